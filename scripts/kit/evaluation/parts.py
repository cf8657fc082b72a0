"""What is compared with what: each part of the evaluation gives rows of a title and its scores."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from demo import data, drawing, export, models, shipped
from nested_core.attention import outer_probabilities, scaled_dot_product
from nested_core.hosts.diffusers import cross_attention

from . import METHODS
from .batched import Batched
from .cases import WITHOUT_SUBJECT, Bench, Condition, Scores, pooled
from .nodes import Nodes

STRENGTHS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
TRAININGS = (0, 1, 2)
REGIMES = {"": "the reference is a crop of the target", "_pairs": "the reference is another picture"}
IDENTITIES = (0.25, 0.5, 0.75, 1.0, 1.25)  # of the encoder's own α
FOCUS = (1.0, 1.5, 2.0, 3.0)
SEPARATION = (0.0, 0.25, 0.5, 0.75, 1.0)
APART = (0.0, 0.5, 1.0)
GUIDANCE = (1.5, 3.0, 5.0, 7.5)
TOKENS = (1, 4, 16)
BUDGETS = ("_200_steps", "")
VIEWS = (1, 2, 4)
AS_SHIPPED = "as shipped"

Rows = list[tuple[str, Scores]]


def table(bench: Batched) -> Rows:
    """One subject, every method in both regimes; trainings are pooled, each with its own noise."""
    return [
        ("as drawn, through the codec", bench.measure(Condition("drawn"))),
        (METHODS["none"], _without(bench)),
        *((f"{METHODS[method]}, {REGIMES[regime]}", _trainings(bench, method, regime))
          for method, regime in _trained(bench)),
        (f"{METHODS['none']}, first noise", bench.measure(bench.condition("none"))),
        (f"{METHODS['nested']}, {AS_SHIPPED}", bench.measure(bench.shipped())),
    ]  # fmt: skip


def frontier(bench: Batched) -> Rows:
    """Identity against alignment over strengths: what is gained of the one for what is lost of the other."""
    return [
        (METHODS["none"], _without(bench)),
        *((f"{METHODS[method]}, {REGIMES[regime]}, strength {value:g}",
           _trainings(bench, method, regime, strength=value))
          for method, regime in _trained(bench)
          for value in STRENGTHS),
        *((f"{METHODS['nested']}, {AS_SHIPPED}, strength {value:g}", bench.measure(bench.shipped(strength=value)))
          for value in STRENGTHS),
    ]  # fmt: skip


def order(bench: Batched) -> Rows:
    """Whether a look is heard from its own words or from the class word, which has read what stands before it."""
    rows = []
    for first, title in ((False, "smiling wooden robot"), (True, "robot smiling wooden")):
        rows.append((f"{title}, {METHODS['none']}", bench.measure(bench.condition("none", word_first=first))))
        rows += [
            (f"{title}, {METHODS[method]}, {REGIMES[regime]}",
             bench.measure(Condition(method, f"{method}{regime}", word_first=first)))
            for method, regime in _trained(bench) if regime
        ]  # fmt: skip
    return rows


def _trained(bench: Bench) -> list[tuple[str, str]]:
    """(method, regime) of the encoders that there are."""
    methods = [method for method in METHODS if method not in WITHOUT_SUBJECT]
    return [(method, regime) for regime in REGIMES for method in methods if f"{method}{regime}" in bench.encoders]


def _trainings(bench: Bench, method: str, regime: str, share: float = 1.0, **changes: Any) -> Scores:
    """A method's trainings, pooled: the same noises for all methods, another for each training."""
    names = {n: f"{method}{regime}{f'_seed{n}' * (n > 0)}" for n in TRAININGS}
    return pooled([
        bench.measure(Condition(method, name, **changes), share, (n,))
        for n, name in names.items() if name in bench.encoders
    ])  # fmt: skip


def _without(bench: Bench, share: float = 1.0, **changes: Any) -> Scores:
    """No subject, with the noises of `_trainings`."""
    return pooled([bench.measure(bench.condition("none", **changes), share, (n,)) for n in TRAININGS])


def pairs(bench: Batched) -> Rows:
    rows = [(METHODS["none"], _without(bench, 0.67, pair=True))]
    for method, regime in _trained(bench):
        rows.append((f"{METHODS[method]}, {REGIMES[regime]}", _trainings(bench, method, regime, 0.67, pair=True)))
    rows.append((f"{METHODS['nested']}, {AS_SHIPPED}", bench.measure(bench.shipped(pair=True), 0.67)))
    return rows


def focus(bench: Batched) -> Rows:
    return [(f"focus {x:g}", bench.measure(bench.shipped(focus=x))) for x in FOCUS]


def nodes(bench: Nodes) -> Rows:
    """The shipped encoder and no subject, for the table's rows of the same names."""
    return [
        (f"{METHODS['none']}, first noise", bench.measure(bench.condition("none"))),
        (f"{METHODS['nested']}, {AS_SHIPPED}", bench.measure(bench.shipped())),
    ]


def separation(bench: Nodes) -> Rows:
    return [(f"separation {x:g}", bench.measure(bench.shipped(pair=True, separation=x), 0.67)) for x in SEPARATION]


def apart(bench: Nodes) -> Rows:
    """Two subjects as they come, and two who reach out for each other, with Separate Subjects and without."""
    rows = []
    for title, touching in (("as they come", False), ("reaching out", True)):
        said = {"pair": True, "touching": touching}
        rows.append((f"{title}, {METHODS['none']}", bench.measure(bench.condition("none", **said), 0.67)))
        for x in APART:
            scores = bench.measure(bench.shipped(apart=x, **said), 0.67)
            rows.append((f"{title}, Separate Subjects {x:g}" if x else f"{title}, without it", scores))
    return rows


