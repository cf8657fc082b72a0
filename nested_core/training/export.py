"""The trained encoder as a file. Load Nested Encoder opens one of nested attention and refuses a baseline's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint import load_encoder, write_state
from ..encoder import NestedEncoder
from ..files import open_weights
from ..metadata import BASELINE, FORMAT
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
    method = "decoupled" if open_weights(path).metadata.get("format") == BASELINE else "nested"
    return method, load_encoder(path, dtype=dtype, baseline=True)
