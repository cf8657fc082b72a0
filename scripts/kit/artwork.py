"""The registry's icon and banner, drawn: figures of the small world between the brackets of their placeholders."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from demo import drawing, world
from demo.drawing.canvas import Colour
from nested_core.files import whole

from .first_look import COLOURS, GREY, PAPER, ROOM, WHITE
from .paths import REPO

FOLDER = REPO / "docs" / "images"
ICON_SIDE = 400  # the registry takes no larger one
BANNER = 1680, 720  # the registry wants 21:9
_TITLE, _LINE = "Nested Attention", "Your subject, bound to one word of the prompt."
# The first is also the first of the quickstart.
_ROBOT = world.Figure("robot", "blue", "stripes", "flower", "yellow", "one", "stilts")
_CREATURE = world.Figure("creature", "purple", "stripes", "flower", "green", "three", "feet")
_GOLD, _BLUE = COLOURS
_PROMPT = (("a ", WHITE), ("<robot>", _GOLD), (" and a ", WHITE), ("<creature>", _BLUE), (" in the forest", WHITE))
_OVER = 3  # drawn larger, then reduced: smooth edges


def make_artwork() -> list[Path]:
    """Writes icon.png and banner.png into docs/images; returns where."""
    written = []
    for name, picture in (("icon.png", icon()), ("banner.png", banner())):
        with whole(FOLDER / name) as part:
            picture.save(part, "PNG", optimize=True)
        written.append(FOLDER / name)
    return written


def icon() -> Image.Image:
    """The figure between brackets on a round square, 400 x 400."""
    side = ICON_SIDE * _OVER
    page = Image.new("RGBA", (side, side))
    ImageDraw.Draw(page).rounded_rectangle((0, 0, side - 1, side - 1), side // 6, fill=ROOM)
    _bracketed(page, _ROBOT, _GOLD, (side // 2, side // 2), round(side * 0.8))
    return page.resize((ICON_SIDE, ICON_SIDE), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """Name, a prompt with two subjects' words in it, and the two between their brackets, 1680 x 720."""
    width, height = (side * _OVER for side in BANNER)
    page = Image.new("RGB", (width, height), ROOM)
    draw, left = ImageDraw.Draw(page), 90 * _OVER
    for text, y, size, colour in ((_TITLE, 206, 96, WHITE), (_LINE, 338, 36, GREY)):
        draw.text((left, y * _OVER), text, fill=colour, font=ImageFont.load_default(size * _OVER))
    font, at, y = ImageFont.load_default(36 * _OVER), left + 28.0 * _OVER, 476 * _OVER
    end = left + 56 * _OVER + font.getlength("".join(text for text, _ in _PROMPT))
    draw.rounded_rectangle((left, y - 44 * _OVER, end, y + 44 * _OVER), 16 * _OVER, fill=PAPER)
    for text, colour in _PROMPT:
        draw.text((at, y), text, fill=colour, font=font, anchor="lm")
        at += font.getlength(text)
    _bracketed(page, _ROBOT, _GOLD, (1118 * _OVER, height // 2), 320 * _OVER)
    _bracketed(page, _CREATURE, _BLUE, (1468 * _OVER, height // 2), 320 * _OVER)
    return page.resize(BANNER, Image.Resampling.LANCZOS)


def _bracketed(page: Image.Image, figure: world.Figure, colour: Colour, centre: tuple[int, int], width: int) -> None:
    """A figure with a bracket at each side, `width` across."""
    drawn = _cut_out(figure, width)
    drawn = drawn.resize((round(width * 0.98 * drawn.width / drawn.height), round(width * 0.98)))
    page.paste(drawn, (centre[0] - drawn.width // 2, centre[1] - drawn.height // 2), drawn)
    draw = ImageDraw.Draw(page)
    half, deep, high = width / 2, width * 0.13, width * 0.27
    for side in (-1, 1):
        outer, inner = centre[0] + side * half, centre[0] + side * (half - deep)
        _thick(draw, [(inner, centre[1] - high), (outer, centre[1]), (inner, centre[1] + high)], width * 0.055, colour)


def _thick(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], width: float, colour: Colour) -> None:
    """A line with round ends."""
    draw.line(points, fill=colour, width=round(width), joint="curve")
    for x, y in (points[0], points[-1]):
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=colour)


def _cut_out(figure: world.Figure, size: int) -> Image.Image:
    """The figure alone, RGBA, as large as it is in a picture of that size."""
    look = world.Look("smiling", "plush", "waving", "front", "nothing")
    drawn = drawing.render([figure], [look], "room", "flat", random.Random(4), size=size)
    alpha = Image.fromarray((drawn.regions > 0).astype("uint8") * 255)
    cut = drawn.image.convert("RGBA")
    cut.putalpha(alpha)
    return cut.crop(alpha.getbbox())
