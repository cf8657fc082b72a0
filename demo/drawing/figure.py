"""Draws one figure in its look, in its own units: x to the right, y up from its feet, 110 its height with a hat."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image

from demo.world import Figure, Look

from .canvas import INK, Canvas, Colour, Pen, Point, box, ellipse, heart, mix, star

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
_CREAM: Colour = (252, 240, 214)
_STEEL, _DARK_STEEL = (150, 154, 168), (110, 114, 130)
_SIGN: Colour = (150, 30, 90)
_GLOW: Colour = (90, 240, 255)
_WOOD: Colour = (120, 74, 40)


@dataclass(frozen=True)
class _Stance:
    """A pose. arms, legs: degrees outwards from hanging, left and right; the right hand may hold something."""

    arms: tuple[float, float]
    legs: tuple[float, float]
    tilt: float = 0.0
    lift: float = 0.0


_STANCES = {
    "standing": _Stance((24, 52), (0, 0)),
    "waving": _Stance((132, 52), (0, 0)),
    "jumping": _Stance((112, 112), (38, 38), 0, 11),
    "sitting": _Stance((38, 66), (84, 84), 0, -15),
    "dancing": _Stance((122, 76), (-6, 58), 9, 2),
}
_NECK, _HEAD = 52.0, 1.22
_TURNS = {"left": -1, "front": 0, "right": 1}


@dataclass(frozen=True)
class _Shown:
    """A figure while it is drawn. turn: -1 where it faces left of the picture, 1 right. glance: of the eyes."""

    pen: Pen
    figure: Figure
    look: Look
    colour: Colour
    dark: Colour
    stance: _Stance
    turn: int
    glance: float

    def head(self, turned: float) -> Pen:
        """A pen for what is on the head, moved by `turned` to where the figure faces. Heads are large: faces count."""
        return self.pen.moved(turned * self.turn, _NECK, scale=_HEAD).moved(0, -_NECK)


def draw_figure(canvas: Canvas, figure: Figure, look: Look, rng: random.Random, x: float, foot: float, height: float,
                first_part: int) -> None:  # fmt: skip
    """x, foot, height in pixels of a 128 px picture; the figure's parts are `first_part` + PARTS in the map."""
    stance, unit = _STANCES[look.pose], height / 100
    lifted = foot - stance.lift * unit
    pen = Pen(canvas, (x, lifted), unit, -stance.tilt + rng.uniform(-1.5, 1.5), first_part)
    colour = _COLOURS[figure.body]
    turn = _TURNS[look.view]
    glance = turn * 0.7 + rng.uniform(-0.15, 0.15)
    shown = _Shown(pen, figure, look, colour, mix(colour, INK, 0.38), stance, turn, glance)
    width = 20 if stance.lift > 5 else 27
    canvas.polygon([(x + px * unit, foot + py * unit) for px, py in ellipse(0, 0, width, 4)], (60, 60, 70))
    behind = canvas.image.copy()
    arms = [stance.arms[side] + rng.uniform(-3, 3) for side in (0, 1)]
    far = 0 if turn >= 0 else 1  # a turned figure's near arm is in front of its body
    _draw_legs(shown)
    _draw_arm(shown, far, arms[far])
    _draw_body(shown)
    _draw_arm(shown, 1 - far, arms[1 - far])
    _draw_head(shown)
    _draw_material(canvas, shown, rng, behind)
    _draw_belly(shown)
    _draw_eyes(shown)
    _draw_mouth(shown)
    _draw_hat(shown)
    _draw_held(shown, arms[1])


def _hand(side: int, angle: float) -> Point:
    out = (-1, 1)[side]
    a = math.radians(angle)
    return out * (17 + 19 * math.sin(a)), 42 - 19 * math.cos(a)


def _draw_legs(shown: _Shown) -> None:
    figure, dark = shown.figure, shown.dark
    for side, turned in zip((-1, 1), shown.stance.legs, strict=True):
        pen = shown.pen.moved(side * 10, 22, side * turned)  # from the hip, y down to -22
        toe = shown.turn * 4 or side * 2
        if figure.legs == "feet":
            pen.fill(box(-5, -18, 5, 2), dark, "legs")
            pen.fill(ellipse(toe, -18, 9, 5), dark, "legs")
        elif figure.legs == "wheels":
            pen.fill(box(-2.5, -14, 2.5, 2), dark, "legs")
            pen.fill(ellipse(0, -14, 9, 9), INK, "legs")
            pen.fill(ellipse(0, -14, 4, 4), (214, 214, 220), "legs", outline=False)
        elif figure.legs == "springs":
            pen.line([(5 if i % 2 else -5, -i * 3.2) for i in range(6)], 2.2, (70, 72, 92), "legs")
            pen.fill(box(-7, -22, 7, -17, 2), (190, 190, 200), "legs")
        else:  # stilts
            pen.line([(-side * 3, 1), (side * 3, -22)], 3, _WOOD, "legs")
            pen.line([(side * 3 - 4, -21.2), (side * 3 + 4, -21.2)], 3, _WOOD, "legs")


