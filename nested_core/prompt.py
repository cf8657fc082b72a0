"""Placeholders in a prompt: what the text encoder reads in their place, and which of its tokens those are.

The nodes and the training code both locate a subject's word here, so a word is bound in pictures where it was bound
in training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from .subject import is_plain_word
from .words import GOES_ON, Kind, fold, letter, letters

_CODES = 0xE000  # from here on: characters that mean nothing in a pattern


@dataclass(frozen=True)
class Placeholder:
    """A word of the prompt that stands for a subject.

    text: as written in prompts. class_word: what the text encoder reads instead. pooled: take SDXL's pooled text
    vector at this token instead of the end of the text (an encoder whose `pooled` is "placeholder"). negative: it acts
    in texts that are steered away from, and in no others.
    """

    text: str
    class_word: str
    pooled: bool = False
    negative: bool = False

    @property
    def key(self) -> str:
        """How the placeholder is compared (`words.fold`): two with the same key are the same placeholder."""
        return fold(self.text)

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
    """Reads prompts with these placeholders; where several would fit, the longest does.

    The rules of `words` say what counts as the same word and where a plain word ends. A match never begins or ends
    inside a letter: "man" is not in "mañana", however its ñ is composed. Takes time in proportion to the text.
    """

    def __init__(self, placeholders: Iterable[Placeholder]) -> None:
        written = ((p, [letter(part) for part in letters(p.text)]) for p in placeholders)
        ordered = sorted(written, key=lambda item: len(item[1]), reverse=True)
        self.placeholders = [p for p, _ in ordered]
        # A text is searched with one character for each of its letters, so that no match can begin or end inside one.
        # Letters that no placeholder holds are told apart by their kind only.
        self._others = {kind: chr(_CODES + i) for i, kind in enumerate(Kind)}
        known = dict.fromkeys(part for _, parts in ordered for part in parts)
        self._codes = {folded: chr(_CODES + len(Kind) + i) for i, (folded, _) in enumerate(known)}
        of_kind = dict(self._others)
        for folded, kind in known:
            of_kind[kind] += self._codes[folded]

        def any_of(kinds: Iterable[Kind]) -> str:
            return "".join(of_kind[kind] for kind in kinds)

        alternatives = []  # a group for each; plain words only as whole words
        for p, parts in ordered:
            pattern = "".join(self._codes[folded] for folded, _ in parts)
            if is_plain_word(p.text):
                before, after = (any_of(GOES_ON[kind]) for _, kind in (parts[0], parts[-1]))
                pattern = (f"(?<![{before}])" if before else "") + pattern + (f"(?![{after}])" if after else "")
            alternatives.append(f"({pattern})")
        self._pattern = re.compile("|".join(alternatives) or "(?!)")

    def mentions_any(self, text: str) -> bool:
        """Whether any placeholder stands in the text."""
        return self._pattern.search(self._encoded(letters(text))) is not None

    def read(self, text: str) -> Reading:
        """The text with every placeholder read as its class word."""
        parts = letters(text)
        starts = [0, *accumulate(map(len, parts))]
        read, end = [], 0
        length = 0
        spans: list[Span] = []
        for match in self._pattern.finditer(self._encoded(parts)):
            assert match.lastindex is not None  # every alternative is a group
            placeholder = self.placeholders[match.lastindex - 1]
            start, stop = starts[match.start()], starts[match.end()]
            # Two placeholders side by side stay two words.
            between = text[end:start] or (" " if spans else "")
            word = placeholder.reads_as(text[start:stop])
            length += len(between)
            spans.append(Span(length, length + len(word), placeholder.text))
            length += len(word)
            read += [between, word]
            end = stop
        return Reading("".join(read) + text[end:], tuple(spans))

    def _encoded(self, parts: Iterable[str]) -> str:
        codes, others = self._codes, self._others
        return "".join([codes.get(folded) or others[kind] for folded, kind in map(letter, parts)])


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
        # A word's tokens are those that neither the text before nor the text after it accounts for. A token that
        # reaches over an end of the word counts as the word's: all of "cats" for "<a>s".
        before, word, after = reading.text[:start], reading.text[start:stop], reading.text[stop:]
        first = _common_prefix(tokenize(before), ids)
        if before[-1:].isalpha() and word[:1].isalpha():
            # Glued, as in scripts without spaces: by itself, the text before would end in other tokens than it does in
            # the middle of a word. Any letter may follow it, except one that could begin like this word's tokens.
            other = "я" if fold(word[0]).isascii() else "a"
            first = max(first, _common_prefix(tokenize(before + other), ids))
        last = len(ids) - _common_prefix(tokenize(after)[::-1], ids[::-1])
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
