"""The method measured in the small world: pictures sampled in a real ComfyUI through the nodes, scored by the probe.

    python scripts/evaluate.py                  everything; goes on where it stopped
    python scripts/evaluate.py --identities 8   quicker, wider intervals
    python scripts/evaluate.py --only table     one part; the others' names: --help

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
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _setup
from _graphs import Graph, Shown, check_nodes, node, run_graph, saved_pictures, subject_graph
from _setup import REPO, STATE, Server, say

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
WITHOUT_SUBJECT = ("none", "described")
# Names of demo/train.py for encoders that were trained otherwise than the shipped one.
VARIANT = re.compile(r"nested(_(?P<norm>none|unit|match_per_head)_norm)?(_(?P<steps>\d+)_steps)?")
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
IDENTITIES = (0.25, 0.5, 0.75, 1.0, 1.25)  # of the encoder's own α
FOCUS = (1.0, 1.5, 2.0, 3.0)
SEPARATION = (0.0, 0.25, 0.5, 0.75, 1.0)
APART = (0.0, 0.5, 1.0)
EDITS = (0.5, 0.75, 1.0, 1.25)  # strengths
TOKENS = (1, 4, 16, 64)
VIEWS = (1, 2, 4)


@dataclass(frozen=True)
class Condition:
    """How pictures are made. encoder: file in models/nested_attention. alpha: factor on the encoder's own.

    apart: strength of Separate Subjects.

    edit: whether the prompt gives the subject an attribute that it does not have, in words.
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
    edit: bool = False


@dataclass(frozen=True)
class Case:
    """Held-out figures in a scene and style, with the seed of their pictures.

    edit: an attribute and another value of it than the first figure's.
    """

    figures: tuple[world.Figure, ...]
    scene: str
    style: str
    seed: int
    edit: tuple[str, str]

    def edit_in_words(self) -> str:
        name, value = self.edit
        figure = replace(self.figures[0], **{name: value})
        return figure.words([name]).removesuffix(f" {figure.kind}")


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
    host = _setup.prepared_host()

    import small_world

    packs = small_world.link_packs(host)
    models = WORK / "models"
    names = small_world.provide_models(models)
    encoders = provide_encoders(arguments.run, models / "nested_attention")
    for wanted in ("one_value", "decoupled", *(f"nested_{n}_tokens" for n in TOKENS if n not in (1, 16))):
        if wanted not in encoders:
            say(f"no encoder {wanted} in {arguments.run}: left out. python demo/train.py --shipped --stage {wanted}")
    server = Server(host, WORK, models=models, only=packs)
    say(f"starting ComfyUI {_setup.version_of(host)}, log in {server.log}")
    with server:
        ours = ("NestedEncodeSubject", "NestedApplySubject", "NestedApplySubjectAdvanced", "DecoupledSubject")
        check_nodes(server, {kind: node(kind) for kind in ours})
        bench = Bench(server, names, encoders, arguments.identities)
        for part in arguments.only or PARTS:
            write_report(part, PARTS[part](bench))
    return 0


