"""The small world: drawn figures whose identity is known exactly, in scenes and styles that a prompt can name.

A figure is a robot or a creature with six localised attributes: 34,560 combinations for each kind, a tenth of them
held out of every training. Pictures are RGB, 128 x 128 by default; with each comes a map that says for every pixel
which part of which figure it shows, so that a heat map can be checked against the truth.

    python demo/world.py sheet.png      a contact sheet of the world, to look at
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 1  # of the drawing: another one makes other pictures
SIZE = 128
KINDS = ("robot", "creature")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "body": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white"),
    "belly": ("star", "heart", "stripes", "dots", "ring", "cross"),
    "hat": ("crown", "tophat", "cone", "bow", "helmet", "flower"),
    "hat_colour": ("red", "yellow", "green", "blue", "pink", "white"),
    "eyes": ("one", "two", "three", "sleepy", "visor"),
    "legs": ("feet", "wheels", "springs", "stilts"),
}
SCENES = ("forest", "beach", "city", "snow", "desert", "space", "sea", "room")
STYLES = ("flat", "comic", "watercolour", "crayon")

#: What the region map says, for the first figure; 8 more for the second. 0 is the background.
PARTS = {"body": 1, "belly": 2, "hat": 3, "eyes": 4, "legs": 5}
#: The part of the region map in which an attribute is seen.
PART_OF = {"body": "body", "belly": "belly", "hat": "hat", "hat_colour": "hat", "eyes": "eyes", "legs": "legs"}
NEXT_FIGURE = 8

Colour = tuple[int, int, int]
_COLOURS: dict[str, Colour] = {
    "red": (214, 48, 49),
    "orange": (240, 138, 36),
    "yellow": (250, 211, 60),
    "green": (60, 168, 84),
    "cyan": (70, 205, 214),
    "blue": (48, 92, 210),
    "purple": (136, 68, 178),
    "white": (240, 240, 236),
    "pink": (250, 130, 190),
}
_INK: Colour = (34, 32, 44)
_CREAM: Colour = (252, 240, 214)


@dataclass(frozen=True)
class Figure:
    """A subject of the small world: its class word (`kind`) and its identity."""

    kind: str
    body: str
    belly: str
    hat: str
    hat_colour: str
    eyes: str
    legs: str

    @property
    def identity(self) -> tuple[str, ...]:
        """The values of ATTRIBUTES, in their order."""
        return astuple(self)[1:]

    @property
    def held_out(self) -> bool:
        """Whether no training may see it: a tenth of all figures, by hash."""
        return hashlib.sha256(" ".join(astuple(self)).encode()).digest()[0] * 10 < 256

    def words(self, named: Collection[str] = tuple(ATTRIBUTES)) -> str:
        """The figure in words, attributes before the class word: "star belly, red crown, one eye, blue robot"."""
        said = {
            "belly": f"{self.belly} belly",
            "hat": f"{self.hat_colour} {self.hat}" if "hat_colour" in named else self.hat,
            "eyes": f"{self.eyes} eyes",
            "legs": f"{self.legs} below",
            "body": self.body,
        }
        return " ".join([*(text for name, text in said.items() if name in named), self.kind])


class Picture(NamedTuple):
    """A rendered picture: RGB, and the part of the figures that each pixel shows (uint8, height x width)."""

    image: Image.Image
    regions: np.ndarray


def random_figure(rng: random.Random, kind: str | None = None, held_out: bool = False) -> Figure:
    """A figure of the training set, or of the held-out set."""
    while True:
        values = [rng.choice(options) for options in ATTRIBUTES.values()]
        figure = Figure(kind or rng.choice(KINDS), *values)
        if figure.held_out == held_out:
            return figure


def prompt(figures: Sequence[str], scene: str, style: str) -> str:
    """The prompt of a picture; figures as words or placeholders, from left to right."""
    return f"a {' and a '.join(figures)} in the {scene}, {style} drawing"


def words() -> list[str]:
    """Every word that a prompt of this world can have."""
    texts = [prompt([" ".join(KINDS), "x"], " ".join(SCENES), " ".join(STYLES)), "belly eyes below"]
    texts += [" ".join(options) for options in ATTRIBUTES.values()]
    return sorted(set(" ".join(texts).replace(",", " ").split()) - {"x"})


# --- drawing ----------------------------------------------------------------------------------------------------------

_OVER = 3  # supersampling
Point = tuple[float, float]


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> list[Point]:
    angles = np.radians(np.linspace(start, end, max(8, int(abs(end - start) / 10) + 1)))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _box(x0: float, y0: float, x1: float, y1: float, r: float = 0.0) -> list[Point]:
    """A rectangle with round corners."""
    if r == 0:
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    corners = [(x1 - r, y1 - r, 0), (x0 + r, y1 - r, 90), (x0 + r, y0 + r, 180), (x1 - r, y0 + r, 270)]
    return [point for x, y, start in corners for point in _ellipse(x, y, r, r, start, start + 90)]


def _star(x: float, y: float, r: float, points: int = 5, inner: float = 0.45) -> list[Point]:
    return [
        (x + r * (inner if i % 2 else 1) * math.sin(math.pi * i / points),
         y + r * (inner if i % 2 else 1) * math.cos(math.pi * i / points))
        for i in range(2 * points)
    ]  # fmt: skip


def _heart(x: float, y: float, r: float) -> list[Point]:
    points = []
    for a in np.linspace(0, 2 * math.pi, 28):
        up = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        points.append((x + r * math.sin(a) ** 3, y + r * up / 16))
    return points


def _mix(a: Colour, b: Colour, t: float) -> Colour:
    return tuple(round(p + (q - p) * t) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]


class _Pen:
    """Draws polygons in a figure's own units: x to the right, y up from its feet, 100 its height with a hat."""

    def __init__(self, canvas: _Canvas, x: float, y: float, height: float, tilt: float, first_part: int) -> None:
        self.canvas, self.origin, self.scale, self.first_part = canvas, (x, y), height / 100, first_part
        self.turn = math.radians(tilt)

    def place(self, points: Iterable[Point]) -> list[Point]:
        cos, sin = math.cos(self.turn) * self.scale, math.sin(self.turn) * self.scale
        x0, y0 = self.origin
        return [((x0 + x * cos - y * sin), (y0 - x * sin - y * cos)) for x, y in points]

    def fill(self, points: Iterable[Point], colour: Colour, part: str | None, outline: bool = True) -> None:
        self.canvas.polygon(self.place(points), colour, self.part(part), outline)

    def line(self, points: Iterable[Point], width: float, colour: Colour, part: str | None) -> None:
        self.canvas.line(self.place(points), width * self.scale, colour, self.part(part))

    def part(self, part: str | None) -> int | None:
        return None if part is None else PARTS[part] + self.first_part


