"""What scripts/benchmark.py measures: time and memory of sampling, in the ComfyUI of this process."""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import comfy.model_management
import skimage.data
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from . import studio
from .environment import say
from .paths import REPO

TOKENS = (16, 256, 1024)
SUBJECTS = (1, 2, 4)
NAMES = ("<anna>", "<ben>", "<cleo>", "<dan>")
WORDS = ("woman", "man", "cat", "dog")
PROMPT = "a photo of <anna> and <ben> with a <cleo> and a <dan>"
READ = PROMPT.replace("<anna>", "woman")  # what a text encoder reads with the first subject
Rows = list[list[str]]


@torch.inference_mode()
def run(version: str, quick: bool, rounds: int | None, sizes: list[tuple[int, int]] | None) -> None:
    """Measures, prints, and writes docs/benchmark.md unless it is to be quick."""
    section = measure(version, quick, rounds, sizes)
    if not quick:
        write(section)


def measure(version: str, quick: bool, rounds: int | None, sizes: list[tuple[int, int]] | None) -> dict[str, Any]:
    """Everything, as titles and rows of text."""
    cuda = torch.cuda.is_available()
    rounds = rounds or (1 if quick else 10 if cuda else 3)
    pack = studio.load_pack()
    photo = torch.from_numpy(skimage.data.astronaut()).float()[None] / 255
    say("making a vision tower: ViT-H/14")
    tower = studio.make_clip_vision(**({"num_hidden_layers": 2} if quick else {}))
    tables: list[dict[str, Any]] = [layer_table(pack, rounds, quick)]
    dtype = torch.float16 if cuda else torch.float32
    sizes = sizes or ([(512, 512), (1024, 1024), (1536, 1024)] if cuda and not quick else [(256, 256)])
    for family in ("sdxl", "sd15") if cuda else ("sdxl",):
        full = cuda and not quick
        say(f"making {family}, {'full size' if full else 'narrow'}")
        made = studio.Studio(pack, family, tower, photo, 320, dtype, tapered=full)
        bench = Bench(made, rounds, dtype)
        for size in sizes:
            tables.append(bench.table(size))
        tables += [bench.shares(sizes[0]), bench.marks(), bench.waits(sizes[0])]
        del made, bench
        gc.collect()
    return {"machine": _machine(version), "device": "cuda" if cuda else "cpu", "tables": tables}


def _machine(version: str) -> str:
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{device}, PyTorch {torch.__version__}, ComfyUI {version}"


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, which take turns; one round before that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            _sync()
            begun = time.perf_counter()
            call()
            _sync()
            if number:
                taken[name].append(time.perf_counter() - begun)
    return taken


def _peak(call: Callable[[], Any]) -> int:
    """Bytes of tensors alive at the worst moment of a call, above those before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    results: Any = profile.profiler.kineto_results
    now = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# --- one layer --------------------------------------------------------------------------------------------------------


def literal(q: Tensor, k: Tensor, v: Tensor, heads: int, terms: Sequence[Any]) -> Tensor:
    """The layer's output as the paper writes it, a value for every query: equations (1) to (4) of `nested_core`."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    qh, kh, vh = split(q), split(k), split(v)
    values = vh[:, :, None].expand(-1, -1, q.shape[1], -1, -1).clone()  # V_q, (B, H, Q, T, d)
    for term in terms:
        key, value = (x.expand(len(q), -1, -1) for x in (term.key, term.value))
        nested = F.scaled_dot_product_attention(qh, split(key), split(value))  # v*_q, (B, H, Q, d)
        norm = nested.transpose(1, 2).flatten(2).norm(dim=-1)[:, None, :, None]
        for place in term.places.tolist():
            target = v[:, place].norm(dim=-1)[:, None, None, None]
            values[:, :, :, place] = nested * (term.alpha * target / norm)
    weights = torch.softmax(qh @ kh.transpose(-1, -2) * qh.shape[-1] ** -0.5, -1)
    return (weights[:, :, :, None] @ values).squeeze(3).transpose(1, 2).flatten(2)


