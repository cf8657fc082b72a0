"""Which precision the passes of a training run in, where the config leaves that to the machine."""

from __future__ import annotations

import functools
import json
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from .config import Precision, TrainingConfig

log = logging.getLogger(__name__)


def settled(config: TrainingConfig, resume: Path | None) -> TrainingConfig:
    """The config with a precision that is not "auto": that of the checkpoint it goes on from, else the fastest here."""
    if config.precision != "auto":
        return config
    if resume is not None:
        said: Precision = json.loads((resume / "run.json").read_text("utf-8"))["shape"]["precision"]
        return replace(config, precision=said)
    state = PartialState(cpu=config.cpu)
    chosen = [fastest(state.device)]
    broadcast_object_list(chosen)  # machines differ, and so does what one measures twice
    log.info("precision: %s", chosen[0])
    return replace(config, precision=chosen[0])


def fastest(device: torch.device) -> Precision:
    """The precision that a device is fastest with: known for GPUs, measured on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        return "bf16" if _seconds(torch.bfloat16) < _seconds(torch.float32) else "fp32"
    return "fp32"


def mixed(precision: Precision) -> str:
    """A precision as accelerate calls it."""
    return "no" if precision == "fp32" else precision


@functools.cache
def _seconds(dtype: torch.dtype) -> float:
    """Of a convolution and a product of matrices, forward and backward, on the CPU: the fastest of five.

    A CPU with units for bf16 takes a third of fp32's time, one without takes eight times as much.
    """
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    with torch.enable_grad():
        picture, kernel, matrix = rand(4, 64, 32, 32), rand(64, 64, 3, 3), rand(512, 512)
        taken = []
        for _ in range(5):
            begun = time.perf_counter()
            (torch.conv2d(picture, kernel, padding=1).mean() + (matrix @ matrix).mean()).backward()
            taken.append(time.perf_counter() - begun)
    return min(taken)
