"""Strength schedules: their shapes, what is refused, and where in a run a noise level stands."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.errors import NestedAttentionError
from nested_core.schedule import SCHEDULES, factor_at, parse_schedule, progress_of


def at(name, *places, values=""):
    schedule = parse_schedule(name, values)
    return [round(factor_at(schedule, p), 6) for p in places]


def test_shapes():
    assert at("constant", 0, 0.3, 1) == [1, 1, 1]
    assert at("ease in", 0, 0.5, 1) == [0, 0.5, 1]
    assert at("ease out", 0, 0.5, 1) == [1, 0.5, 0]
    assert at("ease in and out", 0, 0.25, 0.5, 0.75, 1) == [0, 0.5, 1, 0.5, 0]
    assert at("list", 0, 0.25, 0.5, 1, values="0, 1, -2") == [0, 0.5, 1, -2]
    assert at("list", 0, 0.5, 1, values="0.7") == [0.7, 0.7, 0.7]


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n.startswith("ease")])
def test_eased_factors_stay_between_0_and_1_and_near_the_curve(name):
    curve = {"ease in": lambda p: p, "ease out": lambda p: 1 - p, "ease in and out": lambda p: 1 - abs(2 * p - 1)}[name]
    for i in range(101):
        p = curve(i / 100)
        factor = factor_at(parse_schedule(name), i / 100)
        assert 0 <= factor <= 1
        assert factor == pytest.approx(p * p * (3 - 2 * p), abs=3e-3)


@pytest.mark.parametrize("values", ["", ",", "1,,2", "a", "0; 1", "nan", "inf", "6", "1, -5.1"])
def test_a_list_that_is_none_is_refused_by_name(values):
    with pytest.raises(NestedAttentionError, match="values is .* numbers from -5 to 5 separated by commas"):
        parse_schedule("list", values)


def test_an_unknown_schedule_is_refused_with_those_there_are():
    with pytest.raises(NestedAttentionError, match="expected one of constant, ease in"):
        parse_schedule("bounce")


def test_progress_counts_steps_not_noise():
    sigmas = [14.6, 5.0, 2.0, 0.5, 0.0]
    assert [progress_of(s, sigmas) for s in sigmas[:-1]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert progress_of(3.5, sigmas) == pytest.approx(0.5)
    assert progress_of(100.0, sigmas) == 0
    assert progress_of(0.01, sigmas) == 1
    assert progress_of(1.0, [1.0, 0.0]) == 0, "one step"
    assert progress_of(1.0, []) == 0


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=30), st.floats(0, 200))
def test_progress_is_within_0_and_1_and_grows_as_noise_falls(levels, sigma):
    sigmas = [*sorted(levels, reverse=True), 0.0]
    p = progress_of(sigma, sigmas)
    assert 0 <= p <= 1 and math.isfinite(p)
    assert progress_of(sigma / 2, sigmas) >= p
