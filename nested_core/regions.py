"""Where subjects are in a picture, from how much its parts look at their words; and self-attention bounded by that.

Self-attention is the way by which two people of one picture melt into each other: a part of the one looks at the
other, because they look alike. That is what "Be Yourself: Bounded Attention" (arXiv 2403.16990) holds against, with
regions that a user draws and masks that are hard. Here regions are read off the outer attention that nested attention
computes anyway, they are soft, and what lies in no region is free:

    (1) r_s(q) = p_s(q) / max_q p_s(q)                     p_s: attention on the words of subject s
    (2) m_s(q) = ramp(r_s(q)) · r_s(q)^4 / Σ_s' r_s'(q)^4   how far q belongs to s; Σ_s m_s(q) <= 1
    (3) o(q, k) = Σ_{s ≠ s'} m_s(q) m_s'(k)                how far q and k belong to different subjects
    (4) softmax over k of  q kᵀ / √d + log(1 - σ · o(q, k))

so that a part of another subject counts 1 - σ·o as much as it would. σ = 0 is the plain attention.

Shapes: B images, S subjects, Q places of a grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: (2): below the first of these, relative to the most a word is looked at, is no part of the subject; above the second
#: is all of it. In between, a ramp.
RAMP = (0.2, 0.5)
_SHARPNESS = 4


def by_area(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, S, H, W) on another grid (h, w), each place the mean of what it covers: adaptive average pooling.

    As two products with matrices: not every device pools to sizes that do not divide.
    """
    rows, columns = (_pooling(maps.shape[i], size[i], maps) for i in (-2, -1))
    with torch.autocast(maps.device.type, enabled=False):  # shares, not activations: they keep their precision
        return rows @ maps @ columns.T


def _pooling(before: int, after: int, like: Tensor) -> Tensor:
    """(after, before): row i has the same weight for each of the places i·before/after to (i + 1)·before/after."""
    place, part = (torch.arange(n, device=like.device) for n in (before, after))
    part = part[:, None]
    first, last = part * before // after, -(-(part + 1) * before // after)
    covered = ((place >= first) & (place < last)).to(like.dtype)
    return covered / covered.sum(1, keepdim=True)


def memberships(attention: Tensor) -> Tensor:
    """Equations (1) and (2): attention on the subjects' words (B, S, Q) -> how far each place belongs to each, in fp32.

    A subject that is not looked at anywhere has no region.
    """
    attention = attention.float()
    relative = attention / attention.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    sharp = relative**_SHARPNESS
    share = sharp / sharp.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    low, high = RAMP
    return ((relative - low) / (high - low)).clamp(0, 1) * share


def separating_bias(members: Tensor, strength: float, queries: slice = slice(None)) -> Tensor:
    """Equations (3) and (4): memberships (B, S, Q), σ from 0 to 1 -> what to add to the logits, (B, Q, Q).

    queries: only these rows of it. Where σ = 1 and both places belong wholly to different subjects, that is -inf; never
    on the diagonal of whole memberships, so that something is left to look at.
    """
    anyone = members.sum(1, keepdim=True)
    own, whole = members[..., queries], anyone[..., queries]
    # In place: these are the largest tensors of a step.
    other = torch.bmm(-own.transpose(1, 2), members).baddbmm_(whole.transpose(1, 2), anyone)
    return other.clamp_(0, 1).mul_(-strength).log1p_()
