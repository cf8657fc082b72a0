"""The right answers to what a picture shows, and how many of them a model has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import data, drawing, models, world


def answers_of(entries: Sequence[data.Entry]) -> Tensor:
    """Right answers to models.SCORED, (N, questions); -1 where there is none."""
    rows = [models.labels(entry) for entry in entries]
    return torch.tensor([[row[name] for name in models.SCORED] for row in rows])


def portrayed(entries: Sequence[data.Entry]) -> Tensor:
    """Right answers to models.PORTRAIT for the figures of pictures, (N, 2, questions); -1 where there is no second."""
    rows = torch.full((len(entries), 2, len(models.PORTRAIT)), -1)
    for row, entry in enumerate(entries):
        for i, (figure, look) in enumerate(zip(entry.figures, entry.looks, strict=True)):
            shown = {**vars(figure), **vars(look)}
            values = [options.index(shown[name]) for name, options in models.OF_FIGURE.items()]
            rows[row, i] = torch.tensor([world.KINDS.index(figure.kind), *values])
    return rows


def true_of(entries: Sequence[data.Entry]) -> Tensor:
    """Which of world.all_facts are true of the figures of pictures, (N, 2, facts): 1 or 0."""
    places = {fact: i for i, fact in enumerate(world.all_facts())}
    truth = torch.zeros(len(entries), 2, len(places))
    for row, entry in enumerate(entries):
        for i, (figure, look) in enumerate(zip(entry.figures, entry.looks, strict=True)):
            said = [*world.facts(figure, look), world.place(entry.scene), f"{entry.style} drawing"]
            truth[row, i, [places[fact] for fact in said]] = 1
    return truth


def parts_of(regions: Tensor, side: int) -> Tensor:
    """Maps of parts (B, H, W) -> uint8 (B, 2, parts, side * side): 1 in cells that show a part; part 0 is all of it."""
    figures = []
    for i in range(2):
        own = (regions > 0) & (regions // drawing.NEXT_FIGURE == i)
        part = regions % drawing.NEXT_FIGURE
        shown = torch.stack([own, *(own & (part == p) for p in range(1, drawing.NEXT_FIGURE))], 1)
        figures.append(F.adaptive_max_pool2d(shown.float(), side).flatten(2).to(torch.uint8))
    return torch.stack(figures, 1)


#: What of SCORED is asked of which kind of figure, the part of it that tells, and among how many choices.
ASKED = [
    (i, world.KINDS.index(kind), drawing.PARTS.get(drawing.PART_OF.get(name, ""), 0), choices)
    for i, (question, choices) in enumerate(models.SCORED.items())
    for kind, _, name in [question.partition(".")]
    if kind in world.KINDS
]


def kinds_of(entries: Sequence[data.Entry]) -> Tensor:
    """The kinds of pictures' figures from left to right, (N, 2); a picture's only one twice."""
    rows = [[world.KINDS.index(figure.kind) for figure in entry.figures] for entry in entries]
    return torch.tensor([[*row, row[0]][:2] for row in rows])


def parts_of_kind(parts: Tensor, kinds: Tensor, kind: int) -> Tensor:
    """`parts_of` the figure of that kind, (B, parts, cells), nothing where there is none. kinds: `kinds_of`."""
    index = (kinds[:, 0] != kind).long()  # which of the figures it is
    own = parts.gather(1, index[:, None, None, None].expand(-1, 1, *parts.shape[2:]))[:, 0]
    return own * (kinds == kind).any(1)[:, None, None]


def stray(looks: Tensor, parts: Tensor, kinds: Tensor, answers: Tensor) -> Tensor:
    """How far from what they ask about questions look: the mean of -log of the share that is on it.

    looks (B, questions, cells). parts: `parts_of` the pictures. kinds: `kinds_of`. answers: `answers_of`.
    """
    losses, counts = [], []
    for kind in range(len(world.KINDS)):
        own = parts_of_kind(parts, kinds, kind).to(looks.dtype)
        asked = [(question, part) for question, of, part, _ in ASKED if of == kind]
        share = torch.stack([(looks[:, question] * own[:, part]).sum(-1) for question, part in asked], 1)
        # A part that is hidden can't be looked at.
        shown = torch.stack([own[:, part].amax(-1) * (answers[:, question] >= 0) for question, part in asked], 1)
        losses.append(-((share + 1e-4).log() * shown).sum())
        counts.append(shown.sum())
    return torch.stack(losses).sum() / torch.stack(counts).sum().clamp(min=1)


def score(out: dict[str, Tensor], answers: Tensor, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the questions, and the share of right answers; nothing waits for the device."""
    losses, rights = [], []
    for i, name in enumerate(questions):
        known = answers[:, i] >= 0
        count = known.sum().clamp(min=1)
        losses.append(F.cross_entropy(out[name].float(), answers[:, i], ignore_index=-1, reduction="sum") / count)
        rights.append(((out[name].argmax(-1) == answers[:, i]) & known).sum() / count)
    return torch.stack(losses).mean(), torch.stack(rights).mean()


def share_right(logits: Tensor, answers: Tensor) -> float:
    asked = answers.to(logits.device) >= 0
    return float((logits.argmax(-1)[asked] == answers.to(logits.device)[asked]).float().mean())


@torch.no_grad()
def judge(probe: models.Probe, pictures: Tensor, entries: list[data.Entry]) -> dict[str, float]:
    """What the probe finds right in pictures (B, 3, H, W) uint8: class, scene, style, identity, and each axis of looks.

    Also "identity.<attribute>" for each attribute.
    """
    out = probe(models.normalise(pictures.permute(0, 2, 3, 1)))
    answers = answers_of(entries)
    rights = {name: share_right(out[name], answers[:, i]) for i, name in enumerate(models.SCORED)}

    def of_kinds(name: str) -> float:
        return float(np.nanmean([rights[f"{kind}.{name}"] for kind in world.KINDS]))

    attributes = {f"identity.{name}": of_kinds(name) for name in world.ATTRIBUTES}
    return {
        "class": of_kinds("present"), "scene": rights["scene"], "style": rights["style"],
        **{name: of_kinds(name) for name in world.LOOKS},
        "identity": float(np.mean([*attributes.values()])), **attributes,
    }  # fmt: skip
