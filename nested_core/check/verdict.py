"""What a search found, in plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..encoder import EncoderConfig
from .keys import KIN, Kinship
from .search import Found
from .settings import NAMES, Settings, settings_of
from .statistics import interval, photos_to_settle

SURE = 0.95
"""Certainty from which on a setting is called settled, and remembered."""
_OTHER_CAUSES = (
    "the wrong vision tower; a LoRA or another patch on the model that changes its cross-attention; photos unlike "
    "those that it was trained on (for a face encoder: not cut out and upright)."
)
WORDS = {
    "image_features": "image features", "value_norm": "value norm", "alpha": "alpha", "pooled": "pooled text vector",
}  # fmt: skip


def works(found: Found) -> bool:
    """Whether the subject lowers the error at all, with SURE certainty."""
    return interval(found.gain())[0] > 0


def is_about_the_subject(found: Found) -> bool:
    """Whether the encoder's own photo helps more than another one, with SURE certainty."""
    return interval(found.own())[0] > 0


def open_settings(found: Found) -> tuple[str, ...]:
    """Which settings were tried at several values, and have a value in the winner."""
    return tuple(
        name
        for name in NAMES
        if getattr(found.settings, name) is not None and len({getattr(c, name) for c in found.candidates}) > 1
    )


def shown(found: Found, name: str) -> str:
    """The winner's value of a setting."""
    value = getattr(found.settings, name)
    return value if isinstance(value, str) else f"{value:g}"


def settled(found: Found) -> dict[str, Any]:
    """The settings that are sure; none where it is not sure that the encoder sees its photos."""
    if not _told(found):
        return {}
    sure = {name: getattr(found.settings, name) for name in open_settings(found) if found.certainty(name) >= SURE}
    if "value_norm" not in sure:
        sure.pop("alpha", None)  # it is a factor on what the norm says
    return sure


def _helps(differences: Tensor) -> bool | None:
    """Whether what was measured in each photo, (n,), is above 0 on average, with SURE certainty. None where more photos
    might tell: it is above 0 so far, and in most photos."""
    better = int((differences > 0).sum())
    if interval(differences)[0] > 0:
        return True
    return None if float(differences.mean()) > 0 and better > len(differences) / 2 else False


def _told(found: Found) -> bool:
    """Whether the encoder sees its photos, and either lowers the error or has no leaning to.

    One that learned from other pictures of a subject than the one it sees need not lower the error of that one.
    """
    return is_about_the_subject(found) and _helps(found.gain()) is not None


def _does_nothing(found: Found) -> bool:
    """Whether the error is not lowered; a little lower in most photos is what the best of many has by chance."""
    gain, own = _helps(found.gain()), _helps(found.own())
    return own is not True and (gain is False or (gain is None and own is False))


def headline(found: Found) -> str:
    """The outcome in a few words."""
    if _told(found):
        return f"{found.settings}"
    if _does_nothing(found):
        return "does nothing for these photos on this model"
    if _helps(found.own()) is False:
        return "works, but does not see these photos"
    return "not sure yet: more photos are needed"


def report(found: Found, config: EncoderConfig, name: str, kin: Kinship | None, photos: str = "photos") -> str:
    """What was found, in words; `table_text` has the figures.

    config: as the loader gave it. name: of the encoder's file.
    """
    count = found.photos
    lines = [f"Check Encoder: {name}, {count} {photos}, {found.passes} forward passes", ""]
    lines += _effect(found, kin)
    if _told(found):
        lines += ["", f"Most likely trained with: {found.settings}.", *_certainties(found, count)]
        now = settings_of(config)
        if now != found.settings:
            lines.append(f"The encoder was loaded with: {now}. {_where(found, now)}")
    return "\n".join(lines)


def _effect(found: Found, kin: Kinship | None) -> list[str]:
    gain, own = found.gain(), found.own()
    said = f"With the subject the denoising error is {_change(gain)} (best of {len(found.candidates)} combinations)."
    beside = f"When it sees the photo itself the error is {_change(own)} than when it sees another one."
    if _told(found):
        if works(found):
            return [f"This encoder works on this model. {said} {beside}"]
        return [f"This encoder sees these photos on this model. {beside} {said}"]
    if _does_nothing(found):
        return [f"THIS ENCODER DOES NOTHING FOR THESE PHOTOS ON THIS MODEL. {said}", _cause(kin)]
    if _helps(own) is False:
        return [
            f"WHAT THIS ENCODER SEES IS NOT THE PHOTO. {said} But another photo does as well. {beside}",
            "Most likely it is the wrong vision tower, or the photos show the same subject. "
            "Load the CLIP vision model that the encoder was trained with, and give photos of different subjects.",
        ]
    needed = [photos_to_settle(each) for each in (gain, own) if _helps(each) is None]
    most = max(needed, key=lambda number: number or math.inf)
    more = f"About {most - found.photos} more" if most and most > found.photos else "Some more" if most else "Many more"
    return [f"NOT SURE YET whether this encoder works on this model. {said} {beside} {more} photos would settle it."]