class _Canvas:
    def __init__(self, size: int, background: Colour, ink_width: float) -> None:
        self.factor = size / SIZE * _OVER
        pixels = (size * _OVER, size * _OVER)
        self.image = Image.new("RGB", pixels, background)
        self.regions = Image.new("L", pixels, 0)
        self.draw, self.draw_regions = ImageDraw.Draw(self.image), ImageDraw.Draw(self.regions)
        self.ink_width = ink_width

    def polygon(self, points: list[Point], colour: Colour, part: int | None = None, outline: bool = False) -> None:
        """Points in pixels of a 128 px picture. `part` None leaves the region map as it is."""
        points = [(x * self.factor, y * self.factor) for x, y in points]
        self.draw.polygon(points, fill=colour)
        if outline and self.ink_width:
            width = max(1, round(self.ink_width * self.factor))
            self.draw.line([*points, points[0], points[1]], fill=_INK, width=width, joint="curve")
        if part is not None:
            self.draw_regions.polygon(points, fill=part)

    def line(self, points: list[Point], width: float, colour: Colour, part: int | None = None) -> None:
        points = [(x * self.factor, y * self.factor) for x, y in points]
        pixels = max(1, round(width * self.factor))
        self.draw.line(points, fill=colour, width=pixels, joint="curve")
        if part is not None:
            self.draw_regions.line(points, fill=part, width=pixels, joint="curve")


