"""What is compared with what: each part of the evaluation gives rows of a title and its scores."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from demo import export, models, shipped, world
from nested_core.attention import outer_probabilities, scaled_dot_product
from nested_core.hosts.diffusers import cross_attention

from . import METHODS
from .bench import WITHOUT_SUBJECT, Bench, Condition, Scores

# Names of demo/train.py for encoders that were trained otherwise than the shipped one.
VARIANT = re.compile(r"nested(_(?P<norm>none|unit|match_per_head)_norm)?(_(?P<steps>\d+)_steps)?")
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
IDENTITIES = (0.25, 0.5, 0.75, 1.0, 1.25)  # of the encoder's own α
FOCUS = (1.0, 1.5, 2.0, 3.0)
SEPARATION = (0.0, 0.25, 0.5, 0.75, 1.0)
APART = (0.0, 0.5, 1.0)
GUIDANCE = (1.5, 3.0, 5.0, 7.5)
EDITS = (0.5, 0.75, 1.0, 1.25)  # strengths
TOKENS = (1, 4, 16, 64)
VIEWS = (1, 2, 4)

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


def unconditional(bench: Bench) -> Rows:
    """What the negative side of the guidance gets: nothing, the class word, or a black picture on the class word.

    *gain*: of identity over that of nothing, subject by subject.
    """
    rows = []
    for cfg in GUIDANCE:
        nothing = bench.measure(bench.condition("nested", cfg=cfg), 0.5)
        rows.append((f"cfg {cfg:g}, nothing", nothing))
        for negative, title in (("word", "the class word"), ("black", "a black picture on the class word")):
            scores = bench.measure(bench.condition("nested", cfg=cfg, negative=negative), 0.5)
            pairs = zip(scores.right["identity"], nothing.right["identity"], strict=True)
            scores.right["gain"] = [one - other for one, other in pairs]
            rows.append((f"cfg {cfg:g}, {title}", scores))
    return rows


def attention(bench: Bench) -> Rows:
    """How much of each layer's attention the class word has, by what is drawn there: the bare base model, in diffusers.

    Half noised pictures of held-out figures, whose parts are known; the mean over heads and places.
    """
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
    "identity": identity, "focus": focus, "unconditional": unconditional, "tokens": tokens, "views": views,
    "attention": attention, "remedies": remedies,
}  # fmt: skip
