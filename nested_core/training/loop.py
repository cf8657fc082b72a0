"""The training loop: the paper's recipe on accelerate, diffusers' schedulers and EMA.

for each step: x0 = VAE(target); x_t = noised; predict with the subjects bound; weighted squared error; AdamW.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from ..errors import NestedAttentionError
from ..files import PRECISIONS, few
from . import checkpoints
from .base import BaseModel, load_base
from .config import TrainingConfig
from .costs import memory_of, unet_costs
from .data import SubjectData
from .examples import Batch, Collate, Draws, Example, rng_of
from .export import export
from .frozen import FrozenEncoders, make_cache
from .initial import make_encoder
from .journal import Callback, Journal
from .model import SubjectDenoiser
from .objective import denoising_loss, make_optimiser
from .parallel import check_launched, check_workers, compiled, heap_left_alone
from .precision import mixed, settled
from .provenance import trained_on
from .samples import write_samples
from .validation import HeldOut, Validation, Validator, split

log = logging.getLogger(__name__)


class Positions(Sampler[list[int]]):
    """Batches of positions of the run, from `start` on: those of this process."""

    def __init__(self, start: int, passes: int, batch_size: int, process: int = 0, processes: int = 1) -> None:
        self.start, self.passes, self.batch_size = start, passes, batch_size
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return self.passes

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.passes):
            first = self.start + (number * self.processes + self.process) * self.batch_size
            yield list(range(first, first + self.batch_size))


@dataclass
class Run:
    """What a run is made of, ready to train or to be described."""

    config: TrainingConfig
    accelerator: Accelerator
    base: BaseModel
    draws: Draws
    collate: Collate
    frozen: FrozenEncoders
    model: SubjectDenoiser
    noise: Any
    held_out: HeldOut


@contextmanager
def accelerated(config: TrainingConfig) -> Iterator[Accelerator]:
    """accelerate, set up for this config; several runs in one process may differ in precision."""
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        mixed_precision=mixed(config.precision),
        gradient_accumulation_steps=config.accumulation,
        cpu=config.cpu,
        log_with=None if config.tracker == "none" else config.tracker,
        # Gradients are seen where they are summed up: with buckets of their own they would be there twice.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        project_config=ProjectConfiguration(project_dir=config.output, logging_dir=config.output),
    )
    try:
        yield accelerator
    finally:
        accelerator.end_training()
        accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=False)


def noise_generator(seed: int, position: int) -> torch.Generator:
    """Of the noise and the timestep of the example at a position of the run."""
    return torch.Generator().manual_seed(rng_of(seed, "noise", position).getrandbits(63))


def frozen_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """The type of the frozen weights: what the config says, else the precision's, but fp32 on a CPU."""
    if config.base.dtype != "auto":
        return getattr(torch, config.base.dtype)
    return torch.float32 if device.type == "cpu" else PRECISIONS[config.precision]


def prepare(
    config: TrainingConfig,
    accelerator: Accelerator,
    base: BaseModel | None,
    data: Any | None,
    validation: Sequence[Example] = (),
) -> Run:
    """Loads what is not given, puts it on the device, makes the encoder."""
    set_seed(config.seed)
    device = accelerator.device
    dtype = frozen_dtype(config, device)
    base = base or load_base(config.base, dtype)
    data = SubjectData(config.data) if data is None else data
    if base.unet.dtype != dtype:
        base.unet.to(dtype=dtype)
    for part in (base.unet, base.vae, *base.text_encoders, base.vision):
        part.to(device)
    encoder = make_encoder(config.encoder, config.init, base, config.seed)
    collate = Collate(base.tokenizers, config.loss.mask_weight, base.vision.image_size)
    if isinstance(data, SubjectData):
        for caption in data.captions():
            collate.read(caption)  # finds words beyond what the text encoder reads before the first step
        data, held_out = split(data, config.validation)
    else:
        held_out = held_out_of(validation, config)
    cache = make_cache(config.cache, config.cache_gb, Path(config.output) / "cache")
    size = base.vision.image_size
    return Run(
        config=config,
        accelerator=accelerator,
        base=base,
        draws=Draws(data, config.seed, config.loss, size, config.data.fit),
        collate=collate,
        frozen=FrozenEncoders(base, device, dtype, config.encoder.image_features, cache),
        model=SubjectDenoiser(encoder, base.unet, config.encoder.method, config.encoder.learn_alpha),
        noise=DDPMScheduler.from_config(base.scheduler.config),
        held_out=held_out,
    )


