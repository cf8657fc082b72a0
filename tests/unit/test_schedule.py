"""Strength schedules: their shapes, what is refused, and at which step of a run a noise level stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.errors import NestedAttentionError
from nested_core.schedule import SCHEDULES, parse_schedule, step_of


def factors(name, steps, values=""):
    schedule = parse_schedule(name, values)
    return [round(schedule.factor(i, steps), 4) for i in range(steps)]


def test_shapes():
    assert parse_schedule("constant") is None
    assert factors("ease in", 4) == [0.043, 0.3164, 0.6836, 0.957]
    assert factors("ease out", 4) == [0.957, 0.6836, 0.3164, 0.043]
    assert factors("ease in and out", 4) == [0.1562, 0.8438, 0.8438, 0.1562]
    assert factors("list", 5, "0, 1, -2") == [0, 0.5, 1, -0.5, -2]
    assert factors("list", 3, "0.7") == [0.7, 0.7, 0.7]
    assert factors("list", 1, "0.2, 1") == [0.2]


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n.startswith("ease")])
@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_named_shapes_never_silence_a_subject_wholly(name, steps):
    """A turbo model's one or two steps too."""
    every = factors(name, steps)
    assert all(0 < factor <= 1 for factor in every)
    assert max(every) >= 0.5


@pytest.mark.parametrize("values", ["", ",", "1,,2", "a", "0; 1", "nan", "inf", "6", "1, -5.1"])
def test_a_list_that_is_none_is_refused_by_name(values):
    with pytest.raises(NestedAttentionError, match="values is .* numbers from -5 to 5 separated by commas"):
        parse_schedule("list", values)


def test_an_unknown_schedule_is_refused_with_those_there_are():
    with pytest.raises(NestedAttentionError, match="expected one of constant, ease in"):
        parse_schedule("bounce")


def test_steps_are_counted_not_noise():
    sigmas = [14.6, 5.0, 2.0, 0.5, 0.0]
    assert [step_of(s, sigmas) for s in sigmas[:-1]] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert step_of(3.5, sigmas) == (1.5, 4)
    assert step_of(100.0, sigmas) == (0, 4)
    assert step_of(0.01, sigmas) == (3, 4)
    assert step_of(1.0, [1.0, 0.0]) == (0, 1)
    assert step_of(1.0, []) == (0, 1)


def test_noise_that_rises_is_counted_from_the_first_step_too():
    sigmas = [0.03, 0.5, 2.0, 5.0, 14.6]
    assert [step_of(s, sigmas)[0] for s in sigmas[:-1]] == [0, 1, 2, 3]
    assert step_of(1.25, sigmas) == (1.5, 4)


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=30), st.floats(0, 200))
def test_a_step_is_within_the_run_and_grows_as_noise_falls(levels, sigma):
    sigmas = [*sorted(levels, reverse=True), 0.0]
    step, steps = step_of(sigma, sigmas)
    assert steps == len(levels) and 0 <= step <= steps - 1
    assert step_of(sigma / 2, sigmas)[0] >= step
