"""The small world for the quickstart, the tests and the evaluation: its shipped models, and pictures of its figures.

The models are small ones that `demo/train.py` trained from nothing on drawn robots and creatures, and lie in
`demo/weights`. ComfyUI's stock loaders open them once `demo/comfyui` is among its custom nodes.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _setup
from _graphs import Shown
from _setup import REPO, SetupError

DEMO = REPO / "demo"
sys.path += [str(folder) for folder in (DEMO, REPO) if str(folder) not in sys.path]

import world  # noqa: E402
from shipped import CHECKPOINT, ENCODER, VISION, WEIGHTS  # noqa: E402

if TYPE_CHECKING:
    pass

SIZE = world.SIZE
EXTENSION = "nested-attention-small-world"
_FOLDERS = {CHECKPOINT: "checkpoints", VISION: "clip_vision", ENCODER: "nested_attention"}


def link_packs(host: Path) -> list[str]:
    """Links this pack and the small world's loader into a ComfyUI; returns their folders' names, the pack's first."""
    return [_setup.link_pack(host), _setup.link_pack(host, EXTENSION, DEMO / "comfyui")]


def provide_models(models: Path, weights: Path = WEIGHTS) -> dict[str, str]:
    """Puts the shipped models into the folders of a ComfyUI models folder, where they are not there as shipped.

    This is the one place that says which models the quickstart uses. Returns their names by the graph's input.
    """
    for name, folder in _FOLDERS.items():
        shipped, placed = weights / name, models / folder / name
        if not shipped.is_file():
            raise SetupError(f"{shipped} is missing: get the repository again, or make it with python demo/train.py.")
        if placed.is_file() and placed.read_bytes() == shipped.read_bytes():
            continue
        placed.parent.mkdir(parents=True, exist_ok=True)
        temporary = placed.with_suffix(".part")
        shutil.copyfile(shipped, temporary)
        os.replace(temporary, placed)
    return {"ckpt_name": CHECKPOINT, "clip_name": VISION, "encoder_name": ENCODER}


def held_out_figures(seed: int, count: int, kind: str | None = None) -> list[world.Figure]:
    """Figures that no training saw."""
    rng = random.Random(f"held out {seed}")
    return [world.random_figure(rng, kind, held_out=True) for _ in range(count)]


def portrait(figure: world.Figure, seed: int) -> world.Picture:
    """A reference picture: the figure large, in some scene and style."""
    rng = random.Random(f"portrait {figure} {seed}")
    return world.render([figure], rng.choice(world.SCENES), rng.choice(world.STYLES), rng, close=True)


def write_portraits(figures: Sequence[world.Figure], folder: Path, views: int = 1) -> list[Shown]:
    """Writes reference pictures into an input folder; the figures as subjects, bound to <robot> or <creature>."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for figure in figures:
        files = []
        for view in range(views):
            name = "_".join([figure.kind, *figure.identity, str(view)]) + ".png"
            portrait(figure, view + 1).image.save(folder / name)
            files.append(name)
        shown.append(Shown(tuple(files), f"<{figure.kind}>", figure.kind))
    return shown


def prompt(subjects: Sequence[Shown], scene: str, style: str, bound: bool = True) -> str:
    """The prompt for subjects in a scene; with `bound` False their class words stand for them."""
    return world.prompt([s.placeholder if bound else s.class_word for s in subjects], scene, style)
