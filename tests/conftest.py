"""What values are computed on and in: every device of this machine, and the types that models run in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
#: What rounding inside one layer may change of its result, relative to it
TOLERANCES = {torch.float32: 3e-6, torch.float16: 6e-3, torch.bfloat16: 4e-2}

# Where fp32 is compared with fp32, no convolution may round to TF32 on the way.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test's tensors belong. What it makes elsewhere shows that the code under test does not mix devices."""
    return torch.device(request.param)


@pytest.fixture(scope="session", params=TOLERANCES, ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES[dtype]


@pytest.fixture
def randn(device: torch.device) -> Callable[..., torch.Tensor]:
    """randn(*shape, dtype=...) -> normal numbers, the same ones on every device."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return made
