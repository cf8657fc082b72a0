"""Makes the pictures of the evaluation in a server, keeps them, and scores them by the probe."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from demo import data, drawing, models, shipped, world
from demo.lessons import other_entry
from nested_core.checkpoint import read_encoder

from .. import small_world
from ..graphs import Graph, Shown, node, run_graph, saved_pictures, subject_graph
from ..paths import REPO
from ..server import Server
from . import METHODS

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


class Bench:
    """Makes pictures of conditions in the server, keeps them, and scores them."""

    def __init__(
        self, server: Server, names: dict[str, str], encoders: dict[str, str], identities: int, seeds: int = 3
    ) -> None:
        """encoders: files by name. identities: held-out subjects. seeds: pictures per subject and condition."""
        self.server, self.names, self.encoders = server, names, encoders
        self.identities, self.seeds = identities, seeds
        self.probe = models.load_probe(shipped.WEIGHTS / shipped.PROBE)
        # Pictures are kept for what made them: the models, our code, and the graph.
        sources = [
            *(path for path in (REPO / "nested_core").rglob("*.py") if "training" not in path.parts),
            *(REPO / "nodes").glob("*.py"),
            *(REPO / "demo" / "comfyui").glob("*.py"),
            *(REPO / "demo" / "drawing").glob("*.py"),
            *(REPO / "demo" / name for name in ("world.py", "models.py")),
        ]
        weights = [path for path in shipped.WEIGHTS.glob("*.safetensors") if path.name != shipped.PROBE]
        digest = hashlib.sha256()
        for path in sorted([*sources, *weights]):
            digest.update(path.read_bytes())
        self.stamp = digest.hexdigest()
        self.trained = {(f.kind, *f.identity) for f in data.drawn_figures(data.PICTURES, 0)}

    def cases(self, pair: bool, share: float = 1.0, touching: bool = False) -> list[Case]:
        """The same for every condition; a share of them is the first ones."""
        cases = []
        for i in range(max(2, round(self.identities * share))):
            rng = random.Random(f"evaluation {pair} {i}")
            entry = data.random_entry(rng, 2 if pair else 1)
            if touching:
                entry.looks = [replace(look, pose=rng.choice(WIDE), held="umbrella") for look in entry.looks]
            references = tuple(other_entry(entry, at, rng) for at in range(len(entry.figures)))
            cases.append(Case(entry, 1000 + i, references))
        return cases

    def measure(self, condition: Condition, share: float = 1.0) -> Scores:
        """Scores of a condition; pictures that are there already are not made again."""
        scores = Scores()
        title = f"{condition.method} x{condition.strength:g} α{condition.alpha:g} {condition.encoder[:24]}"
        for case in tqdm(self.cases(condition.pair, share, condition.touching), desc=title, mininterval=2):
            self.score(case, self.pictures(condition, case), scores)
        return scores

    def pictures(self, condition: Condition, case: Case) -> list[Path]:
        """The pictures of a case, one for each seed."""
        graph = self.graph(condition, case)
        encoder = self.server_models() / self.encoders.get(condition.encoder, "")
        digest = hashlib.sha256(f"{self.stamp} {json.dumps(graph, sort_keys=True)}".encode())
        digest.update(encoder.read_bytes() if condition.encoder else b"")
        folder = self.server.work / "pictures" / digest.hexdigest()[:24]
        made = [folder / f"{i}.png" for i in range(self.seeds)]
        if not all(path.is_file() for path in made):
            folder.mkdir(parents=True, exist_ok=True)
            saved = saved_pictures(self.server, asyncio.run(run_graph(self.server, graph, True)))
            for source, target in zip(saved, made, strict=True):
                shutil.move(source, target)
        return made

    def server_models(self) -> Path:
        assert self.server.models
        return self.server.models / "nested_attention"

    def graph(self, condition: Condition, case: Case) -> Graph:
        entry = case.entry
        shown = small_world.write_portraits(entry.figures, self.server.input, condition.views, case.references)
        shown = [replace(subject, strength=condition.strength) for subject in shown]
        bound = condition.method in ("nested", "one_value")
        prompt = small_world.prompt(shown, entry.scene, entry.style, entry.looks, bound)
        subjects: Sequence[Shown] = () if condition.method in WITHOUT_SUBJECT else shown
        names = {**self.names, "encoder_name": self.encoders.get(condition.encoder, "")}
        negative = f"a {shown[0].class_word}" if condition.negative else ""
        graph = subject_graph(
            names, prompt, subjects, negative=negative, cfg=condition.cfg, seed=case.seed, batch=self.seeds,
            prefix="evaluation/picture",
        )  # fmt: skip
        graph = {key: value for key, value in graph.items() if not key.startswith("seen")}
        if condition.method == "decoupled":
            _decouple(graph, len(subjects))
        elif condition.alpha != 1 or condition.focus != 1 or condition.separation or condition.negative == "black":
            self._turn_knobs(graph, condition)
        if condition.negative == "black":
            self._connect_black(graph)
        if condition.apart:
            (sampler,) = [place for place in graph.values() if place["class_type"] == "KSampler"]
            inputs = {"model": sampler["inputs"]["model"], "strength": condition.apart}
            graph["apart"] = node("NestedSeparateSubjects", **inputs, start_percent=0.0, end_percent=1.0)
            sampler["inputs"]["model"] = ["apart", 0]
        return graph

    def _turn_knobs(self, graph: Graph, condition: Condition) -> None:
        own = read_encoder(self.server_models() / self.encoders[condition.encoder])[0].alpha
        for place in graph.values():
            if place["class_type"] == "NestedApplySubject":
                place["class_type"] = "NestedApplySubjectAdvanced"
                place["inputs"] |= {
                    "identity": round(own * condition.alpha, 2), "focus": condition.focus,
                    "value_norm": "encoder's own", "layer_weights": "", "when_unmentioned": "stop",
                    "separation": condition.separation,
                }  # fmt: skip

    def _connect_black(self, graph: Graph) -> None:
        """A black picture as what the subjects are in the negative prompt."""
        encode = graph["subject0"]
        size = {"width": drawing.SIZE, "height": drawing.SIZE, "batch_size": 1, "color": 0}
        graph["black_picture"] = node("EmptyImage", **size)
        graph["black"] = {**encode, "inputs": {**encode["inputs"], "image": ["black_picture", 0]}}
        for place in graph.values():
            if place["class_type"] == "NestedApplySubjectAdvanced":
                place["inputs"]["unconditional"] = ["black", 0]

    def score(self, case: Case, files: Iterable[Path], scores: Scores) -> None:
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        with torch.no_grad():
            out = self.probe(models.normalise(torch.from_numpy(pixels)))
        told, figures = {name: logits.argmax(-1).numpy() for name, logits in out.items()}, case.entry.figures
        truth = models.labels(case.entry)
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


def _decouple(graph: Graph, subjects: int) -> None:
    """The baseline node in place of Apply Subject; prompts come from the stock CLIP."""
    model: list[Any] = ["checkpoint", 0]
    for i in range(subjects):
        strength = graph.pop(f"apply{i}")["inputs"]["strength"]
        graph[f"apply{i}"] = node("DecoupledSubject", model=model, subject=[f"subject{i}", 0], strength=strength)
        model = [f"apply{i}", 0]
    for name in ("positive", "negative"):
        graph[name]["inputs"]["clip"] = ["checkpoint", 1]
