"""Grid Values, Picture Grid."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from comfy_api.v0_0_2 import io

from ..nested_core.errors import NestedAttentionError
from ..nested_core.figures import picture_grid
from .record import CATEGORY_SEE
from .types import NestedGrid

log = logging.getLogger(__name__)

_MOST = 100  # pictures of a grid: a slip of the pen should not sample for a day


@dataclass(frozen=True)
class Grid:
    """A grid's two axes: titles, and values as they were written."""

    titles: tuple[str, str]
    across: tuple[str, ...]
    down: tuple[str, ...]


def _written_values(text: str, axis: str) -> tuple[str, ...]:
    """The numbers of "0.5, 1, 1.5" as they are written. Raises NestedAttentionError at what is none."""
    written = tuple(piece for piece in text.replace(",", " ").replace(";", " ").split())
    for piece in written:
        try:
            number = float(piece)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise NestedAttentionError(
                f'"{piece}" in {axis} is no number. Write values with commas between them, such as 0.5, 1, 1.5.'
            )
    if not written:
        raise NestedAttentionError(f"{axis} is empty: it needs one value at least, such as 1.")
    return written


class NestedGridValues(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedGridValues",
            display_name="Grid Values",
            category=CATEGORY_SEE,
            description=(
                "Two rows of numbers for two knobs, such as strength and identity of Apply Subject (Advanced). What "
                "they are connected to runs once for each pair; Picture Grid lays the pictures out."
            ),
            search_aliases=["nested attention", "xy plot", "grid", "sweep", "compare", "list"],
            inputs=[
                io.String.Input(
                    "across",
                    default="0.6, 1, 1.4",
                    tooltip="The values of the first knob, one column of pictures each.",
                ),
                io.String.Input(
                    "down",
                    default="1, 2, 4",
                    tooltip="The values of the second knob, one row of pictures each. A single value: one row.",
                ),
                io.String.Input(
                    "across_title", default="strength", tooltip="What Picture Grid writes above the columns."
                ),
                io.String.Input("down_title", default="identity", tooltip="What Picture Grid writes beside the rows."),
            ],
            outputs=[
                io.Float.Output(
                    display_name="across", is_output_list=True, tooltip="For the first knob: a number for each picture."
                ),
                io.Float.Output(
                    display_name="down", is_output_list=True, tooltip="For the second knob: a number for each picture."
                ),
                NestedGrid.Output(display_name="grid", tooltip="For Picture Grid."),
            ],
        )

    @classmethod
    def execute(cls, across: str, down: str, across_title: str, down_title: str) -> io.NodeOutput:
        columns, rows = _written_values(across, "across"), _written_values(down, "down")
        if len(columns) * len(rows) > _MOST:
            raise NestedAttentionError(
                f"{len(columns)} values across and {len(rows)} down are {len(columns) * len(rows)} pictures; at most "
                f"{_MOST} fit on a grid. Take fewer values."
            )
        pairs = [(float(column), float(row)) for row in rows for column in columns]
        grid = Grid((across_title.strip(), down_title.strip()), columns, rows)
        return io.NodeOutput([column for column, _ in pairs], [row for _, row in pairs], grid)


class NestedPictureGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedPictureGrid",
            display_name="Picture Grid",
            category=CATEGORY_SEE,
            description="Lays out the pictures that Grid Values had made, with their values above and beside them.",
            search_aliases=["nested attention", "xy plot", "contact sheet", "image grid", "compare"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="From VAE Decode, behind the sampler that the values went to."),
                NestedGrid.Input("grid", tooltip="From the same Grid Values."),
                io.Int.Input(
                    "cell",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="The longer side of each picture in the grid, in pixels.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image", tooltip="The grid. Of a batch, one grid for each of its pictures."
                )
            ],
        )

    @classmethod
    def execute(cls, images: list[torch.Tensor], grid: list[Grid], cell: list[int]) -> io.NodeOutput:
        axes = grid[0]
        columns, rows = len(axes.across), len(axes.down)
        if len(images) != columns * rows:
            raise NestedAttentionError(
                f"A grid of {columns} x {rows} takes {columns * rows} pictures, {len(images)} came. Connect images to "
                "what is made with the values of this Grid Values: its across or down must go to a knob that the "
                "pictures depend on."
            )
        if len({len(image) for image in images}) > 1:
            raise NestedAttentionError(
                f"The pictures come in batches of {', '.join(str(len(image)) for image in images)}; a grid needs the "
                "same number of pictures from every pair of values."
            )
        _warn_of_a_loose_axis(images, axes)
        sheets = [
            picture_grid([image[i] for image in images], axes.across, axes.down, axes.titles, cell[0])
            for i in range(len(images[0]))
        ]
        return io.NodeOutput(torch.stack(sheets))


def _warn_of_a_loose_axis(images: list[torch.Tensor], axes: Grid) -> None:
    """Both lists are as long as the grid: with one of them connected the pictures are all there, and labelled wrong."""
    columns = len(axes.across)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]

    def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    if len(set(axes.down)) > 1 and all(same(row, rows[0]) for row in rows):
        log.warning("Picture Grid: all rows are the same. Is down of Grid Values connected to a knob?")
    by_column = [list(column) for column in zip(*rows, strict=True)]
    if len(set(axes.across)) > 1 and all(same(column, by_column[0]) for column in by_column):
        log.warning("Picture Grid: all columns are the same. Is across of Grid Values connected to a knob?")