def _draw_arm(shown: _Shown, side: int, angle: float) -> None:
    pen, out = shown.pen, (-1, 1)[side]
    shoulder, hand = (out * 17.0, 42.0), _hand(side, angle)
    if shown.figure.kind == "robot":
        middle = ((shoulder[0] + hand[0]) / 2 + out * 3, (shoulder[1] + hand[1]) / 2)
        pen.line([shoulder, middle, hand], 4.5, _STEEL, "body")
        pen.fill(box(hand[0] - 4, hand[1] - 4, hand[0] + 4, hand[1] + 4, 1), _DARK_STEEL, "body")
    else:
        pen.line([shoulder, hand], 9, shown.dark, "body")
        pen.fill(ellipse(*hand, 5.5, 5.5), shown.dark, "body", outline=False)


def _draw_body(shown: _Shown) -> None:
    pen = shown.pen
    if shown.figure.kind == "robot":
        pen.fill(box(-20, 18, 20, 51, 2), shown.colour, "body")
    else:
        back = -shown.turn or 1
        pen.line([(back * 16, 24), (back * 28, 20), (back * 33, 27), (back * 30, 33)], 6, shown.dark, "body")
        pen.fill(ellipse(0, 34, 23, 19), shown.colour, "body")


def _draw_head(shown: _Shown) -> None:
    """Head with what shows its view: bolts and a nose of robots, ears and a snout of creatures."""
    pen, turn = shown.head(2), shown.turn
    if shown.figure.kind == "robot":
        pen.fill(box(-5, 50, 5, 56), _DARK_STEEL, "body")
        for side in (-1, 1):
            if side != turn:
                pen.fill(box(side * 23 - 3.5, 63, side * 23 + 3.5, 73, 1), _STEEL, "body")
        pen.fill(box(-21, 53, 21, 82, 2), shown.colour, "body")
        if turn:
            pen.fill([(turn * 21, 69), (turn * 29, 65), (turn * 21, 61)], _STEEL, "body")
    else:
        for side in (-1, 1):
            size = 0.75 if side == turn else 1.0
            tip = (side * (19 + 8 * size), 66 + 24 * size)
            pen.fill([(side * 11, 78), tip, (side * 23, 66)], shown.dark, "body")
        pen.fill(ellipse(0, 67, 24, 18), shown.colour, "body")
        if turn:
            pen.fill(ellipse(turn * 22, 62, 8, 5.5), shown.colour, "body")
            pen.fill(ellipse(turn * 29, 63.5, 2.4, 2.4), INK, "body", outline=False)


def _draw_material(canvas: Canvas, shown: _Shown, rng: random.Random, behind: Image.Image) -> None:
    """Marks of the material over body, head and arms, in lines, so that line drawings have them too."""
    pen, material, colour = shown.pen, shown.look.material, shown.colour
    part = pen.part("body")
    if material == "glass" and canvas.ink.paper is None:
        canvas.within(part, behind, 0.38)
    marked = canvas.copy()
    over = pen.on(marked)
    if material == "wooden":  # planks, each with a knot
        wood = mix(colour, (70, 40, 20), 0.62)
        for row, y in enumerate(range(9, 106, 11)):
            waves = [(x, y + 1.2 * math.sin(x / 7 + row * 1.7)) for x in range(-50, 51, 4)]
            over.line(waves, 2.8, wood)
        for x, knot in ((-19, 25.5), (19, 47.5), (-20, 69.5), (20, 80.5)):
            over.line(ellipse(x, knot, 3.4, 2.2), 1.8, wood)
    elif material == "metal":
        for x in range(-70, 60, 19):
            over.line([(x, 0), (x + 60, 104)], 5.5, mix(colour, (255, 255, 255), 0.72))
            over.line([(x + 6, 0), (x + 66, 104)], 1.6, mix(colour, (255, 255, 255), 0.72))
    elif material == "plush":
        for row, y in enumerate(range(12, 108, 8)):
            for column, x in enumerate(range(-56, 57, 9)):
                px, py = x + 4.5 * (row % 2) + rng.uniform(-0.8, 0.8), y + rng.uniform(-0.8, 0.8)
                shade = mix(colour, INK, 0.5) if (row + column) % 2 else mix(colour, (255, 255, 255), 0.65)
                over.line([(px - 1.2, py - 1.6), (px, py + 1.6), (px + 1.2, py - 1.6)], 1.9, shade)
    else:  # glass: reflections
        for x, y, length in ((-17, 60, 12), (-17, 22, 10), (13, 70, 9), (14, 38, 9)):
            for shift in (0, 4):
                over.line([(x + shift, y), (x + shift + 4, y + length)], 1.8, (255, 255, 255))
    canvas.within(part, marked.image)


