"""The log of a run: means since the last entry, to the tracker, to metrics.jsonl and to a callback."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

Callback = Callable[[dict[str, float]], None]


class Journal:
    """Collects the passes of a run.

    An entry has: step, loss, rate of K̈ and V̈, gradient norm (where gradients are clipped), examples per second and
    the share of rows with a subject.
    """

    def __init__(self, accelerator: Accelerator, output: Path, callback: Callback | None = None) -> None:
        self.accelerator, self.file, self.callback = accelerator, output / "metrics.jsonl", callback
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
        seconds = max(time.monotonic() - self.begun, 1e-9)
        entry = {
            "step": step,
            "loss": mean,
            "rate": rate,
            **({} if norm is None else {"grad_norm": float(norm)}),
            "examples_per_second": self.rows * self.accelerator.num_processes / seconds,
            "bound": bound,
        }
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            if self.callback is not None:
                self.callback(entry)
        self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=step)
        self._start()
        return entry
