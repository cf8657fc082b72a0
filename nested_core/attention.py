"""Nested attention in fused form: the only place where the method's equations are written.

Source: "Nested Attention" (arXiv 2501.01407). In a cross-attention layer with queries q, text keys K and text
values V, the subject is bound to one prompt token s*:

    (1) v*_q    = softmax(q K̈ᵀ / √d) V̈              nested attention over the subject's tokens, per query
    (2) V_q[t]  = v*_q  if t = s*  else  V[t]
    (3) out(q)  = softmax(q Kᵀ / √d) V_q             the outer attention; K is untouched
    (4) v*_q is rescaled to α times the norm of the value that it replaces

Written like that, (2) needs a value tensor per query. The layer is linear in the values, so with the outer
probability a_s(q) of token s the same result is

    out(q) = Attn(q, K, V)  +  Σ_s a_s(q) · w · (v*_q,s − V[s])

where the first term is whatever attention the model computes (opaque here), `w` is the strength, and a token that
stands at several places contributes once per place. `nested_delta` returns the sum alone: a layer without
subjects, or with strength 0, has nothing to add.

`focus` f multiplies the pre-softmax logit l_s of the bound token where that raises it: with strength and spatial
weight folded in, Δ_s = max(0, w) · max(0, (f − 1) · l_s). With a the unchanged probabilities, the raised softmax is

    r = 1 / (1 + Σ_s a_s (e^Δ_s − 1)),     a'_t = r a_t  (t ≠ s),     a'_s = r a_s e^Δ_s

and its difference to Attn(q, K, V) is again a sum over the bound tokens plus (r − 1) · Attn(q, K, V).

`separation` σ lets a subject yield where another one of the same prompt is looked at more (not in the paper; the
overlap of the words' attention is what bounded and attend-and-excite style methods work on, there by gradients). With
p_s(q) the mean over heads of a_s(q), summed over the places of subject s, times its strength and spatial weight there
(at most 1 each: who hardly acts takes nothing from others), its strength at q is multiplied by

    (p_s(q) / max_s' p_s'(q)) ^ (σ / (1 − σ))

which is 1 everywhere for σ = 0 (the plain sum), and 1 for the strongest subject and 0 for the others for σ = 1.

Shapes: B batch rows, Q queries, T text tokens, N subject tokens, P bound places, H heads, C = H · d channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .errors import NestedAttentionError

ValueNorm = Literal["match", "match_per_head", "unit", "none"]
VALUE_NORMS: tuple[ValueNorm, ...] = get_args(ValueNorm)

#: eps of a norm's square: a v* of nothing (an untrained layer, a dead head) has no direction, and stays nothing.
_NOTHING = 1e-30

#: `attend(q (B, Q, C), k (B, N, C), v (B, N, C), heads, mask (B, Q, N) or None) -> (B, Q, C)`
Attend = Callable[[Tensor, Tensor, Tensor, int, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class NestedTerm:
    """One subject in one cross-attention layer: the same one in all batch rows, or another one in each.

    Attributes:
        key, value: K̈ and V̈ of the subject in this layer, (1 or B, N, C), in the layer's type or a wider one.
        places: indexes of the bound tokens on the text axis, int64, on the device of the layer: (P,) for all rows, or
            (B, P), where -1 fills up rows with fewer places.
        strength: w; 1 is the paper, 0 adds nothing.
        alpha: α of equation (4), a number or, in training, a scalar tensor; unused with `value_norm="none"`.
        value_norm: what equation (4) measures. "match": α·‖V[s]‖ over all channels; "match_per_head": the same
            within each head; "unit": α itself, per head; "none": v* as it comes.
        focus: weight of the bound token's logit, applied only where it raises it; 1 leaves the softmax alone.
        spatial: factor on `strength` per query, (1 or B, Q), or None for 1 everywhere.
        separation: σ from 0 to 1, how far the subject yields where another one is looked at more; 0 is the plain sum.
        log_weights: logarithm of each subject token's multiplicity in the nested softmax, (N,) or (B, N), or None for
            equal ones. A token of multiplicity 2 counts as if it stood there twice, one of 0 (-inf) as if it did not.
    """

    key: Tensor
    value: Tensor
    places: Tensor
    strength: float = 1.0
    alpha: float | Tensor = 2.0
    value_norm: ValueNorm = "match"
    focus: float = 1.0
    spatial: Tensor | None = None
    separation: float = 0.0
    log_weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.value_norm not in VALUE_NORMS:
            raise NestedAttentionError(f"value_norm is {self.value_norm!r}; expected one of {', '.join(VALUE_NORMS)}.")
        if self.focus < 0:
            raise NestedAttentionError(f"focus is {self.focus}; expected 0 or more (1 leaves the attention alone).")
        if not 0 <= self.separation <= 1:
            raise NestedAttentionError(f"separation is {self.separation}; expected 0 (the plain sum) to 1.")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H·d) -> (B, H, T, d), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, d) -> (B, T, H·d)."""
    return x.transpose(1, 2).flatten(2)


