"""Draws the small world: RGB pictures of 128 x 128 by default, each with a map of which part of which figure it shows.

python -m demo.drawing sheet.png      a contact sheet of the world, to look at
"""

from .picture import NEXT_FIGURE, PART_OF, PARTS, SIZE, VERSION, Picture, render, sheet, square_around

__all__ = ["NEXT_FIGURE", "PARTS", "PART_OF", "SIZE", "VERSION", "Picture", "render", "sheet", "square_around"]
