"""Immutable values that the nodes hand around, and that a sampling run reads."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_patcher
from torch import Tensor

from ...attention import ValueNorm
from ...encoder import EncoderConfig, NestedEncoder
from ...prompt import Placeholder
from ...schedule import Schedule
from ...subject import Subject


@dataclass(frozen=True, eq=False)
class HostEncoder:
    """NESTED_ENCODER: an encoder that the host loads, offloads and counts.

    name: how the user knows it (the file's name in the loader).
    """

    patcher: comfy.model_patcher.ModelPatcher
    config: EncoderConfig
    name: str

    @property
    def module(self) -> NestedEncoder:
        return self.patcher.model


@dataclass(frozen=True, eq=False)
class ReferenceView:
    """What the encoder was shown: the `square` (1, S, S, 3), and its features (1, T, E) or, pooled, (1, E)."""

    square: Tensor
    features: Tensor


@dataclass(frozen=True, eq=False)
class HostSubject:
    """NESTED_SUBJECT: a subject together with the encoder that made it.

    views: one for each of the encoder's runs, in the order of the tokens, for Explain Point. Empty for a subject from a
    file, which holds no photos.
    """

    encoder: HostEncoder
    subject: Subject
    views: tuple[ReferenceView, ...] = ()


@dataclass(frozen=True, eq=False)
class Application:
    """One subject as applied to a model.

    strength: w, 1 is the paper. start, end: window of the sampling steps, in percent of the noise schedule (0 to 1).
    alpha, value_norm: equation (4). focus: weight of the token's logit. mask: where the subject may act, (M, H, W)
    over the whole picture, one or one per image. layer_weights: factor on the strength per layer, in the order of
    `unet_layers_of`. skip_unmentioned: let a run pass in which no positive prompt mentions the subject. separation: σ,
    how far it yields where another subject is looked at more. schedule: how the strength moves over the steps.
    unconditional: what it is in texts that are steered away from, there on its class word too; None: itself.
    """

    source: HostSubject
    placeholder: Placeholder
    strength: float
    start: float
    end: float
    alpha: float
    value_norm: ValueNorm
    mask: Tensor | None
    layer_weights: tuple[float, ...]
    focus: float = 1.0
    skip_unmentioned: bool = False
    separation: float = 0.0
    schedule: Schedule | None = None
    unconditional: HostSubject | None = None

    @property
    def idle(self) -> bool:
        """Whether it can't change any picture."""
        return self.strength == 0 or self.start >= self.end or not any(self.layer_weights)


@dataclass(frozen=True)
class Apart:
    """How far the subjects of a model are kept apart: σ, within a window in percent of the noise schedule (0 to 1)."""

    strength: float
    start: float
    end: float
