"""The right answers to what a picture shows, and how many of them a model has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import data, models, world


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
