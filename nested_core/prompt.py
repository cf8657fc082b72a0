"""Placeholders in a prompt: what the text encoder reads in their place, and which of its tokens those are.

The nodes and the training code both locate a subject's word here, so a word is bound in pictures where it was bound
in training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Generic, NamedTuple, TypeVar

from .subject import is_plain_word
from .words import GOES_ON, Kind, fold, letter, letters

_CODES = 0xE000  # from here on: characters that mean nothing in a pattern


@dataclass(frozen=True)
class ClassWord:
    """A class word that is looked for where a prompt has it as itself.

    text: folded (`words.fold`), so that all writings of a word are one.
    """

    text: str
    pooled: ClassVar[bool] = False
    whole: ClassVar[bool] = True

    @property
    def key(self) -> ClassWord:
        return self


@dataclass(frozen=True)
class Placeholder:
    """A word of the prompt that stands for a subject.

    text: as written in prompts. class_word: what the text encoder reads instead. pooled: take SDXL's pooled text
    vector at this token instead of the end of the text (an encoder whose `pooled` is "placeholder").
    seeks_class_word: where the class word stands as itself is to be known as well.
    """

    text: str
    class_word: str
    pooled: bool = False
    seeks_class_word: bool = False

    @property
    def key(self) -> str:
        """How the placeholder is compared (`words.fold`): two with the same key are the same placeholder."""
        return fold(self.text)

    @property
    def whole(self) -> bool:
        """Whether it is found as a whole word only."""
        return is_plain_word(self.text)

    @property
    def sought(self) -> ClassWord | None:
        return ClassWord(fold(self.class_word)) if self.seeks_class_word else None

    def reads_as(self, written: str) -> str:
        """What the text encoder gets for `written`, an occurrence of this placeholder in a prompt."""
        return written if is_plain_word(self.text) else self.class_word


class Span(NamedTuple):
    """Characters from `start` to before `stop` of a read text, which stand for a placeholder, or are a class word."""

    start: int
    stop: int
    placeholder: str


class Reading(NamedTuple):
    """A prompt as the text encoder reads it, and where the subjects are in it."""

    text: str
    spans: tuple[Span, ...]


_W = TypeVar("_W", bound=Placeholder | ClassWord)


class _Finder(Generic[_W]):
    """Finds words in texts; where several would fit, the longest does. Takes time in proportion to the text."""

    def __init__(self, words: Iterable[_W]) -> None:
        written = ((word, [letter(part) for part in letters(word.text)]) for word in words)
        ordered = sorted(written, key=lambda item: len(item[1]), reverse=True)
        self.words = [word for word, _ in ordered]
        # A text is searched with one character for each of its letters, so that no match can begin or end inside one.
        # Letters that no word holds are told apart by their kind only.
        self._others = {kind: chr(_CODES + i) for i, kind in enumerate(Kind)}
        known = dict.fromkeys(part for _, parts in ordered for part in parts)
        self._codes = {folded: chr(_CODES + len(Kind) + i) for i, (folded, _) in enumerate(known)}
        of_kind = dict(self._others)
        for folded, kind in known:
            of_kind[kind] += self._codes[folded]

        def any_of(kinds: Iterable[Kind]) -> str:
            return "".join(of_kind[kind] for kind in kinds)

        alternatives = []  # a group for each
        for word, parts in ordered:
            pattern = "".join(self._codes[folded] for folded, _ in parts)
            if word.whole:
                before, after = (any_of(GOES_ON[kind]) for _, kind in (parts[0], parts[-1]))
                pattern = (f"(?<![{before}])" if before else "") + pattern + (f"(?![{after}])" if after else "")
            alternatives.append(f"({pattern})")
        self._pattern = re.compile("|".join(alternatives) or "(?!)")

    def any_in(self, text: str) -> bool:
        return bool(self.words) and self._pattern.search(self._encoded(letters(text))) is not None

    def find(self, text: str) -> Iterator[tuple[int, int, _W]]:
        """(start, stop, word) for each, in order."""
        if not self.words:
            return
        parts = letters(text)
        starts = [0, *accumulate(map(len, parts))]
        for match in self._pattern.finditer(self._encoded(parts)):
            assert match.lastindex is not None  # every alternative is a group
            yield starts[match.start()], starts[match.end()], self.words[match.lastindex - 1]

    def _encoded(self, parts: Iterable[str]) -> str:
        codes, others = self._codes, self._others
        return "".join([codes.get(folded) or others[kind] for folded, kind in map(letter, parts)])


class PromptReader:
    """Reads prompts with these placeholders; where several would fit, the longest does.

    The rules of `words` say what counts as the same word and where a plain word ends. A match never begins or ends
    inside a letter: "man" is not in "mañana", however its ñ is composed. Takes time in proportion to the text.
    """

    def __init__(self, placeholders: Iterable[Placeholder]) -> None:
        self._placeholders = _Finder(placeholders)
        self.placeholders = self._placeholders.words
        self._class_words = _Finder(dict.fromkeys(p.sought for p in self.placeholders if p.sought is not None))

    def mentions_any(self, text: str) -> bool:
        """Whether any placeholder stands in the text."""
        return self._placeholders.any_in(text)

    def concerns(self, text: str) -> bool:
        """Whether any placeholder stands in the text, or a class word that is sought."""
        return self.mentions_any(text) or self._class_words.any_in(text)

    def read(self, text: str) -> Reading:
        """The text with every placeholder read as its class word."""
        read, end = [], 0
        length = 0
        spans: list[Span] = []
        for start, stop, placeholder in self._placeholders.find(text):
            # Two placeholders side by side stay two words.
            between = text[end:start] or (" " if spans else "")
            word = placeholder.reads_as(text[start:stop])
            length += len(between)
            spans.append(Span(length, length + len(word), placeholder.text))
            length += len(word)
            read += [between, word]
            end = stop
        return Reading("".join(read) + text[end:], tuple(spans))

    def class_words(self, reading: Reading) -> Reading:
        """A read text with the sought class words in it, apart from those that stand for placeholders."""
        taken = {at for span in reading.spans for at in range(span.start, span.stop)}
        found = [Span(start, stop, word.text) for start, stop, word in self._class_words.find(reading.text)]
        return Reading(reading.text, tuple(s for s in found if taken.isdisjoint(range(s.start, s.stop))))


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
