"""The trained encoder as a file. Load Nested Encoder opens one of nested attention and refuses a baseline's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from ..checkpoint import BASELINE, FORMAT, identify, write_state
from ..encoder import NestedEncoder
from ..errors import NestedAttentionError
from .model import SubjectDenoiser


def export(path: Path, model: SubjectDenoiser) -> None:
    """Writes the encoder of a trained module, with a trained α in its metadata.

    Raises NestedAttentionError when the file can't be written there.
    """
    config = model.encoder.config
    if model.alpha is not None:
        config = replace(config, alpha=round(model.alpha.item(), 6))
    form = FORMAT if model.method == "nested" else BASELINE
    write_state(path, config, model.encoder.state_dict(), form=form)


def load_trained(path: str | Path, dtype: torch.dtype | None = None) -> tuple[str, NestedEncoder]:
    """An exported file as (method, encoder), ready for inference: also a baseline's, which the nodes refuse.

    Raises NestedAttentionError when it is not such a file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise NestedAttentionError(f"Could not read the encoder {path}: {error}.") from error
    method = "decoupled" if metadata.get("format") == BASELINE else "nested"
    config, state = identify(tensors, {**metadata, "format": FORMAT} if method == "decoupled" else metadata)
    encoder = NestedEncoder.from_config(config, device="meta")
    encoder.load_state_dict({name: tensor.to(dtype=dtype) for name, tensor in state.items()}, assign=True)
    return method, encoder.eval().requires_grad_(False)