# --- figures ----------------------------------------------------------------------------------------------------------


def _draw_legs(pen: _Pen, figure: Figure, dark: Colour) -> None:
    for side in (-1, 1):
        x = side * 11
        if figure.legs == "feet":
            pen.fill(_box(x - 5, 4, x + 5, 22), dark, "legs")
            pen.fill(_ellipse(x + side * 2, 4, 9, 5), dark, "legs")
        elif figure.legs == "wheels":
            pen.fill(_box(x - 2.5, 8, x + 2.5, 22), dark, "legs")
            pen.fill(_ellipse(x, 8, 9, 9), _INK, "legs")
            pen.fill(_ellipse(x, 8, 4, 4), (214, 214, 220), "legs", outline=False)
        elif figure.legs == "springs":
            zigzag = [(x + (5 if i % 2 else -5), 22 - i * 3.2) for i in range(6)]
            pen.line(zigzag, 2.6, _INK, "legs")
            pen.fill(_box(x - 7, 0, x + 7, 5, 2), (190, 190, 200), "legs")
        else:  # stilts
            pen.line([(x * 0.6, 23), (x * 1.35, 0)], 3, (120, 74, 40), "legs")
            pen.line([(x * 1.35 - 4, 0.8), (x * 1.35 + 4, 0.8)], 3, (120, 74, 40), "legs")


def _draw_body(pen: _Pen, figure: Figure, colour: Colour, dark: Colour, arms: tuple[float, float]) -> None:
    """Body, head and arms: where the two kinds differ in shape."""
    for side, lift in zip((-1, 1), arms, strict=True):
        shoulder, hand = (side * 17, 40.0), (side * 29, 40 + 17 * lift)
        if figure.kind == "robot":
            pen.line([shoulder, (side * 27, 40), hand], 4, (150, 154, 168), "body")
            pen.fill(_box(hand[0] - 4, hand[1] - 4, hand[0] + 4, hand[1] + 4), (110, 114, 130), "body")
        else:
            pen.line([shoulder, hand], 9, dark, "body")
            pen.fill(_ellipse(*hand, 5.5, 5.5), dark, "body", outline=False)
    if figure.kind == "robot":
        pen.fill(_box(-20, 18, 20, 51, 2), colour, "body")
        pen.fill(_box(-5, 50, 5, 56), (110, 114, 130), "body")
        pen.fill(_box(-25, 62, 25, 72), (150, 154, 168), "body")  # bolts, seen at the sides of the head
        pen.fill(_box(-21, 54, 21, 82, 2), colour, "body")
        pen.fill(_box(-14, 56.5, 14, 59.5), dark, "body", outline=False)  # mouth grille
        for x in (-7, 0, 7):
            pen.fill(_box(x - 0.8, 56.5, x + 0.8, 59.5), colour, "body", outline=False)
    else:
        tail = [(16, 24), (28, 20), (33, 27), (30, 33)]
        pen.line(tail, 6, dark, "body")
        pen.fill(_ellipse(0, 34, 23, 19), colour, "body")
        for side in (-1, 1):  # ears
            pen.fill([(side * 11, 78), (side * 27, 90), (side * 23, 66)], dark, "body")
        pen.fill(_ellipse(0, 67, 24, 18), colour, "body")
        pen.line(_ellipse(0, 60, 6, 3.5, 180, 360), 1.8, _INK, "body")  # smile


