"""The nodes in the real host: what they offer, what they make, and what they say about bad input."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import comfy.model_patcher
import comfy.ops
import folder_paths
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import save_file

from kit import random_models

IDS = {
    "NestedGridValues",
    "NestedPictureGrid",
    "NestedAdjustSubject",
    "NestedCheckEncoder",
    "NestedEncoderLoader",
    "NestedEncodeSubject",
    "NestedApplySubject",
    "NestedApplySubjectAdvanced",
    "NestedMergeSubjects",
    "NestedSaveSubject",
    "NestedLoadSubject",
    "NestedCropSubject",
    "NestedSeparateSubjects",
    "NestedRecordAttention",
    "NestedAttentionMaps",
    "NestedExplain",
    "NestedShowBinding",
}


@pytest.fixture
def refused(pack):
    """refused(match): the block raises NestedAttentionError whose message fits."""
    return lambda match: pytest.raises(pack.errors.NestedAttentionError, match=match)


@pytest.fixture
def models(pack):
    """The folder that Load Nested Encoder lists."""
    return folder_paths.get_folder_paths("nested_attention")[0]


@pytest.fixture
def encoder_file(pack, sdxl, models):
    """A file of the pack's own format, fitting the test model."""
    path = os.path.join(models, "faces", "test.safetensors")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pack.checkpoint.write_encoder(path, sdxl.encoder.module)
    return os.path.join("faces", "test.safetensors")


def load(pack, name, **options):
    return pack.nodes["NestedEncoderLoader"].execute(name, **options)[0]


# -- what is offered ------------------------------------------------------------------------------------------------


def test_the_host_knows_the_nodes_and_each_explains_itself(pack):
    assert set(pack.nodes) == IDS
    for node in pack.nodes.values():
        info = node.GET_NODE_INFO_V1()
        assert info["category"].startswith("Nested Attention")
        assert len(info["description"]) > 40
        schema = node.define_schema()
        for i in schema.inputs:
            assert i.tooltip, f"{info['name']}.{i.id} has no tooltip"


def test_public_names_stay(pack):
    """Shared workflows and API graphs depend on these: change them never, add to them only at the end."""
    names = {
        node_id: ([i.id for i in n.define_schema().inputs], [o.display_name for o in n.define_schema().outputs])
        for node_id, n in pack.nodes.items()
    }
    common = ["model", "clip", "subject", "strength", "start_percent", "end_percent"]
    advanced = ["identity", "focus", "value_norm", "layer_weights", "when_unmentioned"]
    assert names == {
        "NestedEncoderLoader": (["encoder_name", "image_features", "value_norm", "alpha", "pooled"], ["encoder"]),
        "NestedCheckEncoder": (
            ["model", "clip", "vae", "encoder", "clip_vision", "photos", "class_word", "caption", "size", "remember"],
            ["encoder", "report", "chart"],
        ),
        "NestedEncodeSubject": (
            ["encoder", "clip_vision", "image", "mask", "placeholder", "class_word", "fit"],
            ["subject", "seen"],
        ),
        "NestedApplySubject": ([*common, "mask"], ["model", "clip"]),
        "NestedApplySubjectAdvanced": ([*common, *advanced, "mask", "separation", "unconditional"], ["model", "clip"]),
        "NestedAdjustSubject": (
            ["model", "placeholder", "strength", "start_percent", "end_percent", "schedule", "values", "layer_weights"],
            ["model"],
        ),
        "NestedRecordAttention": (["model", "explain_at"], ["model", "recording"]),
        "NestedAttentionMaps": (
            ["recording", "after", "placeholder", "threshold", "start_percent", "end_percent", "layer_weights"],
            ["image", "mask"],
        ),
        "NestedExplain": (["recording", "after", "placeholder", "x", "y", "batch_index"], ["image"]),
        "NestedShowBinding": (["conditioning"], ["conditioning", "text"]),
        "NestedGridValues": (["across", "down", "across_title", "down_title"], ["across", "down", "grid"]),
        "NestedPictureGrid": (["images", "grid", "cell"], ["image"]),
        "NestedSeparateSubjects": (["model", "strength", "start_percent", "end_percent"], ["model"]),
        "NestedMergeSubjects": (["subjects", "weights"], ["subject"]),
        "NestedSaveSubject": (["subject", "filename_prefix"], []),
        "NestedLoadSubject": (["encoder", "subject_name", "placeholder", "class_word"], ["subject"]),
        "NestedCropSubject": (
            ["image", "mask", "face_landmarks", "margin", "face", "face_number"],
            ["image", "mask"],
        ),
    }


