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

from . import drawing, world
from .world import Figure, Look

PICTURES = 24_000  # of a whole training, drawn with its seed


@dataclass(frozen=True)
class Entry:
    """What a picture shows: figures from left to right, each in its look."""

    figures: list[Figure]
    looks: list[Look]
    scene: str
    style: str


@dataclass
class Pictures:
    """pixels uint8 (N, size, size, 3), regions uint8 (N, size, size) as in `drawing.Picture`, and what they show."""

    pixels: np.ndarray
    regions: np.ndarray
    entries: list[Entry]

    def __len__(self) -> int:
        return len(self.entries)


def random_entry(rng: random.Random, figures: int = 1, held_out: bool = True) -> Entry:
    """Figures, and looks in a style (by default of the held-out sets) in a scene, with nothing drawn yet."""
    scene, style = rng.choice(world.SCENES), rng.choice(world.STYLES)
    kinds = rng.sample(world.KINDS, figures)
    return Entry(
        [world.random_figure(rng, kind, held_out) for kind in kinds],
        [world.random_look(rng, style, held_out) for _ in kinds],
        scene,
        style,
    )


def _entry(rng: random.Random, held_out: bool) -> Entry:
    return random_entry(rng, 1 if rng.random() < 0.65 else 2, held_out)


def draw(entry: Entry, rng: random.Random) -> drawing.Picture:
    return drawing.render(entry.figures, entry.looks, entry.scene, entry.style, rng)


def drawn_figures(count: int, seed: int) -> list[Figure]:
    """The figures in the first `count` pictures of a series that is not held out, without drawing them."""
    return [figure for i in range(count) for figure in _entry(random.Random(f"{seed} {i}"), False).figures]


def _draw(seed: int, index: int, held_out: bool) -> tuple[np.ndarray, np.ndarray, Entry]:
    rng = random.Random(f"{seed} {index}")
    entry = _entry(rng, held_out)
    picture = draw(entry, rng)
    return np.asarray(picture.image), picture.regions, entry


def _draw_many(arguments: tuple[int, int, int, bool]) -> list[tuple[np.ndarray, np.ndarray, Entry]]:
    seed, start, stop, held_out = arguments
    return [_draw(seed, i, held_out) for i in range(start, stop)]


def pictures(folder: Path, name: str, count: int, seed: int, *, held_out: bool = False) -> Pictures:
    """`count` pictures, drawn unless an earlier call drew them.

    Every picture has its own seed, so the first ones of a longer series are the same.
    """
    about = folder / f"{name}.json"
    size = drawing.SIZE
    key = [count, seed, held_out, world.words(), drawing.VERSION]
    shapes = {"pixels": (count, size, size, 3), "regions": (count, size, size)}
    paths = {part: folder / f"{name}.{part}.u8" for part in shapes}
    if not about.is_file() or json.loads(about.read_text("utf-8"))["key"] != key:
        folder.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)  # what it says is about to be overwritten
        arrays = {part: np.memmap(paths[part], np.uint8, "w+", shape=shape) for part, shape in shapes.items()}
        entries: list[Entry] = []
        jobs = [(seed, i, min(i + 250, count), held_out) for i in range(0, count, 250)]
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
    entries = [
        Entry([Figure(**f) for f in e["figures"]], [Look(**look) for look in e["looks"]], e["scene"], e["style"])
        for e in found
    ]
    mapped = {part: np.memmap(paths[part], np.uint8, "c", shape=shape) for part, shape in shapes.items()}
    return Pictures(mapped["pixels"], mapped["regions"], entries)


def plain_prompt(entry: Entry, word_first: bool = False) -> str:
    """The prompt that names all that a prompt can name: classes with their looks, scene and style.

    word_first: as `world.phrase` has it.
    """
    phrases = [
        world.phrase(figure.kind, look, word_first=word_first)
        for figure, look in zip(entry.figures, entry.looks, strict=True)
    ]
    return world.prompt(phrases, entry.scene, entry.style)
