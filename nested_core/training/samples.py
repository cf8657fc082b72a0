"""Grids of pictures: what an example shows, and what the model makes of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from .examples import Batch, Example
from .model import attention, bind

if TYPE_CHECKING:
    from .loop import Run


def write_samples(run: Run, step: int) -> Path:
    """A grid with a row per example: reference, target, samples. As PNG in `output`/samples, and to the tracker."""
    config = run.config
    # The first examples of the run, whatever was drawn since; their conditions are never dropped.
    examples = first_examples(run, config.samples.count)
    batches = [run.collate([example]) for example in examples]
    made = [sample(run, batch) for batch in batches]
    size = (examples[0].target.shape[0], examples[0].target.shape[1])
    columns = max(1, max(len(batch.references) for batch in batches))
    rows = []
    for batch, pictures in zip(batches, made, strict=True):
        shown = [_fitted(view, size) for view in batch.references]
        blank = torch.ones(*size, 3)
        rows += [*shown, *[blank] * (columns - len(shown)), batch.targets[0], *pictures]
    path = Path(config.output) / "samples" / f"step-{step:08}.png"
    grid = _write_grid(rows, columns + 1 + config.samples.seeds, path)
    for tracker in run.accelerator.trackers:
        tracker.log_images({"samples": grid[None].numpy()}, step=step)
    return path


def first_examples(run: Run, count: int) -> list[Example]:
    """The examples at the first positions of the run, with all their conditions."""
    whole = run.draws.undropped()
    return [whole[position] for position in range(count)]


@torch.no_grad()
def sample(run: Run, batch: Batch) -> Tensor:
    """Pictures (seeds, H, W, 3) in 0..1 of a batch of one row, on the CPU."""
    options, base, model = run.config.samples, run.base, run.model
    seeds = options.seeds
    conditions = run.frozen.conditions(batch)
    negative, negative_pooled = run.frozen.text([options.negative])
    height, width = batch.targets.shape[1:3]
    step = base.vae_step
    latents = torch.cat(
        [
            torch.randn((1, base.latent_channels, height // step, width // step), generator=_generator(seed))
            for seed in range(seeds)
        ]
    )
    text: dict[str, Any] = {
        "prompt_embeds": conditions.text.expand(seeds, -1, -1),
        "negative_prompt_embeds": negative.expand(seeds, -1, -1),
    }
    if conditions.added and negative_pooled is not None:
        text["pooled_prompt_embeds"] = conditions.added["text_embeds"].expand(seeds, -1)
        text["negative_pooled_prompt_embeds"] = negative_pooled.expand(seeds, -1)
    encoder = model.encoder
    subjects = []
    with run.accelerator.autocast():
        if conditions.groups:
            # The pipeline puts the negative rows first.
            first = seeds if options.guidance > 1 else 0
            groups = [group.expand(seeds) for group in conditions.groups]
            subjects = bind(encoder, encoder.encode(conditions.features), groups, model.alpha, first)
        with attention(base.unet, subjects, model.method):
            out = pipeline_for_samples(base.pipeline)(
                **text,
                height=height,
                width=width,
                latents=latents.to(conditions.text),
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                output_type="latent",
            ).images
    return decode(base.vae, out)


def pipeline_for_samples(pipeline: Any) -> Any:
    """The pipeline with its scheduler's own copy, and no progress bar inside the run's."""
    scheduler = pipeline.scheduler
    # Of DDPM's thousand steps no few can be taken.
    kind = DDIMScheduler if isinstance(scheduler, DDPMScheduler) else type(scheduler)
    own = copy.copy(pipeline)
    own.scheduler = kind.from_config(scheduler.config)
    own.set_progress_bar_config(disable=True)
    return own


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> pictures (B, H, W, 3) in 0..1, on the CPU."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    pictures = [vae.decode(row[None].to(vae.dtype) / vae.config.scaling_factor + shift).sample[0] for row in latents]
    return (torch.stack(pictures) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu()


def show_batch(batch: Batch, path: Path) -> None:
    """Writes a batch as a picture: a row per example, references then target (with its mask's outside darkened)."""
    size = (batch.targets.shape[1], batch.targets.shape[2])
    views = [[] for _ in batch.targets]  # type: list[list[Tensor]]
    for group in batch.groups:
        for slot in group.slots:
            for row, own in enumerate(slot.views.tolist(), group.rows[0]):
                views[row] += [_fitted(batch.references[i], size) for i in own if i >= 0]
    columns = max(1, max(map(len, views)))
    cells: list[Tensor] = []
    for row, target in enumerate(batch.targets):
        if batch.weights is not None:
            weight = batch.weights[row]
            target = target * (0.4 + 0.6 * weight / weight.max())[..., None]
        cells += [*views[row], *[torch.ones(*size, 3)] * (columns - len(views[row])), target]
    _write_grid(cells, columns + 1, path)


def _write_grid(cells: Sequence[Tensor], columns: int, path: Path) -> Tensor:
    """Writes pictures (H, W, 3) side by side; returns the grid (3, H', W') in 0..1."""
    grid = make_grid(torch.stack(list(cells)).permute(0, 3, 1, 2), nrow=columns, padding=4, pad_value=1.0).clamp(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(grid).save(path)
    return grid


def _fitted(view: Tensor, size: Sequence[int]) -> Tensor:
    """(S, S, 3) -> (H, W, 3)."""
    return F.interpolate(view.permute(2, 0, 1)[None], size=tuple(size), mode="bilinear", antialias=True)[0].permute(
        1, 2, 0
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