def _draw_belly(pen: _Pen, figure: Figure) -> None:
    y = 34
    panel = _box(-13, 22, 13, 46, 2) if figure.kind == "robot" else _ellipse(0, y, 14.5, 13)
    pen.fill(panel, _CREAM, "belly")
    ink: Colour = (150, 30, 90)
    if figure.belly == "star":
        pen.fill(_star(0, y, 11), ink, "belly", outline=False)
    elif figure.belly == "heart":
        pen.fill(_heart(0, y - 0.5, 9), ink, "belly", outline=False)
    elif figure.belly == "stripes":
        for dy, half in ((-7, 9), (0, 12), (7, 9)):
            pen.fill(_box(-half, y + dy - 1.9, half, y + dy + 1.9), ink, "belly", outline=False)
    elif figure.belly == "dots":
        for dx, dy in ((-5.5, 5), (5.5, 5), (-5.5, -5), (5.5, -5)):
            pen.fill(_ellipse(dx, y + dy, 3.2, 3.2), ink, "belly", outline=False)
    elif figure.belly == "ring":
        pen.fill(_ellipse(0, y, 9.5, 9.5), ink, "belly", outline=False)
        pen.fill(_ellipse(0, y, 5, 5), _CREAM, "belly", outline=False)
    else:  # cross
        pen.fill(_box(-3, y - 10, 3, y + 10), ink, "belly", outline=False)
        pen.fill(_box(-10, y - 3, 10, y + 3), ink, "belly", outline=False)


def _draw_eye(pen: _Pen, x: float, y: float, r: float, look: float) -> None:
    pen.fill(_ellipse(x, y, r, r), (255, 255, 255), "eyes")
    pen.fill(_ellipse(x + look * r * 0.3, y, r * 0.5, r * 0.5), _INK, "eyes", outline=False)


def _draw_eyes(pen: _Pen, figure: Figure, look: float) -> None:
    y = 69
    if figure.eyes == "one":
        _draw_eye(pen, 0, y, 9, look)
    elif figure.eyes == "two":
        for x in (-9, 9):
            _draw_eye(pen, x, y, 6.5, look)
    elif figure.eyes == "three":
        for dx, dy in ((-11.5, -1), (0, 2.5), (11.5, -1)):
            _draw_eye(pen, dx, y + dy, 5.2, look)
    elif figure.eyes == "sleepy":
        for x in (-9, 9):
            pen.line(_ellipse(x, y + 1, 6, 5, 180, 360), 2.6, _INK, "eyes")
    else:  # visor
        pen.fill(_box(-17, y - 5.5, 17, y + 5.5, 2), (28, 30, 46), "eyes")
        pen.line([(-12 + 3 * look, y), (12 + 3 * look, y)], 3, (90, 240, 255), "eyes")


def _draw_hat(pen: _Pen, figure: Figure) -> None:
    y, colour = 81.0, _COLOURS[figure.hat_colour]
    dark = _mix(colour, _INK, 0.35)
    if figure.hat == "crown":
        spikes = [(-15, y), (-18, y + 17), (-8, y + 9), (0, y + 19), (8, y + 9), (18, y + 17), (15, y)]
        pen.fill(spikes, colour, "hat")
    elif figure.hat == "tophat":
        pen.fill(_box(-11, y, 11, y + 19), colour, "hat")
        pen.fill(_box(-19, y - 1, 19, y + 3.5), colour, "hat")
        pen.fill(_box(-11, y + 3.5, 11, y + 7.5), dark, "hat", outline=False)
    elif figure.hat == "cone":
        pen.fill([(-14, y - 1), (0, y + 21), (14, y - 1)], colour, "hat")
        pen.fill(_ellipse(0, y + 20, 3.5, 3.5), dark, "hat")
    elif figure.hat == "bow":
        for side in (-1, 1):
            pen.fill([(0, y + 5), (side * 19, y + 14), (side * 19, y - 3)], colour, "hat")
        pen.fill(_ellipse(0, y + 5, 4.5, 4.5), dark, "hat")
    elif figure.hat == "helmet":
        pen.fill(_ellipse(0, y - 2, 22, 18, 0, 180), colour, "hat")
        pen.fill(_box(-24, y - 4, 24, y), dark, "hat")
    else:  # flower
        pen.line([(0, y - 2), (0, y + 8)], 2.4, (50, 130, 60), "hat")
        for angle in range(0, 360, 72):
            a = math.radians(angle + 90)
            pen.fill(_ellipse(7 * math.cos(a), y + 11 + 7 * math.sin(a), 5, 5), colour, "hat")
        pen.fill(_ellipse(0, y + 11, 4, 4), (120, 70, 30), "hat", outline=False)