def _cause(kin: Kinship | None) -> str:
    if kin is None:
        return f"Likely causes: it was made for another base model; {_OTHER_CAUSES}"
    if kin.shaped < 1.5:
        return (
            "Its keys are as even as random numbers are: most likely it was hardly trained, or the file is damaged. "
            "Get it again."
        )
    if kin.likeness < KIN:
        return (
            f"Its keys do not lie where this model's own keys lie (likeness {kin.likeness:.2f}; {KIN:g} and more where "
            "they were made for each other): most likely it was made for another base model. Load the checkpoint that "
            "it was trained on, or one made from that."
        )
    return (
        f"Its keys are of this model's kind (likeness {kin.likeness:.2f}), so the base model seems right. Likely "
        f"causes: {_OTHER_CAUSES}"
    )


def _certainties(found: Found, count: int) -> list[str]:
    lines = []
    for name in open_settings(found):
        certainty = found.certainty(name)
        text = f"  {WORDS[name]}: {shown(found, name)}, {certainty:.0%} sure"
        if certainty < SURE:
            text += f". {_more(found, name, count)}"
        lines.append(text)
    return lines


def _more(found: Found, name: str, count: int) -> str:
    """What would settle a setting: its nearest rival with another value."""
    chances, behind = found.chances, found.behind()
    rivals = [i for i, c in enumerate(found.candidates) if getattr(c, name) != getattr(found.settings, name)]
    rival = max(rivals, key=lambda i: float(chances[i]))
    needed = photos_to_settle(behind[rival])
    other = f"Nearly as good: {found.candidates[rival]}"
    if needed is None:
        return f"{other}. No number of photos tells them apart; either will do."
    return f"{other}. About {max(needed - count, 1)} more photos would settle it."


def _where(found: Found, now: Settings) -> str:
    if now not in found.candidates:
        return ""
    behind = found.behind()[found.candidates.index(now)]
    return f"With that the error is {_change(behind, compared=True)}."


def _change(differences: Tensor, compared: bool = False) -> str:
    """The mean of per-photo differences (n,), as a share of the error without a subject, with its interval and count.

    compared: a positive difference is a higher error, instead of a lower one.
    """
    low, high = interval(differences)
    mean = float(differences.mean())
    word = "lower" if (mean > 0) != compared else "higher"
    if mean < 0:
        mean, low, high, differences = -mean, -high, -low, -differences
    photos = f"{int((differences > 0).sum())} of {len(differences)} photos"
    return f"{mean:.2%} {word} ({low:.2%} to {high:.2%}; {word} in {photos})"


@dataclass(frozen=True)
class Line:
    """A line of the table: how far above the winner's error, in each photo (n,), and the chance to be the best."""

    title: str
    differences: Tensor
    chance: float | None = None


def table(found: Found, most: int = 12) -> list[Line]:
    """The best combinations, at most so many; then the winner when it sees another photo, and no subject."""
    behind, chances = found.behind(), found.chances
    order = sorted(range(len(behind)), key=lambda i: float(behind[i].mean()))[:most]
    lines = [Line(str(found.candidates[i]), behind[i], float(chances[i])) for i in order]
    return [*lines, Line("another photo", found.own()), Line("no subject", found.gain())]


def table_text(found: Found) -> str:
    """The table as text, for a font of one width."""
    lines = table(found)
    width = max(len(line.title) for line in lines)
    text = [f"{'Error above the best':{width}}      mean   95 % interval        worse in  chance"]
    for line in lines:
        low, high = interval(line.differences)
        worse = f"{int((line.differences > 0).sum())} of {len(line.differences)}"
        chance = "" if line.chance is None else f"{line.chance:.0%}"
        between = f"{low:+.2%} to {high:+.2%}"
        text.append(
            f"{line.title:{width}}  {float(line.differences.mean()):+8.2%}   {between:20} {worse:>8}  {chance:>6}"
        )
    return "\n".join(text)


def summary(found: Found, model: str) -> str:
    """One line for the file of what is remembered."""
    said = ", ".join(f"{name} {found.certainty(name):.0%}" for name in open_settings(found))
    return f"{found.settings}; certainty: {said}; {found.photos} photos on {model}"
