"""A first look at the data, before any model is loaded: counts, sizes, what is wrong, a contact sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from ..errors import NestedAttentionError
from ..faces import ffhq_square
from ..figures import FAINT, INK, PALETTE, PAPER, typeface
from .catalogue import Catalogue
from .config import DataConfig, TrainingConfig
from .data import mask_of, picture_of
from .pictures import flat, to_tensor
from .references import Place
from .sources import Sample

_CELL, _CELLS, _COLUMNS = 160, 96, 8  # of the contact sheet: pixels, pictures at most, pictures in a row
_SAME = 0.985  # correlation of two small pictures; a photo saved again in another size and quality has 0.99
_GRID = 16  # side of those small pictures
_FEW = 8  # cases that are listed


@dataclass
class Seen:
    """One picture, looked at.

    error: why it can't be read, or what is wrong with its mask; then the rest is None. thumbnail: for the contact
    sheet, of those that are on it.
    """

    sample: Sample
    size: tuple[int, int] | None = None
    thumbnail: Image.Image | None = None
    small: Tensor | None = None
    error: str = ""


def look(config: TrainingConfig) -> tuple[str, bool]:
    """Prints and returns what there is to train on, and whether a training would take it as it is.

    Writes a contact sheet to `output`/look.png. Raises NestedAttentionError for what can't be read at all.
    """
    catalogue = Catalogue(config.data)
    # Every picture once; what is kept of each is small. Pillow decodes outside of Python's lock.
    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        pictured = [sample for sample in catalogue.samples.values() if sample.picture]
        drawn = _on_sheet(catalogue, pictured)
        seen = list(pool.map(lambda s: _seen(s, catalogue.places.get(s.name), s.name in drawn), pictured))
    broken = [f"{one.sample.name}: {one.error}" for one in seen if one.error]
    stops = bool(catalogue.problems) or (bool(broken) and config.data.broken == "stop")
    lines = [*_counts(catalogue), *_sizes(seen, config.data), ""]
    for problem in catalogue.problems:
        lines += [str(problem), ""]
    if broken:
        what = "are skipped" if config.data.broken == "skip" else 'stop a training (data.broken: "skip" goes on)'
        lines += [*_cases(f"{len(broken)} pictures can't be read; they {what}:", broken), ""]
    for title, cases in _worth_a_look(catalogue, seen, config.data):
        lines += [*_cases(title, cases), ""]
    sheet = Path(config.output) / "look.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(catalogue, [one for one in seen if one.sample.name in drawn]).save(sheet)
    lines += [f"Contact sheet: {sheet}", "A training would stop at this." if stops else "A training can begin."]
    text = "\n".join(lines)
    print(text)
    return text, not stops


def _cases(title: str, cases: Sequence[str]) -> list[str]:
    more = [f"  and {len(cases) - _FEW} more"] if len(cases) > _FEW else []
    return [title, *(f"  {case}" for case in cases[:_FEW]), *more]


def _on_sheet(catalogue: Catalogue, pictured: Sequence[Sample]) -> set[str]:
    """The first pictures of as many subjects as the contact sheet has room for, by name."""
    rank = {sample.name: i for views in catalogue.views.values() for i, sample in enumerate(views)}
    return {s.name for s in sorted(pictured, key=lambda s: (rank.get(s.name, 0), s.name))[:_CELLS]}


def _seen(sample: Sample, place: Place | None, drawn: bool) -> Seen:
    try:
        image = picture_of(sample)
        mask = mask_of(sample, image)
    except NestedAttentionError as error:
        return Seen(sample, error=str(error))
    size = image.size
    if mask is not None and np.asarray(mask).max() < 128:
        return Seen(sample, error="its mask is black, or nearly: it should be white (255) where the subject is.")
    image = flat(image)
    small = to_tensor(image.resize((_GRID, _GRID), Image.Resampling.BOX)).flatten()
    if not drawn:
        return Seen(sample, size, small=small)
    thumbnail = image.copy()
    thumbnail.thumbnail((_CELL, _CELL))
    if outline := _outline(place, mask):
        scale = thumbnail.width / size[0]
        draw = ImageDraw.Draw(thumbnail)
        draw.polygon([(x * scale, y * scale) for x, y in outline], outline=PALETTE[0], width=2)
    return Seen(sample, size, thumbnail, small)


def _outline(place: Place | None, mask: Image.Image | None) -> list[tuple[float, float]]:
    """The corners of what a reference is cut to."""
    box = place.box if place else None
    if place and place.landmarks:
        try:
            centre, axis = ffhq_square(torch.tensor(place.landmarks, dtype=torch.float64), 0)
        except NestedAttentionError:
            return []
        down = torch.stack((-axis[1], axis[0]))
        corners = (centre - axis - down, centre + axis - down, centre + axis + down, centre - axis + down)
        return [(float(x), float(y)) for x, y in corners]
    if box is None and mask is not None:
        box = mask.point(lambda value: 255 if value > 127 else 0).getbbox()
    if box is None:
        return []
    left, top, right, bottom = box
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _counts(catalogue: Catalogue) -> list[str]:
    captions = sum(len(picture.captions) for picture in catalogue.pictures)
    several = sum(picture.several for picture in catalogue.pictures)
    views = sum(map(len, catalogue.views.values()))
    words = Counter(catalogue.classes[subject] or "(nothing)" for subject in catalogue.views)
    numbers = sorted(map(len, catalogue.views.values())) or [0]
    shown = sum(map(catalogue.repeats, catalogue.pictures))
    lines = [
        f"{views} pictures of {len(catalogue.views)} subjects, {several} of several subjects; "
        f"{len(catalogue.pictures)} are targets, with {captions} captions",
        f"class words: {', '.join(f'{word} ({count} subjects)' for word, count in words.most_common(_FEW))}",
        f"pictures per subject: {numbers[0]} to {numbers[-1]}, half have {numbers[len(numbers) // 2]} or more",
    ]
    if shown != len(catalogue.pictures):
        lines.append(f"an epoch: {shown} examples, by the folders' repeats")
    said = sum(picture.sample.reference is not None for picture in catalogue.pictures)
    if said or catalogue.places:
        lines.append(f"references that are said: {said}; pictures with a box or landmarks: {len(catalogue.places)}")
    return lines


def _sizes(seen: Sequence[Seen], config: DataConfig) -> list[str]:
    sizes = sorted((one.size for one in seen if one.size), key=lambda size: size[0] * size[1])
    if not sizes:
        return []
    formats = Counter(str(one.sample.picture) for one in seen)
    small = sum(min(size) < config.resolution for size in sizes)
    lines = [
        f"sizes: {' x '.join(map(str, sizes[0]))} to {' x '.join(map(str, sizes[-1]))}; "
        f"files: {', '.join(f'{count} {name}' for name, count in formats.most_common())}"
    ]
    if small:
        lines.append(f"{small} are smaller than data.resolution {config.resolution}: they are enlarged")
    return lines


def _worth_a_look(catalogue: Catalogue, seen: Sequence[Seen], config: DataConfig) -> Iterator[tuple[str, list[str]]]:
    """What stops nothing, and may be a mistake."""
    if catalogue.homeless:
        yield f"{len(catalogue.homeless)} pictures lie in no subject's folder and are not used:", catalogue.homeless
    rivals = [f"{s.name}: {', '.join(s.pictures)}" for s in catalogue.samples.values() if len(s.pictures) > 1]
    if rivals:
        yield f"{len(rivals)} pictures share their name; the first of each is used:", rivals
    alone = [subject for subject, views in catalogue.views.items() if len(views) == 1]
    if alone and config.layout != "pictures":
        yield f"{len(alone)} subjects have one picture, which is its own reference and teaches less:", alone
    if config.reference == "self" and (whole := catalogue.uncut()):
        yield f"{len(whole)} pictures do not say where their subject is; the reference is the whole picture:", whole
    if pairs := near_duplicates(catalogue, seen):
        yield f"{len(pairs)} pairs of near-duplicates between subjects:", [f"{one} and {other}" for one, other in pairs]


def near_duplicates(catalogue: Catalogue, seen: Sequence[Seen]) -> list[tuple[str, str]]:
    """Pairs of pictures of different subjects that show the same, mirrored or not: by their small pictures."""
    whose = catalogue.subject_by_view()
    known = [one for one in seen if one.small is not None and one.sample.name in whose]
    if len(known) < 2:
        return []
    small = torch.stack([one.small for one in known if one.small is not None])
    mirrored = small.view(-1, _GRID, _GRID, 3).flip(2).flatten(1)
    small, mirrored = (F.normalize(pixels - pixels.mean(1, keepdim=True)) for pixels in (small, mirrored))
    pairs = []
    for start in range(0, len(known), 1024):
        part = small[start : start + 1024]
        alike = torch.maximum(part @ small.T, part @ mirrored.T) > _SAME
        for row, column in alike.nonzero().tolist():
            one, other = known[start + row].sample.name, known[column].sample.name
            if start + row < column and whose[one] != whose[other]:
                pairs.append((one, other))
    return pairs


def contact_sheet(catalogue: Catalogue, shown: Sequence[Seen]) -> Image.Image:
    """Pictures with their names and class words, and with what a reference would be cut to outlined."""
    whose = catalogue.subject_by_view()
    shown = sorted(shown, key=lambda one: one.sample.name)
    font, line, gap = typeface(13), 18, 8
    columns = min(_COLUMNS, max(1, len(shown)))
    rows = -(-len(shown) // columns)
    step = (_CELL + gap, _CELL + 2 * line + gap)
    sheet = Image.new("RGB", (gap + columns * step[0], gap + max(1, rows) * step[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, one in enumerate(shown):
        x, y = gap + number % columns * step[0], gap + number // columns * step[1]
        if one.thumbnail is not None:
            at = (x + (_CELL - one.thumbnail.width) // 2, y + (_CELL - one.thumbnail.height) // 2)
            sheet.paste(one.thumbnail, at)
        else:
            draw.text((x + _CELL / 2, y + _CELL / 2), "can't be read", FAINT, font, anchor="mm")
        word = catalogue.classes.get(whose.get(one.sample.name, ""), "")
        for text, colour, below in ((one.sample.name, INK, 0), (word, FAINT, line)):
            draw.text((x, y + _CELL + below), _short(text, font), colour, font)
    return sheet


def _short(text: str, font: object) -> str:
    """The end of a text that is too wide for its cell."""
    while font.getlength(text) > _CELL and len(text) > 4:  # type: ignore[attr-defined]
        text = "..." + text[4:]
    return text