def _draw_belly(shown: _Shown) -> None:
    """The sign, on a panel that turns with the figure."""
    pen, belly, y = shown.pen.moved(5 * shown.turn, 0), shown.figure.belly, 34
    robot = shown.figure.kind == "robot"
    pen.fill(box(-13, 22, 13, 46, 2) if robot else ellipse(0, y, 14.5, 13), _CREAM, "belly")
    if belly == "star":
        pen.fill(star(0, y, 11), _SIGN, "belly", outline=False)
    elif belly == "heart":
        pen.fill(heart(0, y - 0.5, 9), _SIGN, "belly", outline=False)
    elif belly == "stripes":
        for dy, half in ((-7, 9), (0, 12), (7, 9)):
            pen.fill(box(-half, y + dy - 1.9, half, y + dy + 1.9), _SIGN, "belly", outline=False)
    elif belly == "dots":
        for dx, dy in ((-5.5, 5), (5.5, 5), (-5.5, -5), (5.5, -5)):
            pen.fill(ellipse(dx, y + dy, 3.2, 3.2), _SIGN, "belly", outline=False)
    elif belly == "ring":
        pen.fill(ellipse(0, y, 9.5, 9.5), _SIGN, "belly", outline=False)
        pen.fill(ellipse(0, y, 5, 5), _CREAM, "belly", outline=False)
    else:  # cross
        pen.fill(box(-3, y - 10, 3, y + 10), _SIGN, "belly", outline=False)
        pen.fill(box(-10, y - 3, 10, y + 3), _SIGN, "belly", outline=False)


def _draw_eye(pen: Pen, x: float, y: float, r: float, glance: float) -> None:
    pen.fill(ellipse(x, y, r, r), (255, 255, 255), "eyes")
    pen.fill(ellipse(x + glance * r * 0.4, y, r * 0.5, r * 0.5), INK, "eyes", outline=False)


def _draw_eyes(shown: _Shown) -> None:
    pen, eyes, y = shown.head(8), shown.figure.eyes, 69.5
    if eyes == "one":
        _draw_eye(pen, 0, y, 8, shown.glance)
    elif eyes == "two":
        for x in (-8.5, 8.5):
            _draw_eye(pen, x, y, 6.3, shown.glance)
    elif eyes == "three":
        for dx, dy in ((-11, -1), (0, 2), (11, -1)):
            _draw_eye(pen, dx, y + dy, 5, shown.glance)
    elif eyes == "sleepy":
        for x in (-8.5, 8.5):
            pen.line(ellipse(x, y + 1, 6, 5, 180, 360), 2.2, INK, "eyes")
    else:  # visor
        pen.fill(box(-16, y - 5, 16, y + 5, 2), (28, 30, 46), "eyes")
        pen.line([(-11 + 3 * shown.glance, y), (11 + 3 * shown.glance, y)], 2.2, _GLOW, "eyes")


