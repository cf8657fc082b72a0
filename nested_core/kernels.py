"""Equation (4) and a subject's part of the sum in one kernel, in Triton: for CUDA, and only where it is asked for.

`attention` has the equations; this is a transcription of what its `_add` does once v* is known, six operations there.
The environment variable NESTED_ATTENTION_KERNEL chooses: "triton" this one on CUDA, "torch" (or nothing) PyTorch's own
operations everywhere.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from .errors import NestedAttentionError

VARIABLE = "NESTED_ATTENTION_KERNEL"
_CHOICES = ("", "torch", "triton")


@functools.cache
def chosen() -> bool:
    """Whether Triton's kernel is asked for; read once.

    Raises NestedAttentionError where the variable says something else, or Triton can't be had.
    """
    said = os.environ.get(VARIABLE, "")
    if said not in _CHOICES:
        raise NestedAttentionError(f'{VARIABLE} is "{said}"; expected "triton", or "torch" for PyTorch\'s operations.')
    if said != "triton":
        return False
    try:
        _operation()
    except ImportError as error:
        raise NestedAttentionError(
            f"{VARIABLE} is triton, but Triton can't be imported ({error}). PyTorch brings it on Linux; on Windows it "
            f"is the package triton-windows. Install it in ComfyUI's Python, or unset {VARIABLE}."
        ) from error
    return True


def add_subject(out: Tensor, nested: Tensor, share: Tensor, replaced: Tensor, value_norm: str, alpha: float,
                strength: float) -> None:  # fmt: skip
    """Adds one subject to a layer's output, in place; statistics and sums in fp32.

    Args:
        out: (B, Q, H, d), of any floating type.
        nested: v*_q before rescaling (B, Q, H, d).
        share: a'_s where the subject acts (B, Q, H, P).
        replaced: V[s] (B, P, H, d).
        value_norm, alpha: of equation (4). strength: w.
    """
    _operation()(out, nested, share, replaced, value_norm, alpha, strength)


@functools.cache
def _operation() -> Any:
    """The kernel as an operation of PyTorch's: tensors without data, as in tracing, pass through it."""
    import triton  # noqa: PLC0415 - hosts without it never get here

    kernel = _kernel()

    @torch.library.custom_op("nested_attention::add_subject", mutates_args=("out",))
    def add(out: Tensor, nested: Tensor, share: Tensor, replaced: Tensor, value_norm: str, alpha: float,
            strength: float) -> None:  # fmt: skip
        rows, queries, heads, width = out.shape
        by_row = [x if x.stride()[2:] == (width, 1) else x.contiguous() for x in (nested, replaced)]
        if out.stride()[2:] != (width, 1):
            raise NestedAttentionError(f"out has strides {out.stride()}; expected heads beside each other.")
        strides = [step for x in (out, *by_row) for step in x.stride()[:2]]
        kernel[(rows * queries,)](
            out, *by_row, share, *strides, *share.stride(), queries, heads, width,
            alpha if value_norm != "none" else 1.0, strength, PLACES=share.shape[-1],
            NORM=("match", "match_per_head", "unit", "none").index(value_norm),
            HEADS=triton.next_power_of_2(heads), WIDTH=triton.next_power_of_2(width),
        )  # fmt: skip

    @add.register_fake
    def _(out: Tensor, nested: Tensor, share: Tensor, replaced: Tensor, value_norm: str, alpha: float,
          strength: float) -> None:  # fmt: skip
        return None

    return add


@functools.cache
def _kernel() -> Any:
    import triton  # noqa: PLC0415
    import triton.language as tl  # noqa: PLC0415

    @triton.jit
    def add_subject_kernel(  # type: ignore[no-untyped-def]
        out, nested, replaced, share, out_row, out_query, nested_row, nested_query, replaced_row, replaced_place,
        share_row, share_query, share_head, share_place, queries, heads, width, alpha, strength,
        PLACES: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One query of one row: NORM 0 measures all channels, 1 and 2 each head, 3 nothing; 2 is scaled to α alone."""
        at = tl.program_id(0).to(tl.int64)
        row, query = at // queries, at % queries
        head, channel = tl.arange(0, HEADS), tl.arange(0, WIDTH)
        here = (head < heads)[:, None] & (channel < width)[None, :]
        places = head[:, None] * width + channel[None, :]
        star = tl.load(nested + row * nested_row + query * nested_query + places, mask=here, other=0.0).to(tl.float32)
        factor = tl.zeros([HEADS], tl.float32)
        added = tl.zeros([HEADS, WIDTH], tl.float32)
        for place in tl.static_range(PLACES):
            of_heads = share + row * share_row + query * share_query + head * share_head + place * share_place
            part = tl.load(of_heads, mask=head < heads, other=0.0).to(tl.float32)
            before = tl.load(replaced + row * replaced_row + place * replaced_place + places, mask=here, other=0.0)
            before = before.to(tl.float32)
            added -= part[:, None] * before
            if NORM == 0:
                factor += part * tl.sqrt(tl.sum(tl.sum(before * before, 1), 0))
            elif NORM == 1:
                factor += part * tl.sqrt(tl.sum(before * before, 1))
            else:
                factor += part
        if NORM == 0:
            norm = tl.sqrt(tl.sum(tl.sum(star * star, 1), 0)) + tl.zeros([HEADS], tl.float32)
            factor = tl.where(norm > 0, factor / norm, 0.0)
        elif NORM != 3:
            norm = tl.sqrt(tl.sum(star * star, 1))
            factor = tl.where(norm > 0, factor / norm, 0.0)
        added += alpha * factor[:, None] * star
        target = out + row * out_row + query * out_query + places
        before_it = tl.load(target, mask=here, other=0.0).to(tl.float32)
        tl.store(target, (before_it + strength * added).to(out.dtype.element_ty), mask=here)

    return add_subject_kernel
