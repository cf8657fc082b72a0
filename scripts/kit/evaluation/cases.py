"""What is measured: conditions, cases of held-out figures, and the probe's scores of their pictures."""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo import data, models, shipped, world
from demo.encoders import SHIPPED
from demo.lessons import other_entry
from nested_core.files import whole

from ..paths import REPO

Told = dict[str, list[int]]
"""What the probe says of a case's pictures, by question."""

WITHOUT_SUBJECT = ("none", "drawn")
AXES = ("scene", "style", *world.LOOKS)
"""What belongs to a picture; with the class, what a prompt asks for."""
GROUPS = {"alignment": ("class", *AXES), "on the figure": tuple(world.LOOKS), "around it": ("scene", "style")}
WIDE = ("jumping", "dancing")
"""Poses that reach out."""
_NOTHING = world.LOOKS["held"].index("nothing")
_WEIGHTS = (shipped.CHECKPOINT, shipped.VISION, shipped.PROBE)
_CASES = (
    "demo/drawing", "demo/world.py", "demo/data.py", "demo/lessons.py", "demo/models.py", "scripts/kit/small_world.py",
)  # fmt: skip
"""What decides the cases, and how they are judged."""


@dataclass(frozen=True)
class Condition:
    """How pictures are made. method: of METHODS, or "drawn": what was asked for, as drawn, through the codec.

    encoder: a name of the bench's. alpha: factor on the encoder's own.

    apart: strength of Separate Subjects. negative: what the negative prompt is: "" (nothing), "word" (the class word)
    or "black" (the class word, and on it the tokens of a black picture).

    touching: two subjects in poses that reach out, with an umbrella: they touch.

    word_first: no word of a subject's look stands before its class word.
    """

    method: str
    encoder: str = ""
    strength: float = 1.0
    alpha: float = 1.0
    focus: float = 1.0
    separation: float = 0.0
    apart: float = 0.0
    views: int = 1
    pair: bool = False
    touching: bool = False
    cfg: float = 4.0
    negative: str = ""
    word_first: bool = False


@dataclass(frozen=True)
class Case:
    """What is asked for, of held-out figures; the seed of its pictures; and what each figure's reference shows, which
    differs from that in every axis."""

    entry: data.Entry
    seed: int
    references: tuple[data.Entry, ...]

    def noise(self, number: int) -> int:
        """The seed of a picture of it."""
        return self.seed + 10_000 * number


Wanted = tuple[Case, int]
"""A picture: the case, and the number of its noise."""


@dataclass
class Scores:
    """Per case, the mean over its pictures; NaN where it can't tell. right: by question. of: each training's alone,
    where several of the same kind are pooled."""

    right: dict[str, list[float]] = field(default_factory=dict)
    of: list[Scores] = field(default_factory=list)

    def add(self, name: str, value: float) -> None:
        self.right.setdefault(name, []).append(value)

    def interval(self, name: str) -> tuple[float, float, float]:
        """Mean and 95 % interval, by resampling cases."""
        values = np.array(self.right[name])
        values = values[~np.isnan(values)]
        draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
        low, high = np.quantile(draws, (0.025, 0.975))
        return float(values.mean()), float(low), float(high)


def pooled(parts: list[Scores]) -> Scores:
    """Of a case, the mean over trainings: cases are what is resampled."""
    if len(parts) == 1:
        return parts[0]
    return Scores({q: np.mean([part.right[q] for part in parts], 0).tolist() for q in parts[0].right}, parts)


