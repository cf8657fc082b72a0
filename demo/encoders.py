"""The small world's encoders by name: what differs in their training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from nested_core.attention import VALUE_NORMS

ENCODERS: dict[str, dict[str, Any]] = {
    "nested": {},
    "one_value": {"tokens": 1},
    "decoupled": {"method": "decoupled", "value_norm": "none", "alpha": 1.0, "learn_alpha": False},
}
SHIPPED = "nested_pairs_longer"
ENCODER_NAME = re.compile(
    rf"(?P<method>{'|'.join(ENCODERS)})(?P<pairs>_pairs)?(_(?P<tokens>\d+)_tokens)?(_(?P<norm>{'|'.join(VALUE_NORMS)})_norm)?"
    r"(_alpha(?P<alpha>\d+))?(_(?P<features>last))?(_(?P<steps>\d+)_steps)?(_seed(?P<seed>\d+))?(?P<longer>_longer)?"
)
#: What `scripts/evaluate.py` compares: both regimes, three seeds each; shorter ones; tokens.
COMPARED = (
    *(f"{method}{seed}" for seed in ("_seed1", "_seed2") for method in ENCODERS),
    *(f"{method}_pairs{seed}" for seed in ("", "_seed1", "_seed2") for method in ENCODERS),
    *(f"{method}_200_steps" for method in ENCODERS), *ENCODERS, "nested_4_tokens",
)  # fmt: skip


def finished(folder: Path) -> bool:
    """Whether the encoder of a folder is trained to its end."""
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    if not (config.is_file() and metrics.is_file() and (folder / "encoder.safetensors").is_file()):
        return False
    done = [json.loads(line)["step"] for line in metrics.read_text("utf-8").splitlines()]
    return bool(done) and done[-1] == json.loads(config.read_text("utf-8"))["steps"]
