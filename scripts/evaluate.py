"""The method measured in the small world: pictures sampled in a real ComfyUI through the nodes, scored by the probe.

    python scripts/evaluate.py                    everything; goes on where it stopped
    python scripts/evaluate.py --identities 8     quicker, wider intervals
    python scripts/evaluate.py --only table       without the sweeps (or: pairs, strength, identity, tokens, views)

Subjects are held out of every training; each is sampled with three seeds. Writes docs/evaluation.md and .json, and
docs/images/evaluation.png. Encoders: the shipped one, and those that `demo/train.py` left in its folder: `one_value`
and `decoupled` (the baselines, trained with the same budget), `nested_<N>_tokens` for the sweep of tokens, and any of
them with `_seed<S>` for other training seeds. What is missing is left out, and said.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _setup
from _graphs import Graph, Shown, check_nodes, node, run_graph, saved_pictures, subject_graph
from _setup import NEWEST, REPO, STATE, Server, say

if TYPE_CHECKING:
    import numpy as np

    import world

WORK = STATE / "evaluation"
METHODS = {
    "none": "no subject",
    "described": "every attribute in the prompt",
    "one_value": "one value per token",
    "decoupled": "decoupled attention",
    "nested": "nested attention",
}
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
IDENTITIES = (0.5, 1.0, 2.0)  # of the encoder's own α; the node takes 20 at most
TOKENS = (1, 4, 16, 64)
VIEWS = (1, 2, 4)


@dataclass(frozen=True)
class Condition:
    """How pictures are made. encoder: file in models/nested_attention. alpha: factor on the encoder's own."""

    method: str
    encoder: str = ""
    strength: float = 1.0
    alpha: float = 1.0
    views: int = 1
    pair: bool = False


@dataclass(frozen=True)
class Case:
    """Held-out figures in a scene and style, with the seed of their pictures."""

    figures: tuple[world.Figure, ...]
    scene: str
    style: str
    seed: int


@dataclass
class Scores:
    """Per case, the mean over its pictures. right: by question of the probe. pairs: own, swapped, neither."""

    right: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.right.setdefault(name, []).append(value)

    def interval(self, name: str) -> tuple[float, float, float]:
        """Mean and 95 % interval, by resampling cases."""
        import numpy as np

        values = np.array(self.right[name])
        draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
        low, high = np.quantile(draws, (0.025, 0.975))
        return float(values.mean()), float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--identities", type=int, default=48, help="held-out subjects in the table; half in sweeps")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="only this part (repeatable)")
    parser.add_argument("--run", type=Path, default=REPO / "demo" / "run_shipped", help="folder of demo/train.py")
    arguments = parser.parse_args()
    own = _setup.own_comfyui()
    _setup.enter_environment()
    if own:
        _setup.check_own_environment(own, _setup.test_requirements())
        host = own
    else:
        host = _setup.fetch_host(NEWEST)
        _setup.install([*_setup.host_requirements([host]), *_setup.test_requirements()], "ComfyUI's packages")

    import small_world

    packs = [_setup.link_pack(host), _setup.link_pack(host, small_world.EXTENSION, small_world.DEMO / "comfyui")]
    models = WORK / "models"
    names = small_world.provide_models(models)
    encoders = provide_encoders(arguments.run, models / "nested_attention")
    for wanted in ("one_value", "decoupled", *(f"nested_{n}_tokens" for n in TOKENS if n not in (1, 16))):
        if wanted not in encoders:
            say(f"no encoder {wanted} in {arguments.run}: left out. python demo/train.py --shipped --stage {wanted}")
    server = Server(host, WORK, models=models, only=packs)
    say(f"starting ComfyUI {_setup.version_of(host)}, log in {server.log}")
    with server:
        bench = Bench(server, names, encoders, arguments.identities)
        results = {part: PARTS[part](bench) for part in arguments.only or PARTS}
    write_report(results)
    return 0


