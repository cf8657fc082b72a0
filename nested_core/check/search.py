"""The search: all combinations at one noise level, the better half at two, and so on (successive halving)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..encoder import EncoderConfig
from ..errors import NestedAttentionError
from .settings import Settings, combinations, with_pooled
from .statistics import chances, paired

ROUNDS = ((0.45,), (0.3,), (0.6,), (0.15, 0.225, 0.375, 0.525, 0.675))
"""Noise levels of each round, as the share of the noise schedule that is done: 0 is pure noise. Where there is more
noise a subject matters more, until nothing of the photo can be guessed."""
LEVELS = tuple(level for levels in ROUNDS for level in levels)
FINALISTS = 5
LEAST_PHOTOS = 3


class Bench(Protocol):
    """What computes denoising losses of some photos, through one encoder on one base model."""

    @property
    def config(self) -> EncoderConfig:
        """The encoder's, as its file has it."""
        ...

    @property
    def photos(self) -> int: ...

    def losses(self, settings: Settings | None, shown: Sequence[int], level: float) -> Iterable[float]:
        """Mean squared error of the U-Net's estimate of each photo's latents, under the plain caption.

        settings: None is without a subject. shown: for each photo, which one the encoder sees. level: as in LEVELS. The
        noise depends on photo and level alone.
        """
        ...


@dataclass(frozen=True)
class Found:
    """What a search measured.

    candidates: the combinations. losses: (C, n, L), each as a share of the loss without a subject for the same photo
    and level; NaN where a candidate was out of the race. best: the winner's index. other: (n, L), with the winner when
    the encoder sees another photo instead, at each level another one. passes: forward passes of the U-Net.
    """

    candidates: tuple[Settings, ...]
    losses: Tensor
    best: int
    other: Tensor
    passes: int

    @property
    def photos(self) -> int:
        return self.losses.shape[1]

    @property
    def settings(self) -> Settings:
        return self.candidates[self.best]

    @cached_property
    def chances(self) -> Tensor:
        """The chance of each combination to be the best one, (C,)."""
        return chances(self.losses, self.best)

    def certainty(self, name: str) -> float:
        """How likely the winner's value of one setting is the best one: the chances of all that share it."""
        value = getattr(self.settings, name)
        alike = torch.tensor([getattr(candidate, name) == value for candidate in self.candidates])
        return float(self.chances[alike].sum())

    def gain(self) -> Tensor:
        """How much the subject lowers the error in each photo, as a share of it: (n,)."""
        return (1 - self.losses[self.best]).mean(1)

    def own(self) -> Tensor:
        """How much more the photo itself helps than another one, in each photo: (n,)."""
        return (self.other - self.losses[self.best]).mean(1)

    def behind(self) -> Tensor:
        """How far each combination is behind the winner in each photo: (C, n)."""
        return paired(self.losses, self.best)


def passes_of(config: EncoderConfig, photos: int) -> int:
    """How many forward passes of the U-Net a search takes."""
    alive = finalists = combinations(config)
    total = 0
    for levels in ROUNDS:
        finalists = alive
        total += len(finalists) * len(levels)
        alive = finalists[: _survivors(len(finalists))]
    branched = len(with_pooled(finalists, config)) - len(finalists)
    return (total + (branched + 2) * len(LEVELS)) * photos


def _survivors(count: int) -> int:
    """How many of so many candidates the next round has."""
    return max(FINALISTS, -(-count // 2))


def search(bench: Bench, progress: Callable[[], None] = lambda: None) -> Found:
    """Finds the settings under which photos are denoised best.

    progress: called after every forward pass; what it raises ends the search.

    Raises NestedAttentionError for fewer than LEAST_PHOTOS photos, and losses that are not numbers.
    """
    if bench.photos < LEAST_PHOTOS:
        raise NestedAttentionError(
            f"{bench.photos} photo(s) can't settle anything: give at least {LEAST_PHOTOS}, better 8, of different "
            "subjects if you can."
        )
    race = Race(bench, progress)
    alive = finalists = combinations(bench.config)
    for levels in ROUNDS:
        finalists = alive
        race.measure(finalists, [LEVELS.index(level) for level in levels])
        alive = race.better(finalists, _survivors(len(finalists)))
    branched = [settings for settings in with_pooled(finalists, bench.config) if settings not in finalists]
    race.measure(branched, range(len(LEVELS)))
    best = race.better([*finalists, *branched], 1)[0]
    best = race.better([*alive, *branched], 1)[0]
    other = race.of_others(best)
    candidates = tuple(race.losses)
    return Found(candidates, torch.stack(list(race.losses.values())), candidates.index(best), other, race.passes)


class Race:
    """What was measured so far.

    nothing: (n, L), the losses without a subject, of which all others are shares.
    """

    def __init__(self, bench: Bench, progress: Callable[[], None] = lambda: None) -> None:
        self.bench, self.progress, self.passes = bench, progress, 0
        self.losses: dict[Settings, Tensor] = {}
        self.nothing = torch.ones(bench.photos, len(LEVELS), dtype=torch.float64)
        self.nothing = self.row(None, range(len(LEVELS)))

    def measure(self, candidates: Sequence[Settings], levels: Sequence[int]) -> None:
        for candidate in candidates:
            row = self.row(candidate, levels)
            known = self.losses.get(candidate)
            self.losses[candidate] = row if known is None else torch.where(row.isnan(), known, row)

    def row(self, settings: Settings | None, levels: Sequence[int], shown: Sequence[int] | None = None) -> Tensor:
        """Losses (n, L), NaN at other levels than these. shown: as in `Bench.losses`; None is each photo itself."""
        row = torch.full((self.bench.photos, len(LEVELS)), torch.nan, dtype=torch.float64)
        for level in levels:
            losses = self.bench.losses(settings, shown or range(self.bench.photos), LEVELS[level])
            for photo, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise NestedAttentionError(
                        f"The denoising error of photo {photo + 1} is not a number "
                        f"({'without a subject' if settings is None else settings}). The model overflows its type: "
                        "start ComfyUI with --force-fp32, or load the model in bf16."
                    )
                row[photo, level] = loss / self.nothing[photo, level]
                self.passes += 1
                self.progress()
        return row

    def of_others(self, settings: Settings) -> Tensor:
        """Losses (n, L) when the encoder sees another photo, at each level another one."""
        photos = self.bench.photos
        parts = []
        for level in range(len(LEVELS)):
            step = 1 + level % (photos - 1)
            parts.append(self.row(settings, [level], [(photo + step) % photos for photo in range(photos)])[:, level])
        return torch.stack(parts, 1)

    def better(self, candidates: Sequence[Settings], count: int) -> list[Settings]:
        """The `count` with the lowest mean loss; all were measured at the same levels."""
        return sorted(candidates, key=lambda candidate: float(self.losses[candidate].nanmean()))[:count]


def noise_of(shape: Sequence[int], photo: int, level: float) -> Tensor:
    """The same for a photo and level, whatever the settings, the device and the batch."""
    generator = torch.Generator().manual_seed(round(level * 1000) * 100_003 + photo)
    return torch.randn(tuple(shape), generator=generator)
