"""Decoupled attention, the way of IP-Adapter (arXiv 2308.06721): a baseline to measure nested attention against.

    out(q) = Attn(q, K, V)  +  α · Attn(q, K̈, V̈)

The same encoder, K̈ and V̈; bound to no word, so several subjects of a row are one sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..attention import scaled_dot_product
from ..hosts.diffusers import BoundSubject, nested_attention


class DecoupledAttnProcessor:
    """Attention processor of one cross-attention layer: AttnProcessor2_0 plus the subjects' own attention."""

    def __init__(self, layer: int, subjects: Sequence[BoundSubject]) -> None:
        self.layer, self.subjects = layer, subjects

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """hidden_states (B, Q, C), encoder_hidden_states (B, T, context) -> (B, Q, C)."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.to_q(hidden_states)
        out = scaled_dot_product(q, attn.to_k(text), attn.to_v(text), attn.heads)
        for subject in self.subjects:
            at = slice(*(subject.rows or (0, len(q))))
            term = subject.term(self.layer, q)
            here = q[at]
            key, value = (x.expand(len(here), -1, -1) for x in (term.key, term.value))
            mask = None
            if term.log_weights is not None:
                mask = term.log_weights.to(q.dtype)
                mask = (mask if mask.ndim == 1 else mask[:, None]).expand(*here.shape[:2], -1)
            own = scaled_dot_product(here, key, value, attn.heads, mask)
            out = out.clone()
            out[at] += (term.alpha * term.strength * own).to(out.dtype)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def decoupled_attention(unet: Any, subjects: Sequence[BoundSubject]) -> AbstractContextManager[None]:
    """As `hosts.diffusers.nested_attention`, whose errors it raises, with decoupled attention."""
    return nested_attention(unet, subjects, DecoupledAttnProcessor)
