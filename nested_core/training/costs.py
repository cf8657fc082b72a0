"""What a run needs: the U-Net's memory and arithmetic, counted without computing, and memory as it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .config import TrainingConfig
from .validation import from_files

if TYPE_CHECKING:
    from .loop import Run


def parameters_of(module: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in module.parameters())


def measured_memory(device: torch.device) -> int:
    """Bytes: of a CUDA device the most that was allocated at once, elsewhere what this process has now, program and
    all."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


@dataclass
class Costs:
    """Of the U-Net, for one row.

    activations: bytes of all outputs, which bound what a backward pass keeps. checkpointed: the same with gradient
    checkpointing, when each block's inside is made again for itself. flops: of its forward pass.
    """

    activations: int
    checkpointed: int
    flops: int


def unet_costs(run: Run) -> Costs:
    """Counted on a U-Net without weights, of which nothing is computed; attention counts as fused."""
    unet = _empty(run)
    width = _bytes_per_number(run.config)
    made: dict[str, int] = {}

    def count(name: str, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(out, Tensor):
            made[name] = made.get(name, 0) + out.numel() * width

    blocks = [name for name, _ in unet.named_modules() if _is_block(name)]
    for name, module in unet.named_modules():
        if name in blocks or not list(module.children()):
            module.register_forward_hook(lambda _, __, out, name=name: count(name, out))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**_row(run))
    inside = {block: sum(n for name, n in made.items() if name.startswith(f"{block}.")) for block in blocks}
    everything = sum(n for name, n in made.items() if name not in blocks)
    outputs = sum(made[block] for block in blocks)
    checkpointed = everything - sum(inside.values()) + outputs + max(inside.values())
    return Costs(everything, checkpointed, counter.get_total_flops())


def _empty(run: Run) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(run.base.unet.config))


def _row(run: Run) -> dict[str, Any]:
    """Inputs of the U-Net for one row, without content."""
    base, size = run.base, run.config.data.resolution
    if not from_files(run.draws.data):
        size = run.draws[0].target.shape[0]
    side = size // base.vae_step
    with torch.device("meta"):
        row: dict[str, Any] = {
            "sample": torch.zeros(1, base.latent_channels, side, side),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(1, base.tokenizers[0].model_max_length, base.context_dim),
        }
        config = base.unet.config
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            row["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
    return row


def _is_block(name: str) -> bool:
    """Names of what gradient checkpointing makes again as one: resnets and transformer blocks."""
    parts = name.split(".")
    return len(parts) > 1 and parts[-2] in ("resnets", "transformer_blocks")


def _bytes_per_number(config: TrainingConfig) -> int:
    return 4 if config.precision == "fp32" else 2


def memory_of(run: Run, costs: Costs) -> dict[str, int]:
    """Bytes that a process needs, by what for."""
    config, encoder = run.config, run.model.encoder
    trained = parameters_of(run.model)
    frozen = [run.base.unet, run.base.vae, *run.base.text_encoders, run.base.vision]
    weights = sum(p.numel() * p.element_size() for module in frozen for p in module.parameters())
    kept = costs.checkpointed if config.gradient_checkpointing else costs.activations
    subject = 2 * sum(encoder.config.widths) * encoder.config.tokens * config.data.references
    moments = trained * (2 if config.optimiser.kind == "adamw8bit" else 8)
    if config.optimiser.shard:
        moments //= run.accelerator.num_processes
    return {
        "trained weights, fp32": trained * 4,
        "gradients": trained * 4,
        "optimiser (two moments)": moments,
        "averaged weights": trained * 4 if config.optimiser.ema else 0,
        "frozen weights": weights,
        "U-Net activations (at most)": kept * config.batch_size,
        "K̈ and V̈ of the subjects": subject * _bytes_per_number(config) * config.batch_size,
    }
