"""Held-out subjects: how well their pictures are denoised, and how much of that is because of the subject.

What Check Encoder measures (`nested_core.check`), at its noise levels and with its noise, which depends on a picture's
name alone: so the numbers of two runs on one base model and one set of subjects can be compared.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from ..check.search import LEAST_PHOTOS, LEVELS, Race, noise_of
from ..check.settings import Settings, settings_of
from ..check.statistics import interval
from ..encoder import EncoderConfig
from ..errors import NestedAttentionError
from ..files import few
from .config import LossConfig, ValidationConfig
from .data import SubjectData
from .examples import Draws, Example, rng_of
from .objective import target_of

if TYPE_CHECKING:
    from .loop import Run

#: Examples of each held-out subject, by its name
HeldOut = Mapping[str, Sequence[Example]]


class Part:
    """Some of a data set's examples."""

    def __init__(self, data: SubjectData, indexes: Sequence[int]) -> None:
        self.data, self.indexes = data, list(indexes)

    def __len__(self) -> int:
        return len(self.indexes)

    def __repr__(self) -> str:
        return f"{len(self)} of {self.data!r}; the others show held-out subjects"

    def draw(self, index: int, rng: random.Random) -> Example:
        """As the data set's own."""
        return self.data.draw(self.indexes[index], rng)


def from_files(data: Any) -> TypeGuard[SubjectData | Part]:
    """Whether a data set is one of folders and shards, or a part of it."""
    return isinstance(data, SubjectData | Part)


def held_out(names: Sequence[str], options: ValidationConfig) -> list[str]:
    """Which subjects are held out: those that are named, and a share of all, chosen by name alone.

    So a subject stays what it is when others come, and in every run. Of a share there are two at least.

    Raises NestedAttentionError for a name that no subject has.
    """
    if unknown := sorted(set(options.subjects) - set(names)):
        raise NestedAttentionError(
            f"validation.subjects names {few(unknown)}, but there is no such subject. There are "
            f"{few(sorted(names), 10)}."
        )
    chances = {name: rng_of("held out", name).random() for name in names}
    by_chance = sorted(names, key=chances.__getitem__)
    count = sum(chance < options.share for chance in chances.values())
    drawn = by_chance[: max(count, 2)] if options.share else []
    return sorted({*options.subjects, *drawn})


def split(data: SubjectData, options: ValidationConfig) -> tuple[SubjectData | Part, HeldOut]:
    """What is trained on, and what is held out. A picture with a held-out subject in it is not trained on.

    Raises NestedAttentionError: an unknown name; fewer than two held-out subjects with a picture of their own; nothing
    is left to train on.
    """
    if not options.wanted:
        return data, {}
    names = set(held_out(sorted(data.views), options))
    kept = [i for i, picture in enumerate(data.pictures) if not names & set(picture.subjects.values())]
    # Whatever a run does to its pictures, these are shown alike.
    plain = copy.copy(data)
    plain.config = replace(data.config, crop="centre", flip=0.0, augment=0.0, vary_references=False)
    found: dict[str, list[Example]] = {}
    for index, picture in enumerate(data.pictures):
        name = next(iter(picture.subjects.values()))
        own = found.setdefault(name, []) if name in names and len(picture.subjects) == 1 else None
        if own is not None and len(own) < options.pictures:
            own.append(plain.draw(index, rng_of("validation", picture.sample.name)))
    if len(found) < 2 or not kept:
        raise NestedAttentionError(
            f"Held out are {few(sorted(names), 10)}, of which {len(found)} have captioned pictures of their own, and "
            f"{len(kept)} pictures are left to train on. Expected two or more, so that one can be shown another's "
            "photo, and something to train on: change validation.share or validation.subjects."
        )
    return Part(data, kept), found