def provide_encoders(run: Path, folder: Path) -> dict[str, str]:
    """Puts the trained encoders of a run beside the shipped one. Returns file names by name, "nested" the shipped one.

    The decoupled baseline is no file that Load Nested Encoder opens: here it is written as one, for the baseline node.
    """
    import sys

    import small_world

    sys.path[:0] = [path for path in (str(REPO),) if path not in sys.path]
    import export
    from nested_core.checkpoint import write_encoder
    from nested_core.training import load_trained

    base = export.fingerprint(export.load_checkpoint(small_world.DEMO / "weights" / small_world.CHECKPOINT)[0])
    found = {"nested": small_world.ENCODER}
    for file in sorted(run.glob("*/encoder.safetensors")):
        name = file.parent.name
        if name == "nested":
            continue  # shipped
        if (file.parent / "base.txt").read_text("utf-8") != base:
            say(f"{name} was trained on another base model than the shipped one: left out")
            continue
        steps = json.loads((file.parent / "config.json").read_text("utf-8"))["steps"]
        if not (file.parent / "checkpoints" / f"step-{steps}").is_dir():
            say(f"{name} is not trained to its end, step {steps}: left out")
            continue
        _, encoder = load_trained(file)
        write_encoder(folder / f"{name}.safetensors", encoder)
        found[name] = f"{name}.safetensors"
    return found


class Bench:
    """Makes pictures of conditions in the server, keeps them, and scores them."""

    def __init__(
        self, server: Server, names: dict[str, str], encoders: dict[str, str], identities: int, seeds: int = 3
    ) -> None:
        """encoders: files by name. identities: held-out subjects. seeds: pictures per subject and condition."""
        import sys

        sys.path[:0] = [path for path in (str(REPO),) if path not in sys.path]
        from safetensors.torch import load_file

        import data
        import models

        self.server, self.names, self.encoders = server, names, encoders
        self.identities, self.seeds = identities, seeds
        self.probe = models.Probe()
        self.probe.load_state_dict(load_file(REPO / "demo" / "weights" / "small_world_probe.safetensors"))
        self.probe.eval().float()
        # Pictures are kept for what made them: the models, our code, and the graph.
        sources = [
            *(REPO / "nested_core").rglob("*.py"),
            *(REPO / "nodes").glob("*.py"),
            *(REPO / "demo").rglob("*.py"),
        ]
        shipped = [path for path in (REPO / "demo" / "weights").glob("*.safetensors") if "probe" not in path.name]
        digest = hashlib.sha256()
        for path in sorted([*sources, *shipped]):
            digest.update(path.read_bytes())
        self.stamp = digest.hexdigest()
        self.trained = {(f.kind, *f.identity) for f in data.drawn_figures(24_000, 0)}

    def cases(self, pair: bool, share: float = 1.0) -> list[Case]:
        """The same for every condition; a share of them is the first ones."""
        import data

        cases = []
        for i in range(max(2, round(self.identities * share))):
            rng = random.Random(f"evaluation {pair} {i}")
            entry = data.random_entry(rng, 2 if pair else 1)
            cases.append(Case(tuple(entry.figures), entry.scene, entry.style, 1000 + i))
        return cases

    def measure(self, condition: Condition, share: float = 1.0) -> Scores:
        """Scores of a condition; pictures that are there already are not made again."""
        from tqdm import tqdm

        scores = Scores()
        title = f"{condition.method} x{condition.strength:g} α{condition.alpha:g} {condition.encoder[:24]}"
        for case in tqdm(self.cases(condition.pair, share), desc=title, mininterval=2):
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
        import small_world

        shown = small_world.write_portraits(case.figures, self.server.input, condition.views)
        shown = [replace(subject, strength=condition.strength) for subject in shown]
        prompt = small_world.prompt(shown, case.scene, case.style, bound=condition.method in ("nested", "one_value"))
        if condition.method == "described":
            words = [replace(s, class_word=f.words()) for s, f in zip(shown, case.figures, strict=True)]
            prompt = small_world.prompt(words, case.scene, case.style, bound=False)
        subjects: Sequence[Shown] = () if condition.method in ("none", "described") else shown
        names = {**self.names, "encoder_name": self.encoders.get(condition.encoder, "")}
        graph = subject_graph(names, prompt, subjects, seed=case.seed, batch=self.seeds, prefix="evaluation/picture")
        graph = {key: value for key, value in graph.items() if not key.startswith("seen")}
        if condition.method == "decoupled":
            _decouple(graph, len(subjects))
        elif condition.alpha != 1:
            self._set_alpha(graph, condition)
        if not hasattr(self, "checked"):
            check_nodes(self.server, graph)
            self.checked = True
        return graph

    def _set_alpha(self, graph: Graph, condition: Condition) -> None:
        from nested_core.checkpoint import read_encoder

        own = read_encoder(self.server_models() / self.encoders[condition.encoder])[0].alpha
        for place in graph.values():
            if place["class_type"] == "NestedApplySubject":
                place["class_type"] = "NestedApplySubjectAdvanced"
                place["inputs"] |= {
                    "identity": min(20.0, round(own * condition.alpha, 4)), "focus": 1.0, "value_norm": "auto",
                    "layer_weights": "", "when_unmentioned": "stop",
                }  # fmt: skip

    def score(self, case: Case, files: Iterable[Path], scores: Scores) -> None:
        import numpy as np
        import torch
        from PIL import Image

        import models
        import world

        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        with torch.no_grad():
            out = self.probe(models.normalise(torch.from_numpy(pixels)))
        told = {name: logits.argmax(-1).numpy() for name, logits in out.items()}
        truth = models.labels(list(case.figures), case.scene, case.style)
        scores.add("class", float(np.mean([[told[f"{k}.present"] == truth[f"{k}.present"]] for k in world.KINDS])))
        for name in ("scene", "style"):
            scores.add(name, float(np.mean(told[name] == truth[name])))
        scores.add("alignment", float(np.mean([scores.right[name][-1] for name in ("class", "scene", "style")])))
        for name in world.ATTRIBUTES:
            rights = [told[f"{f.kind}.{name}"] == truth[f"{f.kind}.{name}"] for f in case.figures]
            scores.add(name, float(np.mean(rights)))
        scores.add("identity", float(np.mean([scores.right[name][-1] for name in world.ATTRIBUTES])))
        if len(case.figures) == 1:
            self._remember(case.figures[0], told, scores)
        else:
            self._separate(case.figures, told, scores)

    def _remember(self, figure: world.Figure, told: dict[str, np.ndarray], scores: Scores) -> None:
        """Whether pictures show exactly the held-out figure, or else exactly one of the training pictures' figures."""
        import numpy as np

        import world

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
        import numpy as np

        import world

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
        return [name for name in METHODS if name in ("none", "described") or name in self.encoders]

    def condition(self, method: str, **changes: Any) -> Condition:
        return Condition(method, "" if method in ("none", "described") else method, **changes)


