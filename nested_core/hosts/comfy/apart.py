"""Subjects kept apart while ComfyUI samples: where each is, and self-attention bounded by that.

The maths is in `nested_core.regions`. Where a subject is, its mask says, where it has one; else what its word is looked
at, averaged over the layers of the steps before. So the first step is the plain one, unless all subjects have masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import Attend
from ...errors import NestedAttentionError
from ...regions import by_area, memberships, separating_bias
from .attend import as_the_host
from .rows import Group
from .store import Store

#: Bytes of a bias, (rows, queries, Q) in fp32. A whole one has 1 GiB per picture at 2048 x 2048.
_LIMIT = 64 * 2**20
#: How much of what is known of the regions a step leaves as it was.
_MEMORY = 0.5


class Regions:
    """Where the subjects of a run are in its images, on the grid of the latent."""

    def __init__(self, masks: Mapping[int, Tensor], latent: Sequence[int], device: torch.device) -> None:
        """masks: (M, H, W) over the whole picture, of those subjects that have one. latent: (images, C, rows, cols).

        device: where the maps are kept. Several devices may add to them at a time.
        """
        self.device = device
        self._lock = Lock()
        self.images = latent[0]
        self.grid = (latent[-2], latent[-1])
        self.known: dict[int, Tensor] = {}  # by subject, (images, 1, *grid)
        self.fixed = frozenset(masks)
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}
        for i, mask in masks.items():
            whole = by_area(mask[:, None].float(), self.grid)
            self.known[i] = comfy.utils.repeat_to_batch_size(whole, self.images).to(device)

    def note(self, i: int, first: int, attention: Tensor, shape: tuple[int, int], area: Sequence[int] | None) -> None:
        """What a layer saw of subject i: attention on its word (rows, Q) for the images from `first` on, on a grid of
        `shape`, of the whole picture or of an area (h, w, y, x) of the latent."""
        if i in self.fixed:
            return
        h, w, y, x = (*self.grid, 0, 0) if area is None else area
        seen = F.interpolate(attention.float().unflatten(1, shape)[:, None], size=(h, w), mode="bilinear")
        at = (slice(first, first + len(seen)), slice(None), slice(y, y + h), slice(x, x + w))
        with self._lock:
            if i not in self.sums:
                empty = torch.zeros(self.images, 1, *self.grid, device=self.device)
                self.sums[i], self.counts[i] = empty, empty.clone()
            self.sums[i][at] += seen.to(self.device)
            self.counts[i][at] += 1

    def turn(self) -> None:
        """A step is over: what it saw is known from here on."""
        for i, total in self.sums.items():
            seen = total / self.counts[i].clamp_min(1)
            self.known[i] = seen if i not in self.known else torch.lerp(seen, self.known[i], _MEMORY)
        self.sums.clear()
        self.counts.clear()

    def members(
        self, subjects: Sequence[int], shape: tuple[int, int], area: Sequence[int] | None, device: torch.device
    ) -> Tensor:
        """How far each place of a grid of `shape` belongs to each subject, (images, S, Q), on `device`."""
        h, w, y, x = (*self.grid, 0, 0) if area is None else area
        maps = torch.cat([self.known[i] for i in subjects], 1)[:, :, y : y + h, x : x + w].to(device)
        part = by_area(maps, shape) if h > shape[0] else F.interpolate(maps, size=shape, mode="bilinear")
        return memberships(part.flatten(2))


def cannot_separate(what: str) -> NestedAttentionError:
    """The error for a run in which nobody can know where subjects are, because another node does `what`."""
    return NestedAttentionError(
        f"Separate Subjects can't tell where the subjects are: another node {what}. Take one of the two nodes out, or "
        "give the subjects masks in Apply Subject and leave Separate Subjects out."
    )


class BoundedSelfAttention:
    """attn1 replacement of all layers in one call of the model: subjects do not look at each other."""

    def __init__(
        self, regions: Regions, strength: float, subjects: tuple[int, ...], groups: Sequence[Group], store: Store
    ) -> None:
        """groups: the rows of the call. Raises NestedAttentionError where they show no known part of the picture."""
        if any(group.tile or group.image is None for group in groups):
            raise cannot_separate("samples the picture in tiles")
        self.regions, self.strength, self.subjects, self.store = regions, strength, subjects, store
        self.groups = groups
        self.called = False
        self._made: dict[Any, Tensor] = {}

    def _kept(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """What is made once a call; once a run where all regions are masks."""
        if self.regions.fixed.issuperset(self.subjects):
            return self.store.kept(("apart", *key), make)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _bounded(self, group: Group, shape: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, heads: int,
                 attend: Attend) -> Tensor:  # fmt: skip
        """A group's self-attention, (rows, Q, C). The bias is never larger than `_LIMIT`: the queries take turns."""
        key = (self.subjects, shape, group.area, q.device)
        members = self._kept(key, lambda: self.regions.members(self.subjects, shape, group.area, q.device))
        members = members[group.image or 0 :][: len(q)]
        count = q.shape[1]
        at_once = max(1, _LIMIT // (len(q) * count * torch.float32.itemsize))
        if at_once >= count:
            bias = self._kept(
                (*key, q.dtype, group.image, len(q)), lambda: separating_bias(members, self.strength).to(q.dtype)
            )
            return attend(q, k, v, heads, bias)
        parts = []
        for start in range(0, count, at_once):
            some = slice(start, start + at_once)
            bias = separating_bias(members, self.strength, some).to(q.dtype)
            parts.append(attend(q[:, some], k, v, heads, bias))
        return torch.cat(parts, 1)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        self.called = True
        height, width = extra_options["activations_shape"][-2:]
        if len(q) != self.groups[-1].stop or not q.shape[1] == k.shape[1] == height * width:
            raise cannot_separate("changes what self-attention sees (HyperTile and token merging do)")
        heads, parts, attend = extra_options["n_heads"], [], as_the_host(extra_options, beside=True)
        for group in self.groups:
            at = group.rows
            parts.append(self._bounded(group, (height, width), q[at], k[at], v[at], heads, attend))
        return torch.cat(parts)