@dataclass(frozen=True)
class Validation:
    """Of one step.

    loss: the mean squared error of the U-Net's prediction. gain: by what share of itself the subject lowers it. own: by
    how much more than another subject's photo does. gain_low, own_low: above which they are with 97.5 % certainty, as
    far as the held-out subjects speak for others; None for fewer than three.
    """

    loss: float
    gain: float
    own: float
    gain_low: float | None = None
    own_low: float | None = None

    def figures(self) -> dict[str, float]:
        """For the log."""
        return {f"validation_{name}": value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        def with_low(value: float, low: float | None) -> str:
            return f"{value:+.2%}" + ("" if low is None else f" (surely above {low:+.2%})")

        return (
            f"validation: loss {self.loss:.5f}; gap to no subject {with_low(self.gain, self.gain_low)}, to another "
            f"subject's photo {with_low(self.own, self.own_low)}"
        )


class Validator:
    """Measures an encoder on held-out subjects; what it is without a subject is measured once."""

    def __init__(self, run: Run, subjects: HeldOut) -> None:
        self.bench = HeldOutBench(run, subjects)
        self.race: Race | None = None

    def measure(self) -> Validation:
        """The encoder as it is now, in all processes together."""
        race = self.race = self.race or Race(self.bench)
        settings = settings_of(self.bench.config)
        losses = race.row(settings, range(len(LEVELS)))
        gain, own = (1 - losses).mean(1), (race.of_others(settings) - losses).mean(1)
        lows = [interval(each)[0] if len(each) >= LEAST_PHOTOS else None for each in (gain, own)]
        self.bench.run.model.subjects.clear()
        return Validation(float((losses * race.nothing).mean()), float(gain.mean()), float(own.mean()), *lows)


class HeldOutBench:
    """The losses of held-out subjects' pictures: a `check.search.Bench` whose photos are the subjects.

    Row by row, so that the numbers do not depend on how many processes share the work.
    """

    def __init__(self, run: Run, subjects: HeldOut) -> None:
        self.run, self.names = run, list(subjects)
        size, fit = run.base.vision.image_size, run.config.data.fit
        # Of one example: its references as the tower sees them.
        self.examples = [
            [Draws([example], 0, LossConfig(drop_text=0), size, fit)[0] for example in examples]
            for examples in subjects.values()
        ]
        self._latents: dict[tuple[int, int], Tensor] = {}

    @property
    def config(self) -> EncoderConfig:
        return self.run.model.encoder.config

    @property
    def photos(self) -> int:
        return len(self.examples)

    def losses(self, settings: Settings | None, shown: Sequence[int], level: float) -> list[float]:
        """As `Bench.losses`, of the U-Net's prediction: at one level its share is that of the estimate's."""
        accelerator = self.run.accelerator
        losses = torch.zeros(self.photos, device=accelerator.device)
        for subject in range(accelerator.process_index, self.photos, accelerator.num_processes):
            other = None if settings is None else shown[subject]
            own = [self._loss(subject, number, other, level) for number in range(len(self.examples[subject]))]
            losses[subject] = torch.stack(own).mean()
        found: list[float] = accelerator.reduce(losses, "sum").tolist()
        if not all(map(math.isfinite, found)):
            broken = [name for name, loss in zip(self.names, found, strict=True) if not math.isfinite(loss)]
            raise NestedAttentionError(
                f"The validation loss of {few(broken)} is not a number: the models overflow their type, or the "
                'training has diverged. Use precision "bf16" or "fp32", or lower rates from an earlier checkpoint.'
            )
        return found

    @torch.no_grad()
    def _loss(self, subject: int, number: int, other: int | None, level: float) -> Tensor:
        run, scheduler = self.run, self.run.noise
        example = self.examples[subject][number]
        batch = run.collate([example if other == subject else self._seeing(example, other)])
        if (subject, number) not in self._latents:
            self._latents[subject, number] = run.frozen.latents(batch)
        clean = self._latents[subject, number]
        seed = rng_of("noise of", self.names[subject], number).randrange(100_003)
        noise = noise_of(clean.shape, seed, level).to(clean)
        time = torch.tensor([round((1 - level) * (scheduler.config["num_train_timesteps"] - 1))], device=clean.device)
        conditions = run.frozen.conditions(batch)
        with run.accelerator.autocast():
            out = run.model(scheduler.add_noise(clean, noise, time), time, conditions)
        return (out.float() - target_of(scheduler, clean, noise, time).float()).square().mean()

    def _seeing(self, example: Example, other: int | None) -> Example:
        """The example with another subject's references; None: with no subject, but its class word."""
        references: Any = () if other is None else self.examples[other][0].subjects[0].references
        return replace(example, subjects=[replace(s, references=references) for s in example.subjects])
