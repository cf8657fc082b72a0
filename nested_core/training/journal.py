"""The log of a run: means since the last entry, to the tracker, to metrics.jsonl and to a callback."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from .costs import measured_memory

Callback = Callable[[dict[str, float]], None]


class Journal:
    """Collects the passes of a run.

    An entry has: step, loss, rate of K̈ and V̈, gradient norm (where gradients are clipped), examples per second,
    hours left (as if the rest went like this run so far, checkpoints and all), GB of memory (`measured_memory` of the
    first process) and the share of rows with a subject. An entry of a validation has its figures.
    """

    def __init__(self, accelerator: Accelerator, output: Path, steps: range, callback: Callback | None = None) -> None:
        """steps: those of this run, from the one it starts at."""
        self.accelerator, self.file, self.callback = accelerator, output / "metrics.jsonl", callback
        self.steps, self.first = steps, time.monotonic()
        self._start()

    def _start(self) -> None:
        # On the device: a value that is read in every pass would stop the queue in every pass.
        self.loss = torch.zeros((), device=self.accelerator.device)
        self.passes = self.rows = self.bound = 0
        self.begun = time.monotonic()

    def add(self, loss: Tensor, rows: int, bound: int) -> None:
        """One pass: its loss, and how many of its rows have a subject."""
        self.loss += loss
        self.passes += 1
        self.rows += rows
        self.bound += bound

    def write(self, step: int, rate: float, norm: Tensor | None) -> dict[str, float]:
        """Logs an entry and starts the next one."""
        ours = torch.stack([self.loss / self.passes, self.loss.new_tensor(self.bound / self.rows)])
        mean, bound = self.accelerator.reduce(ours, "mean").tolist()
        now = time.monotonic()
        seconds = max(now - self.begun, 1e-9)
        pace = (now - self.first) / max(step - self.steps.start, 1)
        entry = {
            "step": step,
            "loss": mean,
            "rate": rate,
            **({} if norm is None else {"grad_norm": float(norm)}),
            "examples_per_second": self.rows * self.accelerator.num_processes / seconds,
            "hours_left": pace * (self.steps.stop - step) / 3600,
            "memory_gb": measured_memory(self.accelerator.device) / 1e9,
            "bound": bound,
        }
        self.note(entry)
        self._start()
        return entry

    def note(self, entry: dict[str, float]) -> None:
        """Logs figures of a step."""
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            if self.callback is not None:
                self.callback(entry)
        self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=int(entry["step"]))
