"""Nested attention on diffusers' UNet2DConditionModel: attention processors, put in and taken out as exact inverses.

    subject = BoundSubject(encoder, tokens, places=[5], rows=(1, 2))
    with nested_attention(unet, [subject]):
        noise = unet(latents, timestep, encoder_hidden_states=prompt_embeds, ...).sample

The mathematics is `nested_core.attention`, the same as in the nodes; gradients reach the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..attention import NestedTerm, ValueNorm, nested_delta, scaled_dot_product
from ..encoder import EncoderConfig, NestedEncoder
from ..errors import NestedAttentionError
from ..layers import family_of


@dataclass(eq=False)
class BoundSubject:
    """A subject in some rows of a batch, or one in each of them.

    encoder: whose K̈ and V̈ layers it goes through. tokens: x, (1 or rows, N, C). places: indexes of its tokens on the
    text axis, the same in all rows, or (rows, P) with -1 to fill up. rows: the batch rows from start to before stop,
    None for all. alpha and value_norm are the encoder's unless given; the rest as in `NestedTerm`.
    """

    encoder: NestedEncoder
    tokens: Tensor
    places: Sequence[int] | Tensor
    rows: tuple[int, int] | None = None
    strength: float = 1.0
    alpha: float | Tensor | None = None
    value_norm: ValueNorm | None = None
    focus: float = 1.0
    log_weights: Tensor | None = None
    _made: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def term(self, layer: int, like: Tensor) -> NestedTerm:
        """This subject in a layer, on the device and in the type of `like`."""
        made = self._made.get(layer)
        if made is None:
            key, value = self.encoder.keys_values(self.tokens, layer)
            made = (key.to(like), value.to(like))
            if not torch.is_grad_enabled():  # the same in every step; a training step makes new ones
                self._made[layer] = made
        config = self.encoder.config
        return NestedTerm(
            key=made[0],
            value=made[1],
            places=torch.as_tensor(self.places, device=like.device),
            strength=self.strength,
            alpha=config.alpha if self.alpha is None else self.alpha,
            value_norm=cast(ValueNorm, config.value_norm) if self.value_norm is None else self.value_norm,
            focus=self.focus,
            log_weights=self.log_weights,
        )


class NestedAttnProcessor:
    """Attention processor of one cross-attention layer: diffusers' AttnProcessor2_0 plus the subjects' term."""

    def __init__(self, layer: int, subjects: Sequence[BoundSubject]) -> None:
        self.layer, self.subjects = layer, subjects

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (B, Q, C), encoder_hidden_states (B, T, context) -> (B, Q, C)."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = None
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, text.shape[1], hidden_states.shape[0])
            mask = mask.unflatten(0, (hidden_states.shape[0], -1))[:, 0].expand(-1, hidden_states.shape[1], -1)
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        out = scaled_dot_product(q, k, v, attn.heads, mask)
        parts: list[tuple[slice, Tensor]] = []
        for rows, subjects in self._by_rows(len(q)).items():
            at = slice(*rows)
            terms = [subject.term(self.layer, q) for subject in subjects]
            parts.append((at, nested_delta(q[at], k[at], v[at], attn.heads, terms)))
        if parts:
            out = out.clone()
            for at, delta in parts:
                out[at] += delta
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor

    def _by_rows(self, batch: int) -> dict[tuple[int, int], list[BoundSubject]]:
        grouped: dict[tuple[int, int], list[BoundSubject]] = {}
        for subject in self.subjects:
            rows = subject.rows or (0, batch)
            if not 0 <= rows[0] < rows[1] <= batch:
                raise NestedAttentionError(f"A subject is bound to rows {rows} of a batch of {batch}.")
            if subject.strength != 0:
                grouped.setdefault(rows, []).append(subject)
        for a in grouped:
            if any(a != b and a[0] < b[1] and b[0] < a[1] for b in grouped):
                raise NestedAttentionError(
                    f"Subjects are bound to rows that overlap but differ: {sorted(grouped)}. Give subjects of one "
                    "prompt the same rows."
                )
        return grouped


def cross_attention(unet: Any) -> list[str]:
    """Names of the U-Net's cross-attention modules, in the order of its processors."""
    return [n.removesuffix(".processor") for n in unet.attn_processors if n.endswith("attn2.processor")]


def check_fits(unet: Any, config: EncoderConfig) -> None:
    """Raises NestedAttentionError when the U-Net's layers are not those that an encoder was made for."""
    names = cross_attention(unet)
    family = family_of(config.family)
    expected = [layer.diffusers for layer in family.layers()]
    if names != expected:
        raise NestedAttentionError(
            f"The encoder is for {family.title}, with {len(expected)} cross-attention layers; this U-Net has "
            f"{len(names)}. Use the U-Net of an {family.title} model."
        )
    widths = tuple(unet.get_submodule(name).to_k.out_features for name in names)
    if widths != config.widths:
        raise NestedAttentionError(
            f"The encoder's layers are {sorted(set(config.widths))} wide, this {family.title} U-Net's "
            f"{sorted(set(widths))}. Use the base model that the encoder was trained on."
        )


@contextmanager
def nested_attention(
    unet: Any, subjects: Sequence[BoundSubject], processor: Callable[..., Any] = NestedAttnProcessor
) -> Iterator[None]:
    """While the block runs, `unet`'s cross-attention has `subjects`; before and after it has the same processors.

    processor: made for each layer, of its number and the subjects.

    The list may be changed meanwhile; a backward pass with gradient checkpointing still needs what its forward had.

    Raises NestedAttentionError when the U-Net's layers are not those that the subjects' encoders were made for.
    """
    for subject in subjects:
        check_fits(unet, subject.encoder.config)
    before = dict(unet.attn_processors)
    nested = {f"{name}.processor": processor(i, subjects) for i, name in enumerate(cross_attention(unet))}
    unet.set_attn_processor({**before, **nested})
    try:
        yield
    finally:
        unet.set_attn_processor(before)