def layer_table(pack: Any, rounds: int, quick: bool) -> dict[str, Any]:
    """One cross-attention layer of SDXL at 1024 x 1024 by itself: plain, fused and literal."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    core = pack.attention
    rows: Rows = []
    for queries, channels in ((1024, 1280), (4096, 640)):
        if quick:
            queries, channels = queries // 16, channels // 4
        generator = torch.Generator().manual_seed(0)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: B023

        heads = channels // 64
        q, k, v = rand(1, queries, channels), rand(1, 77, channels), rand(1, 77, channels)
        for tokens in TOKENS:
            place = torch.tensor([5], device=device)
            term = core.NestedTerm(rand(1, tokens, channels), rand(1, tokens, channels), place)
            one_hot = core.one_hot_values(place, 77, heads, channels // heads, dtype)[None]

            def plain() -> Tensor:
                return core.scaled_dot_product(q, k, v, heads)  # noqa: B023

            def fused() -> Tensor:
                out = plain()  # noqa: B023
                prob = core.outer_probabilities(q, k, heads, place, one_hot)  # noqa: B023
                return core.nested_delta(q, k, v, heads, [term], into=out, prob=prob)  # noqa: B023

            def written() -> Tensor:
                return literal(q, k, v, heads, [term])  # noqa: B023

            calls = {"plain": plain, "fused": fused, "literal": written}
            error = (fused().float() - written().float()).norm() / written().float().norm()
            taken = {name: statistics.median(x) for name, x in _times(calls, 3 * rounds).items()}
            peaks = {name: _peak(call) / 2**20 for name, call in calls.items()}
            rows.append(
                [
                    f"{queries} queries, {channels} channels, {tokens} tokens",
                    f"{taken['plain'] * 1e3:.2f} ms",
                    f"{taken['fused'] / taken['plain']:.1f}",
                    f"{taken['literal'] / taken['plain']:.1f}",
                    f"{taken['literal'] / taken['fused']:.1f}",
                    f"{peaks['fused']:.0f} / {peaks['literal']:.0f} MiB",
                    f"{float(error):.0e}",
                ]
            )
            say(" | ".join(rows[-1]))
    head = ["layer, one row of the batch", "plain", "fused x plain", "literal x plain", "literal x fused",
            "peak fused / literal", "relative difference"]  # fmt: skip
    return {"title": "One cross-attention layer", "head": head, "rows": rows}


# --- whole steps ------------------------------------------------------------------------------------------------------


@dataclass
class Condition:
    """A MODEL and its prompts."""

    name: str
    model: Any
    positive: Any
    negative: Any


class Bench:
    """Steps of the stock sampler on one base model."""

    def __init__(self, studio: Any, rounds: int, dtype: torch.dtype) -> None:
        self.studio, self.rounds = studio, rounds
        resampler = {"dim": 1024, "depth": 4, "heads": 12, "dim_head": 64, "ff_mult": 4}
        self.encoders = {n: studio.make_encoder(tokens=n, resampler=resampler, dtype=dtype) for n in TOKENS}
        # One encoder for all subjects of a graph, as artists have it: another picture for each.
        self.subjects = {
            (n, i): studio.subject(NAMES[i], WORDS[i], view=i, encoder=encoder)
            for n, encoder in self.encoders.items()
            for i in range(max(SUBJECTS) if n == max(TOKENS) else 1)
        }

    def condition(self, name: str, tokens: int, subjects: int, **inputs: Any) -> Condition:
        model, clip = self.studio.model, self.studio.clip
        for i in range(subjects):
            model, clip = self.studio.apply(self.subjects[tokens, i], model, clip, **inputs)
        return Condition(name, model, self.studio.encode(clip, PROMPT), self.studio.encode(clip, "blurry"))

    def conditions(self) -> list[Condition]:
        plain = self.condition("plain", 0, 0)
        most = max(TOKENS)
        made = [plain]
        made += [self.condition(f"1 subject, {n} tokens", n, 1) for n in TOKENS]
        made += [self.condition(f"{s} subjects, {most} tokens each", most, s) for s in SUBJECTS[1:]]
        made += [
            self.condition("1 subject, strength 0", most, 1, strength=0.0),
            self.condition("1 subject, its window over", most, 1, end_percent=0.001),  # the first step has it
            self._other("literal, 1 subject, 1024 tokens", most, self._literal),
            self._other("decoupled attention, 16 tokens", 16, self._decoupled),
        ]
        return made

    def _other(self, name: str, tokens: int, replacement: Callable[..., Callable[..., Tensor]]) -> Condition:
        """The same subject by another layer, in the rows of the positive prompt."""
        bound = self.condition(name, tokens, 1)
        encoder, subject = self.encoders[tokens], self.subjects[tokens, 0].subject
        comfy.model_management.load_models_gpu([encoder.patcher])
        device = encoder.patcher.load_device
        (place,) = bound.positive[0][1]["nested_attention"]["places"][NAMES[0]]
        model = self.studio.model.clone()
        family, layers = self.studio.pack.unet.unet_layers_of(model)
        for layer in layers:
            dtype = next(encoder.module.parameters()).dtype
            key, value = encoder.module.keys_values(subject.tokens.to(device, dtype), layer.index)
            model.set_model_attn2_replace(replacement(key, value, place), *layer.block)
        return Condition(name, model, self.studio.encode(self.studio.clip, READ), bound.negative)

    def _literal(self, key: Tensor, value: Tensor, place: int) -> Callable[..., Tensor]:
        term = self.studio.pack.attention.NestedTerm(key, value, torch.tensor([place], device=key.device))

        def positive(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            return literal(q, k, v, heads, [term])

        return self._replacement(positive)

    def _decoupled(self, key: Tensor, value: Tensor, place: int) -> Callable[..., Tensor]:
        attend = self.studio.pack.attention.scaled_dot_product

        def positive(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            rows = q.shape[0]
            return attend(q, k, v, heads).add_(attend(q, key.expand(rows, -1, -1), value.expand(rows, -1, -1), heads))

        return self._replacement(positive)

    @staticmethod
    def _replacement(positive: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """attn2 replacement that computes the rows of the positive prompt in a way of its own."""

        def replace(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            heads, chunks, parts = options["n_heads"], options["cond_or_uncond"], []
            rows = len(q) // len(chunks)
            for i, kind in enumerate(chunks):
                at = slice(i * rows, (i + 1) * rows)
                layer = positive if kind == 0 else optimized_attention
                parts.append(layer(q[at], k[at], v[at], heads))
            return torch.cat(parts)

        return replace

    def _sample(self, condition: Condition, size: tuple[int, int], steps: int) -> list[float]:
        """Seconds to the first step's end and of each further step."""
        moments = []

        def after_step(*args: Any) -> None:
            _sync()
            moments.append(time.perf_counter())

        _sync()
        begun = time.perf_counter()
        width, height = size
        self.studio.sample(
            condition.model, condition.positive, condition.negative, steps, 7.0, (height // 8, width // 8),
            callback=after_step,
        )  # fmt: skip
        return [b - a for a, b in zip([begun, *moments], moments, strict=False)]

    def table(self, size: tuple[int, int]) -> dict[str, Any]:
        """Time of a step and peak memory of a run, for all conditions."""
        plain, *others = self.conditions()
        steps: dict[str, list[float]] = {c.name: [] for c in (plain, *others)}
        firsts: dict[str, list[float]] = {c.name: [] for c in (plain, *others)}
        ratios: dict[str, list[float]] = {c.name: [] for c in (plain, *others)}
        for number in range(self.rounds + 1):
            # Every condition between two runs of the plain model, and a plain run between two others: machines drift.
            turns = [plain, *(c for other in (*others, plain) for c in (other, plain))]
            taken = [self._sample(c, size, 3) for c in turns]
            say(f"{self.studio.family} {size[0]} x {size[1]}: round {number} of {self.rounds}")
            if number == 0:
                continue
            for i in range(1, len(turns) - 1, 2):
                name = turns[i].name
                firsts[name].append(taken[i][0] - (taken[i - 1][0] + taken[i + 1][0]) / 2)
                steps[name] += taken[i][1:]
                ratios[name].append(2 * sum(taken[i][1:]) / sum(taken[i - 1][1:] + taken[i + 1][1:]))
        peaks = {c.name: _peak(lambda c=c: self._sample(c, size, 1)) for c in (plain, *others)}  # type: ignore[misc]
        rows: Rows = []
        for c in (plain, *others):
            rows.append(
                [
                    c.name,
                    f"{statistics.median(steps[c.name]) * 1e3:.0f} ms",
                    f"{statistics.median(ratios[c.name]):.3f}",
                    f"{min(ratios[c.name]):.2f} to {max(ratios[c.name]):.2f}",
                    f"{statistics.median(firsts[c.name]) * 1e3:+.0f} ms",
                    f"{(peaks[c.name] - peaks['plain']) / 2**20:+.0f} MiB",
                ]
            )
        head = ["condition", "a step", "x plain", "spread", "until the first step", "peak memory"]
        name = {"sdxl": "SDXL", "sd15": "SD 1.5"}[self.studio.family]
        kind = "full size" if self.studio.tapered else f"narrow, {self.studio.channels} channels"
        dtype = str(self.studio.model.model_dtype()).removeprefix("torch.")
        title = f"{name} ({kind}, {dtype}, CFG), {size[0]} x {size[1]}: peak of the plain model "
        return {"title": title + f"{peaks['plain'] / 2**20:.0f} MiB", "head": head, "rows": rows}

    def shares(self, size: tuple[int, int]) -> dict[str, Any]:
        """Where the time goes that a subject of 1024 tokens adds to a step: of our own functions, step by step."""
        plain, *others = self.conditions()
        (one,) = (c for c in others if c.name == f"1 subject, {max(TOKENS)} tokens")
        attention, layer = self.studio.pack.attention, self.studio.pack.layer
        timed = {
            "nested attention (equation 1)": (attention, "_nested"),
            "probability of the word": (layer, "outer_probabilities"),
            "all that is added in layers": (layer.SubjectLayer, "_add"),
            "marks taken off texts": (layer.TextReader, "__call__"),
        }
        spent: dict[str, float] = dict.fromkeys(timed, 0.0)
        steps = 3 * self.rounds
        alone = statistics.median(self._sample(plain, size, steps + 1)[1:])
        with ExitStack() as stack:
            for name, (owner, function) in timed.items():
                stack.enter_context(mock.patch.object(owner, function, _timed(getattr(owner, function), spent, name)))
            self._sample(one, size, 1)
            spent.update(dict.fromkeys(timed, 0.0))
            self._sample(one, size, steps)
        whole = "all that is added in layers"
        inside = list(timed)[:2]
        spent["norms, factors and sums"] = spent[whole] - sum(spent[name] for name in inside)
        rows = [
            [name, f"{spent[name] / steps * 1e3:.1f} ms", f"{spent[name] / steps / alone:.1%}"]
            for name in (*inside, "norms, factors and sums", whole, "marks taken off texts")
        ]
        title = f"Where a subject of {max(TOKENS)} tokens spends its time, {size[0]} x {size[1]}"
        return {"title": title, "head": ["", "a step", "of the plain step"], "rows": rows}

    def marks(self) -> dict[str, Any]:
        """Knowing which rows of a batch are whose, once a step: the texts of the prompts made one, cast, read."""
        text, rows_of = self.studio.pack.text, self.studio.pack.text.rows_of
        model, clip = self.studio.model, self.studio.clip
        for i in range(max(SUBJECTS)):
            model, clip = self.studio.apply(self.subjects[max(TOKENS), i], model, clip)
        rows: Rows = []
        for long, images in ((1, 1), (1, 4), (3, 1), (3, 4)):
            prompt = self.studio.encode(clip, "tree " * 75 * (long - 1) + PROMPT)[0][0]
            negative = self.studio.encode(clip, "tree " * 75 * (long - 1) + "blurry")[0][0]

            def whole(texts: Sequence[Tensor]) -> Tensor:
                return torch.cat([t.repeat(images, 1, 1) for t in texts]).to(torch.float16)  # noqa: B023

            def marked() -> Any:
                label = torch.ones((), dtype=torch.bool)
                return rows_of(whole([text.mark(t, {object(): label}) for t in (negative, prompt)]))  # noqa: B023

            calls = {"plain": lambda: whole([text.plain(negative), text.plain(prompt)]), "marked": marked}  # noqa: B023
            assert marked()
            taken = {name: statistics.median(x) for name, x in _times(calls, 10 * self.rounds).items()}
            encode = {
                "stock": lambda: self.studio.encode(self.studio.clip, READ),
                "bound": lambda: self.studio.encode(clip, PROMPT),
            }
            read = {name: statistics.median(x) for name, x in _times(encode, self.rounds).items()}
            what = f"{prompt.shape[1]} rows, {images} picture{'s' * (images > 1)}, {max(SUBJECTS)} subjects"
            rows.append(
                [
                    what,
                    f"{(taken['marked'] - taken['plain']) * 1e3:.2f} ms",
                    f"{read['bound'] / read['stock']:.2f}",
                ]
            )
        head = ["two texts", "more time a step", "encoding with placeholders x stock"]
        return {"title": "Knowing which rows of a text are whose", "head": head, "rows": rows}

    def waits(self, size: tuple[int, int]) -> dict[str, Any]:
        """What happens before a run: encoding a photo."""
        studio, rows = self.studio, []
        for tokens, encoder in self.encoders.items():
            calls = {
                "vision tower": lambda: studio.clip_vision.encode_image(studio.photo),
                "Encode Subject": lambda e=encoder: studio.subject(encoder=e),  # type: ignore[misc]
            }
            taken = {name: statistics.median(x) for name, x in _times(calls, self.rounds).items()}
            rows.append([str(tokens), *(f"{x * 1e3:.0f} ms" for x in taken.values())])
        name = {"sdxl": "SDXL", "sd15": "SD 1.5"}[studio.family]
        return {
            "title": f"Before the run, {name}: ViT-H/14 and a Q-Former of 4 layers, 1024 wide",
            "head": ["tokens", "the vision tower alone", "Encode Subject"],
            "rows": rows,
        }


def _timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """A function that adds the seconds it takes to what is `spent` under a name."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _sync()
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _sync()
            spent[name] += time.perf_counter() - begun

    return run


# --- docs -------------------------------------------------------------------------------------------------------------


COUNTED = [
    "*Counted on a GPU that is not there*: PyTorch's fake tensors run ComfyUI's own sampling step at full size, with",
    "shapes, types and devices and without numbers. *Kernels*: operations that PyTorch is asked for, views left out;",
    "attention and RMS norm are one each. *Read and written*: the sizes of what goes into them and comes out. *Waits*:",
    "where the host reads from the device or copies to it. Times do not follow from this.",
    "",
]


def _lines(section: dict[str, Any]) -> list[str]:
    lines = [f"## {section['machine']}", ""]
    for table in section["tables"]:
        lines += [f"### {table['title']}", "", f"| {' | '.join(table['head'])} |", "|---" * len(table["head"]) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in table["rows"]] + [""]
    return lines


def write(section: dict[str, Any]) -> None:
    """docs/benchmark.md and .json, with the section of this kind of machine made anew."""
    path = REPO / "docs" / "benchmark.json"
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    known[section["device"]] = section
    print("\n".join(_lines(section)))
    path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", "utf-8")
    text = [
        "# What a subject costs",
        "",
        "Made by `python scripts/benchmark.py`, with models of random weights, inside ComfyUI. Each condition is",
        "run between two runs of the plain model and compared with those; a run has three steps.",
        "",
        "* *a step*: median of the second and third; *x plain*: ratio to the plain runs around it (median);",
        "  *spread*: the range of that ratio. The row *plain* is the plain model against itself: what is noise.",
        "* *until the first step*: how much later that ends than the plain model's. K̈ and V̈ are there: a subject's",
        "  first run makes them, and they stay in the computer's memory as long as it does.",
        "* *peak memory*: of a run's tensors, above the plain model's; on a CPU, without K̈ and V̈, which are kept.",
        "* *knowing which rows are whose*: the marks that conditionings carry are followed on the CPU, once a step.",
        "* *literal*: equations (1) to (4) as the paper writes them. *decoupled*: what IP-Adapter adds.",
        "",
    ]
    if "cuda" not in known:
        text += ["No GPU has run it yet.", ""]
    if "counted" in known:
        text += COUNTED
    for device in ("cuda", "counted", "cpu"):
        if device in known:
            text += _lines(known[device])
    (REPO / "docs" / "benchmark.md").write_text("\n".join(text).rstrip() + "\n", "utf-8")
    say("written: docs/benchmark.md")
