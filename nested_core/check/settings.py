"""The combinations of settings that a file can leave open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..encoder import POOLED, EncoderConfig

ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Factors α that are tried; the release's code has 2."""
NAMES = ("image_features", "value_norm", "alpha", "pooled")
"""The settings, as `EncoderConfig` and the loader call them."""


@dataclass(frozen=True)
class Settings:
    """One combination; the fields are those of `EncoderConfig`. alpha is None where value_norm is "none": unused."""

    image_features: str
    value_norm: str
    alpha: float | None
    pooled: str

    def __str__(self) -> str:
        alpha = "" if self.alpha is None else f", alpha {self.alpha:g}"
        pooled = ", pooled at the placeholder" if self.pooled == "placeholder" else ""
        return f"{self.image_features} features, norm {self.value_norm}{alpha}{pooled}"


def settings_of(config: EncoderConfig) -> Settings:
    """What a config says."""
    alpha = None if config.value_norm == "none" else config.alpha
    return Settings(config.image_features, config.value_norm, alpha, config.pooled)


def config_with(config: EncoderConfig, settings: Settings) -> EncoderConfig:
    """The config with these settings; an α that is not used stays."""
    alpha = config.alpha if settings.alpha is None else settings.alpha
    return replace(config, **{**vars(settings), "alpha": alpha})


def combinations(config: EncoderConfig) -> list[Settings]:
    """What this encoder can have been trained with, but for `pooled`, which is as the config has it.

    An α that the config names and ALPHAS lack is tried too.
    """
    features = ("pooled",) if config.image_features == "pooled" else ("penultimate", "last")
    alphas = sorted({*ALPHAS, config.alpha})
    norms: list[tuple[str, float | None]] = [("none", None)]
    norms += [(norm, alpha) for norm in ("match", "match_per_head", "unit") for alpha in alphas]
    return [Settings(feature, norm, alpha, config.pooled) for feature in features for norm, alpha in norms]


def with_pooled(finalists: Sequence[Settings], config: EncoderConfig) -> list[Settings]:
    """The same with SDXL's pooled text vector at either place; other models have none."""
    if config.family != "sdxl":
        return list(finalists)
    return [Settings(s.image_features, s.value_norm, s.alpha, pooled) for s in finalists for pooled in POOLED]