def touching(bench: Bench) -> float:
    """The share of `apart`'s pairs reaching out that come within two pixels of each other where they are drawn."""
    near = []
    for case in bench.cases(True, 0.67, True):
        regions = torch.from_numpy(data.draw(case.entry, random.Random(case.seed)).regions)
        shown = [((regions > 0) & (regions // drawing.NEXT_FIGURE == i)).float()[None] for i in range(2)]
        near.append(bool((F.max_pool2d(shown[0], 5, 1, 2) * shown[1]).any()))
    return sum(near) / len(near)


def budget(bench: Batched) -> Rows:
    """The frontier after a part of the training, and after all of it: whether the order has settled."""
    return [
        (METHODS["none"], bench.measure(bench.condition("none"))),
        *((f"{METHODS[method]}, {budget_title(steps)}, strength {value:g}",
           bench.measure(Condition(method, f"{method}{steps}", strength=value)))
          for steps in BUDGETS
          for method in METHODS
          if f"{method}{steps}" in bench.encoders
          for value in STRENGTHS),
    ]  # fmt: skip


def budget_title(steps: str) -> str:
    return steps.strip("_").replace("_", " ") or "all steps"


def identity(bench: Batched) -> Rows:
    return [(f"α x {x:g}", bench.measure(bench.shipped(alpha=x))) for x in IDENTITIES]


def unconditional(bench: Batched) -> Rows:
    """What the negative side of the guidance gets: nothing, the class word, or a black picture on the class word.

    *gain*: of identity over that of nothing, subject by subject.
    """
    rows = []
    for cfg in GUIDANCE:
        nothing = bench.measure(bench.shipped(cfg=cfg))
        rows.append((f"cfg {cfg:g}, nothing", nothing))
        for negative, title in (("word", "the class word"), ("black", "a black picture on the class word")):
            scores = bench.measure(bench.shipped(cfg=cfg, negative=negative))
            pairs = zip(scores.right["identity"], nothing.right["identity"], strict=True)
            scores.right["gain"] = [one - other for one, other in pairs]
            rows.append((f"cfg {cfg:g}, {title}", scores))
    return rows


def attention(bench: Batched) -> Rows:
    """How much of each layer's attention the class word has, by what is drawn there: the bare base model, in diffusers.

    Half noised pictures of held-out figures, whose parts are known; the mean over heads and places.
    """
    unet, text_encoder, codec = export.load_checkpoint(shipped.WEIGHTS / shipped.CHECKPOINT)
    scheduler: Any = models.scheduler()
    tokenizer, cases = models.tokenizer(), bench.cases(pair=False)
    drawn = [data.draw(c.entry, random.Random(c.seed)) for c in cases]
    texts = [data.plain_prompt(c.entry) for c in cases]
    ids = tokenizer(texts, padding="max_length", max_length=models.TEXT_LENGTH, return_tensors="pt").input_ids
    words = [tokenizer(c.entry.figures[0].kind).input_ids[1] for c in cases]
    places = (ids == torch.tensor(words)[:, None]).int().argmax(1, keepdim=True)
    seen: dict[int, torch.Tensor] = {}

    class Watching:
        def __init__(self, layer: int) -> None:
            self.layer = layer

        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
            q, k = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
            shares = outer_probabilities(q, k, attn.heads, places).float().mean(2)[..., 0]
            side = int(shares.shape[1] ** 0.5)
            seen[self.layer] = F.interpolate(shares.view(-1, 1, side, side), size=drawing.SIZE)[:, 0]
            return attn.to_out[0](scaled_dot_product(q, k, attn.to_v(encoder_hidden_states), attn.heads))

    watching = {f"{name}.processor": Watching(i) for i, name in enumerate(cross_attention(unet))}
    unet.set_attn_processor({**unet.attn_processors, **watching})
    with torch.no_grad():
        pixels = models.normalise(torch.from_numpy(np.stack([np.asarray(picture.image) for picture in drawn])))
        latents = codec.encode(pixels).latent * codec.config.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        times = torch.full((len(cases),), 500)
        unet(scheduler.add_noise(latents, noise, times), times, text_encoder(ids).last_hidden_state)
    rows = []
    for layer, name in enumerate(cross_attention(unet)):
        scores = Scores()
        for picture, shares in zip(drawn, seen[layer].numpy(), strict=True):
            for part, number in {**drawing.PARTS, "background": 0}.items():
                if (picture.regions == number).any():
                    scores.add(part, float(shares[picture.regions == number].mean()))
        rows.append((name.replace(".transformer_blocks.0.attn2", ""), scores))
    return rows


def tokens(bench: Batched) -> Rows:
    rows = []
    for count in TOKENS:
        name = {1: "one_value", 16: "nested"}.get(count, f"nested_{count}_tokens")
        if name in bench.encoders:
            method = "one_value" if count == 1 else "nested"
            rows.append((f"{count} tokens", bench.measure(Condition(method, name))))
    return rows


def views(bench: Batched) -> Rows:
    return [(f"{n} views", bench.measure(bench.shipped(views=n))) for n in VIEWS]


#: In diffusers, where batches are large and any encoder opens.
BATCHED: dict[str, Callable[[Batched], Rows]] = {
    "table": table, "frontier": frontier, "order": order, "budget": budget, "pairs": pairs, "identity": identity,
    "focus": focus, "unconditional": unconditional, "tokens": tokens, "views": views, "attention": attention,
}  # fmt: skip
#: Those that compare with encoders that are not shipped.
COMPARING = ("table", "frontier", "order", "budget", "pairs", "tokens")
#: In ComfyUI, through the nodes.
NODES: dict[str, Callable[[Nodes], Rows]] = {"nodes": nodes, "separation": separation, "apart": apart}
