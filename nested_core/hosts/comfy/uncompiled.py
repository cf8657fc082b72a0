"""Compiled models run as they are written while subjects act.

The host's compile node tells the compiler to ignore changes of the options in which replacements lie: a compiled layer
would go on with the subjects of another step, or of another run. What is compiled elsewhere in the process stays so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import nn

_ORIGINAL = "_torchdynamo_orig_callable"  # what torch.compile leaves on the functions it makes

#: an object, the name of its attribute, and what to put there
_Swap = tuple[nn.Module, str, Any]


class Uncompiled:
    """For the calls of one run: which parts of its model are compiled is found out in the first."""

    def __init__(self) -> None:
        self._places: list[tuple[nn.Module, str]] | None = None

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """What is compiled in a model is its own original inside of this, and compiled again after it."""
        if self._places is None:
            self._places = [(owner, name) for owner, name, _ in _compiled_in(model)]
        swapped: list[_Swap] = []
        try:
            for owner, name in self._places:
                compiled = getattr(owner, name)
                eager = _eager(compiled)
                if eager is not compiled:
                    swapped.append((owner, name, compiled))
                    setattr(owner, name, eager)
            yield
        finally:
            for owner, name, compiled in swapped:
                setattr(owner, name, compiled)


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
