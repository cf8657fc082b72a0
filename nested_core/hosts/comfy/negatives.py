"""The texts that a run steers away from: which they are, and whether unconditional subjects have a word in them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...prompt import Placeholder
from ...words import fold
from .rows import NEGATIVE
from .text import MarkedText, mark, marks_of
from .values import Application

log = logging.getLogger(__name__)


def is_negative(name: str) -> bool:
    """Whether a guider's list of conditionings by that name is there to be steered away from."""
    return any(word in name.lower() for word in ("neg", "uncond", "empty"))


def mark_negatives(conds: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """The entries of a run are its own copies: texts in them may be marked for it."""
    for name, entries in conds.items():
        for entry in entries:
            if is_negative(name) and isinstance(entry.get("cross_attn"), MarkedText):
                entry["cross_attn"] = mark(entry["cross_attn"], {NEGATIVE: torch.ones((), dtype=torch.bool)})


def with_words(guider: Any, applications: Sequence[Application]) -> tuple[Application, ...]:
    """The applications of a run, without those unconditional subjects that have no word in its negative prompts.

    That is said, where there is a negative prompt that will be sampled.
    """
    texts = [entry.get("cross_attn") for name in guider.conds if is_negative(name) for entry in guider.conds[name]]
    marked = {key for text in texts for key, marks in marks_of(text).items() if bool(marks.any())}
    sampled = bool(texts) and not math.isclose(getattr(guider, "cfg", 0.0), 1.0)  # at 1 the host leaves it out
    kept = []
    for application in applications:
        placeholder = application.placeholder
        if application.unconditional is not None and marked.isdisjoint((placeholder.key, placeholder.sought)):
            application = replace(application, unconditional=None)
            if sampled:
                log.warning(
                    "The unconditional subject of %s acts nowhere: no negative prompt has the word %s, or %s. Write %s "
                    "in the negative prompt, in a text encode node whose CLIP comes from Apply Subject (Advanced).",
                    placeholder.text, placeholder.class_word, placeholder.text, placeholder.class_word,
                )  # fmt: skip
        kept.append(application)
    if sampled:
        _tell_of_shared_words([a.placeholder for a in kept if a.unconditional and a.placeholder.sought in marked])
    return tuple(kept)


def _tell_of_shared_words(placeholders: Sequence[Placeholder]) -> None:
    """A word of a text is one subject's: that of the first who acts, in the order of their keys."""
    by_word: dict[str, list[str]] = {}
    for placeholder in sorted(placeholders, key=lambda p: p.key):
        by_word.setdefault(fold(placeholder.class_word), []).append(placeholder.text)
    for word, names in by_word.items():
        if len(names) > 1:
            log.info(
                "The word %s of the negative prompt is the class word of %s: the unconditional subject of %s acts on "
                "it, with the strength and mask of that one.", word, " and ".join(names), names[0],
            )  # fmt: skip