def provide_encoders(run: Path, folder: Path) -> dict[str, str]:
    """Puts the trained encoders of a run beside the shipped one. Returns file names by name, "nested" the shipped one.

    The decoupled baseline is no file that Load Nested Encoder opens: here it is written as one, for the baseline node.
    """
    import export
    import shipped
    from nested_core.checkpoint import write_encoder
    from nested_core.training import load_trained

    base = export.fingerprint(export.load_checkpoint(shipped.WEIGHTS / shipped.CHECKPOINT)[0])
    found = {"nested": shipped.ENCODER}
    for file in sorted(run.glob("*/encoder.safetensors")):
        name = file.parent.name
        if name == "nested":
            continue  # shipped
        if (file.parent / "base.txt").read_text("utf-8") != base:
            say(f"{name} was trained on another base model than the shipped one: left out")
            continue
        steps = json.loads((file.parent / "config.json").read_text("utf-8"))["steps"]
        if not (file.parent / "checkpoints" / f"step-{steps:08}").is_dir():
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
        import data
        import models
        import shipped

        self.server, self.names, self.encoders = server, names, encoders
        self.identities, self.seeds = identities, seeds
        self.probe = models.load_probe(shipped.WEIGHTS / shipped.PROBE)
        # Pictures are kept for what made them: the models, our code, and the graph.
        sources = [
            *(path for path in (REPO / "nested_core").rglob("*.py") if "training" not in path.parts),
            *(REPO / "nodes").glob("*.py"),
            *(REPO / "demo" / "comfyui").glob("*.py"),
            *(REPO / "demo" / name for name in ("world.py", "models.py")),
        ]
        weights = [path for path in shipped.WEIGHTS.glob("*.safetensors") if path.name != shipped.PROBE]
        digest = hashlib.sha256()
        for path in sorted([*sources, *weights]):
            digest.update(path.read_bytes())
        self.stamp = digest.hexdigest()
        self.trained = {(f.kind, *f.identity) for f in data.drawn_figures(data.PICTURES, 0)}

    def cases(self, pair: bool, share: float = 1.0) -> list[Case]:
        """The same for every condition; a share of them is the first ones."""
        import data
        import world

        cases = []
        for i in range(max(2, round(self.identities * share))):
            rng = random.Random(f"evaluation {pair} {i}")
            entry = data.random_entry(rng, 2 if pair else 1)
            name = rng.choice([name for name in world.ATTRIBUTES if name != "hat_colour"])  # no word of its own
            value = rng.choice([v for v in world.ATTRIBUTES[name] if v != getattr(entry.figures[0], name)])
            cases.append(Case(tuple(entry.figures), entry.scene, entry.style, 1000 + i, (name, value)))
        return cases

    def measure(self, condition: Condition, share: float = 1.0) -> Scores:
        """Scores of a condition; pictures that are there already are not made again."""
        from tqdm import tqdm

        scores = Scores()
        title = f"{condition.method} x{condition.strength:g} α{condition.alpha:g} {condition.encoder[:24]}"
        edit = "edit " if condition.edit else ""
        for case in tqdm(self.cases(condition.pair, share), desc=edit + title, mininterval=2):
            self.score(case, self.pictures(condition, case), scores, condition.edit)
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
        said = shown
        if condition.edit:
            words = case.edit_in_words()
            said = [
                replace(s, placeholder=f"{words} {s.placeholder}", class_word=f"{words} {s.class_word}") for s in shown
            ]
        prompt = small_world.prompt(said, case.scene, case.style, bound=condition.method in ("nested", "one_value"))
        if condition.method == "described":
            named = [replace(s, class_word=f.words()) for s, f in zip(shown, case.figures, strict=True)]
            prompt = small_world.prompt(named, case.scene, case.style, bound=False)
        subjects: Sequence[Shown] = () if condition.method in WITHOUT_SUBJECT else shown
        names = {**self.names, "encoder_name": self.encoders.get(condition.encoder, "")}
        graph = subject_graph(names, prompt, subjects, seed=case.seed, batch=self.seeds, prefix="evaluation/picture")
        graph = {key: value for key, value in graph.items() if not key.startswith("seen")}
        if condition.method == "decoupled":
            _decouple(graph, len(subjects))
        elif condition.alpha != 1 or condition.focus != 1 or condition.separation:
            self._turn_knobs(graph, condition)
        if condition.apart:
            (sampler,) = [place for place in graph.values() if place["class_type"] == "KSampler"]
            inputs = {"model": sampler["inputs"]["model"], "strength": condition.apart}
            graph["apart"] = node("NestedSeparateSubjects", **inputs, start_percent=0.0, end_percent=1.0)
            sampler["inputs"]["model"] = ["apart", 0]
        return graph

    def _turn_knobs(self, graph: Graph, condition: Condition) -> None:
        from nested_core.checkpoint import read_encoder

        own = read_encoder(self.server_models() / self.encoders[condition.encoder])[0].alpha
        for place in graph.values():
            if place["class_type"] == "NestedApplySubject":
                place["class_type"] = "NestedApplySubjectAdvanced"
                place["inputs"] |= {
                    "identity": round(own * condition.alpha, 2), "focus": condition.focus,
                    "value_norm": "encoder's own", "layer_weights": "", "when_unmentioned": "stop",
                    "separation": condition.separation,
                }  # fmt: skip

    def score(self, case: Case, files: Iterable[Path], scores: Scores, edit: bool = False) -> None:
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
        if edit:
            name, value = case.edit
            shown = told[f"{case.figures[0].kind}.{name}"]
            scores.add("edit", float(np.mean(shown == world.ATTRIBUTES[name].index(value))))
        kept = [name for name in world.ATTRIBUTES if not edit or name != case.edit[0]]
        scores.add("identity", float(np.mean([scores.right[name][-1] for name in kept])))
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
    return _over_strengths(bench, STRENGTHS)


