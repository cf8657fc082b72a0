"""What comes from outside, in the real host: masks out of range, videos for photos, files that change or are bad."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import save_file


@pytest.fixture
def refused(pack):
    """refused(match): the block raises NestedAttentionError whose message fits."""
    return lambda match: pytest.raises(pack.errors.NestedAttentionError, match=match)


@pytest.fixture
def models(pack):
    """A folder that Load Nested Encoder lists, with what other tests left there; emptied of what this one makes."""
    folder = Path(folder_paths.get_folder_paths("nested_attention")[0])
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


@pytest.fixture
def subjects(pack):
    """The folder that Save Subject writes below."""
    return Path(pack.folders.subjects_output())


def load(pack, name):
    return pack.nodes["NestedEncoderLoader"].execute(name)[0]


def picture(studio, encoder):
    model, clip = studio.apply(studio.subject(encoder=encoder))
    return studio.sample(model, studio.encode(clip, "<person>"), studio.encode(clip, ""))


# -- masks and batches ----------------------------------------------------------------------------------------------

MASKS = [
    (torch.ones(1, 64, 64).tril() * 255, r"0 \(black\) to 1 \(white\); this one goes from 0 to 255.*divide it by 255"),
    (torch.ones(1, 64, 64).tril() - 1.5, r"goes from -1.5 to -0.5.*Combine Masks"),
    (torch.ones(1, 64, 64).tril() * 1.2, r"goes from 0 to 1.2.*Combine Masks"),
    (torch.ones(0, 64, 64), r"got shape \(0, 64, 64\), float32. It has no images or no pixels"),
    (torch.ones(1, 0, 64), r"got shape \(1, 0, 64\), float32. It has no images or no pixels"),
]


@pytest.mark.parametrize(("mask", "said"), MASKS)
def test_masks_out_of_range_are_refused_wherever_one_goes_in(pack, sdxl, refused, mask, said):
    encode, crop = pack.nodes["NestedEncodeSubject"].execute, pack.nodes["NestedCropSubject"].execute
    for give in (
        lambda: sdxl.apply(mask=mask),
        lambda: sdxl.apply_advanced(mask=mask),
        lambda: encode(sdxl.encoder, sdxl.clip_vision, sdxl.photo, "<a>", "cat", "crop", mask),
        lambda: crop(sdxl.photo, 0.0, mask),
    ):
        with refused(said):
            give()


def test_a_mask_that_rounding_moved_is_the_mask(sdxl):
    positive = negative = None
    pictures = []
    for mask in (torch.ones(1, 64, 64), torch.full((1, 64, 64), 1.0005)):
        model, clip = sdxl.apply(mask=mask)
        positive, negative = positive or sdxl.encode(clip, "<person>"), negative or sdxl.encode(clip, "")
        pictures.append(sdxl.sample(model, positive, negative))
    assert torch.equal(*pictures)


def test_a_video_for_photos_is_said(pack, sdxl, caplog):
    """As many frames are as many views: that works, and costs."""
    node, frame = pack.nodes["NestedEncodeSubject"], sdxl.photo[:, :64, :64]
    subject = node.execute(sdxl.encoder, sdxl.clip_vision, frame.repeat(12, 1, 1, 1), "<a>", "cat", "crop")[0]
    assert "views" not in caplog.text
    node.execute(sdxl.encoder, sdxl.clip_vision, frame.repeat(17, 1, 1, 1), "<a>", "cat", "crop")
    assert "has 17 views: 136 tokens" in caplog.text and "frames of a video, take a few" in caplog.text
    caplog.clear()
    pack.nodes["NestedMergeSubjects"].execute({"subject_1": subject, "subject_2": subject}, "")
    assert "has 24 views: 192 tokens" in caplog.text


# -- encoder files --------------------------------------------------------------------------------------------------


def as_foreign(state):
    """An encoder's weights under the names of another trainer."""
    names = {}
    for name in state:
        which, rest = name.split(".", 1)
        index = rest.split(".")[0]
        names[name] = f"image_proj.{rest}" if which == "resampler" else f"adapter.{index}.{which}_nest.weight"
    return {names[name]: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["over.safetensors", "over.bin"])
