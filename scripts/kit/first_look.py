"""The figure at the top of the README: photo, prompt, picture, and the picture of the same prompt without the subject.

Drawn at twice the size at which it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .graphs import Shown

FILE = "first_look.png"
_SIDE, _PAD, _GAP, _PROMPT, _HEAD = 380, 36, 36, 356, 66
_WIDTH = 2 * _PAD + 3 * _SIDE + _PROMPT + 3 * _GAP
ROOM, PAPER, GREY, WHITE = (27, 29, 35), (40, 43, 52), (160, 166, 180), (236, 238, 243)
#: Of the first and the second subject: the frame of its photo and its word in the prompt.
COLOURS = ((255, 196, 61), (94, 200, 242))


class Row(NamedTuple):
    """One run: the subjects with their photos, the prompt, and its picture with and without them."""

    subjects: Sequence[Shown]
    photos: Sequence[Image.Image]
    prompt: str
    bound: Image.Image
    plain: Image.Image


def first_look(rows: Sequence[Row]) -> Image.Image:
    """The figure; RGBA, with round corners."""
    size = _WIDTH, 2 * _PAD + _HEAD + len(rows) * (_SIDE + _GAP) - _GAP
    figure = Image.new("RGBA", size)
    draw = ImageDraw.Draw(figure)
    draw.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), 28, fill=ROOM)
    left = [_PAD]
    for width in (_SIDE, _PROMPT, _SIDE):
        left.append(left[-1] + width + _GAP)
    titles = ("photo", "prompt", "picture", "without the subject")
    for x, width, title in zip(left, (_SIDE, _PROMPT, _SIDE, _SIDE), titles, strict=True):
        draw.text((x + width / 2, _PAD), title, fill=GREY, font=ImageFont.load_default(34), anchor="ma")
    for number, row in enumerate(rows):
        top = _PAD + _HEAD + number * (_SIDE + _GAP)
        _photos(figure, row.photos, left[0], top)
        _prompt(draw, row, left[1], top)
        for x, picture in ((left[2], row.bound), (left[3], row.plain)):
            _paste(figure, picture, x, top, _SIDE)
    return figure


def _paste(figure: Image.Image, picture: Image.Image, x: int, y: int, side: int) -> None:
    corners = Image.new("L", (side, side))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, side - 1, side - 1), 14, fill=255)
    figure.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y), corners)


def _photos(figure: Image.Image, photos: Sequence[Image.Image], x: int, top: int) -> None:
    """The photos side by side, framed in the colours of their words."""
    side = (_SIDE - 20 * (len(photos) - 1)) // len(photos)
    for number, photo in enumerate(photos):
        place = x + number * (side + 20), top + (_SIDE - side) // 2
        _paste(figure, photo, *place, side)
        box = (*place, place[0] + side - 1, place[1] + side - 1)
        ImageDraw.Draw(figure).rounded_rectangle(box, 14, outline=COLOURS[number], width=6)


def _prompt(draw: ImageDraw.ImageDraw, row: Row, x: int, top: int) -> None:
    """The prompt as a text widget, the subjects' words in their colours."""
    font, line, inside = ImageFont.load_default(38), 56, 26
    colours = {subject.placeholder: colour for subject, colour in zip(row.subjects, COLOURS, strict=False)}
    lines: list[list[str]] = [[]]
    for word in re.findall(r"\S+", row.prompt):
        if font.getlength(" ".join([*lines[-1], word])) > _PROMPT - 2 * inside:
            lines.append([])
        lines[-1].append(word)
    height = 2 * inside + line * len(lines)
    y = top + (_SIDE - height) // 2
    draw.rounded_rectangle((x, y, x + _PROMPT - 1, y + height - 1), 14, fill=PAPER)
    for number, words in enumerate(lines):
        at = float(x + inside)
        for word in words:
            place = at, y + inside + line * number + line / 2
            draw.text(place, word, fill=colours.get(word, WHITE), font=font, anchor="lm")
            at += font.getlength(f"{word} ")
