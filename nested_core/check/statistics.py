"""How sure an outcome of paired measurements is."""

from __future__ import annotations

import torch
from torch import Tensor

DRAWS = 20_000


def means_that_fit(differences: Tensor, draws: int = DRAWS) -> Tensor:
    """Means that fit what was measured: (draws, C) for differences (C, n) of C quantities in n photos.

    Draws of the multivariate t distribution with n - 1 degrees of freedom around the measured means: the posterior of
    means of normal quantities under the usual uninformative prior. What two quantities have in common in a photo they
    have in common here. Seeded: the same measurements give the same answer.
    """
    count = differences.shape[1]
    generator = torch.Generator().manual_seed(0)
    mean = differences.mean(1)
    spread = (differences - mean[:, None]) / (count * (count - 1)) ** 0.5
    shared = torch.randn(draws, count, generator=generator, dtype=differences.dtype)
    chi = torch.randn(draws, count - 1, generator=generator, dtype=differences.dtype).square().sum(1)
    return mean + shared @ spread.T * ((count - 1) / chi).sqrt()[:, None]


def chances(losses: Tensor, best: int) -> Tensor:
    """The chance of each of C candidates to have the lowest mean loss of all, (C,), summing to 1.

    losses: (C, n, L) of C candidates for n photos at L noise levels; NaN where a candidate was not measured. `best` was
    measured wherever another was: what counts is each one's difference to it, where both were measured.
    """
    fitting = means_that_fit(paired(losses, best))
    return torch.bincount(fitting.argmin(1), minlength=len(losses)).double() / len(fitting)


def paired(losses: Tensor, reference: int) -> Tensor:
    """Mean difference of each candidate to `reference` in each photo, over the levels where both have one: (C, n)."""
    return (losses - losses[reference]).nanmean(2)


def interval(differences: Tensor, share: float = 0.95) -> tuple[float, float]:
    """Interval that holds the mean of differences (n,) with this probability."""
    fitting = means_that_fit(differences[None])[:, 0]
    tail = (1 - share) / 2
    low, high = fitting.quantile(torch.tensor([tail, 1 - tail], dtype=fitting.dtype)).tolist()
    return low, high


def photos_to_settle(differences: Tensor, certainty: float = 0.95) -> int | None:
    """How many photos like these would tell a mean of differences (n,) from 0; None for more than 1000."""
    mean, deviation = float(differences.mean().abs()), float(differences.std())
    quantile = 2**0.5 * float(torch.erfinv(torch.tensor(2 * certainty - 1)))
    if mean == 0:
        return None
    needed = int((quantile * deviation / mean) ** 2) + 2
    return needed if needed <= 1000 else None
