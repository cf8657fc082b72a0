"""The methods side by side: what each makes of the same photo, prompts and noise."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from demo import data, world
from demo.world import Look

from .. import small_world
from . import METHODS
from .batched import Batched
from .cases import Case, Condition
from .parts import AS_SHIPPED, REGIMES

#: What is asked for, column by column: a look, a scene, a style.
ASKED = (
    (Look("smiling", "plush", "waving", "front", "balloon"), "forest", "flat"),
    (Look("angry", "metal", "jumping", "left", "flag"), "space", "comic"),
    (Look("sad", "wooden", "sitting", "right", "umbrella"), "beach", "watercolour"),
    (Look("surprised", "glass", "dancing", "front", "lantern"), "city", "neon"),
    (Look("smiling", "wooden", "standing", "right", "nothing"), "room", "pencil"),
)
SUBJECT = (7, "robot")
COST = 0.05
"""Of alignment, against no subject: how strong each method is."""


def write_sheet(bench: Batched, path: Path, strengths: dict[str, float], seed: int = 5) -> None:
    """A PNG: a photo, and a row of ASKED per method. strengths: by the titles of the frontier's lines."""
    cases = cases_of(*SUBJECT, seed)
    rows = conditions(bench, strengths)
    page = Figure(figsize=(2.0 * (len(ASKED) + 1), 2.06 * len(rows) + 0.6), dpi=110, layout="constrained")
    grid = page.subplots(len(rows), len(ASKED) + 1, squeeze=False)
    photo = small_world.portrait(cases[0].entry.figures[0], 1, cases[0].references[0]).image
    for row, (title, condition) in enumerate(rows):
        made = list(bench.pictures(condition, [(case, 0) for case in cases]))
        _fill(grid[row], [np.asarray(photo), *made], title, show_first=row == 0)
    for axes, case in zip(grid[0][1:], cases, strict=True):
        asked = data.plain_prompt(case.entry).replace(SUBJECT[1], "<subject>")
        axes.set_title("\n".join(textwrap.wrap(asked, 26)), fontsize=7.5)
    grid[0][0].set_title("photo", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path)


def conditions(bench: Batched, strengths: dict[str, float]) -> list[tuple[str, Condition]]:
    """Title and condition of each row: the shipped encoder, those that learned from other pictures, no subject."""
    regime = next(regime for regime in REGIMES if regime)
    rows = [(f"{METHODS['nested']}, {AS_SHIPPED}", bench.shipped())]
    rows += [
        (METHODS[method], Condition(method, f"{method}{regime}"))
        for method in [*METHODS][::-1]
        if f"{method}{regime}" in bench.encoders
    ]
    lines = [rows[0][0], *(f"{title}, {REGIMES[regime]}" for title, _ in rows[1:])]
    rows = [(title, replace(of, strength=strengths[line])) for (title, of), line in zip(rows, lines, strict=True)]
    return [*rows, (METHODS["none"], bench.condition("none"))]


def cases_of(number: int, kind: str, seed: int) -> list[Case]:
    """A held-out figure as each column asks for it. Its one photo is in a scene and style of none of them, and has
    nothing of the first one's look."""
    (figure,) = small_world.held_out_figures(number, 1, kind)
    entries = [data.Entry([figure], [look], scene, style) for look, scene, style in ASKED]
    rng = random.Random(f"sheet {number}")
    style = next(style for style in world.STYLES if style not in {entry.style for entry in entries})
    scene = next(scene for scene in world.SCENES if scene not in {entry.scene for entry in entries})
    reference = data.Entry([figure], [world.other_look(rng, entries[0].looks[0], style)], scene, style)
    return [Case(entry, seed + i, (reference,)) for i, entry in enumerate(entries)]


def _fill(row: Sequence[Any], pictures: Sequence[np.ndarray], title: str, show_first: bool) -> None:
    for i, (axes, picture) in enumerate(zip(row, pictures, strict=True)):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if i or show_first:
            axes.imshow(picture, interpolation="lanczos")
    row[0].set_ylabel("\n".join(textwrap.wrap(title, 16)), fontsize=9)
