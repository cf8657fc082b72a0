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
weight folded in, Δ_s = w · max(0, (f − 1) · l_s). With a the unchanged probabilities, the raised softmax is

    r = 1 / (1 + Σ_s a_s (e^Δ_s − 1)),     a'_t = r a_t  (t ≠ s),     a'_s = r a_s e^Δ_s

and its difference to Attn(q, K, V) is again a sum over the bound tokens plus (r − 1) · Attn(q, K, V).

Shapes: B batch rows, Q queries, T text tokens, N subject tokens, P bound places, H heads, C = H · d channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import NestedAttentionError

ValueNorm = Literal["match", "match_per_head", "unit", "none"]
VALUE_NORMS: tuple[ValueNorm, ...] = get_args(ValueNorm)

#: `attend(q (B, Q, C), k (B, N, C), v (B, N, C), heads, mask (B, Q, N) or None) -> (B, Q, C)`
Attend = Callable[[Tensor, Tensor, Tensor, int, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class NestedTerm:
    """One subject in one cross-attention layer: the same one in all batch rows, or another one in each.

    Attributes:
        key, value: K̈ and V̈ of the subject in this layer, (1 or B, N, C).
        places: indexes of the bound tokens on the text axis, int64, on the device of the layer: (P,) for all rows, or
            (B, P), where -1 fills up rows with fewer places.
        strength: w; 1 is the paper, 0 adds nothing.
        alpha: α of equation (4), a number or, in training, a scalar tensor; unused with `value_norm="none"`.
        value_norm: what equation (4) measures. "match": α·‖V[s]‖ over all channels; "match_per_head": the same
            within each head; "unit": α itself, per head; "none": v* as it comes.
        focus: weight of the bound token's logit, applied only where it raises it; 1 leaves the softmax alone.
        spatial: factor on `strength` per query, (1 or B, Q), or None for 1 everywhere.
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
    log_weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.value_norm not in VALUE_NORMS:
            raise NestedAttentionError(f"value_norm is {self.value_norm!r}; expected one of {', '.join(VALUE_NORMS)}.")
        if self.focus < 0:
            raise NestedAttentionError(f"focus is {self.focus}; expected 0 or more (1 leaves the attention alone).")


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


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + mask), written out; (B, H, Q, d), (B, H, T, d) -> fp32 (B, H, Q, T)."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (logits if mask is None else logits + mask).softmax(-1, dtype=_statistics(q))


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + mask) v with PyTorch's fused attention: the default `attend`. (B, Q, C) -> (B, Q, C)."""
    qh, kh, vh = (split_heads(x, heads) for x in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(1)
    if _written_out(q):
        return merge_heads(_probabilities(qh, kh, mask).to(v.dtype) @ vh)
    return merge_heads(F.scaled_dot_product_attention(qh, kh, vh, mask))


def outer_probabilities(q: Tensor, k: Tensor, heads: int, places: Tensor) -> Tensor:
    """a_s(q): the outer attention's probability of the tokens at `places`, (P,) or (B, P); fp32 (B, H, Q, P).

    A place of -1 has the probability 0.

    Attention over one-hot values *is* the probability. So it runs in the fused kernels, whose softmax statistics are
    fp32 for every input type, and does not build the (B, H, Q, T) matrix.
    """
    qh, kh = split_heads(q, heads), split_heads(k, heads)
    if _written_out(q):
        prob = _probabilities(qh, kh)
        if places.ndim == 1:
            return prob.index_select(-1, places)
        at = places.clamp_min(0)[:, None, None].expand(*prob.shape[:3], -1)
        return prob.gather(-1, at) * (places >= 0)[:, None, None]
    head_dim, tokens = qh.shape[-1], kh.shape[-2]
    columns = []
    # Kernels want values as wide as keys: that many places per call. One call in practice.
    for part in places.split(head_dim, dim=-1):
        padded = F.pad(part, (0, head_dim - part.shape[-1]), value=-1)
        one_hot = torch.arange(tokens, device=k.device)[:, None] == padded[..., None, :]  # (T, d) or (B, T, d)
        if places.ndim == 2:
            one_hot = one_hot[:, None]
        values = one_hot.to(k.dtype).expand(*kh.shape[:2], -1, -1)
        columns.append(F.scaled_dot_product_attention(qh, kh, values)[..., : part.shape[-1]])
    return torch.cat(columns, dim=-1).to(_statistics(q))


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x (B, T, C) at `places` (P,) or (B, P) -> (B, P, C). What stands at a place of -1 has no meaning."""
    if places.ndim == 1:
        return x.index_select(1, places)
    return x.gather(1, places.clamp_min(0)[..., None].expand(-1, -1, x.shape[-1]))


def _value_scale(term: NestedTerm, nested: Tensor, replaced: Tensor, heads: int) -> Tensor:
    """Equation (4): the factor on v*_q for each place; fp32, broadcastable to (B, H, Q, P).

    nested: v*_q before rescaling (B, Q, C). replaced: V at the bound places (B, P, C).
    """
    if term.value_norm == "none":
        return torch.ones((), device=nested.device)

    def norms(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, dtype=_statistics(x))

    if term.value_norm == "match":
        norm = norms(nested)[:, None, :, None]  # (B, 1, Q, 1)
        target = norms(replaced)[:, None, None, :]  # (B, 1, 1, P)
    else:
        norm = norms(split_heads(nested, heads))[..., None]  # (B, H, Q, 1)
        if term.value_norm == "unit":
            target = torch.ones((), device=nested.device)
        else:
            target = norms(split_heads(replaced, heads))[:, :, None, :]  # (B, H, 1, P)
    # A v* of nothing (an untrained layer, a dead head) has no direction to rescale: it stays nothing.
    return torch.where(norm > 0, term.alpha * target / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0)


def nested_delta(
    q: Tensor, k: Tensor, v: Tensor, heads: int, terms: Sequence[NestedTerm], attend: Attend = scaled_dot_product
) -> Tensor:
    """What the subjects add to a cross-attention layer's output (equations 1 to 4, fused).

    Args:
        q: queries (B, Q, C), of any floating type.
        k, v: text keys and values (B, T, C).
        heads: H; C must be a multiple of it.
        terms: the subjects, each with its own places (a place belongs to one subject).
        attend: the attention that computes equation (1); see `Attend`.

    Returns:
        (B, Q, C) in q's type, to be added to the layer's own attention output, before its output projection.
    """
    every = [term.places for term in terms]
    if any(places.ndim == 2 for places in every):
        every = [places.expand(q.shape[0], -1) for places in every]
    places = torch.cat(every, dim=-1)
    counts = [term.places.shape[-1] for term in terms]
    prob = outer_probabilities(q, k, heads, places)  # a_s, (B, H, Q, P)

    # w per place: strength times the spatial weight, broadcastable to (B, H, Q, P).
    weights = [
        torch.full((), term.strength, device=q.device)
        if term.spatial is None
        else term.strength * term.spatial.to(prob.dtype)[:, None, :, None]
        for term in terms
    ]

    if all(term.focus == 1 for term in terms):
        raised, remainder, delta = prob, None, None
    else:
        qh, kh = (split_heads(x, heads).to(prob.dtype) for x in (q, _at(k, places)))
        logits = qh @ kh.transpose(-1, -2) * qh.shape[-1] ** -0.5  # l_s, (B, H, Q, P)
        if places.ndim == 2:
            logits = logits.masked_fill((places < 0)[:, None, None], 0)
        gain = torch.cat(
            [
                torch.exp(weight * torch.relu((term.focus - 1) * part))
                for term, weight, part in zip(terms, weights, logits.split(counts, dim=-1), strict=True)
            ],
            dim=-1,
        )  # e^Δ_s
        r = 1 / (1 + (prob * (gain - 1)).sum(-1, keepdim=True))
        raised, remainder = r * prob * gain, r * prob * (gain - 1)  # a'_s, and what the raised logit alone adds
        own = split_heads(attend(q, k, v, heads, None), heads)
        delta = merge_heads((r - 1).to(q.dtype) * own)

    start = 0
    for term, weight, count in zip(terms, weights, counts, strict=True):
        here = slice(start, start + count)
        start += count
        key, value = (x.expand(q.shape[0], -1, -1) for x in (term.key, term.value))
        mask = None
        if term.log_weights is not None:
            mask = term.log_weights.to(q.dtype)
            mask = (mask if mask.ndim == 1 else mask[:, None]).expand(q.shape[0], q.shape[1], -1)
        nested = attend(q, key, value, heads, mask)  # (1), (B, Q, C)
        replaced = _at(v, term.places)  # V[s], (B, P, C)

        swap = raised[..., here] * weight  # a'_s w
        gained = (swap * _value_scale(term, nested, replaced, heads)).sum(-1, keepdim=True)  # (4), (B, H, Q, 1)
        lost = swap if remainder is None else swap - remainder[..., here]
        part = gained.to(q.dtype) * split_heads(nested, heads) - lost.to(q.dtype) @ split_heads(replaced, heads)
        part = merge_heads(part)
        delta = part if delta is None else delta + part
    assert delta is not None, "terms is empty"
    return delta
