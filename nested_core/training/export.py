"""The trained encoder as a file. Load Nested Encoder opens one of nested attention and refuses a baseline's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import fingerprint, load_encoder, write_state
from ..encoder import NestedEncoder
from ..errors import NestedAttentionError
from ..files import open_weights, whole
from ..metadata import BASELINE, FORMAT
from .model import SubjectDenoiser
from .provenance import as_text, model_card


def export(path: Path, model: SubjectDenoiser, trained: Mapping[str, Any] | None = None) -> None:
    """Writes the encoder of a trained module, with a trained α in its metadata.

    trained: what it was trained on, as `provenance.trained_on` says it: goes into the file, and as a model card
    beside it (encoder.md beside encoder.safetensors).

    Raises NestedAttentionError when the files can't be written there.
    """
    config = model.encoder.config
    if model.alpha is not None:
        config = replace(config, alpha=round(model.alpha.item(), 6))
    form = FORMAT if model.method == "nested" else BASELINE
    state = model.encoder.state_dict()
    if trained is None:
        write_state(path, config, state, form=form)
        return
    config = replace(config, training=as_text(trained), fingerprint=fingerprint(state))
    write_state(path, config, state, form=form, keep_fingerprint=True)
    card = path.with_suffix(".md")
    try:
        with whole(card) as part:
            part.write_text(model_card(path.name, config, trained), "utf-8")
    except OSError as error:
        raise NestedAttentionError(
            f"The model card could not be saved as {card}: {error}. The encoder {path} is written."
        ) from error


def load_trained(path: str | Path, dtype: torch.dtype | None = None) -> tuple[str, NestedEncoder]:
    """An exported file as (method, encoder), ready for inference: also a baseline's, which the nodes refuse.

    Raises NestedAttentionError when it is not such a file.
    """
    method = "decoupled" if open_weights(path).metadata.get("format") == BASELINE else "nested"
    return method, load_encoder(path, dtype=dtype, baseline=True)