def held_out_of(examples: Sequence[Example], config: TrainingConfig) -> HeldOut:
    """Held-out subjects of a data set that was given: one per example.

    Raises NestedAttentionError: fewer than two; one without a subject or with several; a share is to be chosen.
    """
    if config.validation.wanted:
        raise NestedAttentionError(
            "validation.share and validation.subjects choose from data.folders and data.shards; here a data set was "
            "given. Give train() the held-out examples, as `validation`."
        )
    wrong = [example.name or str(i) for i, example in enumerate(examples) if len(example.subjects) != 1]
    if wrong or len(examples) == 1:
        raise NestedAttentionError(
            f"`validation` has {len(examples)} example(s); expected two or more, each of one subject, so that one can "
            f"be shown another's photo. Not of one subject: {few(wrong) or 'none'}."
        )
    return {f"{i} {example.name}".strip(): [example] for i, example in enumerate(examples)}


def train(
    config: TrainingConfig,
    base: BaseModel | None = None,
    data: Any | None = None,
    callback: Callback | None = None,
    validation: Sequence[Example] = (),
) -> Path:
    """Trains an encoder and returns the exported file, `config.output`/encoder.safetensors.

    Args:
        config: the run.
        base: the frozen models; None loads what `config.base` names.
        data: a map-style data set of `Example`s, or `RandomExamples`; None reads what `config.data` names.
        callback: is given each log entry: step, loss, rates, gradient norm, examples per second and so on; and those of
            validations, which have step and their figures.
        validation: where `data` is given, an example of each held-out subject, one subject in each.

    Raises NestedAttentionError for whatever does not fit, before the first step where possible.
    """
    check_launched()
    resume = checkpoints.agreed_resume(config)
    config = settled(config, resume)
    with accelerated(config) as accelerator, checkpoints.loss_of_a_process_told(accelerator, config):
        run = prepare(config, accelerator, base, data, validation)
        if config.gradient_checkpointing:
            run.base.unet.enable_gradient_checkpointing()
        try:
            with run.model.attached(), compiled(run.base.unet, config.compile):
                return Trainer(run, callback).train(resume)
        finally:
            if config.gradient_checkpointing:
                run.base.unet.disable_gradient_checkpointing()


