"""One training loop for the frozen parts of the small world: resumable, with EMA, on accelerate."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import AutocastKwargs
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from nested_core.files import whole
from nested_core.training.precision import fastest, mixed

#: draw(generator of this step's choices) -> the choices as tensors of the same shapes in every step
Draw = Callable[[random.Random], Sequence[Tensor]]
#: loss(*choices) -> (loss, what to log). What it draws itself is torch's; it waits for nothing and copies nothing to
#: the device, so that it can be recorded as a CUDA graph.
Loss = Callable[..., tuple[Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Recipe:
    """How a module is trained."""

    steps: int
    lr: float
    seed: int
    ema: float = 0.999
    weight_decay: float = 0.01
    warmup: int = 100


class _Training:
    """What a training has besides the module: all of it is saved, and comes back from `path`."""

    def __init__(self, module: nn.Module, recipe: Recipe, path: Path) -> None:
        self.module, self.path, self.step, self.seconds = module, path, 0, 0.0
        device = PartialState().device
        captured = device.type == "cuda"
        self.accelerator = Accelerator(mixed_precision=mixed(fastest(device)))
        self.graph: torch.cuda.CUDAGraph | None = None
        lr = torch.tensor(recipe.lr, device=device) if captured else recipe.lr
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.99), capturable=captured
        )
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=recipe.warmup, num_training_steps=recipe.steps)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(
            module.to(device, memory_format=torch.channels_last), optimizer, schedule
        )
        self.average = EMAModel(self.model.parameters(), decay=recipe.ema, use_ema_warmup=True, power=0.75,
                                foreach=True)  # fmt: skip
        self.average.to(device)
        self._parts = {"module": module, "optimizer": self.optimizer, "schedule": self.schedule, "ema": self.average}
        if path.is_file():
            state = torch.load(path, map_location=device, weights_only=True)
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts.items()}
        with whole(self.path) as part:
            torch.save({**state, "step": self.step, "seconds": self.seconds}, part)

    def advance(self, loss: Loss, draw: Draw, rng: random.Random) -> dict[str, Tensor]:
        """One step; what is to be logged of it."""
        torch.manual_seed(rng.getrandbits(48))
        drawn = [part.to(self.accelerator.device) for part in draw(rng)]
        figures = self._update(loss, drawn) if self.accelerator.device.type == "cpu" else self._replay(loss, drawn)
        self.schedule.step()
        self.average.step(self.model.parameters())
        self.step += 1
        return figures

    def _update(self, loss: Loss, drawn: Sequence[Tensor], cached: bool = True) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=cached)):
            value, figures = loss(*drawn)
        self.accelerator.backward(value)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": value.detach(), **figures}

    def _replay(self, loss: Loss, drawn: Sequence[Tensor]) -> dict[str, Tensor]:
        """`_update`, recorded as a CUDA graph in the first step.

        A small model's step is a thousand kernels that take less time than their start from Python.
        """
        if self.graph is None:
            self.drawn = [part.clone() for part in drawn]
            self._warm_up(loss)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.figures = self._update(loss, self.drawn, cached=False)
        for held, part in zip(self.drawn, drawn, strict=True):
            held.copy_(part)
        self.graph.replay()
        return {name: figure.clone() for name, figure in self.figures.items()}

    def _warm_up(self, loss: Loss) -> None:
        """Makes what is made once, as CUDA graphs ask for, and puts everything back."""
        kept = [part.clone() for part in self._state()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._update(loss, self.drawn, cached=False)
        torch.cuda.current_stream().wait_stream(side)
        for i, part in enumerate(self._state()):  # an optimiser's state comes with its first step
            part.copy_(kept[i]) if i < len(kept) else part.zero_()

    def _state(self) -> list[Tensor]:
        """Weights, buffers, and what the optimiser keeps of each."""
        own = [part.data for part in (*self.model.parameters(), *self.model.buffers())]
        states = self.optimizer.optimizer.state.values()
        return [*own, *(part for state in states for part in state.values() if isinstance(part, Tensor))]


def fit(
    name: str,
    folder: Path,
    module: nn.Module,
    loss: Loss,
    draw: Draw,
    recipe: Recipe,
    *,
    log: Callable[[str], None] = print,
    note: Callable[[int], dict[str, float]] | None = None,
    note_every: int = 1000,
) -> nn.Module:
    """Trains `module` and leaves the averaged weights in it; returns it in eval mode. It is saved every two minutes.

    Each step's choices come from its own generator, so a resumed run goes on as if it had not stopped. `note` is
    called with the averaged weights in place every `note_every` steps, for figures on unseen pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # CPUs take a hundred times longer over them, and a young network has many
    training = _Training(module, recipe, folder / f"{name}.pt")
    begun, steps = training.step, recipe.steps
    training.model.train()
    bar = tqdm(total=steps, initial=begun, desc=name, mininterval=5)
    shown: dict[str, Tensor] = {}
    saved = last = time.monotonic()
    for step in range(begun, steps):
        for key, figure in training.advance(loss, draw, random.Random(f"{name} {recipe.seed} {step}")).items():
            shown[key] = shown.get(key, figure) * 0.98 + figure * 0.02
        now = time.monotonic()
        training.seconds, last = training.seconds + now - last, now
        bar.update()
        if step % 20 == 0:
            bar.set_postfix_str(_text(shown), refresh=False)
        if (step + 1) % note_every == 0 or step + 1 == steps:
            figures: dict[str, Tensor | float] = {**shown}
            if note:
                figures |= _averaged(training.average, training.model, lambda done=step + 1: note(done))
            log(f"{name} step {step + 1} of {steps}, {training.seconds / 60:.1f} min: {_text(figures)}")
            last = time.monotonic()
        if now - saved > 120:
            training.save()
            saved = now
    bar.close()
    if begun < steps:
        training.save()
    training.average.copy_to(training.model.parameters())
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


def _text(figures: Mapping[str, Tensor | float]) -> str:
    return ", ".join(f"{key} {float(figure):.4g}" for key, figure in figures.items())
