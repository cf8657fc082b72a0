"""The chart of a search: how far above the best each combination is, with its interval."""

from __future__ import annotations

from PIL import Image, ImageDraw
from torch import Tensor

from ..figures import FAINT, INK, PALETTE, PAPER, to_tensor, typeface
from .search import Found
from .statistics import interval
from .verdict import WORDS, Line, open_settings, shown, table

_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 1200, 470, 130, 34, 108


def chart(found: Found, name: str, verdict: str) -> Tensor:
    """(H, 1200, 3), 0 to 1. name: of the encoder's file. verdict: one line."""
    lines = table(found)
    bottom = _TOP + _ROW * len(lines)
    sheet = Image.new("RGB", (_WIDTH, bottom + 92), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((28, 18), f"{name}: {verdict}", INK, typeface(24))
    draw.text((28, 58), f"Error above the best: mean and 95 % interval, {found.photos} photos", FAINT, typeface(18))
    draw.text((_WIDTH - _RIGHT + 20, 58), "chance", FAINT, typeface(18))
    ends = [interval(line.differences) for line in lines]
    least, most = min(0.0, *(low for low, _ in ends)), max(high for _, high in ends)
    across = (_WIDTH - _LEFT - _RIGHT) / max(most - least, 1e-9)
    zero = _LEFT - least * across
    draw.line((zero, _TOP - 6, zero, bottom), FAINT, 1)
    for row, line in enumerate(lines):
        _draw_line(draw, line, _TOP + _ROW * row + _ROW // 2, zero, across, first=row == 0)
    step = next((s for s in _STEPS if (most - least) / s <= 8), _STEPS[-1])
    for i in range(int(least / step), int(most / step) + 1):
        at = zero + step * i * across
        draw.line((at, bottom, at, bottom + 6), FAINT, 1)
        draw.text((at, bottom + 10), f"{step * i * 100:g} %", FAINT, typeface(16), anchor="ma")
    sure = [f"{WORDS[s]} {shown(found, s)}: {found.certainty(s):.0%}" for s in open_settings(found)]
    draw.text((28, bottom + 48), "How sure:  " + "     ".join(sure), INK, typeface(19))
    return to_tensor(sheet)


def _draw_line(draw: ImageDraw.ImageDraw, line: Line, y: int, zero: float, across: float, first: bool) -> None:
    low, high = (zero + end * across for end in interval(line.differences))
    colour = PALETTE[2] if first else PALETTE[1] if line.chance is not None else PALETTE[0]
    draw.text((_LEFT - 24, y), line.title, INK if first or line.chance is None else FAINT, typeface(17), anchor="rm")
    draw.line((low, y, high, y), colour, 3)
    mean = zero + float(line.differences.mean()) * across
    draw.ellipse((mean - 6, y - 6, mean + 6, y + 6), colour)
    if line.chance is not None:
        draw.text((_WIDTH - _RIGHT + 20, y), f"{line.chance:.0%}", INK if first else FAINT, typeface(17), anchor="lm")
