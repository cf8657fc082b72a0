"""Check Encoder in ComfyUI, with the small world's shipped models."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch

from demo import checking, export, models
from demo.shipped import CHECKPOINT, ENCODER, VISION, WEIGHTS
from kit import random_models
from kit.small_world import provide_models
from kit.studio import host_nodes
from nested_core.check.diffusers import DiffusersBench
from nested_core.check.search import passes_of
from nested_core.check.settings import Settings
from nested_core.checkpoint import load_encoder
from nested_core.encoder import NestedEncoder
from nested_core.remembered import path_beside, remember

DEMO = Path(models.__file__).parent


@pytest.fixture(scope="module")
def small(pack: Any) -> Iterator[SimpleNamespace]:
    """The shipped models as the host's loaders and ours give them, and eight photos."""
    assert asyncio.run(host_nodes.load_custom_node(str(DEMO / "comfyui")))
    provide_models(Path(folder_paths.models_dir))
    photos = checking.portraits(16)
    with pytest.MonkeyPatch.context() as patch:
        for option in ("fp32_unet", "fp32_vae", "fp32_text_enc"):
            patch.setattr(comfy.cli_args.args, option, True)
        patch.setattr(comfy.model_management, "FORCE_FP32", True)
        model, clip, vae = pack.host_nodes["CheckpointLoaderSimple"]().load_checkpoint(CHECKPOINT)
        (clip_vision,) = pack.host_nodes["CLIPVisionLoader"]().load_clip(VISION)
        encoder = pack.nodes["NestedEncoderLoader"].execute(ENCODER)[0]
        yield SimpleNamespace(
            model=model, clip=clip, vae=vae, encoder=encoder, clip_vision=clip_vision, photos=photos
        )  # fmt: skip


def inputs(small: SimpleNamespace, **changes: Any) -> dict[str, Any]:
    return {**vars(small), "class_word": "robot", "caption": "a <subject>", "size": 128, **changes}


def test_losses_are_those_of_diffusers(pack: Any, small: SimpleNamespace) -> None:
    unet, text, codec = export.load_checkpoint(WEIGHTS / CHECKPOINT)
    base = models.base_model(unet, text, codec, export.load_vision(WEIGHTS / VISION))
    encoder = load_encoder(WEIGHTS / ENCODER, dtype=torch.float32)
    theirs = DiffusersBench(base, encoder, small.photos, "a <subject>", "robot", 128)
    with torch.inference_mode():
        ours = pack.check.HostBench(**inputs(small))
        for settings in (
            None,
            Settings("penultimate", "match", 16.0, "eos"),
            Settings("last", "none", None, "eos"),
            Settings("last", "unit", 8.0, "eos"),
            Settings("penultimate", "match_per_head", 4.0, "eos"),
        ):
            for level, shown in ((0.25, range(16)), (0.6, [*range(1, 16), 0])):
                got, expected = (list(bench.losses(settings, shown, level)) for bench in (ours, theirs))
                assert got == pytest.approx(expected, rel=0.01), (settings, level)
        kin = ours.kinship()
    assert kin.likeness == pytest.approx(theirs.kinship().likeness, abs=1e-3)


def test_the_node_names_the_settings_and_leaves_nothing_behind(pack: Any, small: SimpleNamespace) -> None:
    before = (dict(small.model.attachments), dict(small.model.model_options["transformer_options"]))
    node = pack.nodes["NestedCheckEncoder"]
    encoder, report, chart = node.execute(**inputs(small)).result
    assert encoder.config.value_norm == "match" and 4 <= encoder.config.alpha <= 8
    assert encoder.patcher is small.encoder.patcher and small.encoder.config.alpha == pytest.approx(5.69, abs=0.01)
    passes = passes_of(small.encoder.config, 16)
    assert report.startswith(f"Check Encoder: {ENCODER}, 16 photos, {passes} forward passes")
    assert "Most likely trained with: penultimate features, norm match" in report
    assert "Nothing was remembered: the file says its settings itself." in report
    assert chart.shape[0] == 1 and chart.shape[2:] == (1200, 3)
    assert before == (dict(small.model.attachments), dict(small.model.model_options["transformer_options"]))