def _draw_mouth(shown: _Shown) -> None:
    """The expression: mouth and brows."""
    pen, expression, y = shown.head(8), shown.look.expression, 58.5
    brow = 79.0
    if expression == "smiling":
        smile = [*ellipse(0, y + 2, 9, 6.5, 180, 360), (-9, y + 2)]
        pen.fill(smile, (150, 30, 40), "mouth")
        pen.fill(box(-6.5, y + 0.4, 6.5, y + 2), (255, 255, 255), "mouth", outline=False)
    elif expression == "sad":
        pen.line(ellipse(0, y - 3.5, 8, 5.5, 0, 180), 2.2, INK, "mouth")
        for side in (-1, 1):
            pen.line([(side * 14, brow - 3), (side * 5, brow + 1)], 2.2, INK, "mouth")
    elif expression == "surprised":
        pen.fill(ellipse(0, y - 0.5, 4.4, 5), (60, 20, 30), "mouth")
        for side in (-1, 1):
            pen.line(ellipse(side * 9, brow - 2, 5.5, 4, 20, 160), 2.0, INK, "mouth")
    else:  # angry: bared teeth
        pen.fill(box(-9, y - 3, 9, y + 2.6, 1), (255, 255, 255), "mouth")
        for x in (-4.5, 0, 4.5):
            pen.line([(x, y - 3), (x, y + 2.6)], 1.2, INK, "mouth")
        for side in (-1, 1):
            pen.line([(side * 14, brow + 1.5), (side * 3, brow - 3.5)], 2.2, INK, "mouth")


def _draw_hat(shown: _Shown) -> None:
    pen, hat, y = shown.head(2), shown.figure.hat, 82.0
    colour = _COLOURS[shown.figure.hat_colour]
    dark = mix(colour, INK, 0.35)
    if hat == "crown":
        spikes = [(-15, y), (-18, y + 17), (-8, y + 9), (0, y + 19), (8, y + 9), (18, y + 17), (15, y)]
        pen.fill(spikes, colour, "hat")
    elif hat == "tophat":
        pen.fill(box(-11, y, 11, y + 19), colour, "hat")
        pen.fill(box(-19, y - 1, 19, y + 3.5), colour, "hat")
        pen.fill(box(-11, y + 3.5, 11, y + 7.5), dark, "hat", outline=False)
    elif hat == "cone":
        pen.fill([(-14, y - 1), (0, y + 21), (14, y - 1)], colour, "hat")
        pen.fill(ellipse(0, y + 20, 3.5, 3.5), dark, "hat")
    elif hat == "bow":
        for side in (-1, 1):
            pen.fill([(0, y + 5), (side * 19, y + 14), (side * 19, y - 3)], colour, "hat")
        pen.fill(ellipse(0, y + 5, 4.5, 4.5), dark, "hat")
    elif hat == "helmet":
        pen.fill(ellipse(0, y, 22, 16, 0, 180), colour, "hat")
        pen.fill(box(-24, y - 1.5, 24, y + 2.5), dark, "hat")
    else:  # flower
        pen.line([(0, y - 2), (0, y + 8)], 2.2, (50, 130, 60), "hat")
        for angle in range(0, 360, 72):
            a = math.radians(angle + 90)
            pen.fill(ellipse(7 * math.cos(a), y + 11 + 7 * math.sin(a), 5, 5), colour, "hat")
        pen.fill(ellipse(0, y + 11, 4, 4), (120, 70, 30), "hat", outline=False)


def _draw_held(shown: _Shown, angle: float) -> None:
    """In the hand on the picture's right, upright whatever the pose."""
    held = shown.look.held
    if held == "nothing":
        return
    x, y = _hand(1, angle)
    pen = shown.pen.moved(x, y)
    if held == "balloon":
        pen.line([(0, 0), (2, 12), (1, 22)], 1.2, (70, 72, 92), "held")
        pen.fill(ellipse(1, 34, 10.5, 12.5), (244, 96, 150), "held")
        pen.line(ellipse(1, 34, 6.5, 8.5, 100, 160), 1.6, (255, 226, 238), "held")
    elif held == "flag":
        pen.line([(0, -8), (0, 38)], 2.2, _WOOD, "held")
        pen.fill([(0, 38), (18, 31), (0, 23)], (44, 190, 120), "held")
    elif held == "umbrella":
        pen.line([(0, -6), (0, 30)], 2.0, _WOOD, "held")
        pen.fill([*ellipse(0, 27, 19, 13, 0, 180)], (92, 84, 226), "held")
        for px in (-7, 7):
            pen.line([(px, 27), (px * 0.5, 39)], 1.2, (210, 208, 255), "held")
    else:  # lantern
        pen.line([(0, 2), (0, -6)], 1.6, (70, 72, 92), "held")
        pen.fill(box(-6.5, -23, 6.5, -6, 2), (255, 214, 90), "held")
        pen.fill(box(-7.5, -9, 7.5, -5.5), (70, 72, 92), "held", outline=False)
        pen.fill(box(-7.5, -25, 7.5, -21.5), (70, 72, 92), "held", outline=False)