def _decouple(graph: Graph, subjects: int) -> None:
    """The baseline node in place of Apply Subject; prompts come from the stock CLIP."""
    model: list[Any] = ["checkpoint", 0]
    for i in range(subjects):
        strength = graph.pop(f"apply{i}")["inputs"]["strength"]
        graph[f"apply{i}"] = node("DecoupledSubject", model=model, subject=[f"subject{i}", 0], strength=strength)
        model = [f"apply{i}", 0]
    for name in ("positive", "negative"):
        graph[name]["inputs"]["clip"] = ["checkpoint", 1]


Rows = list[tuple[str, Scores]]


def table(bench: Bench) -> Rows:
    """One subject: every method; other training seeds of a method are pooled with it."""
    rows = []
    for method in bench.methods():
        scores, others = bench.measure(bench.condition(method)), []
        for name in sorted(bench.encoders):
            if name.startswith(f"{method}_seed"):
                others.append(bench.measure(Condition(method, name)))
        if others:  # the mean of a subject over training seeds is one number: subjects are what is resampled
            every = [scores, *others]
            scores = Scores({q: [sum(v) / len(v) for v in zip(*(s.right[q] for s in every), strict=True)]
                             for q in scores.right})  # fmt: skip
        rows.append((METHODS[method], scores))
    return rows


def pairs(bench: Bench) -> Rows:
    return [(METHODS[m], bench.measure(bench.condition(m, pair=True), 0.67)) for m in bench.methods()]


def strength(bench: Bench) -> Rows:
    rows = []
    for method in [m for m in bench.methods() if m not in ("none", "described")]:
        for value in STRENGTHS:
            scores = bench.measure(bench.condition(method, strength=value), 0.5)
            rows.append((f"{METHODS[method]}, strength {value:g}", scores))
    return rows


def identity(bench: Bench) -> Rows:
    return [(f"α x {x:g}", bench.measure(bench.condition("nested", alpha=x), 0.5)) for x in IDENTITIES]


