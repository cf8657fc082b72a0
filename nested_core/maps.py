"""From recorded attention to heat maps, masks, and what the paper's figures 4 and 5 show of a single query.

Shapes: S subjects, B images, Q queries of a layer, N subject tokens, H heads, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import probabilities, scaled_dot_product, split_heads


@dataclass(frozen=True)
class WordAttention:
    """What one layer saw of one subject in one step: the outer attention on its word.

    attention: (images, rows, columns), the mean over heads. first: the image it begins with. area: (h, w, y, x) of the
    latent that the rows and columns cover, or None for all of it. layer: in diffusers' order.
    """

    step: int
    layer: int
    subject: int
    first: int
    attention: Tensor
    area: tuple[int, ...] | None


def heat(
    seen: Sequence[WordAttention],
    subjects: int,
    images: int,
    grid: tuple[int, int],
    weights: Sequence[float] | None = None,
) -> Tensor:
    """The mean attention on each subject's word, (S, B, *grid) in fp32; 0 where nothing was seen.

    grid: of the latent. weights: of the layers, in diffusers' order; None is 1 for all.
    """
    total = torch.zeros(subjects, images, *grid)
    count = torch.zeros_like(total)
    for one in seen:
        weight = 1.0 if weights is None else weights[one.layer]
        if weight <= 0:
            continue
        h, w, y, x = (*grid, 0, 0) if one.area is None else one.area
        part = F.interpolate(one.attention.float().cpu()[:, None], size=(h, w), mode="bilinear")[:, 0]
        at = (one.subject, slice(one.first, one.first + len(part)), slice(y, y + h), slice(x, x + w))
        total[at] += weight * part
        count[at] += weight
    return total / count.clamp_min(1e-12)


def relative(heats: Tensor) -> Tensor:
    """Heat from 0 to 1 per subject and image: 0 is what the coolest fifth of the picture has, 1 the most."""
    flat = heats.flatten(2)
    low = flat.quantile(0.2, dim=-1)[..., None, None]
    high = flat.amax(-1)[..., None, None]
    return ((heats - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def masks(heats: Tensor, threshold: float) -> Tensor:
    """Where each subject is: (S, B, h, w) of 0 and 1. A place goes to the subject with the most relative heat.

    threshold: least relative heat, 0 to 1. The maps are smoothed over three places first: attention is grainy.
    """
    smooth = F.avg_pool2d(F.pad(heats, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = relative(smooth)
    most = share.amax(0, keepdim=True)
    return ((share >= threshold) & (share == most) & (share > 0) & (heats > 0)).float()


@dataclass(frozen=True)
class LayerQueries:
    """What one layer asked in one step where a subject was bound, kept to look into single queries later.

    q: (images, Q, C) in fp16. replaced: V[s], the value of the bound token, (C,), the mean over its places. shape: rows
    and columns of the queries. The rest is as in `WordAttention`.
    """

    step: int
    layer: int
    subject: int
    first: int
    q: Tensor
    replaced: Tensor
    heads: int
    shape: tuple[int, int]
    area: tuple[int, ...] | None


def nested_attention_of(q: Tensor, key: Tensor, heads: int, log_weights: Tensor | None = None) -> Tensor:
    """Equation (1)'s softmax, the mean over heads: q (Q, C), K̈ (N, C) -> (Q, N) in fp32."""
    qh, kh = (split_heads(x.float()[None], heads) for x in (q, key))
    return probabilities(qh, kh, log_weights)[0].mean(0)


def nested_values(q: Tensor, key: Tensor, value: Tensor, heads: int, log_weights: Tensor | None = None) -> Tensor:
    """Equation (1): v*_q of each query, q (Q, C), K̈ and V̈ (N, C) -> (Q, C) in fp32."""
    mask = None if log_weights is None else log_weights.float().expand(1, q.shape[0], -1)
    q, key, value = (x.float()[None] for x in (q, key, value))
    return scaled_dot_product(q, key, value, heads, mask)[0]


def principal_colours(values: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
    """The three strongest directions of the values as red, green and blue: (Q, C), (C,) -> (Q, 3), (3,), 0 to 1.

    All are scaled to the same norm first: only their direction is the subject's. The constant value is shown in the
    same colours.
    """
    values = F.normalize(values.float(), dim=-1)
    mean = values.mean(0)
    centred = values - mean
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:3]
    # A direction's sign is arbitrary: the side with the longer tail is bright.
    along = centred @ directions.T
    sign = torch.where((along**3).sum(0) < 0, -1.0, 1.0)
    along = along * sign
    low, high = along.quantile(0.02, dim=0), along.quantile(0.98, dim=0)
    other = (F.normalize(constant.float(), dim=-1) - mean) @ directions.T * sign

    def shown(x: Tensor) -> Tensor:
        return ((x - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)

    colours, single = shown(along), shown(other)
    missing = 3 - colours.shape[-1]  # fewer queries or channels than three
    return F.pad(colours, (0, missing)), F.pad(single, (0, missing))