def edits(bench: Bench) -> Rows:
    """An attribute that the prompt gives in words against the reference picture's: obeyed, and the others kept?"""
    without = (METHODS["none"], bench.measure(bench.condition("none", edit=True), 0.5))
    return [without, *_over_strengths(bench, EDITS, edit=True)]


def _over_strengths(bench: Bench, strengths: Sequence[float], **changes: Any) -> Rows:
    rows = []
    for method in [m for m in bench.methods() if m not in WITHOUT_SUBJECT]:
        for value in strengths:
            scores = bench.measure(bench.condition(method, strength=value, **changes), 0.5)
            rows.append((f"{METHODS[method]}, strength {value:g}", scores))
    return rows


def focus(bench: Bench) -> Rows:
    return [(f"focus {x:g}", bench.measure(bench.condition("nested", focus=x), 0.5)) for x in FOCUS]


def separation(bench: Bench) -> Rows:
    return [
        (f"separation {x:g}", bench.measure(bench.condition("nested", pair=True, separation=x), 0.67))
        for x in SEPARATION
    ]


def apart(bench: Bench) -> Rows:
    return [
        (
            f"{METHODS[method]}, Separate Subjects {x:g}",
            bench.measure(bench.condition(method, pair=True, apart=x), 0.67),
        )
        for method in ("nested", "one_value")
        if method in bench.encoders
        for x in APART
    ]


def identity(bench: Bench) -> Rows:
    return [(f"α x {x:g}", bench.measure(bench.condition("nested", alpha=x), 0.5)) for x in IDENTITIES]


def attention(bench: Bench) -> Rows:
    """How much of each layer's attention the class word has, by what is drawn there: the bare base model, in diffusers.

    Half noised pictures of held-out figures, whose parts are known; the mean over heads and places.
    """
    import numpy as np
    import torch
    from torch.nn import functional as F

    import export
    import models
    import shipped
    import world
    from nested_core.attention import outer_probabilities, scaled_dot_product
    from nested_core.hosts.diffusers import cross_attention

    unet, text_encoder, codec = export.load_checkpoint(shipped.WEIGHTS / shipped.CHECKPOINT)
    scheduler: Any = models.scheduler()
    tokenizer, cases = models.tokenizer(), bench.cases(pair=False)
    drawn = [world.render(c.figures, c.scene, c.style, random.Random(c.seed)) for c in cases]
    texts = [world.prompt([figure.kind for figure in c.figures], c.scene, c.style) for c in cases]
    ids = tokenizer(texts, padding="max_length", max_length=models.TEXT_LENGTH, return_tensors="pt").input_ids
    words = [tokenizer(c.figures[0].kind).input_ids[1] for c in cases]
    places = (ids == torch.tensor(words)[:, None]).int().argmax(1, keepdim=True)
    seen: dict[int, torch.Tensor] = {}

    class Watching:
        def __init__(self, layer: int) -> None:
            self.layer = layer

        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
            q, k = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
            shares = outer_probabilities(q, k, attn.heads, places).float().mean(2)[..., 0]
            side = int(shares.shape[1] ** 0.5)
            seen[self.layer] = F.interpolate(shares.view(-1, 1, side, side), size=world.SIZE)[:, 0]
            return attn.to_out[0](scaled_dot_product(q, k, attn.to_v(encoder_hidden_states), attn.heads))

    watching = {f"{name}.processor": Watching(i) for i, name in enumerate(cross_attention(unet))}
    unet.set_attn_processor({**unet.attn_processors, **watching})
    with torch.no_grad():
        pixels = models.normalise(torch.from_numpy(np.stack([np.asarray(picture.image) for picture in drawn])))
        latents = codec.encode(pixels).latents * codec.config.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        times = torch.full((len(cases),), 500)
        unet(scheduler.add_noise(latents, noise, times), times, text_encoder(ids).last_hidden_state)
    rows = []
    for layer, name in enumerate(cross_attention(unet)):
        scores = Scores()
        for picture, shares in zip(drawn, seen[layer].numpy(), strict=True):
            for part, number in {**world.PARTS, "background": 0}.items():
                scores.add(part, float(shares[picture.regions == number].mean()))
        rows.append((name.replace(".transformer_blocks.0.attn2", ""), scores))
    return rows