def _draw_figure(canvas: _Canvas, figure: Figure, rng: random.Random, x: float, foot: float, height: float,
                 index: int) -> None:  # fmt: skip
    pen = _Pen(canvas, x, foot, height, rng.uniform(-5, 5), index * NEXT_FIGURE)
    colour = _COLOURS[figure.body]
    dark = _mix(colour, _INK, 0.38)
    shadow = [(x + px * height / 100, foot + py * height / 100) for px, py in _ellipse(0, 0, 26, 4)]
    canvas.polygon(shadow, (60, 60, 70))
    arms = (rng.uniform(-0.9, 1.0), rng.uniform(-0.9, 1.0))
    _draw_legs(pen, figure, dark)
    _draw_body(pen, figure, colour, dark, arms)
    _draw_belly(pen, figure)
    _draw_eyes(pen, figure, rng.uniform(-1, 1))
    _draw_hat(pen, figure)


# --- scenes -----------------------------------------------------------------------------------------------------------

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


def _draw_scene(canvas: _Canvas, scene: str, rng: random.Random, horizon: float) -> None:
    sky, ground = _SKY_AND_GROUND[scene]
    canvas.polygon(_box(0, 0, SIZE, SIZE), sky)
    canvas.polygon(_box(0, horizon, SIZE, SIZE), ground)
    globals()[f"_{scene}"](canvas, rng, horizon)


def _forest(canvas: _Canvas, rng: random.Random, horizon: float) -> None:
    for i in range(5):
        x, top = i * 30 + rng.uniform(-8, 8), rng.uniform(8, 30)
        canvas.polygon(_box(x - 3, horizon - 26, x + 3, horizon + 4), (96, 66, 44))
        for step in range(3):
            y = top + step * (horizon - top - 14) / 3
            half = 9 + 4 * step
            canvas.polygon([(x, y), (x - half, y + 26), (x + half, y + 26)], (40, 104 + 8 * step, 62))


def _beach(canvas: _Canvas, rng: random.Random, horizon: float) -> None:
    canvas.polygon(_box(0, horizon - 20, SIZE, horizon + 2), (44, 134, 196))
    x = rng.choice((16, 64, 112)) + rng.uniform(-6, 6)
    canvas.polygon(_ellipse(x, 18, 11, 11), (255, 226, 110))
    for _ in range(4):
        wave = rng.uniform(0, SIZE)
        y = horizon - rng.uniform(4, 16)
        canvas.line([(wave, y), (wave + 12, y)], 1.5, (220, 240, 250))


def _city(canvas: _Canvas, rng: random.Random, horizon: float) -> None:
    x = -4.0
    while x < SIZE:
        width, top = rng.uniform(18, 28), rng.uniform(8, 52)
        shade = rng.randint(76, 128)
        canvas.polygon(_box(x, top, x + width - 2, horizon + 2), (shade, shade, shade + 16))
        for wy in np.arange(top + 5, horizon - 6, 10):
            for wx in np.arange(x + 4, x + width - 7, 8):
                lit = (250, 232, 150) if rng.random() < 0.6 else (60, 64, 84)
                canvas.polygon(_box(wx, wy, wx + 4, wy + 5), lit)
        x += width
    canvas.line([(0, horizon + 14), (SIZE, horizon + 14)], 1.5, (230, 230, 200))


