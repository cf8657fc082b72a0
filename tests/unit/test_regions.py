"""Memberships and the bias that keeps subjects apart, against the words of the equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nested_core.regions import RAMP, by_area, memberships, separating_bias


@pytest.fixture(scope="module")
def attention(device):
    return lambda *rows: torch.tensor([rows], dtype=torch.float32, device=device)


def test_who_is_looked_at_where_nobody_else_is_has_the_place(attention):
    members = memberships(attention([0.4, 0.4, 0.0, 0.0, 0.01], [0.0, 0.0, 0.1, 0.1, 0.003]))
    assert members.tolist() == [[[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]], "each by its own most; the background is nobody's"


def test_a_place_that_two_words_share_is_divided(attention):
    members = memberships(attention([0.4, 0.4, 0.2], [0.1, 0.4, 0.4]))
    assert members.sum(1).max() <= 1
    assert members[0, 0, 1] == members[0, 1, 1] == 0.5
    assert members[0, 0, 0] > 0.9 and members[0, 1, 2] > 0.9


def test_the_ramp_and_what_is_nowhere(attention):
    middle = sum(RAMP) / 2
    members = memberships(attention([1.0, middle, RAMP[0], 0.0], [0.0, 0.0, 0.0, 0.0]))
    assert members[0, 0].tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert (members[0, 1] == 0).all()
    assert memberships(attention([1.0, 0.5]).half()).dtype == torch.float32


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_the_bias_is_a_factor_on_what_other_subjects_weigh(device, strength):
    """softmax(l + bias) is softmax(l) with each key weighed by 1 - σ·o, normalised anew."""
    generator = torch.Generator().manual_seed(0)
    members = torch.rand(2, 3, 6, generator=generator).to(device)
    members /= 1.2 * members.sum(1, keepdim=True)
    logits = torch.randn(2, 6, 6, generator=generator).to(device)
    other = torch.zeros(2, 6, 6, device=device)
    for a in range(3):
        for b in range(3):
            if a != b:
                other += members[:, a, :, None] * members[:, b, None, :]
    weighed = logits.softmax(-1) * (1 - strength * other)
    torch.testing.assert_close(
        (logits + separating_bias(members, strength)).softmax(-1), weighed / weighed.sum(-1, keepdim=True)
    )


def test_strength_0_and_one_subject_change_nothing(device):
    members = torch.rand(1, 2, 5, device=device)
    assert (separating_bias(members, 0.0) == 0).all()
    assert (separating_bias(members[:, :1], 1.0) == 0).all()


def test_whole_subjects_do_not_see_each_other_and_the_background_sees_all(attention, device):
    members = attention([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    bias = separating_bias(members, 1.0)[0]
    assert bias[0, 1] == bias[1, 0] == -math.inf
    bias[0, 1] = bias[1, 0] = 0
    assert (bias == 0).all()
    out = F.scaled_dot_product_attention(
        *(torch.ones(1, 1, 3, 4, device=device) for _ in range(3)), separating_bias(members, 1.0)[None]
    )
    assert out.isfinite().all()


def test_some_rows_of_the_bias_are_those_of_the_whole(device):
    members = memberships(torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(1))).to(device)
    whole = separating_bias(members, 0.7)
    for rows in (slice(0, 7), slice(7, 40), slice(39, 60)):
        torch.testing.assert_close(separating_bias(members, 0.7, rows), whole[:, rows])


@pytest.mark.parametrize(
    "before, after", [((64, 64), (16, 16)), ((100, 37), (13, 9)), ((8, 8), (8, 8)), ((5, 7), (8, 12))]
)
def test_by_area_is_pytorchs_where_that_can(before, after):
    maps = torch.rand(2, 3, *before, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(maps, size=after, mode="area")
    torch.testing.assert_close(by_area(maps, after), expected)


def test_by_area_keeps_its_precision_where_others_are_cast():
    maps = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    expected = by_area(maps, (7, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(by_area(maps, (7, 7)), expected)
