"""Checkpoints of a run: written whole or not at all, the newest kept, found again."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from ..errors import NestedAttentionError
from .config import TrainingConfig

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)")


def folder_of(config: TrainingConfig) -> Path:
    return Path(config.output) / "checkpoints"


def found_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, the newest last."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / "run.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save(accelerator: Accelerator, config: TrainingConfig, step: int, samples: int, validation: dict[str, Any]) -> bool:
    """Writes a checkpoint beside the others, then renames it: an interrupted one never counts.

    validation: its figures and its subjects, or nothing. Returns whether it is the best one that there is.
    """
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
        return False
    said = {
        "step": step,
        "samples": samples,
        "seed": config.seed,
        "shape": _shape(config),
        "per_step": _per_step(config, accelerator),
        **({"validation": validation} if validation else {}),
    }
    (temporary / "run.json").write_text(json.dumps(said, indent=2), "utf-8")
    _flush(temporary)
    final = folder / f"step-{step:08}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    best = best_checkpoint(folder, validation)
    for old in found_checkpoints(folder)[: -config.keep]:
        if old != best:
            shutil.rmtree(old, ignore_errors=True)
    return best == final


def best_checkpoint(folder: Path, validation: dict[str, Any]) -> Path | None:
    """The checkpoint whose subjects help most, of those that were measured on the same held-out subjects."""
    gains: dict[Path, float] = {}
    for path in found_checkpoints(folder):
        said = json.loads((path / "run.json").read_text("utf-8")).get("validation", {})
        if said and said["subjects"] == validation.get("subjects"):
            gains[path] = said["validation_gain"]
    return max(gains, key=gains.__getitem__, default=None)


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


def agreed_resume(config: TrainingConfig) -> Path | None:
    """`to_resume` as the main process sees it, for all processes: a shared folder may show each another state.

    Raises NestedAttentionError as `to_resume`, in every process.
    """
    answer: list[Any] = [None, None]
    state = PartialState(cpu=config.cpu)
    if state.is_main_process:
        try:
            answer[0] = to_resume(config)
        except NestedAttentionError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    path, wrong = answer
    if wrong is not None:
        raise NestedAttentionError(wrong)
    if path is not None and not (path / "run.json").is_file():
        raise NestedAttentionError(_not_shared(path, state))
    return path


def check_shared(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Raises NestedAttentionError where this process does not see what the main one has written to `output`."""
    path = Path(config.output) / "config.json"
    if not path.is_file():
        raise NestedAttentionError(_not_shared(path, accelerator.state))


def _not_shared(path: Path, state: Any) -> str:
    return (
        f"Process {state.process_index}, on {socket.gethostname()}, does not see {path.resolve()}, as process 0 does. "
        "All machines of a run need the same output folder: put it on a disk that they share, under the same path."
    )


@contextmanager
def loss_of_a_process_told(accelerator: Accelerator, config: TrainingConfig) -> Iterator[None]:
    """Where another process is gone, says so in place of the network's error.

    Raises NestedAttentionError.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not _of_the_network(error):
            raise
        raise NestedAttentionError(
            f"Process {accelerator.process_index} of {accelerator.num_processes} lost another one, which has ended or "
            f"can't be reached ({str(error).splitlines()[0]}); why is in that one's own output. {going_on(config)}"
        ) from error


def _of_the_network(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def going_on(config: TrainingConfig) -> str:
    """What is left of a run that ended early, in words."""
    found = found_checkpoints(folder_of(config))
    if not found:
        return "There is no checkpoint yet: the same command begins anew."
    return f"The newest checkpoint is {found[-1]}, and whole: the same command goes on from there."


def load(accelerator: Accelerator, config: TrainingConfig, path: Path) -> tuple[int, int]:
    """Restores everything that `save` wrote; returns (step, samples seen).

    Raises NestedAttentionError when the checkpoint is of an encoder of another shape.
    """
    said = json.loads((path / "run.json").read_text("utf-8"))
    now = _shape(config)
    there = {"optimiser": "adamw", **said["shape"]}  # what earlier checkpoints were made with, without saying so
    other = [f"{name}: {there.get(name)} there, {value} now" for name, value in now.items()
             if there.get(name) != value]  # fmt: skip
    if other:
        raise NestedAttentionError(
            f"The checkpoint {path} is of a run with other settings:\n  " + "\n  ".join(other) + "\nRestore them, or "
            "start anew in another output folder (init.encoder takes the weights along)."
        )
    accelerator.load_state(str(path))
    # accelerate counts passes on from the file; after another accumulation that would end steps in their middle.
    accelerator.step = 0
    before, after = said.get("per_step"), _per_step(config, accelerator)
    if before not in (None, after):
        log.info("%s", _told_of(before, after))
    return said["step"], said["samples"]


def _shape(config: TrainingConfig) -> dict[str, Any]:
    """The settings that the saved state depends on."""
    words = ("alpha", "base_model", "licence", "title")
    encoder = {name: value for name, value in asdict(config.encoder).items() if name not in words}
    return {
        **encoder,
        "ema": config.optimiser.ema > 0,
        "optimiser": config.optimiser.kind,
        "precision": config.precision,
    }


def _per_step(config: TrainingConfig, accelerator: Accelerator) -> dict[str, int]:
    """How the examples of a step are shared out."""
    return {
        "processes": accelerator.num_processes,
        "batch_size": config.batch_size,
        "accumulation": config.accumulation,
    }


def _told_of(before: dict[str, int], after: dict[str, int]) -> str:
    """What a run that goes on with another sharing has in common with the one that was stopped."""

    def words(said: dict[str, int]) -> str:
        return f"{said['processes']} process(es) x batch {said['batch_size']} x accumulation {said['accumulation']}"

    first, now = math.prod(before.values()), math.prod(after.values())
    if first == now:
        effect = "as many examples a step, summed in another order: equal to rounding, not bit for bit"
    else:
        effect = f"{now} examples a step where there were {first}: another curve, and rates still count steps"
    return f"{words(after)}, before {words(before)}: no example is repeated or left out; {effect}"


def _flush(folder: Path) -> None:
    """Everything of a folder onto the disk, so that the renaming can't come first in a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:  # Windows syncs only what may be written
                os.fsync(file.fileno())