def _snow(canvas: _Canvas, rng: random.Random, horizon: float) -> None:
    for x, top in ((rng.uniform(0, 40), rng.uniform(24, 40)), (rng.uniform(80, 128), rng.uniform(18, 36))):
        canvas.polygon([(x - 42, horizon + 2), (x, top), (x + 42, horizon + 2)], (164, 184, 212))
        canvas.polygon([(x - 11, top + 14), (x, top), (x + 11, top + 14)], (250, 252, 255))
    for _ in range(22):
        x, y = rng.uniform(0, SIZE), rng.uniform(0, SIZE)
        canvas.polygon(_ellipse(x, y, 1.6, 1.6), (255, 255, 255))


def _desert(canvas: _Canvas, rng: random.Random, horizon: float) -> None:
    canvas.polygon(_ellipse(rng.uniform(10, 118), horizon + 2, 46, 18, 180, 360), (208, 148, 80))
    for x in (rng.uniform(4, 30), rng.uniform(98, 124)):
        top = horizon - rng.uniform(26, 42)
        for part in (_box(x - 4, top, x + 4, horizon + 10, 3), _box(x - 12, top + 10, x - 7, top + 24, 2),
                     _box(x - 12, top + 19, x, top + 24), _box(x + 7, top + 6, x + 12, top + 18, 2),
                     _box(x, top + 13, x + 12, top + 18)):  # fmt: skip
            canvas.polygon(part, (70, 132, 76))


def _space(canvas: _Canvas, rng: random.Random, horizon: float) -> None:
    for _ in range(34):
        x, y, r = rng.uniform(0, SIZE), rng.uniform(0, horizon), rng.uniform(0.5, 1.3)
        canvas.polygon(_ellipse(x, y, r, r), (250, 246, 220))
    x, y = rng.choice((20, 108)) + rng.uniform(-6, 6), rng.uniform(16, 34)
    canvas.polygon(_ellipse(x, y, 13, 13), (216, 130, 96))
    canvas.line(_ellipse(x, y, 20, 5, -30, 330), 2, (240, 214, 170))
    for _ in range(4):
        x = rng.uniform(0, SIZE)
        canvas.polygon(_ellipse(x, horizon + rng.uniform(5, 22), 8, 3), (100, 96, 116))


def _sea(canvas: _Canvas, rng: random.Random, horizon: float) -> None:
    for x in (rng.uniform(2, 26), rng.uniform(26, 46), rng.uniform(84, 104), rng.uniform(104, 126)):
        top = rng.uniform(30, 62)
        ys = np.linspace(horizon + 8, top, 9)
        canvas.line([(x + 4 * math.sin(i * 1.6), float(y)) for i, y in enumerate(ys)], 5, (36, 150, 96))
    for _ in range(11):
        x, y, r = rng.uniform(0, SIZE), rng.uniform(0, horizon), rng.uniform(1.5, 4)
        canvas.polygon(_ellipse(x, y, r, r), (150, 214, 230))
        canvas.polygon(_ellipse(x, y, r * 0.6, r * 0.6), (80, 160, 190))


def _room(canvas: _Canvas, rng: random.Random, horizon: float) -> None:
    x = rng.choice((8, 88)) + rng.uniform(-4, 4)
    canvas.polygon(_box(x - 2, 14, x + 34, 52), (250, 246, 236))
    canvas.polygon(_box(x, 16, x + 32, 50), (150, 206, 240))
    canvas.line([(x + 16, 16), (x + 16, 50)], 2, (250, 246, 236))
    canvas.line([(x, 33), (x + 32, 33)], 2, (250, 246, 236))
    for i in range(1, 5):
        y = horizon + i * (SIZE - horizon) / 5
        canvas.line([(0, y), (SIZE, y)], 0.8, (118, 78, 52))
    canvas.polygon(_box(0, horizon - 4, SIZE, horizon), (246, 236, 222))


# --- styles -----------------------------------------------------------------------------------------------------------


