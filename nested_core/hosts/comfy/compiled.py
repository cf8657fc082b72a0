"""Compiled models while subjects act: attention runs as it is written, what knows nothing of it stays compiled.

The host's compile node tells the compiler to ignore changes of the options in which replacements lie: a compiled layer
would go on with the subjects of another step, or of another run. (To keep only the replacements out of the graphs makes
wrong pictures too: the graphs around them are still those of other options.) Residual blocks and feed-forwards see no
options. They are compiled one by one, as the model was. What another pack compiled in its own way runs as written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

from comfy.ldm.modules.attention import FeedForward
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import nn

from ...compiling import called_by, compiled_call

_ORIGINAL = "_torchdynamo_orig_callable"  # what torch.compile leaves on the functions it makes
_HOW = "torch_compile_kwargs"  # where the host says in a model's options how it compiled


class Compiled:
    """For the calls of one run: which parts of its model are compiled is found out in the first."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """options: the model's (model_options)."""
        how: Mapping[str, Any] | None = options.get(_HOW)
        # PyTorch finds again what an earlier run compiled so.
        self._call = None if how is None else compiled_call(**{**how, "fullgraph": False})
        self._places: list[tuple[nn.Module, str]] | None = None
        self._blocks: dict[nn.Module, list[nn.Module]] = {}

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """Inside of this, what is compiled in a model is its own original, with compiled blocks."""
        if self._places is None:
            self._places = list(_compiled_in(model))
        with ExitStack() as undone:
            for owner, name in self._places:
                compiled = getattr(owner, name)
                eager = _eager(compiled)
                if eager is compiled:
                    continue
                undone.callback(setattr, owner, name, compiled)
                setattr(owner, name, eager)
                if self._call is not None and isinstance(eager, nn.Module):
                    if eager not in self._blocks:
                        self._blocks[eager] = [m for m in eager.modules() if isinstance(m, (ResBlock, FeedForward))]
                    undone.enter_context(called_by(self._call, self._blocks[eager]))
            yield


def _eager(part: Any) -> Any:
    """The original of what torch.compile made; other things as they are."""
    if isinstance(part, nn.Module):
        return part._modules.get("_orig_mod", part)
    return vars(part).get(_ORIGINAL, part) if isinstance(part, FunctionType) else part


def _compiled_in(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(object, name) where torch.compile's modules and functions are in a model: children, methods, or in place."""
    for module in model.modules():
        for name, child in module.named_children():
            if "_orig_mod" in child._modules and name != "_orig_mod":
                yield module, name
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and _ORIGINAL in vars(value):
                yield module, name
