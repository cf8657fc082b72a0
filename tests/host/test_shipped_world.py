"""The shipped small world in a real server: subjects that no training saw keep their identity, and obey the prompt."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo import export, models, shipped, world
from demo.sampling import sample
from kit import graphs, small_world
from kit.evaluation.cases import Condition
from kit.evaluation.nodes import Nodes
from kit.server import Server
from nested_core.checkpoint import load_encoder
from nested_core.hosts.diffusers import BoundSubject, nested_attention
from nested_core.images import prepare
from nested_core.prompt import Placeholder, PromptReader, locate

HOST = Path(os.environ["COMFYUI_PATH"]).resolve()

A_DOZEN = 12
#: The evaluation finds 0.66 and 0.93 at this strength. Without the node it is 0.19 and 0.97, and neither decoupled
#: attention nor one value per token comes to more than 0.48 of the identity, at any strength.
STRENGTH, IDENTITY, ALIGNMENT = 0.75, 0.55, 0.88


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    return {**small_world.provide_models(models), "models": models}


@pytest.fixture(scope="module")
def server(tmp_path_factory, names):
    work = tmp_path_factory.mktemp("small_world")
    with Server(HOST, work, models=names["models"], only=small_world.link_packs(HOST)) as running:
        yield running


@pytest.fixture(scope="module")
def bench(server, names):
    encoders = {"nested": names["models"] / "nested_attention" / shipped.ENCODER}
    return Nodes(server, names, encoders, A_DOZEN, server.work / "answers")


def mean(scores, name):
    return scores.interval(name)[0]


def test_a_dozen_subjects_keep_their_identity_and_obey_the_prompt(bench):
    without = bench.measure(Condition("none"))
    nested = bench.measure(Condition("nested", "nested", strength=STRENGTH))
    # What the bounds are worth: the same pictures without the node miss the first by far.
    assert mean(without, "identity") < IDENTITY / 2
    assert mean(nested, "identity") > IDENTITY
    assert mean(nested, "alignment") > ALIGNMENT


def test_two_subjects_stay_apart(bench):
    scores = bench.measure(Condition("nested", "nested", pair=True), 0.5)
    # With decoupled attention they are even, 0.25 each; with one value per token 0.38 are their own.
    assert mean(scores, "own") > 0.45
    assert mean(scores, "swapped") < 0.2


def test_diffusers_makes_the_same_picture(server, names):
    """With the same weights, noise and steps; PSNR over 40 dB on the saved picture."""
    (figure,) = small_world.held_out_figures(5, 1, "robot")
    (shown,) = small_world.write_portraits([figure], server.input)
    look = world.Look("smiling", "wooden", "waving", "left", "flag")
    prompt = small_world.prompt([shown], "beach", "comic", [look])
    graph = graphs.subject_graph(names, prompt, [shown], seed=5, steps=20, cfg=4.0)
    (file,) = graphs.saved_pictures(server, asyncio.run(graphs.run_graph(server, graph, quiet=True)))
    saved = picture(file)
    with torch.no_grad():
        made = in_diffusers(picture(server.input / shown.images[0]), shown, prompt, seed=5, steps=20, cfg=4.0)
    assert 10 * torch.log10(1 / (saved - made).square().mean()) > 40
    # And the subject is in both.
    plain = graphs.subject_graph(names, small_world.prompt([shown], "beach", "comic", [look], bound=False), [], seed=5)
    (file,) = graphs.saved_pictures(server, asyncio.run(graphs.run_graph(server, plain, quiet=True)))
    assert 10 * torch.log10(1 / (saved - picture(file)).square().mean()) < 25


def picture(file: Path) -> torch.Tensor:
    """(H, W, 3) in 0..1."""
    return torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).astype(np.float32) / 255)


def in_diffusers(reference, shown, prompt, *, seed, steps, cfg):
    """The same subject, prompt and sampler (Euler on the "normal" schedule) in diffusers: a picture as it is saved."""
    unet, text_encoder, codec = export.load_checkpoint(shipped.WEIGHTS / shipped.CHECKPOINT)
    tower = export.load_vision(shipped.WEIGHTS / shipped.VISION)
    encoder = load_encoder(shipped.WEIGHTS / shipped.ENCODER, dtype=torch.float32)
    seen = prepare(reference[None], size=models.VISION_SIZE).mul(255).round().div(255)
    features = tower(seen.permute(0, 3, 1, 2) * 2 - 1, output_hidden_states=True).hidden_states[-2]
    subject = encoder.encode(features)

    tokenizer = models.tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text).input_ids[1:-1]

    reading = PromptReader([Placeholder(shown.placeholder, shown.class_word)]).read(prompt)
    places = [1 + i for i in locate(reading, ids(reading.text), ids)]
    padded = tokenizer([reading.text, ""], padding="max_length", max_length=models.TEXT_LENGTH, return_tensors="pt")
    text = text_encoder(padded.input_ids).last_hidden_state

    shape = (1, models.LATENT_CHANNELS, models.LATENT_SIZE, models.LATENT_SIZE)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with nested_attention(unet, [BoundSubject(encoder, subject, places, rows=(0, 1))]):
        return sample(unet, codec, text, noise, steps, cfg)[0].permute(1, 2, 0) / 255
