"""Checkpoints of a run: written whole or not at all, the newest kept, found again."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..errors import NestedAttentionError
from .config import TrainingConfig

_NAME = re.compile(r"step-(\d+)")


def folder_of(config: TrainingConfig) -> Path:
    return Path(config.output) / "checkpoints"


def found_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, the newest last."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / "run.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save(accelerator: Accelerator, config: TrainingConfig, step: int, samples: int) -> None:
    """Writes a checkpoint beside the others, then renames it: an interrupted one never counts."""
    folder = folder_of(config)
    temporary = folder / f".step-{step:08}.part"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
    except OSError as error:
        raise NestedAttentionError(
            f"Could not write a checkpoint to {folder}: {error}. Check the room on that disk; earlier ones are whole."
        ) from error
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    said = {"step": step, "samples": samples, "seed": config.seed, "shape": _shape(config)}
    (temporary / "run.json").write_text(json.dumps(said, indent=2), "utf-8")
    _flush(temporary)
    final = folder / f"step-{step:08}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in found_checkpoints(folder)[: -config.keep]:
        shutil.rmtree(old, ignore_errors=True)


def to_resume(config: TrainingConfig) -> Path | None:
    """The checkpoint that a run goes on from, None to start anew.

    Raises NestedAttentionError: the one that is named is not there; there are some, and `resume` is "never".
    """
    folder = folder_of(config)
    found = found_checkpoints(folder)
    if config.resume == "auto":
        return found[-1] if found else None
    if config.resume == "never":
        if found:
            raise NestedAttentionError(
                f'{folder} has checkpoints (the newest is {found[-1].name}) and resume is "never". Choose another '
                'output folder, or resume "auto" to go on.'
            )
        return None
    path = Path(config.resume)
    if not (path / "run.json").is_file():
        there = ", ".join(p.name for p in found) or "none"
        raise NestedAttentionError(
            f'resume names {path}, which is no complete checkpoint. It is "auto", "never" or the path of a '
            f"checkpoint folder; those of this run: {there}."
        )
    return path


def load(accelerator: Accelerator, config: TrainingConfig, path: Path) -> tuple[int, int]:
    """Restores everything that `save` wrote; returns (step, samples seen).

    Raises NestedAttentionError when the checkpoint is of an encoder of another shape.
    """
    said = json.loads((path / "run.json").read_text("utf-8"))
    now = _shape(config)
    other = [f"{name}: {said['shape'].get(name)} there, {value} now" for name, value in now.items()
             if said["shape"].get(name) != value]  # fmt: skip
    if other:
        raise NestedAttentionError(
            f"The checkpoint {path} is of a run with other settings:\n  " + "\n  ".join(other) + "\nRestore them, or "
            "start anew in another output folder (init.encoder takes the weights along)."
        )
    accelerator.load_state(str(path))
    return said["step"], said["samples"]


def _shape(config: TrainingConfig) -> dict[str, Any]:
    """The settings that the saved state depends on."""
    words = ("alpha", "base_model", "licence", "title")
    encoder = {name: value for name, value in asdict(config.encoder).items() if name not in words}
    return {**encoder, "ema": config.optimiser.ema > 0, "precision": config.precision}


def _flush(folder: Path) -> None:
    """Everything of a folder onto the disk, so that the renaming can't come first in a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:  # Windows syncs only what may be written
                os.fsync(file.fileno())
