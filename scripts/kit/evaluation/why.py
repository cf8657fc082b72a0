"""What the measurements say about the paper's claim; the figures are read from them."""

from __future__ import annotations

import textwrap
from typing import Any

from demo import drawing

from . import METHODS
from .parts import AS_SHIPPED, REGIMES, STRENGTHS

CROP, PAIRS = (REGIMES[regime] for regime in ("", "_pairs"))
NEEDED = ("table", "frontier", "order", "budget", "attention")


def why(known: dict[str, Any]) -> list[str]:
    """Markdown of the last section, or nothing where a part of NEEDED or a row of it is missing."""
    try:
        text = _text(known)
    except KeyError:  # a part was not made yet, or an encoder was not there
        return []
    paragraphs = [" ".join(paragraph.split("\n")) for paragraph in text.strip().split("\n\n")]
    return [line for paragraph in paragraphs for line in ("", *textwrap.wrap(paragraph, 120, break_on_hyphens=False))]


def _text(known: dict[str, Any]) -> str:
    rows = {part: {row["name"]: row for row in known[part]["rows"]} for part in NEEDED}

    def said(part: str, row: str, question: str) -> str:
        return f"{rows[part][row][question][0]:.2f}"

    def at_1(method: str, regime: str, question: str) -> str:
        return said("table", f"{METHODS[method]}, {regime}", question)

    heard = {
        part: sum(row[part][0] for row in rows["attention"].values()) / len(rows["attention"]) for part in drawing.PARTS
    }
    before, after = (f"{words}, {METHODS['none']}" for words in ("smiling wooden robot", "robot smiling wooden"))
    short = {m: said("budget", f"{METHODS[m]}, 200 steps, strength 1", "identity") for m in METHODS if m != "none"}
    full = {m: said("budget", f"{METHODS[m]}, all steps, strength 1", "identity") for m in METHODS if m != "none"}
    shipped = f"{METHODS['nested']}, {AS_SHIPPED}"
    gentle = f"{METHODS['nested']}, {PAIRS}, strength {STRENGTHS[3]:g}"
    return f"""
## What decides

The paper claims that nested attention keeps an identity and obeys the prompt where others trade one for the other.
Learned from other pictures of a figure, that is so here: at the same alignment it has more of the identity than
decoupled attention has, in each training, and more than that has at any strength. Learned from crops of the target, as
in the paper, it is not, before much alignment is paid; the tables above have the differences. Of three reasons that
were suspected, each was at work.

**(a) Who is listened to.** No caption names identity, and the class word has {min(heard.values()):.2f} to
{max(heard.values()):.2f} of the attention on every part of a figure (the mean over layers; {heard["hat"]:.2f} on the
hat, {heard["legs"]:.2f} on the legs): a figure is what its class word says. But the word says more than its class. The
text encoder reads from left to right, as CLIP's do, so the token of `robot` in `a smiling wooden robot` also holds the
two words before it, and the base model hears material from there alone: said after the word, it is obeyed in
{said("order", after, "material")} of the pictures, said before it in {said("order", before, "material")}, without any
subject. Nested attention and one value per token put a subject in the place of that token's value, and what the words
before it said goes with it. Learned from crops, at strength 1, material is as asked in
{at_1("nested", CROP, "material")} and {at_1("one_value", CROP, "material")} of the pictures, expression in
{at_1("nested", CROP, "expression")} and {at_1("one_value", CROP, "expression")}. Decoupled attention leaves the token
alone ({at_1("decoupled", CROP, "material")} and {at_1("decoupled", CROP, "expression")}). What is said after the word
stays with all of them: pose {at_1("nested", CROP, "pose")}, what is held {at_1("nested", CROP, "held")} with nested
attention.

**(b) What competes.** Scene and style do not: no method loses more of them than the base model does. What lies on the
figure does, and whether it is *copied* is decided by what an encoder learns from. A crop of the target shows the
material and the expression of the target, so saying them is what an encoder is taught: with nested attention the
reference's material is in {at_1("nested", CROP, "copied material")} of the pictures, its expression in
{at_1("nested", CROP, "copied expression")}. Learned from other pictures of the figure,
{at_1("nested", PAIRS, "copied material")} and {at_1("nested", PAIRS, "copied expression")}; and a little less strength
gives the words their place back: at {STRENGTHS[3]:g}, material is as asked in {said("frontier", gentle, "material")}
instead of {at_1("nested", PAIRS, "material")} of the pictures, for an identity of
{said("frontier", gentle, "identity")} instead of {at_1("nested", PAIRS, "identity")}.

**(c) How long.** After 200 steps nothing is decided: identity {short["nested"]} nested, {short["one_value"]} one value,
{short["decoupled"]} decoupled, at strength 1. After 800 it is {full["nested"]}, {full["one_value"]} and
{full["decoupled"]}. The level is not settled: the shipped encoder, which learned
from pairs and went on for three times as long, has {said("table", shipped, "identity")}.

For SDXL this means, as far as can be said without having tried it: its text encoders read from left to right too, so
what stands directly before a subject's word may be lost where it is bound. Say it after the word, or bind with less
strength. How much SDXL hears from those words' own tokens is not known here.
"""
