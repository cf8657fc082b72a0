"""Placeholders in a prompt: what the text encoder reads in their place, and which of its tokens those are.

The nodes and the training code both locate a subject's word here, so a word is bound in pictures where it was bound
in training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .subject import is_plain_word


@dataclass(frozen=True)
class Placeholder:
    """A word of the prompt that stands for a subject.

    text: as written in prompts. class_word: what the text encoder reads instead. pooled: take SDXL's pooled text
    vector at this token instead of the end of the text (DESIGN: the encoder's `pooled` = "placeholder").
    """

    text: str
    class_word: str
    pooled: bool = False

    @property
    def key(self) -> str:
        """How the placeholder is compared: text encoders do not see case either."""
        return self.text.lower()

    def reads_as(self, written: str) -> str:
        """What the text encoder gets for `written`, an occurrence of this placeholder in a prompt."""
        return written if is_plain_word(self.text) else self.class_word


class Span(NamedTuple):
    """Characters from `start` to before `stop` of a read text, which stand for a placeholder."""

    start: int
    stop: int
    placeholder: str


class Reading(NamedTuple):
    """A prompt as the text encoder reads it, and where the subjects are in it."""

    text: str
    spans: tuple[Span, ...]


class PromptReader:
    """Reads prompts with these placeholders; where several would fit, the longest does."""

    def __init__(self, placeholders: Iterable[Placeholder]) -> None:
        self.placeholders = sorted(placeholders, key=lambda p: len(p.text), reverse=True)
        alternatives = []  # a group for each; plain words only as whole words
        for p in self.placeholders:
            escaped = re.escape(p.text)
            alternatives.append(rf"((?<!\w){escaped}(?!\w))" if is_plain_word(p.text) else f"({escaped})")
        self._pattern = re.compile("|".join(alternatives) or "(?!)", re.IGNORECASE)

    def mentions_any(self, text: str) -> bool:
        """Whether any placeholder stands in the text."""
        return self._pattern.search(text) is not None

    def read(self, text: str) -> Reading:
        """The text with every placeholder read as its class word."""
        read, end = "", 0
        spans: list[Span] = []
        for match in self._pattern.finditer(text):
            assert match.lastindex is not None  # every alternative is a group
            placeholder = self.placeholders[match.lastindex - 1]
            between = text[end : match.start()]
            # Two placeholders side by side stay two words.
            read += between or (" " if spans else "")
            word = placeholder.reads_as(match.group())
            spans.append(Span(len(read), len(read) + len(word), placeholder.text))
            read += word
            end = match.end()
        return Reading(read + text[end:], tuple(spans))


def locate(reading: Reading, ids: Sequence[int], tokenize: Callable[[str], Sequence[int]]) -> dict[int, str]:
    """Which tokens of a read text belong to which placeholder.

    Args:
        reading: what `PromptReader.read` gave.
        ids: the tokens of `reading.text`, without those that start and end a text.
        tokenize: the tokenizer that made them, likewise without special tokens.

    Returns:
        index into `ids` -> the placeholder's text.
    """
    found: dict[int, str] = {}
    for start, stop, placeholder in reading.spans:
        # A word's tokens are those that neither the text before nor the text after it accounts for. Where the word is
        # glued to its neighbours ("<person>s"), that is the whole glued word.
        first = _common_prefix(tokenize(reading.text[:start]), ids)
        last = len(ids) - _common_prefix(tokenize(reading.text[stop:])[::-1], ids[::-1])
        for i in range(first, max(first, last)):
            found.setdefault(i, placeholder)
    return found


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
