"""Whole pictures: one or two figures in a scene, in a style."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from demo import world
from demo.world import Figure, Look

from .canvas import INKS, NEXT_FIGURE, OVER, PARTS, SIZE, Canvas
from .figure import draw_figure
from .scene import draw_scene
from .style import finish

VERSION = 4
"""Of the drawing: another one makes other pictures."""
#: The part of the region map in which an attribute or an axis of a look is seen.
PART_OF = {
    "body": "body", "belly": "belly", "hat": "hat", "hat_colour": "hat", "eyes": "eyes", "legs": "legs",
    "expression": "mouth", "material": "body", "held": "held",
}  # fmt: skip

__all__ = ["NEXT_FIGURE", "PARTS", "PART_OF", "SIZE", "VERSION", "Picture", "render", "sheet"]


class Picture(NamedTuple):
    """A rendered picture: RGB, and the part of the figures that each pixel shows (uint8, height x width)."""

    image: Image.Image
    regions: np.ndarray


def render(figures: Sequence[Figure], looks: Sequence[Look], scene: str, style: str, rng: random.Random,
           size: int = SIZE, touching: bool = False) -> Picture:  # fmt: skip
    """A picture of one or two figures, left to right. `touching`: two stand so near that they overlap."""
    canvas = Canvas(size, INKS[style])
    draw_scene(canvas, scene, rng, rng.uniform(80, 86))
    for index, (figure, look) in enumerate(zip(figures, looks, strict=True)):
        if len(figures) > 1:
            height, x = rng.uniform(69, 72), (44, 84)[index] if touching else (31, 90)[index] + rng.uniform(-1.5, 1.5)
        else:
            height, x = rng.uniform(81, 85), SIZE / 2 - 2 + rng.uniform(-2, 2)
        foot = rng.uniform(118, 120)
        draw_figure(canvas, figure, look, rng, x, foot, height, index * NEXT_FIGURE)
    # A pixel's middle: what of a part is wider than a pixel is never missed.
    regions = np.asarray(canvas.regions)[OVER // 2 :: OVER, OVER // 2 :: OVER]
    return Picture(finish(canvas, style, rng, size), np.ascontiguousarray(regions[:size, :size]))


def sheet(columns: int = 8, rows: int = 6, seed: int = 0) -> Image.Image:
    """Pictures of this world side by side."""
    rng = random.Random(seed)
    page = Image.new("RGB", (columns * SIZE, rows * SIZE))
    for i in range(columns * rows):
        kinds = rng.sample(world.KINDS, 2 if i % 4 == 3 else 1)
        scene, style = world.SCENES[i % len(world.SCENES)], world.STYLES[i // columns % len(world.STYLES)]
        figures = [world.random_figure(rng, kind) for kind in kinds]
        looks = [world.random_look(rng, style) for _ in kinds]
        picture = render(figures, looks, scene, style, rng)
        page.paste(picture.image, (i % columns * SIZE, i // columns * SIZE))
    return page


def square_around(regions: np.ndarray, index: int, margin: float) -> tuple[int, int, int]:
    """(top, left, side) of a square around a figure. margin: share of its side.

    A square that leaves the picture is moved back into it, and is no larger than the picture.
    """
    rows, columns = _extent(regions, index)
    side = min(round((1 + 2 * margin) * (max(rows[1] - rows[0], columns[1] - columns[0]) + 1)), *regions.shape)
    top, left = (
        min(max(round((low + high + 1 - side) / 2), 0), size - side)
        for (low, high), size in zip((rows, columns), regions.shape, strict=True)
    )
    return top, left, side


def _extent(regions: np.ndarray, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last row, first and last column of a figure."""
    shown = (regions > 0) & (regions // NEXT_FIGURE == index)
    rows, columns = np.nonzero(shown.any(1))[0], np.nonzero(shown.any(0))[0]
    return (int(rows[0]), int(rows[-1])), (int(columns[0]), int(columns[-1]))
