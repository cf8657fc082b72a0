"""What the last run had in it, for bug reports: plain words, made when it begins, read by `health` alone.

Nothing of a user's is in it: subjects are numbers, packs the names of their folders.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
from torch import Tensor

from ...encoder import EncoderConfig
from ...subject import is_plain_word
from .text import rows_of
from .values import Application

_HOST = "ComfyUI itself"


@dataclass
class LastRun:
    """One line of words for each thing. acted: how many subjects reached a layer, said by the run when it ends."""

    model: str
    sampling: str
    encoders: list[str]
    subjects: list[str]
    patches: list[str]
    state: str = "it still runs"
    acted: int = 0

    @property
    def ended(self) -> str:
        return f"{self.state}; {self.acted} of {len(self.subjects)} subjects acted"

    @contextmanager
    def watched(self) -> Iterator[LastRun]:
        """Around a run: how it ends is kept, and goes on."""
        try:
            yield self
            self.state = "ended"
        except BaseException as error:
            self.state = f"stopped by {type(error).__name__}"
            raise


#: The one of this process; None before the first.
last: LastRun | None = None


def remember(
    guider: Any, applications: Sequence[Application], latent: Sequence[int], sigmas: Tensor, skip: str
) -> LastRun:
    """Remembers a run that begins. skip: the key of our own wrappers."""
    global last
    patcher = guider.model_patcher
    steps = max(0, len(sigmas) - 1)
    last = LastRun(
        model=f"{type(patcher.model).__name__}, {_dtype_of(patcher.model)}, on {patcher.load_device.type}",
        sampling=f"{type(guider).__name__}, {steps} steps, latents of {' x '.join(map(str, latent))}",
        encoders=list(dict.fromkeys(described(a.source.encoder.config) for a in applications)),
        subjects=[f"{number}: {line}" for number, line in enumerate(_subjects(guider.conds, applications), 1)],
        patches=_patches(guider, skip),
    )
    return last


def described(config: EncoderConfig) -> str:
    """An encoder's title and settings."""
    return (
        f"{config.title or config.kind}; image_features {config.image_features}, value_norm {config.value_norm}, alpha "
        f"{config.alpha:g}, pooled {config.pooled}"
    )


def _dtype_of(model: Any) -> str:
    dtype = model.get_dtype() if hasattr(model, "get_dtype") else "unknown"
    return str(dtype).removeprefix("torch.")


def _subjects(conds: Mapping[str, Any], applications: Sequence[Application]) -> Iterator[str]:
    """What each subject is and which rows of the run's texts are its own."""
    bound = [
        (name, rows)
        for name, entries in conds.items()
        for entry in entries
        if entry.get("cross_attn") is not None
        for rows in rows_of(entry["cross_attn"])
    ]
    for a in applications:
        tokens = a.source.subject.tokens.shape[1]
        key = a.placeholder.key
        places = "; ".join(f"{name} rows {', '.join(map(str, rows[key]))}" for name, rows in bound if key in rows)
        options = {
            "focus": a.focus != 1, "separation": a.separation, "schedule": a.schedule, "mask": a.mask is not None,
            "layer_weights": len(set(a.layer_weights)) > 1, "unconditional": a.unconditional, "idle": a.idle,
        }  # fmt: skip
        yield (
            f"{'a plain word' if is_plain_word(a.placeholder.text) else '<...>'}, {tokens} tokens, strength "
            f"{a.strength:g}, from {a.start:g} to {a.end:g}, identity {a.alpha:g}, {a.value_norm}"
            f"{''.join(f', {name}' for name, used in options.items() if used)}; bound in {places or 'no text'}"
        )


def _patches(guider: Any, skip: str) -> list[str]:
    """What stands on the run's model beside us, by whose it is."""
    patcher, options = guider.model_patcher, guider.model_options
    found: dict[str, dict[str, int]] = {}
    for what, function in _on_model(options, skip):
        owner = found.setdefault(owner_of(function), {})
        owner[what] = owner.get(what, 0) + 1
    for name, value in getattr(patcher, "object_patches", {}).items():
        found.setdefault(owner_of(value), {})[f"{name} replaced"] = 1
    lines = [
        f"{owner}: {', '.join(what if count == 1 else f'{what} ({count})' for what, count in kinds.items())}"
        for owner, kinds in sorted(found.items())
    ]
    weights = len(getattr(patcher, "patches", {}))
    return lines + ([f"{weights} weights with a LoRA or other change"] if weights else [])


def _on_model(options: Mapping[str, Any], skip: str) -> Iterator[tuple[str, Any]]:
    """(what it is, the function) for each of what nodes have put on a model."""
    for name, value in options.items():
        if name.startswith(("model_function_wrapper", "sampler_")):
            yield from ((name, function) for function in (value if isinstance(value, list) else [value]))
    transformer = options.get("transformer_options", {})
    for name, functions in transformer.get("patches", {}).items():
        yield from ((name, function) for function in functions)
    for name, by_layer in transformer.get("patches_replace", {}).items():
        yield from ((f"{name} replaced", function) for function in by_layer.values())
    for name, by_key in transformer.get("wrappers", {}).items():
        yield from ((f"{name} wrapper", f) for key, functions in by_key.items() if key != skip for f in functions)
    if transformer.get("optimized_attention_override") is not None:
        yield "attention overridden", transformer["optimized_attention_override"]


def owner_of(function: Any) -> str:
    """Whose code that is: "custom_nodes/<folder>", the host, or a package. No path is in it."""
    file = _file_of(function)
    if file is None:
        return "unknown"
    packs: Iterable[str] = folder_paths.get_folder_paths("custom_nodes")
    for folder in packs:
        if file.is_relative_to(Path(folder).absolute()):
            return f"custom_nodes/{file.relative_to(Path(folder).absolute()).parts[0]}"
    if file.is_relative_to(Path(folder_paths.__file__).absolute().parent) and "site-packages" not in file.parts:
        return _HOST
    module = str(getattr(function, "__module__", None) or type(function).__module__)
    return f"package {module.split('.')[0]}" if "/" not in module and "\\" not in module else "unknown"


def _file_of(function: Any) -> Path | None:
    """Where a function is written, the outermost of those around another; of another object where its class is."""
    unwrapped: Callable[..., Any] | Any = getattr(function, "func", function)  # of a partial
    code = getattr(unwrapped, "__code__", None)
    if code is not None:
        return Path(code.co_filename).absolute()
    module = sys.modules.get(type(unwrapped).__module__)
    file = getattr(module, "__file__", None)
    return Path(file).absolute() if file else None


def replaced(owners: Mapping[str, Sequence[tuple[Any, str]]]) -> list[str]:
    """Which of these functions of the host another pack has put its own in place of.

    owners: {title: ((module or class, "name"), ...)}; what this host does not have is left out.
    """
    lines = []
    for title, places in owners.items():
        for owner, name in places:
            function = getattr(owner, name, None)
            if function is not None and (whose := owner_of(function)) != _HOST:
                lines.append(f"{whose}: {title}, {getattr(owner, '__name__', owner)}.{name}")
    return lines
