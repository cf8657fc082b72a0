"""The small world's training steps: on a GPU each is recorded as a CUDA graph, which only some losses can be."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from demo import data, drawing, models, training, world
from demo.judging import ASKED, answers_of, kinds_of, parts_of, stray
from demo.lessons import coarse, coarseness, roughen
from demo.telling import Telling

#: What waits for the device, or makes a tensor on the host that would have to be copied to it.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal.default")


class Watched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        plans = {stage: replace(plan, batch=4) for stage, plan in training.PLANS["cpu"].items()}
        patch.setitem(training.PLANS, "cpu", plans)
        patch.setitem(training.PLANS, "cuda", plans)
        yield training.Run(tmp_path_factory.mktemp("run"), 0, 0.001)


@pytest.mark.parametrize("stage", ["codec", "probe", "vision", "half", "base", "qformer", "controlnet", "lora"])
def test_a_step_waits_for_nothing(run, stage, monkeypatch):
    steps = {}

    def one_step(name, folder, module, loss, draw, recipe, **said):
        drawn = draw(random.Random(0))
        module.train()
        loss(*drawn)  # makes what is made once
        with Watched() as watched:
            value, figures = loss(*drawn)
        value.backward()
        assert value.isfinite() and any(p.grad is not None for p in module.parameters())
        assert [part.shape for part in drawn] == [part.shape for part in draw(random.Random(1))]
        assert all(isinstance(figure, torch.Tensor) for figure in figures.values())
        steps[name] = watched.seen
        module.zero_grad()
        return module.eval().requires_grad_(False)

    monkeypatch.setattr(training, "fit", one_step)
    getattr(run, "base" if stage == "half" else stage)()
    seen = steps[stage]
    assert len(seen) > 10 and not [name for name in seen if any(word in name for word in WAITS)]


def test_rough_pictures_differ_from_the_drawn_ones_by_little_and_each_in_its_own_way():
    torch.manual_seed(0)
    picture = torch.zeros(3, 64, 64)
    picture[:, 20:40, 24:44] = 1
    rough = roughen(picture.expand(32, -1, -1, -1).contiguous())
    assert rough.shape == (32, 3, 64, 64)
    assert (rough - picture).abs().mean() < 0.2
    centres = [(p > 0.5).nonzero().float().mean(0) for p in rough[:, 0]]
    assert len({tuple(c.round().tolist()) for c in centres}) > 5, "shifted"
    assert all((c - torch.tensor([29.5, 33.5])).abs().max() < 4 for c in centres)
    edges = rough[:, 0].diff(dim=1).abs().amax((1, 2))
    assert edges.min() < 0.75 * edges.max(), "some blurred"


def test_coarse_pictures_keep_what_32_numbers_a_patch_can_say():
    torch.manual_seed(0)
    pictures = torch.nn.functional.interpolate(torch.randn(20, 3, 16, 16), size=(32, 32), mode="bicubic")
    mean, basis = coarseness(pictures)
    once = coarse(pictures, mean, basis)
    assert 0.001 < (once - pictures).square().mean() / pictures.square().mean() < 0.3
    torch.testing.assert_close(coarse(once, mean, basis), once, atol=1e-4, rtol=1e-4)


def test_the_probe_is_told_to_look_at_what_is_asked_about():
    rng = random.Random(4)
    entry = data.Entry(
        [world.random_figure(rng, "creature"), world.random_figure(rng, "robot")],
        [world.Look("sad", "metal", "standing", "front", held) for held in ("flag", "nothing")],
        "city", "flat",
    )  # fmt: skip
    regions = torch.from_numpy(data.draw(entry, rng).regions)[None]
    parts, kinds = parts_of(regions, 8), kinds_of([entry])
    assert kinds.tolist() == [[1, 0]]
    assert parts.shape == (1, 2, drawing.NEXT_FIGURE, 64) and parts.dtype == torch.uint8
    left, right = parts[0, :, 0].view(2, 8, 8).float().mean(1).argmax(-1).tolist()
    assert left < 4 <= right, "from left to right, as in the entry"
    assert (parts[0, :, 1:] <= parts[0, :, :1]).all() and parts[0, 1, drawing.PARTS["held"]].sum() == 0

    answers = answers_of([entry])
    looks = torch.zeros(1, len(models.SCORED), 64)
    for i, question in enumerate(models.SCORED):
        kind, _, name = question.partition(".")
        figure = {"creature": 0, "robot": 1}.get(kind, 0)
        part = drawing.PARTS.get(drawing.PART_OF.get(name, ""), 0)
        shown = parts[0, figure, part].float()
        looks[0, i] = shown / shown.sum().clamp(min=1)
    assert stray(looks, parts, kinds, answers) < 0.01
    belly = [*models.SCORED].index("robot.belly")
    looks[0, belly] = parts[0, 0, drawing.PARTS["belly"]] / parts[0, 0, drawing.PARTS["belly"]].sum()
    assert stray(looks, parts, kinds, answers) > 0.2, "the other one's"
    alone = parts.clone()
    alone[:, 1] = 0
    only = torch.where(torch.tensor([q.startswith("robot") for q in models.SCORED]), -1, answers)
    assert stray(looks, alone, torch.tensor([[1, 1]]), only) < 0.01, "who is not there can't be looked at"


def test_the_base_is_asked_what_is_where_and_its_pictures_do_not_depend_on_it():
    rng = random.Random(5)
    entries = [data.random_entry(rng, 1 + i % 2) for i in range(4)]
    regions = torch.stack([torch.from_numpy(data.draw(entry, rng).regions) for entry in entries])
    parts, kinds, answers = parts_of(regions, 16), kinds_of(entries), answers_of(entries)
    torch.manual_seed(0)
    unet = models.unet()
    telling = Telling(unet)
    noisy, text = torch.randn(4, models.LATENT_CHANNELS, 16, 16), torch.randn(4, 77, models.CONTEXT_DIM)

    def told() -> float:
        unet(noisy, 500, text)
        return telling(parts, kinds, answers).item()

    unet.train()
    before = told()
    with torch.no_grad():
        for head in telling.heads:
            head[1].weight.zero_()
            head[1].bias.zero_()
    assert (
        before > told() == pytest.approx(np.log(2) + np.mean([np.log(choices) for *_, choices in ASKED]), rel=1e-4)
    ), "who says nothing is wrong by the number of choices"
    learned = torch.optim.AdamW([*unet.parameters(), *telling.parameters()], 3e-3)
    for _ in range(30):
        unet(noisy, 500, text)
        loss = telling(parts, kinds, answers)
        learned.zero_grad()
        loss.backward()
        learned.step()
    assert told() < 0.3 * before

    unet.eval()
    unet(noisy, 500, text)
    assert not telling.grids, "only what is trained is kept"
    unet.train()
    telling.leave()
    unet(noisy, 500, text)
    assert not telling.grids


def test_a_codec_begins_as_the_best_linear_one():
    """Of 8 x 8 patches: what it leaves is what principal components leave."""
    torch.manual_seed(0)
    rng = random.Random(6)
    drawn = [data.draw(data.random_entry(rng), rng).image for _ in range(24)]
    pixels = models.normalise(torch.stack([torch.from_numpy(np.array(image)) for image in drawn]))
    codec = models.codec()
    models.start_codec(codec, pixels)
    with torch.no_grad():
        left = (codec.decode(codec.encode(pixels).latent).sample - pixels).square().mean()
    patches = torch.nn.functional.pixel_unshuffle(pixels, 8).permute(0, 2, 3, 1).reshape(-1, 192)
    least = torch.linalg.svdvals(patches - patches.mean(0))[models.LATENT_CHANNELS :].square().sum() / patches.numel()
    assert least < left < 2 * least
