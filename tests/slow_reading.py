"""Reading a prompt slowly: what `nested_core.prompt.PromptReader` must find, told from the names of characters.

Shares nothing with the pack's own reading: no tables of it, no `regex`, only Python's own `unicodedata` and `re`.
"""

from __future__ import annotations

import re
import unicodedata

JOINERS = "\u200c\u200d"
VARIANTS = {chr(c) for c in (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))}
# What Unicode's grapheme clusters (UAX 29) take for more than its category says.
EXTENDS = {
    *JOINERS,
    "\uff9e",
    "\uff9f",
    "\u0e33",
    "\u0eb3",
    *map(chr, (*range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080))),
}
PREPENDED = {
    *map(chr, (*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD)),
    *map(chr, (0xD4E, 0x111C2, 0x111C3, 0x1193F, 0x11941, 0x11A3A, *range(0x11A84, 0x11A8A), 0x11D46, 0x11F02)),
}
VIRAMAS = set("\u094d\u09cd\u0acd\u0b4d\u0c4d\u0d4d\u1039\u17d2\u1a60\ua9c0\u1b44")
UNSPACED = (
    *("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO"),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "YI ", "JAVANESE ", "BALINESE ", "TAI ", "NEW TAI "),
)


def cut(text):
    """A text in what people see as letters."""
    found = []
    for character in text:
        if found and _goes_with(found[-1], character):
            found[-1] += character
        else:
            found.append(character)
    return found


def _goes_with(piece, character):
    if unicodedata.category(character)[0] == "M" or character in EXTENDS:
        return True
    if character.isalpha() and _tied(piece):
        return True
    if piece + character == "\r\n":
        return True
    if unicodedata.category(piece[-1]) in ("Cc", "Zl", "Zp", "Cs") or character in "\r\n":
        return False
    if unicodedata.category(piece[-1]) == "Cf" and piece[-1] not in EXTENDS | PREPENDED:
        return False
    if piece[-1] in PREPENDED and unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return True
    before, after = _hangul(piece[-1]), _hangul(character)
    if (before, after) in {
        ("L", "L"),
        ("L", "V"),
        ("L", "S"),
        ("V", "V"),
        ("V", "T"),
        ("S", "V"),
        ("S", "T"),
        ("T", "T"),
    }:
        return not (before == "S" and after == "V" and (ord(piece[-1]) - 0xAC00) % 28)
    if "\U0001f1e6" <= character <= "\U0001f1ff":
        return "\U0001f1e6" <= piece <= "\U0001f1ff" and len(piece) == 1
    return (  # emoji that a joiner makes one
        piece[-1] == "\u200d"
        and unicodedata.category(character) == unicodedata.category(piece[0]) == "So"
        and all(c in EXTENDS or unicodedata.category(c) in ("Mn", "Me") for c in piece[1:])
    )


def _tied(piece):
    """Whether a virama stands among the marks at the end."""
    for character in reversed(piece):
        if character in VIRAMAS:
            return True
        if character != "\u200d" and unicodedata.category(character) != "Mn":
            break
    return False


def _hangul(character):
    code = ord(character)
    if 0xAC00 <= code < 0xD7A4:
        return "S"
    for kind, ranges in (
        ("L", ((0x1100, 0x1160), (0xA960, 0xA97D))),
        ("V", ((0x1160, 0x11A8), (0xD7B0, 0xD7C7))),
        ("T", ((0x11A8, 0x1200), (0xD7CB, 0xD7FC))),
    ):
        if any(first <= code < end for first, end in ranges):
            return kind
    return ""


def plain(piece):
    """A letter without what does not count: accents composed, ordinary width, < for the brackets of titles."""
    kept = "".join(c for c in piece if c not in VARIANTS).rstrip(JOINERS) or piece
    kept = unicodedata.normalize("NFD", kept)
    kept = unicodedata.normalize("NFD", "".join(map(_ordinary, kept)))
    if kept[0] in "iIıİ":
        kept = "i" + kept[1:].replace("\u0307", "", 1)
    return unicodedata.normalize("NFC", kept)


def _ordinary(character):
    if character in "〈《〉》":
        return "<" if character in "〈《" else ">"
    if character in "\uff9e\uff9f\u3000":
        return {"\uff9e": "\u3099", "\uff9f": "\u309a", "\u3000": " "}[character]
    name = unicodedata.name(character, "")
    if not name.startswith(("FULLWIDTH ", "HALFWIDTH ")):
        return character
    try:
        return unicodedata.lookup(name.split(" ", 1)[1])
    except KeyError:  # some signs have another name at ordinary width
        return unicodedata.normalize("NFKC", character)


def same(one, other):
    """Whether two lists of letters are the same word."""
    return len(one) == len(other) and all(
        re.fullmatch(re.escape(plain(a)), plain(b), re.IGNORECASE) for a, b in zip(one, other, strict=True)
    )


def is_plain(placeholder):
    return placeholder != "" and all(
        c in "_ " or unicodedata.category(c)[0] in "LNM" for c in "".join(map(plain, cut(placeholder)))
    )


def _goes_on(before, after):
    """Whether no word may end between two letters."""
    kinds = [_kind(plain(piece)) for piece in (before, after)]
    if "" in kinds:
        return False
    return "_" in kinds or "unspaced" not in kinds


def _kind(piece):
    for character in piece:
        if character == "_":
            return "_"
        if unicodedata.category(character)[0] in "LN":
            if piece[-1] == "\u20e3":
                return ""
            unspaced = unicodedata.name(character, "").startswith(UNSPACED) or character in "々ー〆〇"
            return "unspaced" if unspaced else "spaced"
    return "spaced" if all(unicodedata.category(c)[0] == "M" for c in piece) else ""


def read_slowly(text, subjects):
    """What the text encoder should read, in pieces (text, who stands there or None): letter by letter.

    subjects: (placeholder, class word) of each.
    """
    pieces, found, i = cut(text), [], 0
    ordered = sorted(((cut(name), name, word) for name, word in subjects), key=lambda s: -len(s[0]))
    while i < len(pieces):
        for letters, name, word in ordered:
            end = i + len(letters)
            if not same(pieces[i:end], letters):
                continue
            if is_plain(name) and (
                (i > 0 and _goes_on(pieces[i - 1], pieces[i]))
                or (end < len(pieces) and _goes_on(pieces[end - 1], pieces[end]))
            ):
                continue
            if found and found[-1][1] is not None:
                found.append((" ", None))
            found.append(("".join(pieces[i:end]) if is_plain(name) else word, name))
            i = end
            break
        else:
            found.append((pieces[i], None))
            i += 1
    return found
