"""Strength schedules: factors on a subject's strength over the steps of a run.

A list runs from the first step to the last, with straight lines between its factors. The named shapes are smoothsteps,
s(p) = p² (3 − 2p), of the progress p at the middle of a step: runs of few steps get what is between the ends, not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .errors import NestedAttentionError

_LIMIT = 5.0


def _smooth(p: float) -> float:
    return p * p * (3 - 2 * p)


_SHAPES: dict[str, Callable[[float], float]] = {
    "ease in": _smooth,
    "ease out": lambda p: 1 - _smooth(p),
    "ease in and out": lambda p: _smooth(1 - abs(2 * p - 1)),
}
CONSTANT, LIST = "constant", "list"
SCHEDULES = (CONSTANT, *_SHAPES, LIST)


@dataclass(frozen=True)
class Schedule:
    """A schedule by its name, one of SCHEDULES but "constant"; `values` are the factors of "list"."""

    name: str
    values: tuple[float, ...] = ()

    def factor(self, step: float, steps: int) -> float:
        """The factor at a step, from 0 to steps − 1; between two steps it is in between."""
        if self.name != LIST:
            return _SHAPES[self.name]((step + 0.5) / steps)
        place = step / max(steps - 1, 1) * (len(self.values) - 1)
        low = min(int(place), len(self.values) - 1)
        high = min(low + 1, len(self.values) - 1)
        return self.values[low] + (self.values[high] - self.values[low]) * (place - low)


def parse_schedule(name: str, values: str = "") -> Schedule | None:
    """A schedule as artists name it, None for "constant". `values`: for "list", numbers from -5 to 5 with commas.

    Raises NestedAttentionError for an unknown name, and for values that are no such numbers.
    """
    if name == CONSTANT:
        return None
    if name in _SHAPES:
        return Schedule(name)
    if name != LIST:
        raise NestedAttentionError(f"There is no schedule {name!r}; expected one of {', '.join(SCHEDULES)}.")
    try:
        factors = tuple(float(part) for part in values.split(","))
    except ValueError:
        factors = ()
    if not factors or not all(math.isfinite(f) and abs(f) <= _LIMIT for f in factors):
        raise NestedAttentionError(
            f'values is "{values}"; for the schedule "list" expected numbers from -5 to 5 separated by commas, first '
            'step first, such as "0, 0.5, 1".'
        )
    return Schedule(name, factors)


def step_of(sigma: float, sigmas: Sequence[float]) -> tuple[float, int]:
    """(at which step a run over these noise levels is at `sigma`, how many steps it has).

    sigmas: as the host has them, one per step and the one where the last step ends; they may rise (unsampling).
    Samplers of higher order also look between two steps; a level beyond all steps counts as the nearest one.
    """
    levels = list(sigmas[:-1]) or [sigma]
    for i, (a, b) in enumerate(pairwise(levels)):
        if min(a, b) <= sigma <= max(a, b) and a != b:
            return i + (a - sigma) / (a - b), len(levels)
    return float(min(range(len(levels)), key=lambda i: abs(levels[i] - sigma))), len(levels)