class Trainer:
    """Steps, logs, checkpoints, sample grids and exports of a run."""

    def __init__(self, run: Run, callback: Callback | None = None) -> None:
        self.run, self.config, self.accelerator, self.callback = run, run.config, run.accelerator, callback
        config, options = run.config, run.config.optimiser
        run.model.to(self.accelerator.device)
        self.parameters = [p for p in run.model.parameters() if p.requires_grad]
        self.ema = EMAModel(self.parameters, decay=options.ema) if options.ema else None
        optimiser = make_optimiser(run.model, options, self.accelerator.num_processes)
        names = {"constant": "constant_with_warmup"}
        self.schedule = get_scheduler(
            names.get(options.schedule, options.schedule),
            optimiser,
            num_warmup_steps=options.warmup,
            num_training_steps=config.steps,
        )
        # The schedule stays ours: accelerate would step it once per process.
        self.model, self.optimiser = self.accelerator.prepare(run.model, optimiser)
        self.accelerator.register_for_checkpointing(self.schedule)
        if self.ema:
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)
        self.validator = Validator(run, run.held_out) if run.held_out else None
        self.step = self.samples = 0
        self.forecast: float | None = None
        self.grad_norm: Tensor | None = None

    def train(self, resume: Path | None) -> Path:
        """All the steps that are left; returns the exported file."""
        config, accelerator = self.config, self.accelerator
        output = Path(config.output)
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            (output / "config.json").write_text(json.dumps(asdict(config), indent=2), "utf-8")
        accelerator.wait_for_everyone()
        checkpoints.check_shared(config, accelerator)
        if config.tracker != "none":
            accelerator.init_trackers("logs")
        if resume is not None:
            self.step, self.samples = checkpoints.load(accelerator, config, resume)
            if self.ema:
                self.ema.to(accelerator.device)  # accelerate loads what is registered on the CPU
            log.info("going on from %s", resume)
        begun = saved = self.step
        self.journal = Journal(accelerator, output, range(begun, config.steps), self.callback)
        if self.validator and not begun:
            self._validate()  # where the curve begins
        for _ in self._steps():
            if config.save_every and self.step % config.save_every == 0:
                saved = self.step
                self._save()
            if config.samples.every and self.step % config.samples.every == 0:
                self._write_samples()
        if saved != self.step:
            self._save()
        if config.samples.every and self.step > begun and self.step % config.samples.every:
            self._write_samples()
        path = output / "encoder.safetensors"
        if saved == self.step and not path.exists():
            self._export()
        return path

    def _steps(self) -> Iterator[None]:
        """Takes the steps that are left, and comes back after each."""
        config, accelerator = self.config, self.accelerator
        check_workers(accelerator, config.workers)
        passes = (config.steps - self.step) * config.accumulation
        batches = DataLoader(
            self.run.draws,
            batch_sampler=Positions(
                self.samples, passes, config.batch_size, accelerator.process_index, accelerator.num_processes
            ),
            collate_fn=self.run.collate,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
        )
        bar = tqdm(total=config.steps, initial=self.step, disable=not accelerator.is_main_process, desc="steps")
        journal = self.journal
        with bar, heap_left_alone(config.workers > 0):
            for batch in batches:
                loss = self._pass(batch)
                self.samples += config.batch_size * accelerator.num_processes
                journal.add(loss, config.batch_size, batch.rows_with_subjects)
                if not accelerator.sync_gradients:
                    continue
                self.step += 1
                bar.update()
                if self.step % config.log_every == 0 or self.step == config.steps:
                    entry = journal.write(self.step, float(self.schedule.get_last_lr()[-1]), self.grad_norm)
                    bar.set_postfix(loss=f"{entry['loss']:.4f}")
                    self._compare_memory(entry)
                yield

    def _pass(self, batch: Batch) -> Tensor:
        """One batch forward and backward, and the optimiser's step where it is due. Returns the loss, detached."""
        accelerator, options = self.accelerator, self.config.optimiser
        conditions = self.run.frozen.conditions(batch)
        latents = self.run.frozen.latents(batch)
        # By position, not by process: so it is the same however many processes share the work.
        generators = [noise_generator(self.config.seed, position) for position in batch.positions]
        with accelerator.accumulate(self.model):
            loss = denoising_loss(
                lambda noisy, times: self.model(noisy, times, conditions),
                self.run.noise, latents, generators, self.config.loss, batch.weights,
            )  # fmt: skip
            accelerator.backward(loss)
            if accelerator.sync_gradients and options.max_grad_norm:
                self.grad_norm = accelerator.clip_grad_norm_(self.parameters, options.max_grad_norm)
            self.optimiser.step()
            self.optimiser.zero_grad()
            if accelerator.sync_gradients:
                if not self.optimiser.step_was_skipped:  # fp16: gradients that overflowed
                    self.schedule.step()
                if self.ema:
                    self.ema.step(self.parameters)
        return loss.detach()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While it is entered, the weights are the averaged ones, where there are such."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _compare_memory(self, entry: dict[str, float]) -> None:
        """Once a run: what the dry run would have said of the memory, beside what it is."""
        if self.forecast is None and self.accelerator.is_main_process:
            self.forecast = sum(memory_of(self.run, unet_costs(self.run)).values()) / 1e9
            log.info("memory: %.2f GB; the forecast was %.2f GB", entry["memory_gb"], self.forecast)

    def _validate(self) -> Validation:
        """The averaged weights on the held-out subjects, in all processes together; logged."""
        assert self.validator is not None
        with self.averaged():
            found = self.validator.measure()
        self.journal.note({"step": self.step, **found.figures()})
        if self.accelerator.is_main_process:
            log.info("step %d, %s", self.step, found)
        return found

    def _save(self) -> None:
        said: dict[str, Any] = {}
        if self.validator:
            said = {"subjects": list(self.run.held_out), **self._validate().figures()}
        best = checkpoints.save(self.accelerator, self.config, self.step, self.samples, said)
        self._export()
        if best:
            self._export("encoder-best.safetensors")

    def _export(self, name: str = "encoder.safetensors") -> None:
        if self.accelerator.is_main_process:
            with self.averaged():
                trained = trained_on(self.run, self.step, self.samples)
                export(Path(self.config.output) / name, self.run.model, trained)

    def _write_samples(self) -> None:
        if self.accelerator.is_main_process:
            with self.averaged():
                write_samples(self.run, self.step)
        self.accelerator.wait_for_everyone()
