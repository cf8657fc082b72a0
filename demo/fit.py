"""One training loop for the frozen parts of the small world: resumable, with EMA, on accelerate."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from nested_core.files import whole

#: loss(generator of this step's choices) -> (loss, what to log)
Loss = Callable[[random.Random], tuple[Tensor, dict[str, float]]]


def fit(
    name: str,
    folder: Path,
    module: nn.Module,
    loss: Loss,
    steps: int,
    *,
    lr: float,
    seed: int,
    ema: float = 0.999,
    weight_decay: float = 0.01,
    warmup: int = 100,
    save_every: float = 120.0,
    log: Callable[[str], None] = print,
    note: Callable[[int], dict[str, float]] | None = None,
    note_every: int = 1000,
) -> nn.Module:
    """Trains `module` for `steps` steps and leaves the averaged weights in it; returns it in eval mode.

    Each step's choices come from its own generator, so a resumed run goes on as if it had not stopped. `note` is
    called with the averaged weights in place every `note_every` steps, for figures on unseen pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # CPUs take a hundred times longer over them, and a young network has many
    path = folder / f"{name}.pt"
    accelerator = Accelerator(mixed_precision="bf16")
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    model, optimizer, schedule = accelerator.prepare(
        module.to(accelerator.device, memory_format=torch.channels_last), optimizer, schedule
    )
    average = EMAModel(model.parameters(), decay=ema, use_ema_warmup=True, power=0.75)
    average.to(accelerator.device)
    begun, spent = 0, 0.0
    if path.is_file():
        state = torch.load(path, map_location=accelerator.device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average.load_state_dict(state["ema"])
        begun, spent = state["step"], state["seconds"]

    def save(step: int) -> None:
        state: dict[str, Any] = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        state |= {"schedule": schedule.state_dict(), "ema": average.state_dict(), "seconds": spent}
        with whole(path) as part:
            torch.save(state, part)

    model.train()
    bar = tqdm(total=steps, initial=begun, desc=name, mininterval=5)
    shown: dict[str, float] = {}
    saved = last = time.monotonic()
    for step in range(begun, steps):
        rng = random.Random(f"{name} {seed} {step}")
        torch.manual_seed(rng.getrandbits(48))
        with accelerator.autocast():
            value, figures = loss(rng)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        for key, figure in {"loss": float(value.detach()), **figures}.items():
            shown[key] = shown.get(key, figure) * 0.98 + figure * 0.02
        now = time.monotonic()
        spent, last = spent + now - last, now
        bar.update()
        if step % 20 == 0:
            bar.set_postfix_str(_text(shown), refresh=False)
        if (step + 1) % note_every == 0 or step + 1 == steps:
            figures = dict(shown)
            if note:
                figures |= _averaged(average, model, lambda done=step + 1: note(done))
            log(f"{name} step {step + 1} of {steps}, {spent / 60:.1f} min: {_text(figures)}")
            last = time.monotonic()
        if now - saved > save_every:
            save(step + 1)
            saved = now
    bar.close()
    if begun < steps:
        save(steps)
    average.copy_to(model.parameters())
    return module.eval().requires_grad_(False)


def _averaged(average: EMAModel, model: nn.Module, call: Callable[[], dict[str, float]]) -> dict[str, float]:
    average.store(model.parameters())
    average.copy_to(model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            return call()
    finally:
        average.restore(model.parameters())
        model.train()


def _text(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {figure:.4g}" for key, figure in figures.items())