@pytest.mark.parametrize("shorter", [False, True])
def test_a_file_that_is_overwritten_while_loaded_changes_nothing(pack, sdxl, models, name, shorter):
    """By another program, in place: with mapped files the next picture is another, or the host ends."""
    path = models / name
    pack.checkpoint.write_encoder(path, sdxl.encoder.module)
    if name.endswith(".bin"):
        torch.save(as_foreign(sdxl.encoder.module.state_dict()), path)
    encoder = load(pack, name)
    before = picture(sdxl, encoder)
    size = path.stat().st_size
    write = "import sys; f = open(sys.argv[1], 'r+b'); f.write(bytes(int(sys.argv[2]))); f.truncate(int(sys.argv[3]))"
    subprocess.run([sys.executable, "-c", write, path, str(size), str(1000 if shorter else size)], check=True)
    assert torch.equal(picture(sdxl, encoder), before)


def test_scaled_fp8_files_of_the_host_s_kind_are_read_as_the_host_reads_them(pack, sdxl, models):
    """Each matrix as the host's own quantiser makes it, in the names of both generations of its files."""
    plain = as_foreign(sdxl.encoder.module.state_dict())
    kept, files = dict(plain), {"weight_scale": dict(plain), "scale_weight": dict(plain)}
    for name, tensor in plain.items():
        if tensor.ndim == 2:
            made = QuantizedTensor.from_float(tensor * 3, "TensorCoreFP8E4M3Layout", scale="recalculate")
            kept[name] = made.dequantize()
            for scale, file in files.items():
                file[name] = made._qdata
                file[f"{name.removesuffix('weight')}{scale}"] = made.params.scale.clone()
    files["scale_weight"]["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(kept, models / "kept.safetensors")
    wanted = picture(sdxl, load(pack, "kept.safetensors"))
    for scale, file in files.items():
        save_file(file, models / f"{scale}.safetensors")
        assert torch.equal(picture(sdxl, load(pack, f"{scale}.safetensors")), wanted)
    save_file({k: v for k, v in files["weight_scale"].items() if "scale" not in k}, models / "dropped.safetensors")
    assert not torch.equal(picture(sdxl, load(pack, "dropped.safetensors")), wanted)


def test_an_encoder_that_would_make_black_pictures_is_refused(pack, sdxl, refused, models):
    state = as_foreign(sdxl.encoder.module.state_dict())
    state["adapter.3.to_k_nest.weight"] = torch.full_like(state["adapter.3.to_k_nest.weight"], torch.nan)
    save_file(state, models / "nan.safetensors")
    with refused(r"nan.safetensors: The file has weights that are not numbers .* in adapter.3.to_k_nest.weight\."):
        load(pack, "nan.safetensors")


# -- links ----------------------------------------------------------------------------------------------------------


def test_a_dead_link_is_called_one_and_not_offered(pack, refused, models):
    link = models / "gone.safetensors"
    link.symlink_to(models.parent / "disk" / "encoder.safetensors")
    loader = pack.nodes["NestedEncoderLoader"]
    said = loader.validate_inputs(encoder_name=link.name)
    assert f"The encoder 'gone.safetensors' is a link to {models.parent / 'disk' / 'encoder.safetensors'}, and" in said
    with refused("is a link to"):
        load(pack, link.name)
    said = loader.validate_inputs(encoder_name="other.safetensors")
    assert "No encoder named 'other.safetensors'" in said and link.name not in said


def test_saving_below_a_dead_link_says_so(pack, sdxl, refused, subjects):
    save = pack.nodes["NestedSaveSubject"].execute
    subject = sdxl.subject()
    subjects.mkdir(exist_ok=True)
    link = subjects / "linked"
    link.symlink_to(subjects / "moved")
    with refused(f"folder for 'linked/anna' below {subjects} can't be used .*{link}.*If it is a link"):
        save(subject, "linked/anna")
    link.unlink()
    aside = subjects.rename(subjects.with_name("aside"))
    subjects.symlink_to(subjects.with_name("unplugged"))
    with refused(f"folder for 'anna' below {subjects} can't be used .*If it is a link"):
        save(subject, "anna")
    subjects.unlink()
    aside.rename(subjects)
    # A file's own link: the saved subject takes its place.
    (subjects / "eve_00001_.safetensors").symlink_to(subjects / "nowhere")
    save(subject, "eve")
    assert any(pack.subject.load_subject(path).views == 1 for path in subjects.glob("eve*") if path.exists())


def test_a_saved_subject_that_is_overwritten_while_loaded_stays(pack, sdxl, subjects):
    pack.nodes["NestedSaveSubject"].execute(sdxl.subject(), "kept")
    name = sorted(path.name for path in subjects.glob("kept*"))[-1]
    loaded = pack.nodes["NestedLoadSubject"].execute(sdxl.encoder, name)[0].subject
    before = loaded.tokens.clone()
    with open(subjects / name, "r+b") as file:
        file.truncate(100)
        os.fsync(file.fileno())
    assert torch.equal(loaded.tokens, before)
