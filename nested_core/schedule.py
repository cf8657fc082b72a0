"""Strength schedules: factors on a subject's strength over the steps of a run.

A schedule is a few factors, spread evenly from the first step to the last, with straight lines between them. The
named ones are sampled smoothsteps, s(p) = p² (3 − 2p), of the progress p from 0 to 1.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from .errors import NestedAttentionError

_LIMIT = 5.0
_SAMPLES = 33


def _smooth(p: float) -> float:
    return p * p * (3 - 2 * p)


_SHAPES: dict[str, Callable[[float], float]] = {
    "ease in": _smooth,
    "ease out": lambda p: 1 - _smooth(p),
    "ease in and out": lambda p: _smooth(1 - abs(2 * p - 1)),
}
CONSTANT, LIST = "constant", "list"
SCHEDULES = (CONSTANT, *_SHAPES, LIST)


def parse_schedule(name: str, values: str = "") -> tuple[float, ...]:
    """The factors of a schedule by name; `values` are those of "list": numbers from -5 to 5, separated by commas.

    Raises NestedAttentionError for an unknown name, and for values that are no such numbers.
    """
    if name == CONSTANT:
        return ()
    if name in _SHAPES:
        return tuple(_SHAPES[name](i / (_SAMPLES - 1)) for i in range(_SAMPLES))
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
    return factors


def factor_at(schedule: Sequence[float], progress: float) -> float:
    """The factor at a progress from 0 (first step) to 1 (last step); 1 for an empty schedule."""
    if not schedule:
        return 1.0
    place = min(max(progress, 0.0), 1.0) * (len(schedule) - 1)
    low = min(int(place), len(schedule) - 1)
    high = min(low + 1, len(schedule) - 1)
    return schedule[low] + (schedule[high] - schedule[low]) * (place - low)


def progress_of(sigma: float, sigmas: Sequence[float]) -> float:
    """How far a run over these noise levels (descending, the last one is where it ends) is at `sigma`: 0 to 1.

    Between two steps, where samplers of higher order look, it is in between.
    """
    levels = list(sigmas[:-1])
    if len(levels) < 2:
        return 0.0
    rising = [-level for level in levels]
    after = min(max(bisect_right(rising, -sigma), 1), len(levels) - 1)
    low, high = rising[after - 1], rising[after]
    within = 0.0 if high == low else (-sigma - low) / (high - low)
    return min(max((after - 1 + within) / (len(levels) - 1), 0.0), 1.0)
