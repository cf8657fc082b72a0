"""What runs in several processes, or in compiled parts: which ways of accelerate's are taken, and which are refused."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from ..compiling import called_by, compiled_call
from ..errors import NestedAttentionError

log = logging.getLogger(__name__)

_REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def check_launched() -> None:
    """Raises NestedAttentionError where accelerate's launcher was told of what this training can't do, or has started
    one process where several were asked for."""
    said = os.environ
    for name, title in _REFUSED.items():
        if said.get(name, "false").lower() == "true":
            raise NestedAttentionError(
                f"accelerate launch was told to use {title}, which takes the trained weights apart: averaged weights, "
                "gradient clipping and checkpoints here need them whole. Expected distributed_type MULTI_GPU (or NO "
                "for one GPU), as in nested_core/training/configs/accelerate. For less memory: optimiser.shard, "
                'optimiser.kind "adamw8bit", gradient_checkpointing.'
            )
    # accelerate leaves CPU processes to MPI: without a host file it starts one.
    alone = not any(name in said for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"))
    if alone and "MASTER_ADDR" in said and said.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        raise NestedAttentionError(
            "accelerate launch was asked for several processes on the CPU and has started one: it does so with --cpu "
            "and with distributed_type MULTI_CPU. Use --multi_gpu (or distributed_type MULTI_GPU) and `cpu: true` in "
            "the training's own config, or --num_processes 1."
        )


class ShardedAdamW(ZeroRedundancyOptimizer):
    """AdamW whose two moments are shared out among the processes; its state dict is that of a plain AdamW, on the first
    process. So checkpoints are the same with it and without, and for any number of processes."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, optimizer_class=torch.optim.AdamW, **options)

    def state_dict(self) -> dict[str, Any]:
        """Of all processes together: all must call it. On others than the first the moments are missing."""
        self.consolidate_state_dict(to=0)
        return super().state_dict() if self.rank == 0 else torch.optim.Optimizer.state_dict(self)


@contextmanager
def compiled(unet: nn.Module, wanted: bool) -> Iterator[None]:
    """While it is entered, the U-Net's convolution blocks and feed-forwards run compiled, if `wanted`. Attention does
    not: its subjects change with every batch."""
    if not wanted:
        yield
        return
    with called_by(compiled_call(), [m for m in unet.modules() if isinstance(m, ResnetBlock2D | FeedForward)]):
        yield


@contextmanager
def heap_left_alone(wanted: bool) -> Iterator[None]:
    """While it is entered, the garbage collector leaves alone what is there, if `wanted`.

    Workers are forks that share this process's memory until one writes to it, and a collection writes to every object:
    each worker would come to have a data set's whole list for itself.
    """
    if not wanted:
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def check_workers(accelerator: Accelerator, workers: int) -> None:
    """Says in the log where the workers of all processes of this machine are more than its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if workers * local > cores and accelerator.is_local_main_process:
        log.warning(
            "workers is %d in each of %d process(es) of this machine, which has %d cores: %d would be enough.",
            workers, local, cores, max(cores // local, 1),
        )  # fmt: skip
