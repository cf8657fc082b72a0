"""Compiled models while subjects act: attention runs as it is written, what knows nothing of it stays compiled.

The host's compile node tells the compiler to ignore changes of the options in which replacements lie: a compiled layer
would go on with the subjects of another step, or of another run. (To keep only the replacements out of the graphs makes
wrong pictures too: the graphs around them are still those of other options.) Residual blocks and feed-forwards see no
options. They are compiled one by one, as the model was. What another pack compiled in its own way runs as written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.ldm.modules.attention import FeedForward
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import nn

_ORIGINAL = "_torchdynamo_orig_callable"  # what torch.compile leaves on the functions it makes
_HOW = "torch_compile_kwargs"  # where the host says in a model's options how it compiled
#: A U-Net's blocks have some dozen shapes, more than PyTorch compiles of one function unless it is told to.
_SHAPES = 64

#: block -> (how, its call compiled so): what a run compiled serves the next
_blocks: WeakKeyDictionary[nn.Module, tuple[Any, Callable[..., Any]]] = WeakKeyDictionary()

#: an object, the name of its attribute, and what to put there
_Swap = tuple[nn.Module, str, Any]


class Compiled:
    """For the calls of one run: which parts of its model are compiled is found out in the first."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """options: the model's (model_options)."""
        self._how: Mapping[str, Any] | None = options.get(_HOW)
        self._places: list[tuple[nn.Module, str]] | None = None

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """Inside of this, what is compiled in a model is its own original, with compiled blocks."""
        if self._places is None:
            self._places = [(owner, name) for owner, name, _ in _compiled_in(model)]
        with ExitStack() as undone:
            for owner, name in self._places:
                compiled = getattr(owner, name)
                eager = _eager(compiled)
                if eager is compiled:
                    continue
                undone.callback(setattr, owner, name, compiled)
                setattr(owner, name, eager)
                if self._how is not None and isinstance(eager, nn.Module):
                    undone.enter_context(_with_compiled_blocks(eager, self._how))
            yield


@contextmanager
def _with_compiled_blocks(model: nn.Module, how: Mapping[str, Any]) -> Iterator[None]:
    limits = torch._dynamo.config
    limit = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"
    blocks = [module for module in model.modules() if isinstance(module, (ResBlock, FeedForward))]
    blocks = [block for block in blocks if block._compiled_call_impl is None]  # others may have theirs already
    with limits.patch(**{limit: max(_SHAPES, getattr(limits, limit))}):
        try:
            for block in blocks:
                block._compiled_call_impl = _compiled(block, how)
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None


def _compiled(block: nn.Module, how: Mapping[str, Any]) -> Callable[..., Any]:
    known = _blocks.get(block)
    if known is None or known[0] != how:
        known = how, torch.compile(block._call_impl, **{**how, "fullgraph": False})
        _blocks[block] = known
    return known[1]


def _eager(part: Any) -> Any:
    """The original of what torch.compile made; other things as they are."""
    if isinstance(part, nn.Module):
        return part._modules.get("_orig_mod", part)
    return vars(part).get(_ORIGINAL, part) if isinstance(part, FunctionType) else part


def _compiled_in(model: nn.Module) -> Iterator[_Swap]:
    """Where torch.compile's modules and functions are in a model: as children, as methods, or compiled in place."""
    for module in model.modules():
        for name, child in module.named_children():
            if "_orig_mod" in child._modules and name != "_orig_mod":
                yield module, name, child
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and _ORIGINAL in vars(value):
                yield module, name, value
