"""The first page of docs/training.md, as real processes: from a folder of photographs to an encoder in the nodes."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import comfy.cli_args
import folder_paths
import guide
import pytest
import torch
from PIL import Image

from demo.models import LATENT_CHANNELS
from kit import small_world
from kit.studio import host_nodes

COMMANDS = [command for command, heading in guide.commands().items() if heading == guide.FIRST_PAGE]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone in which every command of the page was run, in its order."""
    folder = guide.clone(tmp_path_factory.mktemp("clone"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr[-3000:]}"
    return folder


def test_the_page_leaves_what_it_says(clone):
    assert len(list((clone / "photos").iterdir())) == 30
    for name in ("look.png", "first_batch.png", "samples/step-00000010.png"):
        assert Image.open(clone / "runs" / "photos" / name).size > (100, 100)
    assert "30 pictures of 30 subjects" in (clone / "runs" / "photos" / "encoder.md").read_text("utf-8")


def test_its_encoder_opens_in_the_nodes_and_changes_a_picture(pack, clone, caplog):
    models = Path(folder_paths.models_dir)
    names = small_world.provide_models(models)
    target = Path(folder_paths.get_folder_paths("nested_attention")[0]) / "photos.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(clone / "runs" / "photos" / "encoder.safetensors", target)
    assert asyncio.run(host_nodes.load_custom_node(str(guide.REPO / "demo" / "comfyui")))
    loader = pack.nodes["NestedEncoderLoader"]
    assert loader.validate_inputs(encoder_name=target.name) is True
    with caplog.at_level(logging.INFO):
        encoder = loader.execute(target.name)[0]
    said = "photos.safetensors: trained on Small World at 128 pixels: 30 pictures of 30 subjects (creature), 10 steps"
    assert said in caplog.text
    assert said.partition(": ")[2] in guide.GUIDE.read_text("utf-8")

    with pytest.MonkeyPatch.context() as patch:
        for option in ("fp32_unet", "fp32_vae", "fp32_text_enc"):
            patch.setattr(comfy.cli_args.args, option, True)
        model, clip, _ = pack.host_nodes["CheckpointLoaderSimple"]().load_checkpoint(names["ckpt_name"])
        (vision,) = pack.host_nodes["CLIPVisionLoader"]().load_clip(names["clip_name"])
    photo = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    subject = pack.nodes["NestedEncodeSubject"].execute(encoder, vision, photo, "<it>", "creature", "crop")[0]
    bound, bound_clip = pack.nodes["NestedApplySubject"].execute(model, clip, subject, 1.0, 0.0, 1.0).result

    def picture(model, clip):
        encode = pack.host_nodes["CLIPTextEncode"]().encode
        text, negative = encode(clip, "a <it> in the forest")[0], encode(clip, "")[0]
        latent = {"samples": torch.zeros(1, LATENT_CHANNELS, 16, 16)}
        sample = pack.host_nodes["KSampler"]().sample
        return sample(model, 0, 2, 1.0, "euler", "normal", text, negative, latent, 1.0)[0]["samples"]

    made, plain = picture(bound, bound_clip), picture(model, clip)
    assert made.isfinite().all() and (made - plain).norm() / plain.norm() > 1e-3