def tokens(bench: Bench) -> Rows:
    rows = []
    for count in TOKENS:
        name = {1: "one_value", 16: "nested"}.get(count, f"nested_{count}_tokens")
        if name in bench.encoders:
            method = "one_value" if count == 1 else "nested"
            rows.append((f"{count} tokens", bench.measure(Condition(method, name), 0.5)))
    return rows


def remedies(bench: Bench) -> Rows:
    """Encoders trained otherwise than the shipped one, against what it is worst at: see demo/README.md."""
    rows = []
    for name in sorted(bench.encoders):
        match = VARIANT.fullmatch(name)
        if not match:
            continue
        one = bench.measure(Condition("nested", name)).right
        two = bench.measure(Condition("nested", name, pair=True), 0.67).right
        edited = bench.measure(Condition("nested", name, edit=True), 0.5).right
        right = {q: one[q] for q in ("identity", "alignment", "hat")}
        right |= {"own": two["own"], "swapped": two["swapped"], "edit": edited["edit"], "rest": edited["identity"]}
        changes = [f"value_norm {match['norm']}"] if match["norm"] else []
        changes += [f"{match['steps']} steps"] if match["steps"] else []
        rows.append((", ".join(changes) or "as shipped", Scores(right)))
    return rows


def views(bench: Bench) -> Rows:
    return [(f"{n} views", bench.measure(bench.condition("nested", views=n), 0.5)) for n in VIEWS]


PARTS = {
    "table": table, "pairs": pairs, "separation": separation, "apart": apart, "edits": edits, "strength": strength,
    "identity": identity, "focus": focus, "tokens": tokens, "views": views, "attention": attention,
    "remedies": remedies,
}  # fmt: skip
TITLES = {
    "table": "One subject",
    "pairs": "Two subjects in one picture",
    "separation": "Two subjects, with separation",
    "apart": "Two subjects, with Separate Subjects",
    "strength": "Strength",
    "edits": "An attribute changed by the prompt",
    "identity": "identity (α), as a factor on the encoder's own",
    "focus": "focus",
    "tokens": "Number of subject tokens (each number is an encoder of its own)",
    "views": "Number of reference pictures",
    "remedies": "Trained otherwise",
    "attention": "Attention on the class word, by what is drawn there (base model, half noised)",
}


def write_report(part: str, rows: Rows) -> None:
    """Tables, raw figures and the plot under docs/, with a part measured anew; the others stay as the JSON has them."""
    docs = REPO / "docs"
    path = docs / "evaluation.json"
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    known[part] = {
        "subjects": len(next(iter(rows[0][1].right.values()))) if rows else 0,
        "rows": [{"name": name, **{q: scores.interval(q) for q in scores.right}} for name, scores in rows],
    }
    known = {name: known[name] for name in PARTS if name in known}
    path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    plot(known, docs / "images" / "evaluation.png")
    (docs / "evaluation.md").write_text("\n".join(_page(known)) + "\n", "utf-8")
    say(f"written: {docs / 'evaluation.md'}")


