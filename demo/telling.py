"""Asks the inner grids of the base model, while it learns, which part of which figure is where and how it looks.

A picture's error says little about a mouth: at the noise at which a figure's pose and expression are decided, the best
that denoising can give is a blur of all of them. Asked in words, the same cells have to have read the prompt. As with
representation alignment (arXiv 2410.06940), what is asked for is thrown away after the training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import drawing, world
from .judging import ASKED, parts_of_kind

WEIGHT = 0.2


class Telling(nn.Module):
    """Heads on what the U-Net's attention blocks in the middle and on the way up give."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.blocks = ("mid_block.attentions.0", "up_blocks.0.attentions.1", "up_blocks.1.attentions.0")
        self.choices = [len(world.KINDS) * drawing.NEXT_FIGURE, *(choices for *_, choices in ASKED)]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.choices)))
            for width in (unet.get_submodule(name).in_channels for name in self.blocks)
        )
        self.grids: list[Tensor] = []
        self._hooks = [unet.get_submodule(name).register_forward_hook(self._keep) for name in self.blocks]

    def _keep(self, block: nn.Module, _: Any, out: Any) -> None:
        if block.training:
            self.grids.append(out[0])

    def leave(self) -> None:
        """Lets go of the U-Net."""
        for hook in self._hooks:
            hook.remove()

    def forward(self, parts: Tensor, kinds: Tensor, answers: Tensor) -> Tensor:
        """The loss of the pass that was made last.

        parts: `parts_of` the pictures on the largest of the grids. kinds, answers: `kinds_of` and `answers_of` them.
        """
        losses = []
        for head, grid in zip(self.heads, self.grids, strict=True):
            own = _pooled(parts, grid.shape[-1])
            shown = torch.stack([parts_of_kind(own, kinds, kind) for kind in range(len(world.KINDS))], 1).float()
            where, *told = head(grid.flatten(2).transpose(1, 2)).float().split(self.choices, -1)
            losses.append(F.binary_cross_entropy_with_logits(where, shown.flatten(1, 2).transpose(1, 2)))
            errors = []
            for logits, (question, kind, part, _) in zip(told, ASKED, strict=True):
                cells = shown[:, kind, part]
                right = answers[:, question, None].clamp(min=0).expand(cells.shape)  # -1: it has no cells
                error = F.cross_entropy(logits.transpose(1, 2), right, reduction="none") * cells
                errors.append(error.sum() / cells.sum().clamp(min=1))
            losses.append(torch.stack(errors).mean())
        self.grids.clear()
        return torch.stack(losses).sum() / len(self.heads)


def _pooled(parts: Tensor, side: int) -> Tensor:
    """`parts_of` (B, 2, parts, cells) for a grid of fewer cells."""
    whole = int(parts.shape[-1] ** 0.5)
    grids = parts.float().unflatten(-1, (whole, whole)).flatten(1, 2)
    return F.max_pool2d(grids, whole // side).unflatten(1, parts.shape[1:3]).flatten(3)
