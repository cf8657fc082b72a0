"""Texts that know whose words are in them: marks follow what nodes do to conditionings (no host needed)."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_core.hosts.comfy import text as texts
from nested_core.hosts.comfy.text import MarkedText, mark, marks_of, plain, rows_of

T, C = 7, 6


@pytest.fixture(scope="module")
def prompt(device):
    """prompt(2, 3) -> a text (1, T, C) of random numbers whose rows 2 and 3 are marked."""

    def made(*rows: int, key: str = "<person>") -> torch.Tensor:
        numbers = torch.randn(1, T, C, generator=torch.Generator().manual_seed(0)).to(device)
        marks = torch.zeros(1, T, 1, dtype=torch.bool, device=device)
        marks[:, list(rows)] = True
        return mark(numbers, {key: marks})

    return made


def zeros(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """Plain zeros on the device of x."""
    return torch.zeros(*shape, device=x.device)


def randn(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(x.device)


def row_numbers(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(T, device=x.device)[None, :, None]


def rows(text: torch.Tensor, key: str = "<person>") -> list[tuple[int, ...]]:
    return [row.get(key, ()) for row in rows_of(text)]


def test_marking_shares_the_numbers_and_leaves_the_original_plain(device):
    numbers = torch.randn(1, T, C, device=device)
    marked = mark(numbers, {"a": torch.ones(1, T, 1, dtype=torch.bool, device=device)})
    assert type(numbers) is torch.Tensor and type(plain(marked)) is torch.Tensor
    assert marked.data_ptr() == numbers.data_ptr() and torch.equal(plain(marked), numbers)
    assert marks_of(numbers) == {} and rows(numbers, "a") == [()]
    again = mark(marked, {"b": torch.zeros(1, T, 1, dtype=torch.bool, device=device)})
    assert set(marks_of(again)) == {"a", "b"} and set(marks_of(marked)) == {"a"}


MOVES = {
    "slice": (lambda x: x[:, 2:5], [(0,)]),
    "pick": (lambda x: x[:, [3, 2, 0]], [(1,)]),
    "index tensor": (lambda x: x.index_select(1, torch.tensor([2, 2, 1], device=x.device)), [(0, 1)]),
    "batch": (lambda x: x.repeat(2, 1, 1), [(2,), (2,)]),
    "rows twice": (lambda x: x.repeat(1, 2, 1), [(2, 9)]),
    "interleaved": (lambda x: x.repeat_interleave(2, 1), [(4, 5)]),
    "expand": (lambda x: x.expand(3, -1, -1), [(2,)] * 3),
    "concat": (lambda x: torch.cat((zeros(x, 1, 3, C), x, x), 1), [(5, 12)]),
    "channels": (lambda x: torch.cat((zeros(x, 1, T, 2), x), -1), [(2,)]),
    "stack": (lambda x: torch.stack((plain(x), x), 1)[:, 1], [(2,)]),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 4), value=0.5), [(3,)]),
    "pad by repeating": (lambda x: F.pad(x.transpose(1, 2), (0, 9 - T), mode="replicate").transpose(1, 2), [(2,)]),
    "chunk": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), [(5,)]),
    "split": (lambda x: x.split([2, 5], dim=1)[1], [(0,)]),
    "flip": (lambda x: x.flip(1), [(4,)]),
    "roll": (lambda x: x.roll(1, 1), [(3,)]),
    "flat": (lambda x: x.reshape(-1, C).unflatten(0, (1, T)), [(2,)]),
    "transposed": (lambda x: x.mT.contiguous().mT, [(2,)]),
    "iterated": (lambda x: torch.stack([row for row in x]), [(2,)]),
    "rows one by one": (lambda x: torch.stack([row for row in x[0]])[None], [(2,)]),
    "half": (lambda x: x.half().float(), [(2,)]),
    "double": (lambda x: x.to(dtype=torch.float64, copy=True), [(2,)]),
    "copy": (copy.copy, [(2,)]),
    "deep copy": (lambda x: copy.deepcopy({"a": [x]})["a"][0], [(2,)]),
    "clone": (lambda x: x.clone().detach(), [(2,)]),
    "scaled": (lambda x: 1.5 * x - 3, [(2,)]),
    "negative": (lambda x: -x, [(2,)]),
    "noise": (lambda x: x * 0.9 + torch.randn_like(x) * 0.1, [(2,)]),
    "renormalised": (lambda x: (x - x.mean()) / x.std() * 2, [(2,)]),
    "rows renormalised": (lambda x: x / x.norm(dim=-1, keepdim=True), [(2,)]),
    "weights per row": (
        lambda x: x * torch.linspace(0.5, 1, T, device=x.device)[None, :, None].expand(x.shape),
        [(2,)],
    ),
    "average": (lambda x: torch.lerp(x, randn(x, 1, T, C), 0.3), [(2,)]),
    "average, second": (lambda x: torch.mul(randn(x, 1, T, C), 0.3) + torch.mul(x, 0.7), [(2,)]),
    "average of a stack": (
        lambda x: (torch.cat((randn(x, 2, T, C), x)) * torch.rand(3, 1, 1).to(x.device)).sum(0, True),
        [(2,)],
    ),
    "mean of a stack": (lambda x: torch.stack((x, plain(x))).mean(dim=0), [(2,)]),
    "broadcast over a batch": (lambda x: randn(x, 2, T, C) - x, [(2,), (2,)]),
    "where": (lambda x: torch.where(row_numbers(x) > 1, x, 0.0), [(2,)]),
    "where it is not": (lambda x: torch.where(row_numbers(x) > 4, x, zeros(x, 1, T, C)), [()]),
    "masked": (lambda x: x.masked_fill(row_numbers(x) == 2, 0.0), [()]),
    "scattered": (lambda x: x.masked_scatter(row_numbers(x) == 3, randn(x, 1, C)), [(2,)]),
    "all zero": (torch.zeros_like, [()]),
    "times nought": (lambda x: x * 0, [()]),
    "times nought, in place": (lambda x: x.clone().mul_(0.0), [()]),
    "average at nought": (lambda x: randn(x, 1, T, C) * 1.0 + x * 0.0, [()]),
    "lerp at nought": (lambda x: torch.lerp(randn(x, 1, T, C), x, 0.0), [()]),
    "lerp at one": (lambda x: torch.lerp(randn(x, 1, T, C), x, 1.0), [(2,)]),
    "noise alone": (torch.randn_like, [()]),
    "sum over rows": (lambda x: x.sum(1, keepdim=True).expand(-1, T, -1), [()]),
    "one row for all": (lambda x: zeros(x, 1, T, C) + x[:, 2:3], [()]),
    "a layer": (lambda x: F.linear(x, torch.eye(C, device=x.device)), [()]),
    "a product": (lambda x: x @ torch.eye(C, device=x.device), [()]),
    "NumPy and back": (lambda x: torch.from_numpy(x.cpu().numpy()).to(x.device), [()]),
    "pickled": (lambda x: pickle.loads(pickle.dumps(x)), [()]),
}


@pytest.mark.parametrize("name", MOVES)
def test_marks_follow(prompt, name):
    change, expected = MOVES[name]
    text = prompt(2)
    numbers = plain(text).clone()
    torch.manual_seed(1)
    changed = change(text)
    assert rows(changed) == expected
    torch.manual_seed(1)
    bare = change(numbers)
    assert torch.equal(plain(changed), bare) and changed.dtype == bare.dtype, "the numbers are those of a plain text"
    assert rows(text) == [(2,)] and torch.equal(plain(text), numbers), "the text itself stays as it was"


def test_in_place_writes_move_marks(prompt):
    text = prompt(2)
    target = zeros(text, 1, T + 3, C)
    target[:, 3:] = text
    assert rows(target) == [(5,)]
    target[:, 5] = 0
    assert rows(target) == [()]
    into = torch.empty(1, T, C, dtype=torch.float16)
    into.copy_(text)  # how the host moves a text to another device, here to the CPU
    assert rows(into) == [(2,)]
    weighted = text.clone()
    for i in range(len(weighted)):  # how the host applies weights to words
        for j in range(len(weighted[i])):
            weighted[i][j] = (weighted[i][j] - zeros(text, C)) * 1.2 + zeros(text, C)
    assert rows(weighted) == [(2,)]
    view = text.clone()
    view[:, 1:4][:, 1].copy_(zeros(text, 1, C) + 1)
    assert rows(view) == [()], "a view writes into what it is a view of"
    added = zeros(text, 1, T, C)
    added += text
    assert rows(added) == [(2,)]
    doubled = torch.zeros_like(text).repeat(1, 2, 1)  # NegPip's way: a row for K, one for V
    for i in range(T):
        doubled[:, 2 * i] = text[:, i]
        doubled[:, 2 * i + 1] = -text[:, i]
    assert rows(doubled) == [(4, 5)] and rows(doubled[:, 0::2]) == [(2,)]
    fused = text.clone().view(-1, C)  # PhotoMaker's way: one word's rows are replaced
    fused.masked_scatter_((row_numbers(text)[0] == 4), zeros(text, 1, C) + 1)
    assert rows(fused.view(1, T, C)) == [(2,)]


def test_arithmetic_does_not_share_marks(prompt):
    text = prompt(2)
    other = text * 1
    other[:, 2] = 0
    assert rows(text) == [(2,)] and rows(other) == [()]


def test_several_subjects_and_labels(prompt, device):
    label = object()
    everywhere = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
    both = mark(torch.cat((prompt(1, key="a"), prompt(4, key="b")), 1), {label: everywhere})
    assert rows(both, "a") == [(1,)] and rows(both, "b") == [(T + 4,)]
    assert rows(both * 0, label) == [tuple(range(2 * T))], "which text of a step a row belongs to is no word"


def test_a_layer_that_reads_a_marked_text_is_reported(prompt, device, monkeypatch):
    seen = []
    monkeypatch.setattr(texts, "on_unread", seen.append)
    F.linear(plain(prompt(2)), torch.eye(C, device=device))
    assert not seen
    out = torch.nn.Linear(C, C, device=device)(prompt(2))
    assert len(seen) == 1 and isinstance(seen[0], MarkedText) and type(out) is torch.Tensor


def test_questions_about_a_text_get_plain_answers(prompt, device):
    text = prompt(2)
    assert text.shape == (1, T, C) and text.size(1) == T and text.ndim == 3 and len(text) == 1
    assert text.device.type == device.type and text.dtype == torch.float32 and text.is_contiguous()
    assert isinstance(text, torch.Tensor) and isinstance(float(text.sum()), float) and text.tolist()
    assert text[0, 0, 0].item() == plain(text)[0, 0, 0].item() and bool((text == text).all())
    assert "MarkedText" in repr(text)


@st.composite
def walks(draw):
    """Operations that move numbers, drawn one after another, for a text of three axes."""
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["slice", "cat", "repeat", "flip", "roll", "pick", "write", "pad", "swap"]))
        steps.append((kind, draw(st.integers(0, 1)), draw(st.integers(0, 5)), draw(st.integers(1, 3))))
    return steps


def _walk(x: torch.Tensor, steps) -> torch.Tensor:
    for kind, axis, at, much in steps:
        size = x.shape[axis]
        at = at % size
        if kind == "slice":
            x = x.narrow(axis, at, size - at)
        elif kind == "cat":
            x = torch.cat((x, torch.zeros_like(x)) if at % 2 else (zeros(x, *x.shape), x), axis)
        elif kind == "repeat" and x.numel() < 4000:
            x = x.repeat(*[much if i == axis else 1 for i in range(3)])
        elif kind == "flip":
            x = x.flip(axis)
        elif kind == "roll":
            x = torch.roll(x, at, axis)
        elif kind == "pick":
            x = x.index_select(axis, torch.tensor([at] * much + [0], device=x.device))
        elif kind == "write":
            target = zeros(x, *x.shape)
            target[:, at % x.shape[1] :] = x[:, at % x.shape[1] :]
            x = target
        elif kind == "pad":
            x = F.pad(x, (0, 0, at, much))
        elif kind == "swap":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, T - 1), max_size=3), walks())
def test_marks_go_where_the_numbers_go(device, marked, steps):
    """Numbers that are 1 where a subject is and 0 elsewhere end up 1 exactly where marks are."""
    numbers = torch.zeros(2, T, C, device=device)
    numbers[1, marked] = 1
    moved = _walk(mark(numbers, {"a": numbers.bool()}), steps)
    expected = plain(moved) != 0
    assert torch.equal(marks_of(moved).get("a", torch.zeros_like(expected)), expected)
    assert math.prod(moved.shape) == plain(_walk(numbers, steps)).numel()