def tokens(bench: Bench) -> Rows:
    rows = []
    for count in TOKENS:
        name = {1: "one_value", 16: "nested"}.get(count, f"nested_{count}_tokens")
        if name in bench.encoders:
            method = "one_value" if count == 1 else "nested"
            rows.append((f"{count} tokens", bench.measure(Condition(method, name), 0.5)))
    return rows


def views(bench: Bench) -> Rows:
    return [(f"{n} views", bench.measure(bench.condition("nested", views=n), 0.5)) for n in VIEWS]


PARTS = {
    "table": table, "pairs": pairs, "strength": strength, "identity": identity, "tokens": tokens, "views": views,
}  # fmt: skip
TITLES = {
    "table": "One subject",
    "pairs": "Two subjects in one picture",
    "strength": "Strength",
    "identity": "identity (α), as a factor on the encoder's own",
    "tokens": "Number of subject tokens (each number is an encoder of its own)",
    "views": "Number of reference pictures",
}


def write_report(results: dict[str, Rows]) -> None:
    """Tables, raw figures and the plot under docs/. Parts that were not measured now stay as they are in the JSON."""
    docs = REPO / "docs"
    path = docs / "evaluation.json"
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for part, rows in results.items():
        known[part] = {
            "subjects": len(next(iter(rows[0][1].right.values()))) if rows else 0,
            "rows": [{"name": name, **{q: scores.interval(q) for q in scores.right}} for name, scores in rows],
        }
    path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    text = [
        "# The method, measured in the small world",
        "",
        "Made by `python scripts/evaluate.py`, from pictures sampled in ComfyUI through the nodes. Subjects are held",
        "out of every training, each with three seeds; the figures are shares that an independent probe finds right,",
        "with 95 % intervals over subjects.",
    ]
    for part, entry in known.items():
        text += ["", f"## {TITLES[part]}", "", f"{entry['subjects']} subjects or pairs.", ""]
        text += _markdown(part, entry["rows"])
    text += [
        "",
        "*exactly it*: all six attributes are the held-out figure's. *exactly a trained one*: all six are those of a",
        "figure in the training pictures; they cover a third of all figures, so a wrong reading is one by chance too.",
    ]
    if "strength" in known:
        plot(known, docs / "images" / "evaluation.png")
        text += ["", "![Identity against prompt alignment over strengths](images/evaluation.png)"]
    (docs / "evaluation.md").write_text("\n".join(text) + "\n", "utf-8")
    say(f"written: {docs / 'evaluation.md'}")


def _markdown(part: str, rows: list[dict[str, Any]]) -> list[str]:
    columns = ["identity", "alignment"]
    if part == "pairs":
        columns = ["own", "swapped", "neither", "alignment"]
    elif part == "table":
        import world

        columns = ["identity", *world.ATTRIBUTES, "class", "scene", "style", "exactly it", "exactly a trained one"]
    lines = [f"| | {' | '.join(c.replace('_', ' ') for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            mean, low, high = row[column]
            wide = column in ("identity", "alignment", "own", "swapped")
            cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f})" if wide else f"{mean:.2f}")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def plot(known: dict[str, Any], path: Path) -> None:
    """Identity against alignment, a curve over strengths per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.6), dpi=150)
    colours = {"nested": "#c2255c", "one_value": "#1971c2", "decoupled": "#e8590c"}
    for method, colour in colours.items():
        rows = [row for row in known["strength"]["rows"] if row["name"].startswith(METHODS[method])]
        if rows:
            x, y = ([row[q][0] for row in rows] for q in ("identity", "alignment"))
            axes.plot(x, y, "o-", color=colour, label=METHODS[method], lw=2, ms=5)
            for row, a, b in zip(rows, x, y, strict=True):
                axes.annotate(row["name"].split()[-1], (a, b), (0, 6), textcoords="offset points", fontsize=7,
                              color=colour, ha="center")  # fmt: skip
    for row in known.get("table", {}).get("rows", []):
        if row["name"] in (METHODS["none"], METHODS["described"]):
            axes.plot(row["identity"][0], row["alignment"][0], "s", color="#495057", ms=6)
            axes.annotate(row["name"], (row["identity"][0], row["alignment"][0]), (6, -12),
                          textcoords="offset points", fontsize=8, color="#495057")  # fmt: skip
    axes.set(xlabel="identity: attributes that are right", ylabel="alignment: class, scene and style that are right")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    _setup.run_main(main)
