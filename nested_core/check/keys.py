"""Whether an encoder's keys lie where a U-Net's own keys do: what a glance at the weights tells of their kinship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..encoder import NestedEncoder

KIN = 0.1
"""Likeness above which an encoder's keys are said to be made for a U-Net. In the small world, where encoders begin with
the U-Net's own keys, those of the same U-Net have 0.99 after 200 steps of training, 0.8 after 800 and 0.57 after 3,200;
those of another one and of random weights have 0.01 and less. What very long trainings leave of it is not known."""


@dataclass(frozen=True)
class Kinship:
    """likeness: of the directions that K̈ and the U-Net's K use, -1 to 1, the median over layers and heads; about 0
    where they have nothing to do with each other. shaped: how unequal K̈'s directions are, as a multiple of what random
    weights have."""

    likeness: float
    shaped: float


def kinship(encoder: NestedEncoder, own: Sequence[Tensor], heads: Sequence[int]) -> Kinship:
    """Compares W_K̈ of each layer with the U-Net's W_K.

    Trained keys use the directions in which the layer's queries differ, whatever they are keys of. What is compared is
    the second moment of each head's outputs, W Wᵀ (d, d), without its part that has no direction.

    Args:
        own: W_K of each cross-attention layer, (C, text), in diffusers' order.
        heads: of each layer.
    """
    likeness, shaped = [], []
    for layer, (theirs, count) in enumerate(zip(own, heads, strict=True)):
        ours = encoder.to_k[layer].weight
        assert isinstance(ours, Tensor)
        a, b = (_directions(weight, count) for weight in (ours, theirs))
        likeness.append((a * b).sum((1, 2)) / (a.norm(dim=(1, 2)) * b.norm(dim=(1, 2))).clamp_min(1e-30))
        moments = _moments(ours, count)
        random = ((moments.shape[1] + 1) / ours.shape[1]) ** 0.5  # of a Wishart matrix, relative to its trace
        trace = moments.diagonal(dim1=1, dim2=2).mean(1) * moments.shape[1] ** 0.5
        shaped.append(a.norm(dim=(1, 2)) / trace.clamp_min(1e-30) / random)
    return Kinship(float(torch.cat(likeness).median()), float(torch.cat(shaped).median()))


def _moments(weight: Tensor, heads: int) -> Tensor:
    """(C, in) -> W Wᵀ of each head (heads, d, d)."""
    by_head = weight.detach().float().unflatten(0, (heads, -1))
    return by_head @ by_head.transpose(1, 2)


def _directions(weight: Tensor, heads: int) -> Tensor:
    """The moments without the multiple of the identity."""
    moments = _moments(weight, heads)
    even = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return moments - even * torch.eye(moments.shape[1], device=moments.device)