def _smooth_noise(rng: random.Random, size: int, cells: int) -> np.ndarray:
    """Values of -1 to 1, (size, size), that change over size / cells pixels."""
    grid = np.random.default_rng(rng.getrandbits(32)).uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid, "F").resize((size, size), Image.Resampling.BICUBIC))


def _finish(canvas: _Canvas, style: str, rng: random.Random, size: int) -> Image.Image:
    small = canvas.image.resize((size, size), Image.Resampling.BOX)
    figure = np.asarray(canvas.regions.resize((size, size), Image.Resampling.NEAREST)) > 0
    if style == "flat":
        return small
    pixels = np.asarray(small, np.float32)
    y, x = np.mgrid[:size, :size] * (SIZE / size)
    if style == "comic":  # halftone dots behind the figures; the ink is in the drawing already
        dots = (np.hypot(x % 6 - 3, y % 6 - 3) < 1.7) & ~figure
        pixels = np.where(dots[..., None], pixels * 0.72, pixels)
    elif style == "watercolour":
        soft = np.asarray(small.filter(ImageFilter.GaussianBlur(1.1 * size / SIZE)), np.float32)
        edge = np.abs(soft - pixels).mean(-1, keepdims=True)
        wash = 1 + 0.13 * _smooth_noise(rng, size, 9)[..., None]
        pixels = 255 - (255 - soft) * 0.74 * wash - edge * 0.5
    else:  # crayon: slanted strokes through which the paper shows
        strokes = np.sin((x + y) * 1.15 + 2 * _smooth_noise(rng, size, 20)) + 0.5 * _smooth_noise(rng, size, 43)
        paper = np.clip(strokes - 0.15, 0, 1)[..., None] * np.where(figure, 0.34, 0.6)[..., None]
        pixels = pixels + (250 - pixels) * paper
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def render(figures: Sequence[Figure], scene: str, style: str, rng: random.Random, size: int = SIZE,
           close: bool = False) -> Picture:  # fmt: skip
    """A picture of one or two figures, left to right. `close`: as large as fits, for a portrait to show an encoder."""
    ink = {"flat": 0.7, "comic": 1.9, "watercolour": 0.0, "crayon": 1.0}[style]
    canvas = _Canvas(size, (0, 0, 0), ink)
    horizon = rng.uniform(76, 90)
    _draw_scene(canvas, scene, rng, horizon)
    for index, figure in enumerate(figures):
        if len(figures) > 1:
            height, x = rng.uniform(76, 88), (34, 94)[index] + rng.uniform(-4, 4)
        else:
            height = rng.uniform(96, 108) if close else rng.uniform(80, 104)
            x = SIZE / 2 + rng.uniform(-6, 6) * (1 if close else 3)
        foot = min(rng.uniform(112, 122), SIZE - 4.0)
        foot = max(foot, height + 6)
        _draw_figure(canvas, figure, rng, x, foot, height, index)
    regions = np.asarray(canvas.regions.resize((size, size), Image.Resampling.NEAREST))
    return Picture(_finish(canvas, style, rng, size), regions)


def sheet(columns: int = 8, rows: int = 6, seed: int = 0) -> Image.Image:
    """Pictures of this world side by side."""
    rng = random.Random(seed)
    page = Image.new("RGB", (columns * SIZE, rows * SIZE))
    for i in range(columns * rows):
        kinds = KINDS[: 2 if i % 4 == 3 else 1] if rng.random() < 0.5 else KINDS[::-1][: 2 if i % 4 == 3 else 1]
        figures = [random_figure(rng, kind) for kind in kinds]
        picture = render(figures, SCENES[i % len(SCENES)], STYLES[i // columns % len(STYLES)], rng)
        page.paste(picture.image, (i % columns * SIZE, i // columns * SIZE))
    return page


if __name__ == "__main__":
    sheet().save(sys.argv[1] if len(sys.argv) > 1 else "sheet.png")
