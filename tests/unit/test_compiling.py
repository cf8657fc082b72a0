"""Blocks that run compiled: as before afterwards, and given back."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from nested_core.compiling import called_by, compiled_call


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(3, width)

    def forward(self, x):
        return torch.relu(self.inner(x))


def test_blocks_run_compiled_and_are_given_back():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    call = compiled_call(backend=backend)
    blocks = [Block(width) for width in range(1, 12)]  # more shapes than PyTorch's own limit
    x = torch.randn(2, 3)
    expected = [block(x) for block in blocks]
    for _ in range(2):
        with called_by(call, blocks):
            made = [block(x) for block in blocks]
            for one, other in zip(made, expected, strict=True):
                assert torch.equal(one, other)
        assert not [block for block in blocks if block._compiled_call_impl is not None]
    assert 0 < len(graphs) <= len(blocks)
    alive = [weakref.ref(block) for block in blocks]
    del blocks, expected, made, one, other
    gc.collect()
    assert not [block for block in alive if block() is not None], "what was compiled keeps them"
