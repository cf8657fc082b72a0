"""The eight scenes behind the figures."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np

from .canvas import SIZE, Canvas, Colour, box, ellipse

_SKY_AND_GROUND: dict[str, tuple[Colour, Colour]] = {
    "forest": ((170, 206, 170), (86, 130, 70)),
    "beach": ((150, 212, 244), (238, 216, 160)),
    "city": ((186, 190, 206), (112, 112, 120)),
    "snow": ((206, 222, 240), (246, 249, 253)),
    "desert": ((250, 214, 160), (222, 166, 96)),
    "space": ((24, 20, 52), (130, 126, 146)),
    "sea": ((40, 120, 160), (196, 184, 140)),
    "room": ((226, 196, 180), (150, 104, 72)),
}


def draw_scene(canvas: Canvas, scene: str, rng: random.Random, horizon: float) -> None:
    sky, ground = _SKY_AND_GROUND[scene]
    canvas.polygon(box(0, 0, SIZE, SIZE), sky)
    canvas.polygon(box(0, horizon, SIZE, SIZE), ground)
    _DRAWN[scene](canvas, rng, horizon)


def _forest(canvas: Canvas, rng: random.Random, horizon: float) -> None:
    for i in range(5):
        x, top = i * 30 + rng.uniform(-3, 3), (12, 26)[i % 2] + rng.uniform(-3, 3)
        canvas.polygon(box(x - 3, horizon - 26, x + 3, horizon + 4), (96, 66, 44))
        for step in range(3):
            y = top + step * (horizon - top - 14) / 3
            half = 9 + 4 * step
            canvas.polygon([(x, y), (x - half, y + 26), (x + half, y + 26)], (40, 104 + 8 * step, 62))


def _beach(canvas: Canvas, rng: random.Random, horizon: float) -> None:
    canvas.polygon(box(0, horizon - 20, SIZE, horizon + 2), (44, 134, 196))
    x = rng.choice((16, 112)) + rng.uniform(-3, 3)
    canvas.polygon(ellipse(x, 18, 11, 11), (255, 226, 110))
    for i in range(4):
        wave, y = 4 + 34 * i + rng.uniform(-4, 4), horizon - (5, 14)[i % 2] + rng.uniform(-2, 2)
        canvas.line([(wave, y), (wave + 12, y)], 1.5, (220, 240, 250))


def _city(canvas: Canvas, rng: random.Random, horizon: float) -> None:
    x = -4.0
    for house in range(6):
        width, top = 23 + rng.uniform(-1.5, 1.5), (18, 44, 26)[house % 3] + rng.uniform(-4, 4)
        shade = (84, 116)[house % 2]
        canvas.polygon(box(x, top, x + width - 2, horizon + 2), (shade, shade, shade + 16))
        for row, wy in enumerate(np.arange(top + 5, horizon - 6, 10)):
            for column, wx in enumerate(np.arange(x + 4, x + width - 7, 8)):
                lit = (250, 232, 150) if (house + row + column) % 3 else (60, 64, 84)
                canvas.polygon(box(wx, wy, wx + 4, wy + 5), lit)
        x += width
    canvas.line([(0, horizon + 14), (SIZE, horizon + 14)], 1.5, (230, 230, 200))


def _snow(canvas: Canvas, rng: random.Random, horizon: float) -> None:
    for x, top in ((rng.uniform(16, 24), rng.uniform(28, 34)), (rng.uniform(100, 108), rng.uniform(20, 26))):
        canvas.polygon([(x - 42, horizon + 2), (x, top), (x + 42, horizon + 2)], (164, 184, 212))
        canvas.polygon([(x - 11, top + 14), (x, top), (x + 11, top + 14)], (250, 252, 255))
    for _ in range(22):
        x, y = rng.uniform(0, SIZE), rng.uniform(0, SIZE)
        canvas.polygon(ellipse(x, y, 1.6, 1.6), (255, 255, 255))


def _desert(canvas: Canvas, rng: random.Random, horizon: float) -> None:
    canvas.polygon(ellipse(rng.uniform(54, 74), horizon + 2, 46, 18, 180, 360), (208, 148, 80))
    for x in (rng.uniform(14, 20), rng.uniform(108, 114)):
        top = horizon - rng.uniform(32, 38)
        for part in (box(x - 4, top, x + 4, horizon + 10, 3), box(x - 12, top + 10, x - 7, top + 24, 2),
                     box(x - 12, top + 19, x, top + 24), box(x + 7, top + 6, x + 12, top + 18, 2),
                     box(x, top + 13, x + 12, top + 18)):  # fmt: skip
            canvas.polygon(part, (70, 132, 76))


def _space(canvas: Canvas, rng: random.Random, horizon: float) -> None:
    for _ in range(34):
        x, y, r = rng.uniform(0, SIZE), rng.uniform(0, horizon), rng.uniform(0.5, 1.3)
        canvas.polygon(ellipse(x, y, r, r), (250, 246, 220))
    x, y = rng.choice((20, 108)) + rng.uniform(-3, 3), rng.uniform(22, 27)
    canvas.polygon(ellipse(x, y, 13, 13), (216, 130, 96))
    canvas.line(ellipse(x, y, 20, 5, -30, 330), 2, (240, 214, 170))
    for i in range(4):
        x = 16 + 32 * i + rng.uniform(-4, 4)
        canvas.polygon(ellipse(x, horizon + (8, 18)[i % 2] + rng.uniform(-2, 2), 8, 3), (100, 96, 116))


def _sea(canvas: Canvas, rng: random.Random, horizon: float) -> None:
    for middle in (8, 30, 98, 120):
        x, top = middle + rng.uniform(-3, 3), rng.uniform(42, 50)
        ys = np.linspace(horizon + 8, top, 9)
        canvas.line([(x + 4 * math.sin(i * 1.6), float(y)) for i, y in enumerate(ys)], 5, (36, 150, 96))
    for _ in range(11):
        x, y, r = rng.uniform(0, SIZE), rng.uniform(0, horizon), rng.uniform(1.5, 4)
        canvas.polygon(ellipse(x, y, r, r), (150, 214, 230))
        canvas.polygon(ellipse(x, y, r * 0.6, r * 0.6), (80, 160, 190))


def _room(canvas: Canvas, rng: random.Random, horizon: float) -> None:
    x = rng.choice((8, 88)) + rng.uniform(-2, 2)
    canvas.polygon(box(x - 2, 14, x + 34, 52), (250, 246, 236))
    canvas.polygon(box(x, 16, x + 32, 50), (150, 206, 240))
    canvas.line([(x + 16, 16), (x + 16, 50)], 2, (250, 246, 236))
    canvas.line([(x, 33), (x + 32, 33)], 2, (250, 246, 236))
    for i in range(1, 5):
        y = horizon + i * (SIZE - horizon) / 5
        canvas.line([(0, y), (SIZE, y)], 0.8, (118, 78, 52))
    canvas.polygon(box(0, horizon - 4, SIZE, horizon), (246, 236, 222))


_DRAWN: dict[str, Callable[[Canvas, random.Random, float], None]] = {
    "forest": _forest, "beach": _beach, "city": _city, "snow": _snow, "desert": _desert, "space": _space, "sea": _sea,
    "room": _room,
}  # fmt: skip
