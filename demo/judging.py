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


def portrayed(entries: Sequence[data.Entry], which: Sequence[int]) -> Tensor:
    """Right answers to models.PORTRAIT for one figure of each picture, (N, questions)."""
    rows = []
    for entry, i in zip(entries, which, strict=True):
        shown = {**vars(entry.figures[i]), **vars(entry.looks[i])}
        values = [options.index(shown[name]) for name, options in models.OF_FIGURE.items()]
        rows.append([world.KINDS.index(entry.figures[i].kind), *values])
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