# What finds faces, in hosts that are newer than the oldest two; a note in each template says what to do without.
NEWER = {"LoadMediaPipeFaceLandmarker", "MediaPipeFaceLandmarker"}
WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))


def test_a_template_says_what_to_do_where_no_face_can_be_found():
    found = []
    for path in WORKFLOWS:
        nodes = json.loads(path.read_text("utf-8"))["nodes"]
        if NEWER & {node["type"] for node in nodes}:
            found.append(path.stem)
            notes = " ".join(node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
            assert "portrait_by_hand" in notes and "mediapipe_face_fp32.safetensors" in notes
    assert "first_portrait" in found and "portrait_by_hand" not in found and len(found) == len(WORKFLOWS) - 2


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_fit_the_nodes_and_have_a_preview(pack, path):
    """Every node, input and link of a shared workflow is there; widgets have a value each."""
    workflow = json.loads(path.read_text("utf-8"))
    assert path.with_suffix(".jpg").is_file()
    links = {link[0]: link for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node in nodes.values():
        if node["type"] == "MarkdownNote" or node["type"] in NEWER - pack.host_nodes.keys():
            continue
        types = pack.host_nodes[node["type"]].INPUT_TYPES()
        known = {**types.get("required", {}), **types.get("optional", {})}
        for entry in node["inputs"]:
            extra = "widget" in entry and entry["name"] in ("upload", "image_upload")  # the frontend's own
            assert entry["name"].split(".")[0] in known or extra, (node["type"], entry["name"])  # "subjects.subject_1"
            if entry.get("link") is not None:
                _, source, output, target, _, kind = links[entry["link"]]
                assert target == node["id"] and entry["link"] in nodes[source]["outputs"][output]["links"]
        if node["type"].startswith("Nested"):
            sockets = {"NESTED_ENCODER", "NESTED_SUBJECT", "NESTED_RECORDING", "NESTED_GRID", "MODEL", "CLIP", "VAE",
                       "CLIP_VISION", "IMAGE", "MASK", "FACE_LANDMARKS", "CONDITIONING", "IMAGE,LATENT",
                       "COMFY_AUTOGROW_V3"}  # fmt: skip
            widgets = [name for name, (kind, *_) in known.items() if kind not in sockets]
            assert len(node["widgets_values"]) == len(widgets), (node["type"], widgets)


# -- Load Nested Encoder --------------------------------------------------------------------------------------------


def test_loader_lists_subfolders_and_reads_what_the_file_says(pack, sdxl, encoder_file):
    assert encoder_file in folder_paths.get_filename_list("nested_attention")
    loader = pack.nodes["NestedEncoderLoader"]
    assert loader.validate_inputs(encoder_name=encoder_file) is True
    encoder = load(pack, encoder_file)
    assert (encoder.config.alpha, encoder.config.value_norm) == (2.0, "match")
    explicit = load(pack, encoder_file, alpha=1.5, value_norm="none", image_features="last", pooled="placeholder")
    got = (explicit.config.alpha, explicit.config.value_norm, explicit.config.image_features, explicit.config.pooled)
    assert got == (1.5, "none", "last", "placeholder")
    # The picture is that of the encoder it was written from.
    subject = sdxl.subject()
    from_file = sdxl.subject(encoder=encoder)
    torch.testing.assert_close(from_file.subject.tokens, subject.subject.tokens)
    a, clip = sdxl.apply(subject)
    b, _ = sdxl.apply(from_file)
    positive, negative = sdxl.encode(clip, "<person>"), sdxl.encode(clip, "")
    torch.testing.assert_close(sdxl.sample(a, positive, negative), sdxl.sample(b, positive, negative))


def test_foreign_layouts_open_and_make_the_same_picture(pack, sdxl, models):
    """One set of weights under the names of the public release's kind, of IP-Adapter Plus, and flat or nested."""
    own = sdxl.encoder.module.state_dict()
    resampler = {k.removeprefix("resampler."): v for k, v in own.items() if k.startswith("resampler.")}
    layers = {k: v for k, v in own.items() if not k.startswith("resampler.")}

    def renamed(make):
        return {make(*k.split(".")[:2]): v for k, v in layers.items()}

    release = {f"image_proj_model.{k}": v for k, v in resampler.items()}
    release |= renamed(lambda which, i: f"adapter_modules.{i}.{which}_nest.weight")
    plus = {"image_proj": resampler, "ip_adapter": renamed(lambda which, i: f"{2 * int(i) + 1}.{which}_ip.weight")}
    save_file(release, os.path.join(models, "release.safetensors"))
    torch.save(plus, os.path.join(models, "plus.bin"))

    model, clip = sdxl.apply()
    positive, negative = sdxl.encode(clip, "<person>"), sdxl.encode(clip, "")
    expected = sdxl.sample(model, positive, negative)
    for name, kind in (("release.safetensors", "nested"), ("plus.bin", "ip-adapter-plus")):
        encoder = load(pack, name)
        assert encoder.config.kind == kind
        model, _ = sdxl.apply(sdxl.subject(encoder=encoder))
        torch.testing.assert_close(sdxl.sample(model, positive, negative), expected)


def test_sd15_encoders_of_four_pooled_tokens_run(pack, sd15, models):
    """The third-party SD 1.5 kind: `ip_adapter.bin` with to_k_nest and a projection of the pooled embedding."""
    shapes = {
        "image_proj.proj.weight": torch.empty(4 * 768, 1024, device="meta"),
        "image_proj.proj.bias": torch.empty(4 * 768, device="meta"),
        "image_proj.norm.weight": torch.empty(768, device="meta"),
        "image_proj.norm.bias": torch.empty(768, device="meta"),
    }
    for i in range(16):
        for which in ("k", "v"):
            shapes[f"ip_adapter.{2 * i + 1}.to_{which}_nest.weight"] = torch.empty(128, 768, device="meta")
    torch.save(random_models.randomise(shapes, 4), os.path.join(models, "ip_adapter.bin"))
    encoder = load(pack, "ip_adapter.bin")
    subject = sd15.subject(encoder=encoder)
    assert subject.subject.tokens.shape == (1, 4, 768)
    model, clip = sd15.apply(subject)
    positive, negative = sd15.encode(clip, "<person>"), sd15.encode(clip, "")
    picture = sd15.sample(model, positive, negative)
    assert picture.isfinite().all()
    assert not torch.equal(picture, sd15.sample(sd15.model, positive, negative))


def test_loader_names_folders_and_files_when_there_is_no_such_file(pack, encoder_file, models):
    said = pack.nodes["NestedEncoderLoader"].validate_inputs(encoder_name="nope.safetensors")
    assert "No encoder named 'nope.safetensors'" in said
    assert models in said and encoder_file in said and "press R" in said


def test_loader_never_leaves_its_folders(pack, models, tmp_path):
    outside = os.path.join(os.path.dirname(models), "outside.safetensors")
    with open(outside, "wb") as file:
        file.write(b"x")
    said = pack.nodes["NestedEncoderLoader"].validate_inputs(encoder_name="../outside.safetensors")
    assert "No encoder named" in said


def test_a_name_that_comes_over_a_link_is_checked_when_it_is_there(pack, refused):
    assert pack.nodes["NestedEncoderLoader"].validate_inputs(encoder_name=None) is True
    assert pack.nodes["NestedLoadSubject"].validate_inputs(subject_name=None) is True
    with refused("No encoder named 'gone'"):
        load(pack, "gone")


def test_a_replaced_file_is_read_again_and_an_unchanged_one_is_not(pack, encoder_file, models):
    loader = pack.nodes["NestedEncoderLoader"]
    before = loader.fingerprint_inputs(encoder_name=encoder_file)
    assert loader.fingerprint_inputs(encoder_name=encoder_file) == before
    os.utime(os.path.join(models, encoder_file), ns=(1, 1))
    assert loader.fingerprint_inputs(encoder_name=encoder_file) != before
    assert loader.fingerprint_inputs(encoder_name="gone.safetensors") == "missing"
    assert loader.fingerprint_inputs(encoder_name=None) == loader.fingerprint_inputs(encoder_name=None) == "linked"


def test_a_file_that_is_no_encoder_says_so(pack, refused, models):
    with open(os.path.join(models, "page.safetensors"), "w") as file:
        file.write("<!DOCTYPE html><html>Not found</html>")
    with refused("page.safetensors"):
        load(pack, "page.safetensors")


# -- Encode Subject -------------------------------------------------------------------------------------------------


def test_encode_shows_what_was_seen_and_concatenates_views(pack, sdxl):
    node, image = pack.nodes["NestedEncodeSubject"], sdxl.photo[:, :, :300]
    for fit in ("crop", "pad"):
        subject, seen = node.execute(sdxl.encoder, sdxl.clip_vision, image, "<a>", "cat", fit).result
        assert seen.shape == (1, 224, 224, 3)
        assert subject.subject.tokens.shape == (1, 8, 2048)
    views = torch.cat((image, image.flip(2)))
    mask = torch.zeros(2, 512, 300)
    mask[:, 100:200, 100:200] = 1
    subject, seen = node.execute(sdxl.encoder, sdxl.clip_vision, views, "<a>", "cat", "crop", mask).result
    assert (len(seen), subject.subject.views, subject.subject.tokens.shape[1]) == (2, 2, 16)
    one = node.execute(sdxl.encoder, sdxl.clip_vision, views[1:], "<a>", "cat", "crop", mask[1:])[0]
    torch.testing.assert_close(subject.subject.tokens[:, 8:], one.subject.tokens)


def test_a_photo_that_is_no_aligned_crop_is_pointed_out_and_used(pack, sdxl, caplog):
    """To encoders of the public release's sizes alone, once for all views, and what comes out is the same."""
    node = pack.nodes["NestedEncodeSubject"]
    released = replace(sdxl.encoder, config=replace(sdxl.encoder.config, tokens=1024))
    wide = torch.cat((sdxl.photo, sdxl.photo))[:, :300]

    def encode(encoder, image):
        caplog.clear()
        return node.execute(encoder, sdxl.clip_vision, image, "<a>", "person", "crop")

    pointed_out = encode(released, wide)
    assert caplog.text.count("not look like an aligned face (it is 512 x 300, not square)") == 1
    assert "Crop Subject" in str(pointed_out.ui.as_dict())
    other = encode(sdxl.encoder, wide)
    assert not caplog.text and other.ui is None
    assert torch.equal(pointed_out.result[1], other.result[1])
    assert torch.equal(pointed_out.result[0].subject.tokens, other.result[0].subject.tokens)
    aligned = encode(released, sdxl.photo)
    assert not caplog.text and "512 x 512, as aligned crops are" in str(aligned.ui.as_dict()), "an older hint goes away"


def test_encode_refuses_what_it_cannot_use(pack, sdxl, refused):
    node = pack.nodes["NestedEncodeSubject"]

    def encode(placeholder="<a>", class_word="cat", image=sdxl.photo, mask=None, tower=sdxl.clip_vision):
        return node.execute(sdxl.encoder, tower, image, placeholder, class_word, "crop", mask)

    with refused("placeholder"):
        encode(placeholder="(a)")
    with refused("class word"):
        encode(class_word=" ")
    with refused("mask"):
        encode(mask=torch.zeros(1, 512, 512))

    class Narrow:  # a tower of another kind: only its output matters here
        image_size = 224

        @staticmethod
        def encode_image(image, crop):
            return {"penultimate_hidden_states": torch.zeros(1, 257, 1024)}

    with refused("reads vision features of width 1280 .CLIP ViT-H/14., this CLIP vision model gives 1024 .*ViT-L"):
        encode(tower=Narrow())


# -- Merge, Save, Load ----------------------------------------------------------------------------------------------


def test_merged_views_act_as_one_subject(pack, sdxl, refused):
    merge = pack.nodes["NestedMergeSubjects"]
    a, b = sdxl.subject(), sdxl.subject(view=2)
    equal = merge.execute({"subject_1": a, "subject_2": b}, "")[0]
    assert equal.subject.tokens.shape[1] == 16 and equal.subject.views == 2
    only_a = merge.execute({"subject_1": a, "subject_2": b}, "1, 0")[0]
    weighted = merge.execute({"subject_1": a, "subject_2": b}, "3, 1")[0]
    pictures = {}
    for name, subject in {"a": a, "only a": only_a, "equal": equal, "weighted": weighted}.items():
        model, clip = sdxl.apply(subject)
        pictures[name] = sdxl.sample(model, sdxl.encode(clip, "<person>"), sdxl.encode(clip, ""))
        assert pictures[name].isfinite().all()
    torch.testing.assert_close(pictures["only a"], pictures["a"])
    to_a = {name: (picture - pictures["a"]).norm() for name, picture in pictures.items()}
    assert 0 < to_a["weighted"] < to_a["equal"]
    with refused('weights is "1; 2"; expected numbers separated by commas'):
        merge.execute({"subject_1": a, "subject_2": b}, "1; 2")
    with refused("weights"):
        merge.execute({"subject_1": a, "subject_2": b}, "1")
    with refused("encoder"):
        merge.execute({"subject_1": a, "subject_2": sdxl.subject(encoder=sdxl.make_encoder(5))}, "")


def test_a_saved_subject_makes_the_same_picture(pack, sdxl, refused):
    subject = sdxl.subject("<anna>", "woman")
    said = pack.nodes["NestedSaveSubject"].execute(subject, "family/anna").ui.as_dict()["text"][0]
    name = os.path.join("family", "anna_00001_.safetensors")
    assert name in said
    assert os.path.isfile(os.path.join(folder_paths.get_output_directory(), "nested_subjects", name))
    pack.nodes["NestedSaveSubject"].execute(subject, "family/anna")  # never overwrites
    assert os.path.join("family", "anna_00002_.safetensors") in folder_paths.get_filename_list("nested_subjects")

    node = pack.nodes["NestedLoadSubject"]
    assert node.validate_inputs(subject_name=name) is True
    loaded = node.execute(sdxl.encoder, name)[0]
    assert torch.equal(loaded.subject.tokens, subject.subject.tokens)
    a, clip = sdxl.apply(subject)
    b, _ = sdxl.apply(loaded)
    positive, negative = sdxl.encode(clip, "<anna>"), sdxl.encode(clip, "")
    assert torch.equal(sdxl.sample(a, positive, negative), sdxl.sample(b, positive, negative))
    renamed = node.execute(sdxl.encoder, name, "<her>", "girl")[0].subject
    assert (renamed.placeholder, renamed.class_word) == ("<her>", "girl")
    with refused("random encoder sdxl 8 0.*random encoder sdxl 8 6"):
        node.execute(sdxl.make_encoder(6), name)


def test_saving_and_loading_stay_in_their_folders(pack, sdxl, refused):
    for prefix in ("", " ", "./"):
        with refused("filename_prefix is empty"):
            pack.nodes["NestedSaveSubject"].execute(sdxl.subject(), prefix)
    for prefix in ("../x", "/tmp/x", "a/../../x", "..\\x"):
        with refused("must stay below"):
            pack.nodes["NestedSaveSubject"].execute(sdxl.subject(), prefix)
    said = pack.nodes["NestedLoadSubject"].validate_inputs(subject_name="../../input/x.safetensors")
    assert "No saved subject named" in said and "Save one with Save Subject" in said


# -- Crop Subject ---------------------------------------------------------------------------------------------------


def test_crop_gives_squares(pack, sdxl):
    node, image = pack.nodes["NestedCropSubject"], sdxl.photo[:, :, :300]
    mask = torch.zeros(1, 512, 300)
    mask[:, 50:150, 40:100] = 1
    cropped, cut = node.execute(image, 0.0, mask).result
    assert cropped.shape == (1, 100, 100, 3) and cut.shape == (1, 100, 100)
    assert torch.equal(cut[0].sum(0) > 50, (cut[0] > 0.5).any(0))
    whole, _ = node.execute(image, 0.0).result
    assert whole.shape == (1, 300, 300, 3)


def test_crop_turns_a_face_upright(pack, sdxl, refused):
    """Landmarks in the form of the host's MediaPipe node; a face tilted by a quarter comes out as the upright one."""
    node = pack.nodes["NestedCropSubject"]

    def landmarks(turned):
        points = torch.full((478, 2), 120.0)
        eyes_and_mouth = {(33, 133, 160, 158, 153, 144): (205.0, 110.0), (362, 263, 385, 387, 373, 380): (245.0, 110.0)}
        for indexes, point in eyes_and_mouth.items():
            points[list(indexes)] = torch.tensor(point)
        points[61], points[291] = torch.tensor([210.0, 155.0]), torch.tensor([240.0, 155.0])
        if turned:
            points = torch.stack((points[:, 1], 512 - points[:, 0]), 1)
        face = {"landmarks_xy": points.numpy(), "bbox_xyxy": [150, 50, 300, 200], "score": 0.9}
        return {"frames": [[face]], "image_size": (512, 512), "connection_sets": {}}

    upright, _ = node.execute(sdxl.photo, 0.0, None, landmarks(False)).result
    turned, _ = node.execute(sdxl.photo.rot90(1, (1, 2)), 0.0, None, landmarks(True)).result
    assert upright.shape == (1, 512, 512, 3)
    assert (upright - turned).abs().mean() < 0.02
    with refused("Face 2 of image 1 is asked for, and 1 came"):
        node.execute(sdxl.photo, 0.0, None, landmarks(False), "number", 2)


def test_without_a_face_the_photo_goes_on_and_the_node_says_so(pack, sdxl, caplog):
    node, wide = pack.nodes["NestedCropSubject"], sdxl.photo[:, :300]
    told = node.execute(wide, 0.0, None, {"frames": [[]], "image_size": (300, 512)})
    assert torch.equal(told.result[0], wide)
    for said in (caplog.text, str(told.ui.as_dict())):
        assert "No face found: the photo goes on as it is" in said
    assert node.execute(wide, 0.0).ui is None, "nobody asked for a face"


# -- Apply ----------------------------------------------------------------------------------------------------------


def test_apply_refuses_what_it_cannot_use(sdxl, refused):
    with refused("start_percent .0.8. is after end_percent .0.2."):
        sdxl.apply(start_percent=0.8, end_percent=0.2)
    with refused("mask has values that are not numbers"):
        sdxl.apply(mask=torch.full((1, 8, 8), float("nan")))
    with refused(r"mask must be a tensor \(images, height, width\).*got shape \(1, 8, 8, 3\)"):
        sdxl.apply(mask=torch.zeros(1, 8, 8, 3))
    with refused('layer_weights: "output" is not an entry'):
        sdxl.apply_advanced(layer_weights="output")
    with refused(r'"output.7" selects no layer of this model. It has input.4 \(0-1\).*output.5 \(0-1\)'):
        sdxl.apply_advanced(layer_weights="output.7=0")


def test_a_checkpoint_without_text_encoder_is_explained(pack, sdxl, refused):
    with refused("clip input is empty"):
        pack.nodes["NestedApplySubject"].execute(sdxl.model, None, sdxl.subject(), 1.0, 0.0, 1.0)


def test_other_models_are_named(sdxl, refused):
    """A U-Net without SDXL's layers (as the refiner's) and a model without any."""
    config = {**random_models.unet_config("sdxl"), "context_dim": 1280, "adm_in_channels": 2560}
    refiner, dit = torch.nn.Module(), torch.nn.Module()
    refiner.diffusion_model = UNetModel(**config, device="meta", operations=comfy.ops.manual_cast)
    dit.diffusion_model = torch.nn.Linear(1, 1)
    for module, found in ((refiner, "70 cross-attention layers reading text of width 1280"), (dit, "no U-Net")):
        patcher = comfy.model_patcher.ModelPatcher(module, torch.device("cpu"), torch.device("cpu"))
        with refused(f"This model \\(Module\\) has {found}.*SDXL base models"):
            sdxl.apply(model=patcher)
