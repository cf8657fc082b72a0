"""The dry run: what would be trained, the memory and arithmetic that it needs, and the first batch as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .base import BaseModel
from .checkpoints import agreed_resume
from .config import TrainingConfig
from .data import SubjectData
from .loop import Run, accelerated, prepare
from .precision import settled
from .samples import show_batch


def dry_run(config: TrainingConfig, base: BaseModel | None = None, data: Any | None = None) -> str:
    """Prints and returns what a run would do, and writes its first batch to `output`/first_batch.png.

    Raises NestedAttentionError as `train`.
    """
    resume = agreed_resume(config)
    config = settled(config, resume)
    with accelerated(config) as accelerator:
        run = prepare(config, accelerator, base, data)
        batch = run.collate([run.draws[position] for position in range(config.batch_size)])
        costs = unet_costs(run)
        picture = Path(config.output) / "first_batch.png"
        if accelerator.is_main_process:
            show_batch(batch, picture)
        lines = [
            f"Data: {run.draws.data!r}" if isinstance(run.draws.data, SubjectData) else f"Data: {len(run.draws.data)}",
            f"Base: {run.base.name or 'unnamed'}, {run.base.family.title}",
            f"Start: {f'checkpoint {resume}' if resume else 'step 0'}",
            "",
            *_trained(run),
            "",
            *_memory(run, costs, accelerator.num_processes),
            "",
            *_work(run, costs, accelerator.num_processes),
            "",
            "First batch:",
            *(f"  {name}: {text!r}" for name, text in zip(batch.names, batch.prompts, strict=True)),
            f"  as a picture: {picture}",
        ]
    text = "\n".join(lines)
    if accelerator.is_main_process:
        print(text)
    return text


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"  {name:<{left}}  {value:>{right}}" for name, value in rows]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


def _trained(run: Run) -> list[str]:
    encoder, options = run.model.encoder, run.config.optimiser
    parts: dict[str, tuple[nn.Module, float]] = {
        "K̈, V̈ of each layer": (nn.ModuleList([encoder.to_k, encoder.to_v]), options.layers_rate)
    }
    parts = {"Q-Former": (encoder.resampler, options.qformer_rate), **parts}
    rows = [(name, f"{_millions(_parameters(part))} at {rate:g}") for name, (part, rate) in parts.items()]
    if run.model.log_alpha is not None:
        rows.append(("α", f"1 at {options.layers_rate:g}"))
    frozen = {"U-Net": [run.base.unet], "text encoders": run.base.text_encoders, "VAE": [run.base.vae]}
    frozen["vision tower"] = [run.base.vision]
    rest = [(name, _millions(sum(map(_parameters, modules)))) for name, modules in frozen.items()]
    title = f"Trained ({run.model.method}, {encoder.config.tokens} tokens of {encoder.config.token_dim}):"
    return [title, *_table(rows), "Frozen:", *_table(rest)]


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
    if not isinstance(run.draws.data, SubjectData):
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


def _memory(run: Run, costs: Costs, processes: int) -> list[str]:
    config, encoder = run.config, run.model.encoder
    trained = _parameters(run.model)
    frozen = [run.base.unet, run.base.vae, *run.base.text_encoders, run.base.vision]
    weights = sum(p.numel() * p.element_size() for module in frozen for p in module.parameters())
    kept = costs.checkpointed if config.gradient_checkpointing else costs.activations
    subject = 2 * sum(encoder.config.widths) * encoder.config.tokens * config.data.references
    rows = {
        "trained weights, fp32": trained * 4,
        "gradients": trained * 4,
        "optimiser (two moments)": trained * 8,
        "averaged weights": trained * 4 if config.optimiser.ema else 0,
        "frozen weights": weights,
        "U-Net activations (at most)": kept * config.batch_size,
        "K̈ and V̈ of the subjects": subject * _bytes_per_number(config) * config.batch_size,
    }
    total = sum(rows.values())
    table = _table([(name, _gigabytes(size)) for name, size in rows.items()] + [("together, rough", _gigabytes(total))])
    return [f"Memory of each of {processes} process(es), {config.batch_size} rows:", *table]


def _work(run: Run, costs: Costs, processes: int) -> list[str]:
    config = run.config
    examples = config.batch_size * config.accumulation * processes
    # Backward through frozen layers needs the gradients of activations only: as much as forward.
    passes = 3 if config.gradient_checkpointing else 2
    step = costs.flops * passes * examples
    return [
        "Arithmetic (the U-Net, which is most of it):",
        *_table(
            [
                ("forward pass of one row", f"{costs.flops / 1e12:,.3f} TFLOP"),
                (f"one step, {examples} example(s), {passes} passes", f"{step / 1e12:,.3f} TFLOP"),
                (f"{config.steps:,} steps", f"{step * config.steps / 1e18:,.3f} EFLOP"),
            ]
        ),
    ]
