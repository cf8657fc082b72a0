"""What the small world's models are shown while they learn, and how much of it counts."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import canny
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nested_core.files import whole
from nested_core.training import Example, ExampleSubject

from . import data, drawing, models, world

FIGURE_WEIGHT, PART_WEIGHT = 3.0, 9.0  # in a loss; the background weighs 1


class Examples:
    """Training examples of `nested_core.training`: a drawn picture, and for each figure a reference.

    references: uint8 (pictures, 2, S, S, 3). Crops of the pictures themselves, as in the paper, or other pictures.
    """

    def __init__(self, shown: data.Pictures, latents: np.ndarray, references: np.ndarray) -> None:
        self.shown, self.latents, self.references = shown, latents, references

    def __len__(self) -> int:
        return len(self.shown)

    def draw(self, index: int, rng: random.Random) -> Example:
        entry = self.shown.entries[index]
        pixels, regions = np.array(self.shown.pixels[index]), np.array(self.shown.regions[index])
        subjects, words = [], []
        for i, figure in enumerate(entry.figures):
            reference = np.array(self.references[index, i])
            word = f"<subject{i + 1}>"
            subjects.append(ExampleSubject(word, figure.kind, [unit(reference)]))
            words.append(word)
        return Example(
            target=unit(pixels),
            prompt=described(entry, words, rng),
            subjects=subjects,
            mask=(weights(torch.from_numpy(regions)) - 1) / (PART_WEIGHT - 1),
            latents=torch.from_numpy(self.latents[index].astype(np.float32)),
            name=f"picture {index}",
        )


def other_entry(entry: data.Entry, index: int, rng: random.Random) -> data.Entry:
    """One figure of a picture alone, where everything that belongs to the picture is another."""
    scene = rng.choice([scene for scene in world.SCENES if scene != entry.scene])
    style = rng.choice([style for style in world.STYLES if style != entry.style])
    return data.Entry([entry.figures[index]], [world.other_look(rng, entry.looks[index], style)], scene, style)


def portrait(entry: data.Entry, rng: random.Random) -> np.ndarray:
    """The first figure of an entry, drawn and cropped: a reference, as `cropped` has it."""
    picture = data.draw(entry, rng)
    return cropped(np.asarray(picture.image), picture.regions, 0, rng.uniform(0.02, 0.14))


def _portraits(arguments: tuple[int, int, list[data.Entry]]) -> np.ndarray:
    seed, start, entries = arguments
    drawn = np.zeros((len(entries), 2, models.VISION_SIZE, models.VISION_SIZE, 3), np.uint8)
    for row, entry in enumerate(entries):
        for i in range(len(entry.figures)):
            rng = random.Random(f"reference {seed} {start + row} {i}")
            drawn[row, i] = portrait(other_entry(entry, i, rng), rng)
    return drawn


def references(path: Path, shown: data.Pictures, seed: int) -> np.ndarray:
    """Another picture of each figure, uint8 (pictures, 2, 96, 96, 3), drawn unless the file is there."""
    shape = (len(shown), 2, models.VISION_SIZE, models.VISION_SIZE, 3)
    if not path.is_file():
        jobs = [(seed, i, shown.entries[i : i + 250]) for i in range(0, len(shown), 250)]
        with (
            whole(path) as part,
            ProcessPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=len(shown), desc="drawing references") as bar,
        ):
            made = np.memmap(part, np.uint8, "w+", shape=shape)
            for (_, start, entries), drawn in zip(jobs, pool.map(_portraits, jobs), strict=True):
                made[start : start + len(entries)] = drawn
                bar.update(len(entries))
            del made  # flushes; an open map can't be renamed on Windows
    return np.memmap(path, np.uint8, "c", shape=shape)


def cropped(pixels: np.ndarray, regions: np.ndarray, index: int, margin: float) -> np.ndarray:
    """A square around the figure of that index, uint8 (VISION_SIZE, VISION_SIZE, 3). margin: share of its side."""
    top, left, side = drawing.square_around(regions, index, margin)
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(square.resize((models.VISION_SIZE, models.VISION_SIZE), Image.Resampling.LANCZOS))


def weights(regions: Tensor) -> Tensor:
    """What pixels weigh in a loss, by region map: figures are a third of a picture, what sets them apart a tenth."""
    part = regions % drawing.NEXT_FIGURE > drawing.PARTS["body"]
    return 1.0 + (FIGURE_WEIGHT - 1) * (regions > 0) + (PART_WEIGHT - FIGURE_WEIGHT) * part


def coarseness(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (192,) and the first 32 principal components (32, 192) of the 8 x 8 patches of pictures (B, 3, H, W)."""
    patches = F.pixel_unshuffle(pixels, 8).permute(0, 2, 3, 1).flatten(0, 2)
    patches = patches[torch.linspace(0, len(patches) - 1, min(len(patches), 20_000)).long()]
    mean = patches.mean(0)
    return mean, torch.linalg.svd(patches - mean, full_matrices=False)[2][:32]


def coarse(pixels: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) with no more detail than the best linear codec of 32 numbers a patch leaves them."""
    patches = F.pixel_unshuffle(pixels, 8).permute(0, 2, 3, 1) - mean
    return F.pixel_shuffle(((patches @ basis.T) @ basis + mean).permute(0, 3, 1, 2), 8)


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


def described(entry: data.Entry, words: Sequence[str], rng: random.Random) -> str:
    """A prompt for a picture that leaves out some of what could be said, as captions do; never a word of identity.

    words: the figures', from left to right. What a caption does not say can only be learned from the picture.
    """
    chance = rng.choice((0.5, 0.9, 1.0))

    def said(options: Iterable[str]) -> list[str]:
        return [option for option in options if rng.random() < chance]

    phrases = [world.phrase(word, look, said(world.LOOKS)) for word, look in zip(words, entry.looks, strict=True)]
    scene, style = rng.random() < chance, rng.random() < chance
    return world.prompt(phrases, entry.scene if scene else None, entry.style if style else None)


def caption(entry: data.Entry, rng: random.Random) -> str:
    """A prompt for a picture with its figures' class words; now and then it is empty."""
    return "" if rng.random() < 0.1 else described(entry, [figure.kind for figure in entry.figures], rng)


def roughen(pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) as a mediocre generator might make them: shifted, blurred, noisy, of other contrast."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(pixels), *shape, device=pixels.device)

    size = pixels.shape[-1]
    far = size // 24
    grid = F.affine_grid(torch.eye(2, 3, device=pixels.device).expand(len(pixels), -1, -1), list(pixels.shape), False)
    shift = uniform(-far - 0.5, far + 0.5, 2).round() * (2 / size)  # by whole pixels: nothing is blurred
    pixels = F.grid_sample(pixels, grid + shift[:, None, None], padding_mode="reflection", align_corners=False)
    blurred = F.interpolate(F.avg_pool2d(pixels, 2), size=(size, size), mode="bilinear")
    pixels = torch.lerp(pixels, blurred, uniform(-1, 1, 1, 1, 1).clamp(min=0))  # half of them not at all
    pixels = pixels * uniform(0.85, 1.1, 1, 1, 1) + uniform(-0.08, 0.08, 1, 1, 1)
    return pixels + uniform(0, 0.12, 1, 1, 1) * torch.randn_like(pixels)
