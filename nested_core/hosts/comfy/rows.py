"""Which text stands in which rows of a batch, and which part of which picture those rows are. Plain data, no host.

A call of the model has a batch: some texts, each for all pictures that are sampled at once. Other nodes cut it into
tiles or single prompts, put regions' texts in between, or arrange it anew. What a row is, its text says (`text`): the
subjects in it, and the entry of the sampler's lists that it comes from.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...prompt import ClassWord

#: Marks a text that is there to be steered away from.
NEGATIVE = "negative", "text"  # no string: no placeholder is like it

Area = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Entry:
    """One text of a sampler's lists in one step; its rows are marked with it.

    area: (h, w, y, x) of the latent that it is sampled in, or None for all of it.
    """

    area: Area | None


@dataclass(frozen=True)
class Window:
    """A part of what is sampled that is sampled by itself: indexes along an axis (0 images, 2 rows, 3 columns)."""

    axis: int
    indexes: tuple[int, ...]


@dataclass(frozen=True)
class Sampled:
    """What one step samples at once: images of (height, width) latent pixels; perhaps a window of more."""

    images: int
    grid: tuple[int, int]
    window: Window | None = None

    def picture(self, image: int) -> int:
        """Index, in all that is sampled, of an image of this step."""
        return self.window.indexes[image] if self.window is not None and self.window.axis == 0 else image


@dataclass(frozen=True)
class Group:
    """Batch rows from `start` to before `stop` that share one text.

    places: rows of the text by the key of a placeholder or, in a negative text, of a class word. image: index, in its
    step, of the image in row `start`; the next row has the next one. None where that can't be known. area: as in
    `Entry`. tile: the rows show neither all of the picture nor all of the area, or nobody knows what they show.
    negative: the text is steered away from.
    """

    start: int
    stop: int
    places: Mapping[str | ClassWord, tuple[int, ...]]
    image: int | None
    area: Area | None
    tile: bool
    negative: bool

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class _Row:
    places: dict[str | ClassWord, tuple[int, ...]]
    entry: Entry | None
    image: int | None
    tile: bool
    negative: bool


def clipped(area: Sequence[int], grid: tuple[int, int]) -> Area:
    """An area (h, w, y, x) without what lies outside of the picture, as the host samples it."""
    h, w, y, x = area
    return min(h, grid[0] - y), min(w, grid[1] - x), y, x


def groups_of(
    marked: Sequence[Mapping[Hashable, tuple[int, ...]]],
    sampled: Sampled,
    shape: tuple[int, int],
    coupled: bool = False,
) -> list[Group]:
    """The rows of a batch by text.

    Args:
        marked: what each batch row's text is marked with, as `text.rows_of` gives it.
        sampled: what the step samples.
        shape: (height, width) of the latent that the model was called with.
        coupled: another pack says that it put texts of regions behind the rows of the text they are regions of, for
            all images each. Such rows have no entry of their own; they show what the rows in front of them show.
    """
    entries = [next((key for key in marks if isinstance(key, Entry)), None) for marks in marked]
    total = {entry: entries.count(entry) for entry in entries}
    counted: dict[Entry | None, int] = {}
    rows: list[_Row] = []
    shown: Entry | None = None  # by the rows in front
    negative = False
    for number, (marks, entry) in enumerate(zip(marked, entries, strict=True)):
        image: int | None = None
        if entry is not None:
            shown, negative = entry, NEGATIVE in marks
            ordinal = counted[entry] = counted.get(entry, -1) + 1
            image = ordinal if total[entry] == sampled.images else None
        elif coupled and shown is not None and len(marked) % sampled.images == 0:
            entry, image = shown, number % sampled.images
        else:
            shown, negative = None, NEGATIVE in marks
        whole = entry is not None and shape == (sampled.grid if entry.area is None else entry.area[:2])
        words = (str, ClassWord) if negative else (str,)
        places = {key: at for key, at in marks.items() if isinstance(key, words)}
        rows.append(_Row(places, entry, image, not whole, negative))
    groups: list[Group] = []
    for number, row in enumerate(rows):
        area = row.entry.area if row.entry is not None else None
        group = Group(number, number + 1, row.places, row.image, area, row.tile, row.negative)
        if groups and _goes_on(groups[-1], group):
            groups[-1] = replace(groups[-1], stop=group.stop)
        else:
            groups.append(group)
    return groups


def _goes_on(group: Group, after: Group) -> bool:
    """Whether the rows of one group are more of what another one, in front of them, has."""
    image = None if group.image is None else group.image + after.start - group.start
    return after == replace(group, start=after.start, stop=after.stop, image=image)