class Bench(ABC):
    """Makes the pictures of conditions and has them judged. What is known already is not made again."""

    sources: tuple[str, ...]
    """What makes the pictures: files and folders of the repository. Answers are kept for them as they are."""

    def __init__(self, encoders: dict[str, Path], identities: int, known: Path) -> None:
        """encoders: files by name. identities: held-out subjects. known: the folder where answers are kept."""
        self.encoders, self.identities, self.known = encoders, identities, known
        self.probe = models.load_probe(shipped.WEIGHTS / shipped.PROBE)
        self.weights = _digest([shipped.WEIGHTS / name for name in _WEIGHTS])
        self.stamp = _digest([REPO / source for source in (*self.sources, *_CASES)]) + self.weights
        self.trained = {(f.kind, *f.identity) for f in data.drawn_figures(data.PICTURES, 0)}

    @abstractmethod
    def pictures(self, condition: Condition, wanted: Sequence[Wanted]) -> Iterator[np.ndarray]:
        """Pictures one by one, uint8 (H, W, 3)."""

    def cases(self, pair: bool, share: float = 1.0, touching: bool = False) -> list[Case]:
        """The same for every condition; a share of them is the first ones."""
        cases = []
        for i in range(max(2, round(self.identities * share))):
            rng = random.Random(f"evaluation {pair} {i}")
            entry = data.random_entry(rng, 2 if pair else 1)
            if touching:
                looks = [replace(look, pose=rng.choice(WIDE), held="umbrella") for look in entry.looks]
                entry = replace(entry, looks=looks)
            references = tuple(other_entry(entry, at, rng) for at in range(len(entry.figures)))
            cases.append(Case(entry, 1000 + i, references))
        return cases

    def measure(self, condition: Condition, share: float = 1.0, noises: Sequence[int] = (0,)) -> Scores:
        """Scores of a condition, a picture for each of `noises` of each case."""
        scores, cases = Scores(), self.cases(condition.pair, share, condition.touching)
        for case, told in zip(cases, self._told(condition, cases, noises), strict=True):
            self._score(case, {name: np.array(values) for name, values in told.items()}, scores)
        return scores

    def _told(self, condition: Condition, cases: Sequence[Case], noises: Sequence[int]) -> list[Told]:
        # Only what differs from the usual names a condition, so that a new field leaves the others' answers.
        usual = {f.name: f.default for f in fields(Condition)}
        said = {name: value for name, value in asdict(condition).items() if value != usual[name]}
        digest = hashlib.sha256(json.dumps([type(self).__name__, self.stamp, said], sort_keys=True).encode())
        digest.update(self.encoders[condition.encoder].read_bytes() if condition.encoder else b"")
        path = self.known / f"{digest.hexdigest()[:24]}.json"
        known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        left = [(case, number) for case in cases for number in noises if _key(case, number) not in known]
        path.parent.mkdir(parents=True, exist_ok=True)
        for (case, number), pixels in zip(left, self.pictures(condition, left) if left else (), strict=True):
            known[_key(case, number)] = self._judge(pixels)
            with whole(path) as part:
                part.write_text(json.dumps(known), "utf-8")
        of = [[known[_key(case, number)] for number in noises] for case in cases]
        return [{name: [told[name] for told in every] for name in every[0]} for every in of]

    @torch.no_grad()
    def _judge(self, pixels: np.ndarray) -> dict[str, int]:
        out = self.probe(models.normalise(torch.from_numpy(pixels.copy())[None]))
        return {name: int(logits.argmax()) for name, logits in out.items()}

    def _score(self, case: Case, told: dict[str, np.ndarray], scores: Scores) -> None:
        figures, truth = case.entry.figures, models.labels(case.entry)
        scores.add("class", float(np.mean([[told[f"{k}.present"] == truth[f"{k}.present"]] for k in world.KINDS])))
        for axis in AXES:
            asked = [axis] if axis in truth else [f"{figure.kind}.{axis}" for figure in figures]
            scores.add(axis, float(np.mean([told[name] == truth[name] for name in asked])))
            theirs = [models.labels(reference) for reference in case.references]
            copied = [
                told[name] == reference[name]
                for reference in theirs
                for name in asked
                # Who holds nothing has not copied that from a photo of somebody who holds nothing.
                if reference.get(name, -1) >= 0 and not (axis == "held" and reference[name] == _NOTHING)
            ]
            scores.add(f"copied {axis}", float(np.mean(copied)) if copied else float("nan"))
        for group, axes in GROUPS.items():
            scores.add(group, float(np.mean([scores.right[name][-1] for name in axes])))
        scores.add("copied", float(np.nanmean([scores.right[f"copied {axis}"][-1] for axis in AXES])))
        for name in world.ATTRIBUTES:
            rights = [told[f"{f.kind}.{name}"] == truth[f"{f.kind}.{name}"] for f in figures]
            scores.add(name, float(np.mean(rights)))
        scores.add("identity", float(np.mean([scores.right[name][-1] for name in world.ATTRIBUTES])))
        if len(figures) == 1:
            self._edit(figures[0], told, truth, scores)
            self._remember(figures[0], told, scores)
        else:
            self._separate(figures, told, scores)

    def _edit(self, figure: world.Figure, told: dict[str, np.ndarray], truth: dict[str, int], scores: Scores) -> None:
        """How often a picture shows all five looks that were asked for, and five of six attributes or more."""

        def right(names: Iterable[str]) -> np.ndarray:
            return np.stack([told[f"{figure.kind}.{name}"] == truth[f"{figure.kind}.{name}"] for name in names])

        edited = right(world.LOOKS).all(0) & (right(world.ATTRIBUTES).sum(0) >= len(world.ATTRIBUTES) - 1)
        scores.add("edited", float(np.mean(edited)))

    def _remember(self, figure: world.Figure, told: dict[str, np.ndarray], scores: Scores) -> None:
        """Whether pictures show exactly the held-out figure, or else exactly one of the training pictures' figures."""
        exact, trained = [], []
        for i in range(len(told["scene"])):
            values = [options[told[f"{figure.kind}.{name}"][i]] for name, options in world.ATTRIBUTES.items()]
            seen = world.Figure(figure.kind, *values)
            exact.append(seen == figure)
            trained.append((seen.kind, *seen.identity) in self.trained)
        scores.add("exactly it", float(np.mean(exact)))
        scores.add("exactly a trained one", float(np.mean(trained)))

    def _separate(self, figures: Sequence[world.Figure], told: dict[str, np.ndarray], scores: Scores) -> None:
        """Of the attributes in which two figures differ: whose does each show?"""
        own, swapped = [], []
        for figure, other in (figures, figures[::-1]):
            for name, options in world.ATTRIBUTES.items():
                if getattr(figure, name) != getattr(other, name):
                    shown = told[f"{figure.kind}.{name}"]
                    own.append(shown == options.index(getattr(figure, name)))
                    swapped.append(shown == options.index(getattr(other, name)))
        scores.add("own", float(np.mean(own)))
        scores.add("swapped", float(np.mean(swapped)))
        scores.add("neither", 1 - scores.right["own"][-1] - scores.right["swapped"][-1])

    def condition(self, method: str, **changes: Any) -> Condition:
        return Condition(method, "" if method in WITHOUT_SUBJECT else method, **changes)

    def shipped(self, **changes: Any) -> Condition:
        """With the encoder that is shipped."""
        return Condition("nested", SHIPPED, **changes)


def _digest(paths: Iterable[Path]) -> str:
    """Of files, and of the code in folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _key(case: Case, number: int) -> str:
    return hashlib.sha256(repr((case, number)).encode()).hexdigest()[:16]
