"""Blocks of a U-Net that run compiled, one by one, while the attention between them changes and does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

#: A U-Net's blocks have some dozen shapes, more than PyTorch compiles of one function unless it is told to.
_SHAPES = 64


def compiled_call(**how: Any) -> Callable[..., Any]:
    """A module's call, compiled; how: of torch.compile. It knows no module, and so keeps none alive."""
    return torch.compile(nn.Module._call_impl, **how)


@contextmanager
def called_by(call: Callable[..., Any], blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside of this, blocks are called through `compiled_call`; what others have compiled of them stays as it is."""
    limits = torch._dynamo.config
    limit = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"
    blocks = [block for block in blocks if block._compiled_call_impl is None]
    with limits.patch(**{limit: max(_SHAPES, getattr(limits, limit))}):
        try:
            for block in blocks:
                block._compiled_call_impl = partial(call, block)
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None  # torch has no call for it