def _statistics(x: Tensor) -> torch.dtype:
    """The type norms and softmax statistics are kept in: fp32, or fp64 for fp64 input."""
    return torch.promote_types(x.dtype, torch.float32)


def _written_out(q: Tensor) -> bool:
    """Whether attention is better written out than fused: in training on a CPU, whose fused backward pass is slow."""
    return q.device.type == "cpu" and torch.is_grad_enabled()


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + mask), written out; (B, H, Q, d), (B, H, T, d) -> fp32 (B, H, Q, T)."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (logits if mask is None else logits + mask).softmax(-1, dtype=_statistics(q))


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + mask) v with PyTorch's fused attention: the default `attend`. (B, Q, C) -> (B, Q, C)."""
    qh, kh, vh = (split_heads(x, heads) for x in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(1)
    if _written_out(q):
        return merge_heads(probabilities(qh, kh, mask).to(v.dtype) @ vh)
    return merge_heads(F.scaled_dot_product_attention(qh, kh, vh, mask))


def one_hot_values(places: Tensor, tokens: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """Values whose attention is the probability of the tokens at `places`: (T, H·d), or (B, T, H·d) for (B, P).

    In each head of `width` d, column i is 1 at place i; columns beyond P, and those of a place of -1, are 0. P must not
    exceed the width.
    """
    columns = F.pad(places, (0, width - places.shape[-1]), value=-1)
    hot = (torch.arange(tokens, device=places.device)[:, None] == columns[..., None, :]).to(dtype)
    return hot.unsqueeze(-2).expand(*hot.shape[:-1], heads, width).flatten(-2)


def outer_probabilities(
    q: Tensor, k: Tensor, heads: int, places: Tensor, one_hot: Tensor | None = None, attend: Attend = scaled_dot_product
) -> Tensor:
    """a_s(q): the outer attention's probability of the tokens at `places`, (P,) or (B, P); (B, Q, H, P) in q's type.

    A place of -1 has the probability 0. `one_hot`: `one_hot_values` of these places for each batch row, (B, T, C),
    where the caller has them already.

    Attention over one-hot values *is* the probability. So it runs in the fused kernels, whose softmax statistics are
    fp32 for every input type, and does not build the (B, H, Q, T) matrix.
    """
    if _written_out(q):
        prob = probabilities(split_heads(q, heads), split_heads(k, heads)).transpose(1, 2)
        if places.ndim == 1:
            return prob.index_select(-1, places)
        at = places.clamp_min(0)[:, None, None].expand(*prob.shape[:3], -1)
        return prob.gather(-1, at) * (places >= 0)[:, None, None]
    width, columns = q.shape[-1] // heads, []
    # Kernels want values as wide as keys: that many places per call. One call in practice.
    for part in places.split(width, dim=-1):
        values = one_hot
        if values is None:
            values = one_hot_values(part, k.shape[1], heads, width, k.dtype)
            # Copied for each row: not every kernel is right about values of stride 0.
            values = values.repeat(k.shape[0], 1, 1) if values.ndim == 2 else values
        columns.append(attend(q, k, values, heads, None).unflatten(-1, (heads, -1))[..., : part.shape[-1]])
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x (B, T, C) at `places` (P,) or (B, P) -> (B, P, C). What stands at a place of -1 has no meaning."""
    if places.ndim == 1:
        return x.index_select(1, places)
    return x.gather(1, places.clamp_min(0)[..., None].expand(-1, -1, x.shape[-1]))


def _norms(x: Tensor) -> Tensor:
    """(..., C) -> (...), in the type of `_statistics`."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=_statistics(x))


def _sum_places(x: Tensor) -> Tensor:
    """(B, Q, H, P) -> (B, Q, H, 1). With one place, which is the rule, there is nothing to add up."""
    return x if x.shape[-1] == 1 else x.sum(-1, keepdim=True)


def _scaled(value_norm: ValueNorm, share: Tensor, replaced: Tensor) -> Tensor:
    """The share of each place times the norm that equation (4) gives v*_q there, but for α: (B, Q, H, P).

    share: a_s(q) of bound places (B, Q, H, P). replaced: V at them (B, P, H, d).
    """
    if value_norm in ("none", "unit"):
        return share
    target = _norms(replaced.flatten(2))[..., None] if value_norm == "match" else _norms(replaced)  # (B, P, 1 or H)
    return share * target.transpose(1, 2)[:, None]


def _scaled_of_each(terms: Sequence[NestedTerm], share: Tensor, replaced: Tensor) -> Sequence[Tensor]:
    """`_scaled` for each subject's own places; of all at once where they measure the same."""
    counts = [term.places.shape[-1] for term in terms]
    if len({term.value_norm for term in terms}) == 1:
        return _scaled(terms[0].value_norm, share, replaced).split(counts, dim=-1)
    parts = zip(terms, share.split(counts, dim=-1), replaced.split(counts, dim=1), strict=True)
    return [_scaled(term.value_norm, part, before) for term, part, before in parts]


def _rescaled(term: NestedTerm, scaled: Tensor, nested: Tensor) -> tuple[Tensor, Tensor, float]:
    """Equation (4), summed over the places: the product of what comes back is what is added.

    scaled: `_scaled` of the subject's places (B, Q, H, P). nested: v*_q before rescaling (B, Q, H, d). Returns v*_q in
    some scale (B, Q, H, d), a factor (B, Q, H, 1), and a number.
    """
    factor = _sum_places(scaled)
    if term.value_norm == "none":
        return nested, factor, 1.0
    number = 1.0
    if isinstance(term.alpha, Tensor):
        factor = factor * term.alpha
    else:
        number = term.alpha
    measured = nested.flatten(2) if term.value_norm == "match" else nested  # (B, Q, C) or (B, Q, H, d)
    if _mixes_types(nested):  # one kernel instead of three
        width = measured.shape[-1]
        return F.rms_norm(measured, (width,), eps=_NOTHING).view_as(nested), factor, number * width**-0.5
    norm = _norms(measured).reshape(*nested.shape[:2], -1, 1)  # (B, Q, 1 or H, 1)
    # A v* of nothing (an untrained layer, a dead head) has no direction to rescale: it stays nothing.
    return nested, factor / F.threshold(norm, 0.0, torch.inf), number


def _where_they_act(terms: Sequence[NestedTerm], probs: Sequence[Tensor]) -> list[Tensor | None]:
    """Each subject's factor on its strength per query, (B, Q, 1, 1), or None for 1: spatial weight and separation.

    probs: a_s(q) of each subject's places (B, Q, H, P).
    """
    spatial = [None if term.spatial is None else term.spatial[:, :, None, None] for term in terms]
    if len(terms) == 1 or not any(term.separation for term in terms):
        return spatial
    seen = [prob.to(_statistics(prob)).sum(-1, keepdim=True).mean(2, keepdim=True) for prob in probs]
    seen = [
        p * min(max(term.strength, 0.0), 1.0) * (1 if at is None else at.clamp(0, 1))
        for term, p, at in zip(terms, seen, spatial, strict=True)
    ]
    most = torch.stack(seen).amax(0)
    factors = list(spatial)
    for i, (term, p, at) in enumerate(zip(terms, seen, spatial, strict=True)):
        if term.separation == 0:
            continue
        if term.separation == 1:
            share = (p == most).to(p.dtype)
        else:
            # Nobody is looked at where `most` is 0: nothing is added there either way.
            share = (p / most.clamp_min(torch.finfo(p.dtype).tiny)) ** (term.separation / (1 - term.separation))
        factors[i] = share if at is None else at * share
    return factors


def _mixes_types(x: Tensor) -> bool:
    """Whether one operation may read several floating types at no cost, as CUDA's do (not all devices can)."""
    return x.is_cuda


def _fitting(x: Tensor, like: Tensor) -> Tensor:
    """x in another's type, at most the largest number of it; as it is where types may be mixed."""
    if x.dtype == like.dtype or _mixes_types(like):
        return x
    if torch.finfo(x.dtype).max <= torch.finfo(like.dtype).max:
        return x.to(like.dtype)
    most = torch.finfo(like.dtype).max
    return x.clamp(-most, most).to(like.dtype)


def _raised(
    q: Tensor,
    keys: Tensor,
    terms: Sequence[NestedTerm],
    factors: Sequence[Tensor | None],
    places: Tensor,
    prob: Tensor,
) -> tuple[Tensor, Tensor]:
    """The outer attention with the subjects' logits raised by their focus: (a'_s of the bound places (B, Q, H, P),
    r (B, Q, H, 1), by which every other token's probability shrinks).

    keys: K at the bound places (B, P, C). prob: a_s (B, Q, H, P). factors: as of `_where_they_act`.
    """
    heads = prob.shape[2]
    prob = prob.to(_statistics(q))
    qh, kh = (x.to(prob.dtype).unflatten(-1, (heads, -1)) for x in (q, keys))
    logits = torch.einsum("bqhd,bphd->bqhp", qh, kh) * qh.shape[-1] ** -0.5  # l_s
    if places.ndim == 2:
        logits = logits.masked_fill((places < 0)[:, None, None], 0)
    parts = logits.split([term.places.shape[-1] for term in terms], dim=-1)
    raises = torch.cat(
        [
            max(term.strength, 0.0) * (1 if at is None else at) * torch.relu((term.focus - 1) * part)
            for term, at, part in zip(terms, factors, parts, strict=True)
        ],
        dim=-1,
    ).masked_fill(prob == 0, 0)  # Δ_s; what has no probability can't be raised
    most = raises.amax(-1, keepdim=True)
    gain, same = torch.exp(raises - most), torch.exp(-most)  # e^Δ_s and 1, over e^most: those overflow
    whole = same + (prob * (gain - same)).sum(-1, keepdim=True)
    return prob * gain / whole, same / whole


def nested_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    terms: Sequence[NestedTerm],
    attend: Attend = scaled_dot_product,
    into: Tensor | None = None,
    prob: Tensor | None = None,
) -> Tensor:
    """What the subjects add to a cross-attention layer's output (equations 1 to 4, fused).

    Args:
        q: queries (B, Q, C), of any floating type.
        k, v: text keys and values (B, T, C).
        heads: H; C must be a multiple of it.
        terms: the subjects, each with its own places (a place belongs to one subject).
        attend: the attention that computes equation (1); see `Attend`.
        into: the layer's own attention output (B, Q, C), before its output projection: the sum is added to it in
            place, and it is what comes back. None: the sum alone comes back.
        prob: `outer_probabilities` of all terms' places in order, (B, Q, H, P), where the caller has them already.

    Returns:
        (B, Q, C), in the type of `into` or of q.
    """
    if into is not None and into.dtype != q.dtype:
        delta = nested_delta(q, k, v, heads, terms, attend, prob=prob)
        return into.add_(delta.to(into.dtype))
    every = [term.places for term in terms]
    assert every, "terms is empty"
    if any(places.ndim == 2 for places in every):
        every = [places.expand(q.shape[0], -1) for places in every]
    places = every[0] if len(every) == 1 else torch.cat(every, dim=-1)
    counts = [term.places.shape[-1] for term in terms]
    if prob is None:
        prob = outer_probabilities(q, k, heads, places)  # a_s, (B, Q, H, P)
    replaced = _at(v, places).unflatten(-1, (heads, -1))  # V[s], (B, P, H, d)
    total = torch.zeros_like(q) if into is None else into
    # Several subjects are summed in fp32: each sum in a half type would round once more.
    summed = total if len(terms) == 1 else total.to(_statistics(q))
    by_head = summed.unflatten(-1, (heads, -1))  # (B, Q, H, d)
    factors = _where_they_act(terms, prob.split(counts, dim=-1))
    if any(term.focus != 1 for term in terms):
        own = _fitting(attend(q, k, v, heads, None), summed).unflatten(-1, (heads, -1))
        raised, rest = _raised(q, _at(k, places), terms, factors, places, prob)
        by_head.addcmul_(own, _fitting(rest - 1, summed))
        louder = _fitting(raised - rest * prob, summed)  # what the raised logit alone adds of V[s]
        for p in range(places.shape[-1]):
            by_head.addcmul_(_fitting(replaced[:, p, None], summed), louder[..., p, None])
        prob = raised
    _add_all(by_head, q, terms, factors, prob, replaced, attend)
    if summed is total:
        return total
    return summed.to(total.dtype) if into is None else into.copy_(summed)


def _add_all(
    out: Tensor,
    q: Tensor,
    terms: Sequence[NestedTerm],
    factors: Sequence[Tensor | None],
    prob: Tensor,
    replaced: Tensor,
    attend: Attend,
) -> None:
    """Adds the subjects to a layer's output by head, out (B, Q, H, d), in the type of q or of `_statistics`.

    factors: as of `_where_they_act`. prob: a'_s of all places (B, Q, H, P). replaced: V at them (B, P, H, d).
    """
    counts = [term.places.shape[-1] for term in terms]
    shares, values = prob.split(counts, dim=-1), replaced.split(counts, dim=1)
    if out.is_cuda and kernels.chosen() and not torch.is_grad_enabled():
        for term, at, share, before in zip(terms, factors, shares, values, strict=True):
            nested = _nested(q, term, out.shape[2], attend)
            share = share if at is None else share * at
            kernels.add_subject(out, nested, share, before, term.value_norm, float(term.alpha), term.strength)
        return
    scaled = _scaled_of_each(terms, prob, replaced)
    for term, at, share, rescaled, before in zip(terms, factors, shares, scaled, values, strict=True):
        if at is not None:
            share, rescaled = share * at, rescaled * at
        _add(out, q, term, share, rescaled, before, attend)


def _add(
    out: Tensor, q: Tensor, term: NestedTerm, share: Tensor, scaled: Tensor, replaced: Tensor, attend: Attend
) -> None:
    """Adds one subject to a layer's output by head, out (B, Q, H, d), in the type of q or of `_statistics`.

    share: a'_s where the subject acts (B, Q, H, P). scaled: `_scaled` of that. replaced: V[s] (B, P, H, d).
    """
    nested = _nested(q, term, out.shape[2], attend)
    nested, factor, number = _rescaled(term, scaled, nested)
    if nested.dtype != out.dtype and not _mixes_types(out):  # only their product is sure to fit
        nested, factor = nested.to(factor.dtype) * factor, factor.new_ones(())
    out.addcmul_(_fitting(nested, out), _fitting(factor, out), value=term.strength * number)
    share, replaced = _fitting(share, out), _fitting(replaced, out)
    for p in range(share.shape[-1]):
        out.addcmul_(replaced[:, p, None], share[..., p, None], value=-term.strength)


def _nested(q: Tensor, term: NestedTerm, heads: int, attend: Attend) -> Tensor:
    """Equation (1): v*_q of all queries, (B, Q, H, d)."""
    rows, weights = q.shape[0], term.log_weights
    key, value = term.key, term.value
    if len(key) == 1 and (weights is None or weights.ndim == 1):
        q = q.reshape(1, -1, q.shape[-1])  # K̈ and V̈ are those of all rows: one row of all their queries
    q = q.to(key.dtype)  # K̈ and V̈ may need a wider one
    mask = None
    if weights is not None:
        key, value = (x.expand(len(q), -1, -1) for x in (key, value))
        mask = weights.to(q.dtype)
        mask = (mask if mask.ndim == 1 else mask[:, None]).expand(len(q), q.shape[1], -1)
    return attend(q, key, value, heads, mask).reshape(rows, -1, heads, q.shape[-1] // heads)
