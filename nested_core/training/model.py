"""The module that is trained: an encoder and the frozen U-Net that it speaks to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..encoder import NestedEncoder
from ..hosts.diffusers import BoundSubject, nested_attention
from .baselines import decoupled_attention
from .examples import Group


@dataclass
class Conditions:
    """What a pass is given besides latents and timesteps.

    text (B, T, D); added: SDXL's `added_cond_kwargs`; features (R, T', E) of all references of the batch; groups: who
    is bound where.
    """

    text: Tensor
    added: dict[str, Tensor]
    features: Tensor
    groups: tuple[Group, ...]


def attention(unet: Any, subjects: Sequence[BoundSubject], method: str) -> AbstractContextManager[None]:
    """While it is entered, the U-Net's cross-attention has the subjects, in the way of the method."""
    return (nested_attention if method == "nested" else decoupled_attention)(unet, subjects)


def bind(
    encoder: NestedEncoder, tokens: Tensor, groups: Sequence[Group], alpha: Tensor | None = None, first_row: int = 0
) -> list[BoundSubject]:
    """The subjects of a batch as the processors want them.

    Args:
        encoder: whose K̈ and V̈ they go through.
        tokens: x of all references of the batch, (R, N, C).
        groups: who is bound where; `first_row` is added to its rows.
        alpha: in place of the encoder's.
    """
    bound = []
    for group in groups:
        rows = (group.rows[0] + first_row, group.rows[1] + first_row)
        for slot in group.slots:
            weights = None
            if not slot.full:  # views that a row lacks
                absent = torch.zeros(slot.views.shape, device=tokens.device)
                absent = absent.masked_fill_(slot.views < 0, float("-inf"))
                weights = absent.repeat_interleave(tokens.shape[1], dim=1)
            x = tokens[slot.views.clamp_min(0)].flatten(1, 2)  # (rows, V·N, C)
            bound.append(BoundSubject(encoder, x, slot.places, rows, alpha=alpha, log_weights=weights))
    return bound


class SubjectDenoiser(nn.Module):
    """Predicts noise with the subjects of a batch. Its parameters are what is trained; the U-Net is none of them.

    `subjects` is the list that the U-Net's processors look at, once `attached`: a pass replaces its content, which
    stays for the backward pass (gradient checkpointing runs the processors again).
    """

    def __init__(self, encoder: NestedEncoder, unet: Any, method: str = "nested", learn_alpha: bool = False) -> None:
        super().__init__()
        self.encoder, self.method = encoder, method
        self._unet = (unet,)  # in a tuple it is no submodule: neither trained nor saved
        self.subjects: list[BoundSubject] = []
        self.log_alpha = nn.Parameter(torch.tensor(math.log(encoder.config.alpha))) if learn_alpha else None

    @property
    def alpha(self) -> Tensor | None:
        """α where it is trained, a scalar."""
        return None if self.log_alpha is None else self.log_alpha.exp()

    def attached(self) -> AbstractContextManager[None]:
        """While it is entered, the U-Net has this module's subjects."""
        return attention(self._unet[0], self.subjects, self.method)

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """latents (B, C, H, W), timesteps (B,) -> the U-Net's prediction (B, C, H, W)."""
        self.subjects.clear()
        if conditions.groups:
            tokens = self.encoder.encode(conditions.features)
            self.subjects += bind(self.encoder, tokens, conditions.groups, self.alpha)
        (unet,) = self._unet
        added = {"added_cond_kwargs": conditions.added} if conditions.added else {}
        out = unet(latents, timesteps, encoder_hidden_states=conditions.text, **added).sample
        if conditions.groups:
            return out
        # No subject, no gradient. Several processes wait for one another's, so there must be one: 0.
        return out + 0 * sum(parameter.flatten()[0] for parameter in self.parameters())
