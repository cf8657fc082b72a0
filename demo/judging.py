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
    rows = [models.labels(entry.figures, entry.scene, entry.style) for entry in entries]
    return torch.tensor([[row[name] for name in models.SCORED] for row in rows])


def identities_of(shown: data.Pictures) -> Tensor:
    """Right answers to models.IDENTITY for portraits, (N, questions)."""
    rows = []
    for entry in shown.entries:
        figure = entry.figures[0]
        values = [options.index(getattr(figure, name)) for name, options in world.ATTRIBUTES.items()]
        rows.append([world.KINDS.index(figure.kind), *values])
    return torch.tensor(rows)


def score(out: dict[str, Tensor], answers: Tensor, questions: Sequence[str]) -> tuple[Tensor, float]:
    """Mean cross entropy over the questions, and the share of right answers."""
    losses, rights = [], []
    for i, name in enumerate(questions):
        if (answers[:, i] >= 0).any():
            losses.append(F.cross_entropy(out[name].float(), answers[:, i], ignore_index=-1))
            rights.append(share_right(out[name].detach(), answers[:, i]))
    return torch.stack(losses).mean(), sum(rights) / len(rights)


def share_right(logits: Tensor, answers: Tensor) -> float:
    asked = answers.to(logits.device) >= 0
    return float((logits.argmax(-1)[asked] == answers.to(logits.device)[asked]).float().mean())


@torch.no_grad()
def judge(probe: models.Probe, pictures: Tensor, entries: list[data.Entry]) -> dict[str, float]:
    """What the probe finds right in pictures (B, 3, H, W) uint8: class, scene, style, and attributes."""
    out = probe(models.normalise(pictures.permute(0, 2, 3, 1)))
    answers = answers_of(entries)
    rights = {name: share_right(out[name], answers[:, i]) for i, name in enumerate(models.SCORED)}
    attributes = {n: float(np.mean([rights[f"{kind}.{n}"] for kind in world.KINDS])) for n in world.ATTRIBUTES}
    present = sum(rights[f"{kind}.present"] for kind in world.KINDS) / 2
    return {
        "class": present, "scene": rights["scene"], "style": rights["style"],
        "identity": float(np.mean([*attributes.values()])), **attributes,
    }  # fmt: skip
