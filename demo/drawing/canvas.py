"""What is drawn on: polygons and lines with an outline as the style has it, and the map of parts beside the picture."""

from __future__ import annotations

import cmath
import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
OVER = 3
"""Supersampling."""
#: What the region map says, for the first figure; 8 more for the second. 0 is the background.
PARTS = {"body": 1, "belly": 2, "hat": 3, "eyes": 4, "legs": 5, "mouth": 6, "held": 7}
NEXT_FIGURE = 8

Colour = tuple[int, int, int]
Point = tuple[float, float]
INK: Colour = (34, 32, 44)


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> list[Point]:
    angles = np.radians(np.linspace(start, end, max(8, int(abs(end - start) / 10) + 1)))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def box(x0: float, y0: float, x1: float, y1: float, r: float = 0.0) -> list[Point]:
    """A rectangle with round corners."""
    if r == 0:
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    corners = [(x1 - r, y1 - r, 0), (x0 + r, y1 - r, 90), (x0 + r, y0 + r, 180), (x1 - r, y0 + r, 270)]
    return [point for x, y, start in corners for point in ellipse(x, y, r, r, start, start + 90)]


def star(x: float, y: float, r: float, points: int = 5, inner: float = 0.45) -> list[Point]:
    return [
        (x + r * (inner if i % 2 else 1) * math.sin(math.pi * i / points),
         y + r * (inner if i % 2 else 1) * math.cos(math.pi * i / points))
        for i in range(2 * points)
    ]  # fmt: skip


def heart(x: float, y: float, r: float) -> list[Point]:
    points = []
    for a in np.linspace(0, 2 * math.pi, 28):
        up = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        points.append((x + r * math.sin(a) ** 3, y + r * up / 16))
    return points


def mix(a: Colour, b: Colour, t: float) -> Colour:
    return tuple(round(p + (q - p) * t) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Ink:
    """How a style draws. paper: what polygons are filled with where only lines are drawn, else None."""

    width: float
    paper: Colour | None = None
    towards: Colour = INK
    share: float = 0.0

    def line(self, colour: Colour) -> Colour:
        """The colour of a line that stands for an area of a colour."""
        return mix(colour, self.towards, self.share) if self.paper else INK


INKS = {
    "flat": Ink(0.7),
    "comic": Ink(1.9),
    "watercolour": Ink(0.0),
    "crayon": Ink(1.0),
    "pencil": Ink(1.5, (247, 243, 230), INK, 0.3),
    "neon": Ink(1.6, (16, 14, 34), (255, 255, 255), 0.12),
}


class Canvas:
    """A picture and its map of parts; points are in pixels of a 128 px picture, y down."""

    def __init__(self, size: int, ink: Ink) -> None:
        self.factor = size / SIZE * OVER
        self.pixels = (size * OVER, size * OVER)
        self.image = Image.new("RGB", self.pixels, ink.paper or (0, 0, 0))
        self.regions = Image.new("L", self.pixels, 0)
        self.draw, self.draw_regions = ImageDraw.Draw(self.image), ImageDraw.Draw(self.regions)
        self.ink = ink

    def polygon(self, points: list[Point], colour: Colour, part: int | None = None, outline: bool = False) -> None:
        """`part` None leaves the region map as it is. Where only lines are drawn, every polygon has an outline."""
        points = self._scaled(points)
        self.draw.polygon(points, fill=self.ink.paper or colour)
        if self.ink.width and (outline or self.ink.paper):
            width = max(1, round(self.ink.width * self.factor))
            self.draw.line([*points, points[0], points[1]], self.ink.line(colour), width, joint="curve")
        if part is not None:
            self.draw_regions.polygon(points, fill=part)

    def line(self, points: list[Point], width: float, colour: Colour, part: int | None = None) -> None:
        points, pixels = self._scaled(points), max(1, round(width * self.factor))
        if self.ink.paper and width > 2.2:  # a limb, say: its two sides
            edge = max(1, round(self.ink.width * self.factor))
            self.draw.line(points, self.ink.line(colour), pixels + edge, joint="curve")
            self.draw.line(points, self.ink.paper, max(1, pixels - edge), joint="curve")
        else:
            self.draw.line(points, self.ink.line(colour) if self.ink.paper else colour, pixels, joint="curve")
        if part is not None:
            self.draw_regions.line(points, fill=part, width=pixels, joint="curve")

    def copy(self) -> Canvas:
        """A canvas with a copy of the picture and the same map."""
        other = copy.copy(self)
        other.image = self.image.copy()
        other.draw = ImageDraw.Draw(other.image)
        return other

    def within(self, part: int, overlay: Image.Image, share: float = 1.0) -> None:
        """Lays another picture over what shows a part."""
        mask = self.regions.point([round(255 * share) if value == part else 0 for value in range(256)])
        self.image.paste(overlay, mask=mask)

    def _scaled(self, points: list[Point]) -> list[Point]:
        return [(x * self.factor, y * self.factor) for x, y in points]


class Pen:
    """Draws in units of its own: x to the right, y up, turned and scaled."""

    def __init__(self, canvas: Canvas, origin: Point, scale: float, tilt: float, first_part: int) -> None:
        """origin: in the canvas' pixels. scale: pixels per unit. tilt: degrees against the clock."""
        self.canvas, self.first_part = canvas, first_part
        self._at, self._by = complex(origin[0], -origin[1]), cmath.rect(scale, math.radians(tilt))

    def moved(self, x: float, y: float, turn: float = 0.0, scale: float = 1.0) -> Pen:
        """A pen whose origin is at (x, y) of this one, turned by degrees, with larger units."""
        pen = Pen(self.canvas, (0, 0), 1, 0, self.first_part)
        pen._at, pen._by = self._at + self._by * complex(x, y), self._by * cmath.rect(scale, math.radians(turn))
        return pen

    def on(self, canvas: Canvas) -> Pen:
        """The same pen on another canvas."""
        pen = copy.copy(self)
        pen.canvas = canvas
        return pen

    def place(self, points: Iterable[Point]) -> list[Point]:
        placed = [self._at + self._by * complex(x, y) for x, y in points]
        return [(z.real, -z.imag) for z in placed]

    def fill(self, points: Iterable[Point], colour: Colour, part: str, outline: bool = True) -> None:
        self.canvas.polygon(self.place(points), colour, self.part(part), outline)

    def line(self, points: Iterable[Point], width: float, colour: Colour, part: str | None = None) -> None:
        """`part` None leaves the region map as it is."""
        self.canvas.line(self.place(points), width * abs(self._by), colour, None if part is None else self.part(part))

    def part(self, part: str) -> int:
        return PARTS[part] + self.first_part
