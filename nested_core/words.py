"""When two writings are the same word, and where in a text a word may begin and end.

Prompts come from keyboards and input methods of every kind: the same name arrives with its accents composed or not,
in capitals, in full-width letters. Three rules, for placeholders and for prompts alike:

1. A text is read letter by letter as people see them (`letters`): a mark belongs to the letter before it.
2. Two letters are the same (`fold`) if they differ in nothing but case, in how their accents are composed, in full or
   half width, in a variation selector or joiner at their end; 〈 and 《 are <, 〉 and 》 are >. Nothing else counts as
   the same: not ² and 2, not ﬁ and fi, not ß and ss.
3. A word ends where the next letter is of no word. Scripts that are written without spaces, and Hangul with its
   particles, have no such ends: there a word may end between any two letters (`Kind`).
"""

from __future__ import annotations

import enum
import unicodedata
from functools import lru_cache

import regex

# \X is Unicode's grapheme cluster. Three things are done by hand: the two halves of a flag, as \X looks back over all
# flags before it, which takes minutes in a long row of them; marks, as not all of Burmese belong to \X; and consonants
# that a virama ties to the one before (Indic scripts, Burmese, Khmer...), which older versions of Unicode take apart.
_TIES = "\u094d\u09cd\u0acd\u0b4d\u0c4d\u0d4d\u1039\u17d2\u1a60\u1b44\ua9c0"
_MARKS = r"[\p{M}\p{Grapheme_Cluster_Break=Extend}\p{Grapheme_Cluster_Break=SpacingMark}\u200d]*"
_LETTER = regex.compile(
    rf"(?:\p{{Regional_Indicator}}{{2}}|\X){_MARKS}(?:(?<=[{_TIES}][\p{{Mn}}\u200d]*)(?=\p{{L}})\X{_MARKS})*"
)

# Variation selectors; joiners at the end.
_UNSEEN = regex.compile("[\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]+$|[\ufe00-\ufe0f\U000e0100-\U000e01ef]")

# <wide> and <narrow> in Unicode: what East Asian input methods type for ordinary letters, and the other way round.
_ORDINARY = {
    wide: int(ordinary.split()[1], 16)
    for wide in (0x3000, *range(0xFF00, 0xFFF0))
    if (ordinary := unicodedata.decomposition(chr(wide))).startswith(("<wide>", "<narrow>"))
}
_ORDINARY |= {ord(written): ord(read) for written, read in zip("〈《〉》", "<<>>", strict=True)}

# Longer than any letter of a placeholder can be; sorting the marks of thousands takes Python minutes.
_LONGEST = 256

_WORDLY = regex.compile(r"[\p{L}\p{N}_]")
_UNSPACED = regex.compile(
    "["
    + "".join(rf"\p{{Script_Extensions={script}}}" for script in ("Han", "Hiragana", "Katakana", "Bopomofo", "Hangul"))
    + "".join(
        rf"\p{{Script={script}}}"
        for script in (
            *("Yi", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Javanese", "Balinese"),
            *("Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet"),
        )
    )
    + "]"
)


class Kind(enum.Enum):
    """What a letter does at the edge of a word."""

    OTHER = "other"  # of no word: spaces, punctuation, emoji
    SPACED = "spaced"  # letters of scripts that put spaces between words; digits
    UNSPACED = "unspaced"  # letters of scripts that do not
    JOINS = "joins"  # the underscore: written to hold together, in any script


#: after a letter of the first kind, one of the others would go on with the same word
GOES_ON = {
    Kind.OTHER: frozenset[Kind](),
    Kind.SPACED: frozenset({Kind.SPACED, Kind.JOINS}),
    Kind.UNSPACED: frozenset({Kind.JOINS}),
    Kind.JOINS: frozenset({Kind.SPACED, Kind.UNSPACED, Kind.JOINS}),
}


def letters(text: str) -> list[str]:
    """A text cut into what people see as letters: Unicode's grapheme clusters, with all marks that follow."""
    return _LETTER.findall(text)


def fold(text: str) -> str:
    """A text in the form in which texts are compared; equal for two writings of the same word."""
    return "".join(folded for folded, _ in map(letter, letters(text)))


@lru_cache(maxsize=8192)
def letter(written: str) -> tuple[str, Kind]:
    """One of `letters` in the form in which letters are compared, and its kind."""
    if len(written) > _LONGEST:
        return written, _kind(written)
    apart = unicodedata.normalize("NFD", _UNSEEN.sub("", written) or written).translate(_ORDINARY)
    folded = unicodedata.normalize("NFD", "".join(map(_without_case, apart)))
    if folded.startswith(("i", "ı")):  # the small letters of İ and I, which are i and ı in Turkish
        folded = "i" + folded[1:].replace("\u0307", "", 1)
    folded = unicodedata.normalize("NFC", folded)
    return folded, _kind(folded)


def _without_case(character: str) -> str:
    """Unicode's simple case folding: one character for one."""
    for changed in (character.casefold(), character.lower()):
        if len(changed) == 1 and character != "\u0345":  # a mark, which would become a letter of its own
            return changed
    return character


def _kind(folded: str) -> Kind:
    first = _WORDLY.search(folded)
    if first is None:
        # Marks alone go on with whatever is before them.
        return Kind.SPACED if regex.fullmatch(r"\p{M}+", folded) else Kind.OTHER
    if first.group() == "_":
        return Kind.JOINS
    if folded.endswith("\u20e3"):  # a keycap: emoji
        return Kind.OTHER
    return Kind.UNSPACED if _UNSPACED.match(first.group()) else Kind.SPACED
