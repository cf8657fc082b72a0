"""What the small world's models are shown while they learn, and how much of it counts."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import canny
from torch import Tensor

from nested_core.training import Example, ExampleSubject

from . import data, world

FIGURE_WEIGHT, PART_WEIGHT = 3.0, 9.0  # in a loss; the background weighs 1


class Examples:
    """Training examples of `nested_core.training`: a drawn picture, and for each figure a fresh portrait of it."""

    def __init__(self, shown: data.Pictures, latents: np.ndarray) -> None:
        self.shown, self.latents = shown, latents

    def __len__(self) -> int:
        return len(self.shown)

    def draw(self, index: int, rng: random.Random) -> Example:
        entry = self.shown.entries[index]
        subjects, words = [], []
        for i, figure in enumerate(entry.figures):
            portrait = world.render([figure], rng.choice(world.SCENES), rng.choice(world.STYLES), rng, close=True)
            word = f"<subject{i + 1}>"
            subjects.append(ExampleSubject(word, figure.kind, [unit(np.asarray(portrait.image))]))
            words.append(word)
        return Example(
            target=unit(self.shown.pixels[index]),
            prompt=world.prompt(words, entry.scene, entry.style),
            subjects=subjects,
            mask=(weights(torch.from_numpy(np.array(self.shown.regions[index]))) - 1) / (PART_WEIGHT - 1),
            latents=torch.from_numpy(self.latents[index].astype(np.float32)),
            name=f"picture {index}",
        )


def weights(regions: Tensor) -> Tensor:
    """What pixels weigh in a loss, by region map: figures are a third of a picture, what sets them apart a tenth."""
    part = regions % world.NEXT_FIGURE > world.PARTS["body"]
    return 1.0 + (FIGURE_WEIGHT - 1) * (regions > 0) + (PART_WEIGHT - FIGURE_WEIGHT) * part


def unit(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> float in 0..1."""
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def edges(pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] -> 1 where the host's Canny node at its defaults has an edge, (B, H, W)."""
    with torch.autocast(pixels.device.type, enabled=False):
        return canny(pixels, 0.4, 0.8)[1][:, 0]


def at_night(pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], dark and blue, with a light on the middle."""
    y, x = (torch.linspace(-1, 1, n, device=pixels.device) for n in pixels.shape[-2:])
    light = (-1.6 * (x[None] ** 2 + (y[:, None] - 0.1) ** 2)).exp()
    night = pixels.new_tensor([0.22, 0.28, 0.62])[:, None, None]
    lamp = pixels.new_tensor([1.0, 0.92, 0.72])[:, None, None]
    return (pixels / 2 + 0.5) * (night + (lamp - night) * light) * 2 - 1


def caption(entry: data.Entry, rng: random.Random, all_named: bool = False) -> str:
    """A prompt for a picture that names some, all or none of each figure's attributes; now and then it is empty."""
    if not all_named and rng.random() < 0.1:
        return ""
    figures = []
    for figure in entry.figures:
        chance = 1.0 if all_named else rng.choice((0.0, 0.5, 1.0, 1.0))
        figures.append(figure.words([name for name in world.ATTRIBUTES if rng.random() < chance]))
    return world.prompt(figures, entry.scene, entry.style)


def roughen(pixels: Tensor, rng: random.Random) -> Tensor:
    """Pictures (B, 3, H, W) as a mediocre generator might make them: shifted, blurred, noisy, of other contrast."""
    size, far = pixels.shape[-1], pixels.shape[-1] // 24
    pixels = torch.roll(pixels, (rng.randint(-far, far), rng.randint(-far, far)), dims=(2, 3))
    if rng.random() < 0.5:
        pixels = F.interpolate(pixels, scale_factor=rng.uniform(0.5, 1.0), mode="bilinear", antialias=True)
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear")
    pixels = pixels * rng.uniform(0.85, 1.1) + rng.uniform(-0.08, 0.08)
    return pixels + rng.uniform(0, 0.12) * torch.randn_like(pixels)
