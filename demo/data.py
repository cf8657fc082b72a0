"""Drawn pictures for the small world's trainings, kept as memory-mapped arrays so that a rerun does not draw again."""

from __future__ import annotations

import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nested_core.files import whole

from . import world
from .world import Figure

PICTURES = 24_000  # of a whole training, drawn with its seed


@dataclass(frozen=True)
class Entry:
    """What a picture shows: figures from left to right."""

    figures: list[Figure]
    scene: str
    style: str


@dataclass
class Pictures:
    """pixels uint8 (N, size, size, 3), regions uint8 (N, size, size) as in `world.Picture`, and what they show."""

    pixels: np.ndarray
    regions: np.ndarray
    entries: list[Entry]

    def __len__(self) -> int:
        return len(self.entries)


def _figures(rng: random.Random, portrait: bool, held_out: bool) -> list[Figure]:
    kinds = list(world.KINDS)
    rng.shuffle(kinds)
    count = 1 if portrait or rng.random() < 0.6 else 2
    return [world.random_figure(rng, kind, held_out) for kind in kinds[:count]]


def drawn_figures(count: int, seed: int) -> list[Figure]:
    """The figures in the first `count` pictures of a series that is not held out, without drawing them."""
    return [figure for i in range(count) for figure in _figures(random.Random(f"{seed} {i}"), False, False)]


def _draw(seed: int, index: int, portrait: bool, held_out: bool, size: int) -> tuple[np.ndarray, np.ndarray, Entry]:
    rng = random.Random(f"{seed} {index}")
    figures = _figures(rng, portrait, held_out)
    entry = Entry(figures, rng.choice(world.SCENES), rng.choice(world.STYLES))
    picture = world.render(figures, entry.scene, entry.style, rng, close=portrait)
    image, regions = picture.image, picture.regions
    if size != world.SIZE:
        image = image.resize((size, size))
        regions = regions[:: world.SIZE // size, :: world.SIZE // size]
    return np.asarray(image), regions, entry


def _draw_many(arguments: tuple[int, int, int, bool, bool, int]) -> list[tuple[np.ndarray, np.ndarray, Entry]]:
    seed, start, stop, portrait, held_out, size = arguments
    return [_draw(seed, i, portrait, held_out, size) for i in range(start, stop)]


def pictures(folder: Path, name: str, count: int, seed: int, *, portrait: bool = False, held_out: bool = False,
             size: int = world.SIZE) -> Pictures:  # fmt: skip
    """`count` pictures, drawn unless an earlier call drew them. Portraits show one figure, large.

    Every picture has its own seed, so the first ones of a longer series are the same.
    """
    about = folder / f"{name}.json"
    key = [count, seed, portrait, held_out, size, world.words(), world.VERSION]
    shapes = {"pixels": (count, size, size, 3), "regions": (count, size, size)}
    paths = {part: folder / f"{name}.{part}.u8" for part in shapes}
    if not about.is_file() or json.loads(about.read_text("utf-8"))["key"] != key:
        folder.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)  # what it says is about to be overwritten
        arrays = {part: np.memmap(paths[part], np.uint8, "w+", shape=shape) for part, shape in shapes.items()}
        entries: list[Entry] = []
        jobs = [(seed, i, min(i + 250, count), portrait, held_out, size) for i in range(0, count, 250)]
        with ProcessPoolExecutor(os.cpu_count()) as pool, tqdm(total=count, desc=f"drawing {name}") as bar:
            for done in pool.map(_draw_many, jobs):
                for pixels, regions, entry in done:
                    arrays["pixels"][len(entries)], arrays["regions"][len(entries)] = pixels, regions
                    entries.append(entry)
                bar.update(len(done))
        for array in arrays.values():
            array.flush()
        with whole(about) as part:  # last: a picture file without it is drawn anew
            part.write_text(json.dumps({"key": key, "entries": [asdict(entry) for entry in entries]}), "utf-8")
    found = json.loads(about.read_text("utf-8"))["entries"]
    entries = [Entry([Figure(**figure) for figure in e["figures"]], e["scene"], e["style"]) for e in found]
    mapped = {part: np.memmap(paths[part], np.uint8, "r", shape=shape) for part, shape in shapes.items()}
    return Pictures(mapped["pixels"], mapped["regions"], entries)


def random_entry(rng: random.Random, figures: int = 1, held_out: bool = True) -> Entry:
    """Figures (by default of the held-out set) in a scene and style, with nothing drawn yet."""
    kinds = rng.sample(world.KINDS, figures)
    return Entry(
        [world.random_figure(rng, kind, held_out) for kind in kinds],
        rng.choice(world.SCENES),
        rng.choice(world.STYLES),
    )


def plain_prompt(entry: Entry) -> str:
    """The prompt that names the classes, the scene and the style, and no attribute."""
    return world.prompt([figure.kind for figure in entry.figures], entry.scene, entry.style)
