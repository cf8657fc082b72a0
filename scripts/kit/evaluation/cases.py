"""What is measured: conditions, cases of held-out figures, and the probe's scores of their pictures."""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo import data, models, shipped, world
from demo.lessons import other_entry
from nested_core.files import whole

from ..paths import REPO
from . import METHODS

Told = dict[str, list[int]]
"""What the probe says of a case's pictures, by question."""

WITHOUT_SUBJECT = ("none",)
AXES = ("scene", "style", *world.LOOKS)
"""What belongs to a picture; with the class, what a prompt asks for."""
WIDE = ("jumping", "dancing")
"""Poses that reach out."""


@dataclass(frozen=True)
class Condition:
    """How pictures are made. encoder: file in models/nested_attention. alpha: factor on the encoder's own.

    apart: strength of Separate Subjects. negative: what the negative prompt is: "" (nothing), "word" (the class word)
    or "black" (the class word, and on it the tokens of a black picture).

    touching: two subjects in poses that reach out, with an umbrella: they touch.
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


@dataclass(frozen=True)
class Case:
    """What is asked for, of held-out figures; the seed of its pictures; and what each figure's reference shows, which
    differs from that in every axis."""

    entry: data.Entry
    seed: int
    references: tuple[data.Entry, ...]


@dataclass
class Scores:
    """Per case, the mean over its pictures. right: by question of the probe. pairs: own, swapped, neither."""

    right: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.right.setdefault(name, []).append(value)

    def interval(self, name: str) -> tuple[float, float, float]:
        """Mean and 95 % interval, by resampling cases."""
        values = np.array(self.right[name])
        draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
        low, high = np.quantile(draws, (0.025, 0.975))
        return float(values.mean()), float(low), float(high)


class Bench(ABC):
    """Makes the pictures of conditions and has them judged. What is known already is not made again."""

    def __init__(self, encoders: dict[str, Path], identities: int, seeds: int, known: Path) -> None:
        """encoders: files by name. identities: held-out subjects. seeds: pictures per subject and condition. known: the
        folder where the probe's answers are kept."""
        self.encoders, self.identities, self.seeds, self.known = encoders, identities, seeds, known
        self.probe = models.load_probe(shipped.WEIGHTS / shipped.PROBE)
        # Answers are kept for what made them: the models and our code.
        sources = [
            *(path for path in (REPO / "nested_core").rglob("*.py") if "training" not in path.parts),
            *(REPO / "nodes").glob("*.py"),
            *(REPO / "demo" / "comfyui").glob("*.py"),
            *(REPO / "demo" / "drawing").glob("*.py"),
            *(REPO / "demo" / name for name in ("world.py", "models.py", "sampling.py")),
        ]
        digest = hashlib.sha256()
        for path in sorted([*sources, *shipped.WEIGHTS.glob("*.safetensors")]):
            digest.update(path.read_bytes())
        self.stamp = digest.hexdigest()
        self.trained = {(f.kind, *f.identity) for f in data.drawn_figures(data.PICTURES, 0)}

    @abstractmethod
    def pictures(self, condition: Condition, cases: Sequence[Case]) -> Iterable[np.ndarray]:
        """The pictures of each case, uint8 (seeds, H, W, 3)."""

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

    def measure(self, condition: Condition, share: float = 1.0) -> Scores:
        """Scores of a condition."""
        scores, cases = Scores(), self.cases(condition.pair, share, condition.touching)
        for case, told in zip(cases, self._told(condition, cases), strict=True):
            self._score(case, {name: np.array(values) for name, values in told.items()}, scores)
        return scores

    def _told(self, condition: Condition, cases: Sequence[Case]) -> list[Told]:
        said = json.dumps([type(self).__name__, self.stamp, asdict(condition), len(cases), self.seeds])
        digest = hashlib.sha256(said.encode())
        digest.update(self.encoders[condition.encoder].read_bytes() if condition.encoder else b"")
        path = self.known / f"{digest.hexdigest()[:24]}.json"
        if not path.is_file():
            told = [self._judge(pixels) for pixels in self.pictures(condition, cases)]
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as part:
                part.write_text(json.dumps(told), "utf-8")
        return json.loads(path.read_text("utf-8"))

    @torch.no_grad()
    def _judge(self, pixels: np.ndarray) -> Told:
        out = self.probe(models.normalise(torch.from_numpy(pixels)))
        return {name: logits.argmax(-1).tolist() for name, logits in out.items()}

    def _score(self, case: Case, told: dict[str, np.ndarray], scores: Scores) -> None:
        figures, truth = case.entry.figures, models.labels(case.entry)
        scores.add("class", float(np.mean([[told[f"{k}.present"] == truth[f"{k}.present"]] for k in world.KINDS])))
        for axis in AXES:
            asked = [axis] if axis in truth else [f"{figure.kind}.{axis}" for figure in figures]
            scores.add(axis, float(np.mean([told[name] == truth[name] for name in asked])))
            theirs = [models.labels(reference) for reference in case.references]
            copied = [
                told[name] == reference[name] for reference in theirs for name in asked if reference.get(name, -1) >= 0
            ]
            scores.add(f"copied {axis}", float(np.mean(copied)))
        scores.add("alignment", float(np.mean([scores.right[name][-1] for name in ("class", *AXES)])))
        scores.add("copied", float(np.mean([scores.right[f"copied {axis}"][-1] for axis in AXES])))
        for name in world.ATTRIBUTES:
            rights = [told[f"{f.kind}.{name}"] == truth[f"{f.kind}.{name}"] for f in figures]
            scores.add(name, float(np.mean(rights)))
        scores.add("identity", float(np.mean([scores.right[name][-1] for name in world.ATTRIBUTES])))
        if len(figures) == 1:
            self._remember(figures[0], told, scores)
        else:
            self._separate(figures, told, scores)

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

    def methods(self) -> list[str]:
        """Those of METHODS that can be measured."""
        return [name for name in METHODS if name in WITHOUT_SUBJECT or name in self.encoders]

    def condition(self, method: str, **changes: Any) -> Condition:
        return Condition(method, "" if method in WITHOUT_SUBJECT else method, **changes)