def _page(known: dict[str, Any]) -> list[str]:
    """docs/evaluation.md, line by line."""
    text = [
        "# The method, measured in the small world",
        "",
        "Made by `python scripts/evaluate.py`, from pictures sampled in ComfyUI through the nodes. Subjects are held",
        "out of every training, each with three seeds; the figures are shares that an independent probe finds right,",
        "with 95 % intervals over subjects.",
        "",
        "![Identity, alignment and separation of the methods](images/evaluation.png)",
    ]
    for part, entry in known.items():
        counted = f"{entry['subjects']} subjects or pairs."
        if part == "remedies":
            counted += " (*own* and *swapped*: two thirds of that; *edit* and *rest*: half.) One training each."
        text += ["", f"## {TITLES[part]}", "", counted, ""]
        text += _markdown(part, entry["rows"])
    text += [
        "",
        "*edit*: the share of pictures with the attribute that the prompt gives the subject against its reference,",
        "such as `a wheels below <robot>`; *identity*, or *rest*, is then that of the other five. *exactly it*: all",
        "six attributes are the held-out figure's. *exactly a trained one*: all six are those of a figure in the",
        "training pictures; they cover two fifths of all figures, so a wrong one is one by chance too.",
    ]
    return text


def _markdown(part: str, rows: list[dict[str, Any]]) -> list[str]:
    columns = ["identity", "alignment"]
    if part in ("pairs", "separation", "apart"):
        columns = ["own", "swapped", "neither", "alignment"]
    elif part == "edits":
        columns = ["edit", "identity", "alignment"]
    elif part in ("attention", "remedies"):
        columns = [name for name in rows[0] if name != "name"]
    elif part == "table":
        import world

        aligned = ["class", "scene", "style"]
        columns = ["identity", "alignment", *world.ATTRIBUTES, *aligned, "exactly it", "exactly a trained one"]
    lines = [f"| | {' | '.join(c.replace('_', ' ') for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            mean, low, high = row[column]
            wide = column in ("identity", "alignment", "own", "swapped", "edit", "rest")
            cells.append(
                f"{mean:.2f} ({low:.2f} to {high:.2f})" if wide else f"{mean:.{3 if part == 'attention' else 2}f}"
            )
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def plot(known: dict[str, Any], path: Path) -> None:
    """Identity against alignment and a changed attribute, over strengths; whose attributes two subjects have."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    colours = {"nested": "#c2255c", "one_value": "#1971c2", "decoupled": "#e8590c"}
    figure, (aligned, edited, apart) = plt.subplots(1, 3, figsize=(13, 4), dpi=110, layout="constrained")
    for axes, part, asked in ((aligned, "strength", "alignment"), (edited, "edits", "edit")):
        for method, colour in colours.items():
            rows = [row for row in known.get(part, {}).get("rows", []) if row["name"].startswith(METHODS[method])]
            if not rows:
                continue
            x, y = (np.array([row[q] for row in rows]).T for q in ("identity", asked))
            axes.plot(x[0], y[0], "o-", color=colour, label=METHODS[method], lw=2, ms=5)
            spread = {"xerr": np.abs(x[1:] - x[0]), "yerr": np.abs(y[1:] - y[0])}
            axes.errorbar(x[0], y[0], **spread, fmt="none", ecolor=colour, alpha=0.25, lw=1)
            for i, row in ((0, rows[0]), (-1, rows[-1])):
                axes.annotate(row["name"].split()[-1], (x[0][i], y[0][i]), (0, -13), textcoords="offset points",
                              fontsize=8, color=colour, ha="center")  # fmt: skip
        axes.set(xlim=(0, 1.03), ylim=(0, 1.05))
        axes.grid(alpha=0.25)
    aligned.set(xlabel="identity", ylabel="class, scene and style as prompted", title="over strengths")
    edited.set(xlabel="identity, the other five attributes", ylabel="attribute as prompted")
    edited.set_title("the prompt changes an attribute")
    aligned.legend(frameon=False, loc="lower left")
    rows = known.get("pairs", {}).get("rows", [])[::-1]
    left = np.zeros(len(rows))
    for share, colour in (("own", "#2f9e44"), ("swapped", "#e03131"), ("neither", "#ced4da")):
        width = np.array([row[share][0] for row in rows])
        apart.barh(
            [row["name"].replace(" in the", "\nin the") for row in rows], width, left=left, color=colour, label=share
        )
        left += width
    apart.set(xlim=(0, 1), xlabel="attributes in which the two differ", title="two subjects in one picture")
    apart.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.15))
    for axes in (aligned, edited, apart):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    _setup.run_main(main)
