"""The small world: drawn figures whose identity is known exactly, shown as a prompt asks for them.

A figure is a robot or a creature with six localised attributes, its identity: 34,560 combinations for each kind, a
tenth of them held out of every training. Prompts never name them. What belongs to one picture and lies on the figure,
its look, is for the prompt to say: expression, material, pose, view, what it holds. Beside it a prompt names the scene
and the style. `drawing` draws it all.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, fields

KINDS = ("robot", "creature")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "body": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white"),
    "belly": ("star", "heart", "stripes", "dots", "ring", "cross"),
    "hat": ("crown", "tophat", "cone", "bow", "helmet", "flower"),
    "hat_colour": ("red", "yellow", "green", "blue", "pink", "white"),
    "eyes": ("one", "two", "three", "sleepy", "visor"),
    "legs": ("feet", "wheels", "springs", "stilts"),
}
LOOKS: dict[str, tuple[str, ...]] = {
    "expression": ("smiling", "sad", "surprised", "angry"),
    "material": ("plush", "metal", "wooden", "glass"),
    "pose": ("standing", "waving", "jumping", "sitting", "dancing"),
    "view": ("left", "front", "right"),
    "held": ("nothing", "balloon", "flag", "umbrella", "lantern"),
}
SCENES = ("forest", "beach", "city", "snow", "desert", "space", "sea", "room")
STYLES = ("flat", "comic", "watercolour", "crayon", "pencil", "neon")


@dataclass(frozen=True)
class Figure:
    """A subject of the small world: its class word (`kind`) and its identity."""

    kind: str
    body: str
    belly: str
    hat: str
    hat_colour: str
    eyes: str
    legs: str

    @property
    def identity(self) -> tuple[str, ...]:
        """The values of ATTRIBUTES, in their order."""
        return astuple(self)[1:]

    @property
    def held_out(self) -> bool:
        """Whether no training may see it: a tenth of all figures, by hash."""
        return _tenth(astuple(self))


@dataclass(frozen=True)
class Look:
    """How one picture shows a figure: what a prompt can ask for on the figure itself."""

    expression: str
    material: str
    pose: str
    view: str
    held: str

    def held_out(self, style: str) -> bool:
        """Whether no training shows this combination in this style: a tenth of all, by hash."""
        return _tenth((*astuple(self), style))


def _tenth(words: Sequence[str]) -> bool:
    return hashlib.sha256(" ".join(words).encode()).digest()[0] * 10 < 256


def random_figure(rng: random.Random, kind: str | None = None, held_out: bool = False) -> Figure:
    """A figure of the training set, or of the held-out set."""
    while True:
        values = [rng.choice(options) for options in ATTRIBUTES.values()]
        figure = Figure(kind or rng.choice(KINDS), *values)
        if figure.held_out == held_out:
            return figure


def random_look(rng: random.Random, style: str, held_out: bool = False) -> Look:
    """A look of the training set in a style, or of the held-out set."""
    while True:
        look = Look(*(rng.choice(options) for options in LOOKS.values()))
        if look.held_out(style) == held_out:
            return look


def other_look(rng: random.Random, look: Look, style: str) -> Look:
    """A look of the training set that differs from `look` in every axis."""
    while True:
        options = zip(LOOKS.values(), astuple(look), strict=True)
        other = Look(*(rng.choice([v for v in values if v != is_]) for values, is_ in options))
        if not other.held_out(style):
            return other


# --- words ------------------------------------------------------------------------------------------------------------


def phrase(word: str, look: Look | None = None, named: Collection[str] = tuple(LOOKS), word_first: bool = False) -> str:
    """A figure in words: "smiling wooden robot waving facing left holding a balloon". named: axes that are said.

    word_first: "robot smiling wooden waving ...", as no caption of the training has it.
    """
    if look is None:
        return word
    said = {name: getattr(look, name) for name in named}
    parts = [said.get("expression"), said.get("material"), word, said.get("pose")]
    if word_first:
        parts = [word, *parts[:2], parts[3]]
    if "view" in said:
        parts.append(f"facing {look.view}")
    if "held" in said:
        parts.append("holding nothing" if look.held == "nothing" else f"holding {_article(look.held)}")
    return " ".join(part for part in parts if part)


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def place(scene: str) -> str:
    """Where a scene is, in words."""
    return {"beach": "on the beach", "space": "in space"}.get(scene, f"in the {scene}")


def prompt(figures: Sequence[str], scene: str | None = None, style: str | None = None) -> str:
    """The prompt of a picture; figures as phrases with words or placeholders, from left to right."""
    text = " and ".join(map(_article, figures))
    if scene:
        text += f" {place(scene)}"
    return text + f", {style} drawing" if style else text


def facts(figure: Figure, look: Look) -> list[str]:
    """What is true of a shown figure, a phrase each: what a vision tower learns to match pictures with."""
    return [
        figure.kind, f"{figure.body} body", f"{figure.belly} belly", figure.hat, f"{figure.hat_colour} hat",
        f"{figure.eyes} eyes", figure.legs, look.expression, look.material, look.pose, f"facing {look.view}",
        f"holding {look.held}",
    ]  # fmt: skip


def all_facts() -> list[str]:
    """Every phrase of `facts`, and of scenes and styles, in a fixed order."""
    values = [KINDS, *ATTRIBUTES.values()]
    figures = [Figure(*(options[i % len(options)] for options in values)) for i in range(max(map(len, values)))]
    looks = [Look(*(options[i % len(options)] for options in LOOKS.values())) for i in range(5)]
    of_figures = (facts(f, look) for f, look in itertools.product(figures, looks))
    backgrounds = [place(scene) for scene in SCENES] + [f"{style} drawing" for style in STYLES]
    return sorted({fact for some in of_figures for fact in some}) + backgrounds


def words() -> list[str]:
    """Every word that a text of this world can have."""
    options = [KINDS, SCENES, STYLES, *ATTRIBUTES.values(), *LOOKS.values()]
    texts = [" ".join(values) for values in options]
    texts += [prompt(["x", "x"], scene, "x") for scene in SCENES]
    texts += ["facing holding an body belly hat eyes nothing"]
    return sorted(set(" ".join(texts).replace(",", " ").split()) - {"x"})


assert [field.name for field in fields(Figure)][1:] == [*ATTRIBUTES]
assert [field.name for field in fields(Look)] == [*LOOKS]
