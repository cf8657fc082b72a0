"""The dry run: what would be trained, the memory and arithmetic that it needs, and the first batch as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from .base import BaseModel
from .checkpoints import agreed_resume
from .config import TrainingConfig
from .costs import Costs, memory_of, parameters_of, unet_costs
from .loop import Run, accelerated, prepare
from .precision import settled
from .samples import show_batch
from .validation import from_files


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
            f"Data: {run.draws.data!r}" if from_files(run.draws.data) else f"Data: {len(run.draws.data)}",
            *([f"Held out: {', '.join(run.held_out)}"] if run.held_out else []),
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
    rows = [(name, f"{_millions(parameters_of(part))} at {rate:g}") for name, (part, rate) in parts.items()]
    if run.model.log_alpha is not None:
        rows.append(("α", f"1 at {options.layers_rate:g}"))
    frozen = {"U-Net": [run.base.unet], "text encoders": run.base.text_encoders, "VAE": [run.base.vae]}
    frozen["vision tower"] = [run.base.vision]
    rest = [(name, _millions(sum(map(parameters_of, modules)))) for name, modules in frozen.items()]
    title = f"Trained ({run.model.method}, {encoder.config.tokens} tokens of {encoder.config.token_dim}):"
    return [title, *_table(rows), "Frozen:", *_table(rest)]


def _memory(run: Run, costs: Costs, processes: int) -> list[str]:
    rows = memory_of(run, costs)
    total = sum(rows.values())
    table = _table([(name, _gigabytes(size)) for name, size in rows.items()] + [("together, rough", _gigabytes(total))])
    return [f"Memory of each of {processes} process(es), {run.config.batch_size} rows:", *table]


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
