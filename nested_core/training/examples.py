"""A training example, and how examples become batches: drawn by position, prompts read, rows sorted by subjects.

Everything random about an example is a function of the run's seed and of its position in the run. So the order of the
data needs no state of its own: a resumed run continues at its position.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import NestedAttentionError
from ..images import prepare
from ..prompt import Placeholder, PromptReader, locate
from .config import LossConfig

# A data set longer than this (a generated one) is drawn from with replacement: no list of its order is made.
_LONGEST_ORDER = 10_000_000


@dataclass(frozen=True)
class ExampleSubject:
    """A subject of an example.

    placeholder: the word in the prompt. class_word: what the text encoder reads instead (of no meaning for a plain
    word, which reads as itself). references: pictures of it, each (H, W, 3), or (H, W, 4) with an alpha channel that
    is its mask; float, 0..1.
    """

    placeholder: str
    class_word: str
    references: Sequence[Tensor]


@dataclass(frozen=True)
class Example:
    """What one row of a batch is made of.

    target: the picture (H, W, 3), float, 0..1; the same size throughout a data set. prompt: its caption, with
    placeholders. subjects: none, one or several. mask: (H, W), 1 where the loss counts more, or None. original_size
    (height, width) and crop (top, left) are SDXL's conditions: of the target before it was resized and cropped.
    latents: what the VAE makes of the target, scaled (C, h, w), where that is known already. name: for messages.
    position: in the run, where it was drawn for one.
    """

    target: Tensor
    prompt: str
    subjects: Sequence[ExampleSubject] = ()
    mask: Tensor | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    latents: Tensor | None = None
    position: int = 0
    name: str = ""


@runtime_checkable
class RandomExamples(Protocol):
    """A data set whose examples vary: `draw` decides everything random with the generator that it is given.

    A plain map-style data set (`__len__` and `__getitem__`) of `Example`s will do too.
    """

    def __len__(self) -> int: ...

    def draw(self, index: int, rng: random.Random) -> Example: ...


@dataclass(frozen=True)
class Slot:
    """The i-th subject of each row of a group.

    places (rows, P), on the text axis, and views (rows, V), indexes into the batch's references: int64, -1 fills up.
    full: no view is -1.
    """

    places: Tensor
    views: Tensor
    full: bool


@dataclass(frozen=True)
class Group:
    """Rows from start to before stop, each with as many subjects as there are slots."""

    rows: tuple[int, int]
    slots: tuple[Slot, ...]

    def to(self, device: torch.device) -> Group:
        """This group with its indexes on a device."""
        slots = (Slot(slot.places.to(device), slot.views.to(device), slot.full) for slot in self.slots)
        return Group(self.rows, tuple(slots))

    def expand(self, count: int) -> Group:
        """This group of one row as `count` equal rows, the first of a batch."""
        slots = (Slot(s.places.expand(count, -1), s.views.expand(count, -1), s.full) for s in self.slots)
        return Group((0, count), tuple(slots))


@dataclass
class Batch:
    """Rows sorted by their number of subjects.

    targets (B, H, W, 3); prompts as the text encoder reads them; references (R, S, S, 3), what the vision tower is
    shown; groups: who is bound where; weights (B, H, W) of the loss or None; time_ids (B, 6), SDXL's conditions;
    latents (B, C, h, w) where the examples have them; positions of the rows in the run.
    """

    targets: Tensor
    prompts: list[str]
    references: Tensor
    groups: tuple[Group, ...]
    weights: Tensor | None
    time_ids: Tensor
    latents: Tensor | None = None
    positions: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def rows_with_subjects(self) -> int:
        """How many rows have a subject."""
        return sum(stop - start for start, stop in (group.rows for group in self.groups))


def rng_of(*key: object) -> random.Random:
    """A generator of its own for everything that this key names."""
    return random.Random(hashlib.sha256(repr(key).encode()).digest())


class Draws(torch.utils.data.Dataset[Example]):
    """The examples of a run by position: epoch after epoch, each in an order of its own.

    Drops conditions and makes the references the squares that the vision tower sees.
    """

    def __init__(self, data: Any, seed: int, loss: LossConfig, image_size: int, fit: str = "crop") -> None:
        if not len(data):
            raise NestedAttentionError("The data set is empty.")
        self.data, self.seed, self.loss, self.image_size, self.fit = data, seed, loss, image_size, fit
        self._epoch: tuple[int, list[int]] = (-1, [])

    def index(self, position: int) -> int:
        """Which example of the data set stands at a position of the run."""
        if len(self.data) > _LONGEST_ORDER:
            return rng_of(self.seed, "index", position).randrange(len(self.data))
        epoch, offset = divmod(position, len(self.data))
        if self._epoch[0] != epoch:
            order = list(range(len(self.data)))
            rng_of(self.seed, "epoch", epoch).shuffle(order)
            self._epoch = (epoch, order)
        return self._epoch[1][offset]

    def __getitem__(self, position: int) -> Example:
        index, rng = self.index(position), rng_of(self.seed, "example", position)
        example = self.data.draw(index, rng) if isinstance(self.data, RandomExamples) else self.data[index]
        return replace(self._show(self._drop(example, rng)), position=position)

    def undropped(self) -> Draws:
        """The same examples with all their conditions."""
        return Draws(self.data, self.seed, LossConfig(drop_text=0), self.image_size, self.fit)

    def _drop(self, example: Example, rng: random.Random) -> Example:
        loss, chance = self.loss, rng.random()
        if chance < loss.drop_both:
            return replace(example, prompt="", subjects=())
        if chance < loss.drop_both + loss.drop_text and example.subjects:
            example = replace(example, prompt=" ".join(subject.placeholder for subject in example.subjects))
        # All the placeholders are read, bound or not: an unbound subject has no references.
        dropped = [rng.random() < loss.drop_subject for _ in example.subjects]
        kept = (replace(s, references=()) if drop else s for s, drop in zip(example.subjects, dropped, strict=True))
        return replace(example, subjects=tuple(kept))

    def _show(self, example: Example) -> Example:
        """The example with its references as the squares that the vision tower is shown."""

        def shown(subject: ExampleSubject) -> ExampleSubject:
            views = [prepare(view[None], None, self.fit, self.image_size)[0] for view in subject.references]
            return replace(subject, references=views)

        return replace(example, subjects=tuple(shown(subject) for subject in example.subjects))


class Collate:
    """Examples -> `Batch`. `tokenizers` are the base model's; both of SDXL's see the prompt."""

    def __init__(self, tokenizers: Sequence[Any], mask_weight: float = 1.0, image_size: int = 224) -> None:
        self.tokenizers, self.mask_weight, self.image_size = tokenizers, mask_weight, image_size
        self._places: dict[tuple[Any, ...], tuple[str, dict[str, list[int]]]] = {}

    def read(self, example: Example) -> tuple[str, dict[str, list[int]]]:
        """The prompt as the text encoder reads it, and the rows of each placeholder on the text axis.

        Raises NestedAttentionError: a subject is not mentioned, or only beyond what the text encoder reads.
        """
        key = (example.prompt, *((s.placeholder, s.class_word) for s in example.subjects))
        if key not in self._places:
            if len(self._places) > 100_000:
                self._places.clear()
            self._places[key] = self._read(example)
        return self._places[key]

    def _read(self, example: Example) -> tuple[str, dict[str, list[int]]]:
        reading = PromptReader(Placeholder(s.placeholder, s.class_word) for s in example.subjects).read(example.prompt)
        found: dict[str, set[int]] = {s.placeholder: set() for s in example.subjects}
        for tokenizer in self.tokenizers:
            ids = _ids(tokenizer)(reading.text)
            last = tokenizer.model_max_length - 1  # where the end of the text stands at the latest
            for i, placeholder in locate(reading, ids, _ids(tokenizer)).items():
                if i + 1 < last:
                    found[placeholder].add(i + 1)  # after the token that starts the text
        for subject in example.subjects:
            if not found[subject.placeholder]:
                raise NestedAttentionError(_unmentioned(example, subject, reading.text))
        return reading.text, {placeholder: sorted(rows) for placeholder, rows in found.items()}

    def __call__(self, examples: Sequence[Example]) -> Batch:
        if len({tuple(example.target.shape) for example in examples}) > 1:
            sizes = ", ".join(f"{e.name or 'a picture'} {tuple(e.target.shape[:2])}" for e in examples)
            raise NestedAttentionError(f"The targets of a batch must be of one size; got {sizes}.")
        examples = sorted(examples, key=lambda e: len(_shown_subjects(e)), reverse=True)
        read = [self.read(example) for example in examples]
        references: list[Tensor] = []
        rows: list[list[tuple[list[int], list[int]]]] = []  # per row and bound subject: places and views
        for example, (_, places) in zip(examples, read, strict=True):
            rows.append([])
            for subject in _shown_subjects(example):
                views = list(range(len(references), len(references) + len(subject.references)))
                references += subject.references
                rows[-1].append((places[subject.placeholder], views))
        size = self.image_size
        return Batch(
            targets=torch.stack([example.target.float() for example in examples]),
            prompts=[text for text, _ in read],
            references=torch.stack(references) if references else torch.zeros(0, size, size, 3),
            groups=_groups(rows),
            weights=self._weights(examples),
            time_ids=torch.tensor([_time_ids(example) for example in examples], dtype=torch.float32),
            latents=_latents(examples),
            positions=[example.position for example in examples],
            names=[example.name for example in examples],
        )

    def _weights(self, examples: Sequence[Example]) -> Tensor | None:
        """(B, H, W) with mean 1 per row, or None where all are 1."""
        if self.mask_weight == 1 or all(example.mask is None for example in examples):
            return None
        weights = []
        for example in examples:
            weight = torch.ones(example.target.shape[:2])
            if example.mask is not None:
                weight = 1 + (self.mask_weight - 1) * example.mask.float()
            weights.append(weight / weight.mean())
        return torch.stack(weights)


def _shown_subjects(example: Example) -> list[ExampleSubject]:
    return [subject for subject in example.subjects if len(subject.references)]


def _ids(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _latents(examples: Sequence[Example]) -> Tensor | None:
    known = [example.latents for example in examples if example.latents is not None]
    return torch.stack(known).float() if len(known) == len(examples) else None


def _time_ids(example: Example) -> tuple[int, ...]:
    size = (example.target.shape[0], example.target.shape[1])
    return (*(example.original_size or size), *example.crop, *size)


def _groups(rows: Sequence[Sequence[tuple[list[int], list[int]]]]) -> tuple[Group, ...]:
    """Rows in falling order of their subjects -> groups of equally many."""
    groups = []
    start = 0
    while start < len(rows) and rows[start]:
        count = len(rows[start])
        stop = next((i for i in range(start, len(rows)) if len(rows[i]) != count), len(rows))
        part = rows[start:stop]
        slots = []
        for i in range(count):
            places, views = _padded([row[i][0] for row in part]), _padded([row[i][1] for row in part])
            slots.append(Slot(places, views, full=bool((views >= 0).all())))
        groups.append(Group((start, stop), tuple(slots)))
        start = stop
    return tuple(groups)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of indexes -> (rows, longest), filled up with -1."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.int64)


def _unmentioned(example: Example, subject: ExampleSubject, text: str) -> str:
    where = f"{example.name}: " if example.name else ""
    if PromptReader([Placeholder(subject.placeholder, subject.class_word)]).mentions_any(example.prompt):
        return (
            f'{where}the caption mentions "{subject.placeholder}" only beyond what the text encoder reads. Shorten it, '
            f'or move the word to the front. It reads: "{text}"'
        )
    return (
        f'{where}the caption mentions neither "{subject.placeholder}" nor the class word "{subject.class_word}": '
        f'there is nothing to bind the subject to. It reads: "{text}"'
    )
