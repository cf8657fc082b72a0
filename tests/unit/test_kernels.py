"""Triton's kernel against PyTorch's operations: in its interpreter, in a process of its own, and on a GPU if any."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from nested_core import kernels
from nested_core.attention import VALUE_NORMS
from nested_core.errors import NestedAttentionError

COMPARED = """
import sys, itertools, torch
from nested_core import attention, kernels
from nested_core.attention import NestedTerm

device = sys.argv[1]

def rand(*shape, dtype):
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

g = torch.Generator().manual_seed(0)
heads, half = 5, torch.float16
for (width, places), (dtype, own) in itertools.product(((8, 1), (40, 3)), ((half, half), (half, torch.float32))):
    for norm in sys.argv[2:]:
        out = rand(2, 6, heads, width, dtype=own)
        nested, replaced = (rand(2, n, heads, width, dtype=dtype) for n in (6, 2 * places))
        replaced = replaced[:, places:]  # of the strides that one subject's of several have
        nested[0, 1] = 0  # of nothing
        share = rand(2, places, heads, 6, dtype=dtype).abs().permute(0, 3, 2, 1)
        expected, alpha, strength = out.double(), 1.7, -0.6 if places == 1 else 0.8
        term = NestedTerm(nested, nested, torch.arange(places, device=device), strength, alpha, norm)
        exact = [x.double() for x in (share, nested, replaced)]
        scaled = attention._scaled(norm, exact[0], exact[2])
        attention._nested = lambda *_: exact[1]
        attention._add(expected, expected.flatten(2), term, exact[0], scaled, exact[2], None)
        kernels.add_subject(out, nested, share, replaced, norm, alpha, strength)
        worst = float((out - expected).abs().max() / expected.abs().max())
        print(norm, heads, width, places, dtype, own, worst)
        assert worst < (1e-3 if own is torch.float16 else 3e-6)
print("all agree")
"""


@pytest.mark.parametrize("where", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_the_kernel_agrees_with_the_equations(where):
    environment = {**os.environ, "TRITON_INTERPRET": str(int(where == "cpu"))}
    done = subprocess.run(
        [sys.executable, "-c", COMPARED, where, *VALUE_NORMS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.endswith("all agree\n"), done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture
def said(monkeypatch):
    """said(value): what the variable says; asked again afterwards."""

    def put(value):
        monkeypatch.setenv(kernels.VARIABLE, value)
        kernels.chosen.cache_clear()

    yield put
    kernels.chosen.cache_clear()


@pytest.mark.parametrize("value, expected", [("", False), ("torch", False), ("triton", True)])
def test_the_variable_chooses(said, value, expected):
    said(value)
    assert kernels.chosen() is expected


def test_another_word_is_refused(said):
    said("tritn")
    with pytest.raises(
        NestedAttentionError, match=r'NESTED_ATTENTION_KERNEL is "tritn"; expected "triton", or "torch"'
    ):
        kernels.chosen()


def test_without_triton_the_reason_is_said(said, monkeypatch):
    said("triton")
    kernels._operation.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(NestedAttentionError, match="Triton can't be imported"):
        kernels.chosen()