def test_an_interrupted_check_ends_at_once(pack: Any, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def update(self: Any, by: int) -> None:
        asked.append(by)
        if len(asked) == 5:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr("comfy.utils.ProgressBar.update", update)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        pack.nodes["NestedCheckEncoder"].execute(**inputs(small))
    assert len(asked) == 5


def test_sdxls_pooled_vector_is_tried_at_both_places(pack: Any, sdxl: Any) -> None:
    """With random weights and ComfyUI's own VAE class: what is measured are different things, each the same twice."""
    state = {k: v for k, v in random_models.checkpoint_state_dict().items() if k.startswith("first_stage_model.")}
    vae = comfy.sd.VAE(sd=comfy.utils.state_dict_prefix_replace(state, {"first_stage_model.": ""}))
    encoder = sdxl.encoder
    photos = sdxl.photo.repeat(3, 1, 1, 1) * torch.tensor([1.0, 0.7, 0.4])[:, None, None, None]
    with torch.inference_mode():
        bench = pack.check.HostBench(
            sdxl.model, sdxl.clip, vae, encoder, sdxl.clip_vision, photos, "a photo of <subject>", "woman", 128
        )
        losses = {
            (pooled, shown): list(bench.losses(Settings("last", "unit", 2.0, pooled), shown, 0.4))
            for pooled in ("eos", "placeholder")
            for shown in ((0, 1, 2), (1, 2, 0), (0, 1, 2))
        }
        plain = list(bench.losses(None, (0, 1, 2), 0.4))
        assert losses["eos", (0, 1, 2)] == list(bench.losses(Settings("last", "unit", 2.0, "eos"), (0, 1, 2), 0.4))
        assert len({tuple(row) for row in (*losses.values(), plain)}) == 5
        kin = bench.kinship()
    assert abs(kin.likeness) < 0.05 and kin.shaped == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": "a robot"}, 'must have <subject> where the subject stands, as in "a photo of <subject>"'),
        ({"clip": None}, "needs the text encoder and the VAE"),
    ],
)
def test_refusals(pack: Any, small: SimpleNamespace, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(pack.errors.NestedAttentionError, match=message):
        pack.nodes["NestedCheckEncoder"].execute(**inputs(small, **changes))


def test_a_model_with_a_subject_is_refused(pack: Any, small: SimpleNamespace) -> None:
    encode, apply = (pack.nodes[f"Nested{name}Subject"] for name in ("Encode", "Apply"))
    subject = encode.execute(small.encoder, small.clip_vision, small.photos[:1], "<robot>", "robot", "crop")[0]
    model = apply.execute(small.model, small.clip, subject, 1.0, 0.0, 1.0)[0]
    with pytest.raises(pack.errors.NestedAttentionError, match="A subject is applied to this model already"):
        pack.nodes["NestedCheckEncoder"].execute(**inputs(small, model=model))


def test_the_loader_uses_what_was_found_and_is_run_again_for_it(pack: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = pack.encoder.EncoderConfig(family="sd15", tokens=4, token_dim=768, feature_dim=16,
                                        resampler=pack.encoder.ResamplerShape(dim=16, depth=1, heads=1))  # fmt: skip
    folder = Path(folder_paths.get_folder_paths("nested_attention")[0])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "theirs.pt"
    state = NestedEncoder(config).state_dict()
    torch.save({name.replace("resampler.", "image_proj."): tensor for name, tensor in state.items()}, path)
    loader = pack.nodes["NestedEncoderLoader"]
    first = loader.execute(path.name)[0]
    marker = loader.fingerprint_inputs(path.name)
    remember(path, first.config.fingerprint, {"value_norm": "unit", "alpha": 8.0}, "a test")
    assert loader.fingerprint_inputs(path.name) != marker
    caplog.set_level("INFO")
    found = loader.execute(path.name)[0]
    assert (found.config.value_norm, found.config.alpha) == ("unit", 8.0)
    assert f"as Check Encoder found ({path_beside(path).name})" in caplog.text
    assert loader.execute(path.name, value_norm="none", alpha=0.0)[0].config.value_norm == "none"
    assert path.name in folder_paths.get_filename_list("nested_attention")
    assert path_beside(path).name not in folder_paths.get_filename_list("nested_attention")
