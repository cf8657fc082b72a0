"""Pictures of attention, drawn with Pillow: overlays with a legend, and the look into one point of a picture.

Pictures are tensors (H, W, 3) from 0 to 1, as the host has them. Colours are those of Okabe and Ito, which people with
any kind of colour vision tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]

PALETTE: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0), (0, 114, 178),
)  # fmt: skip
PAPER: Colour = (22, 24, 29)
INK: Colour = (236, 238, 242)
FAINT: Colour = (150, 156, 168)
_LEAST_WIDTH = 512


def colour_of(index: int) -> Colour:
    return PALETTE[index % len(PALETTE)]


def typeface(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()


def to_image(picture: Tensor) -> Image.Image:
    """(H, W, 3) -> an image."""
    pixels = (picture.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy(), "RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """An image -> (H, W, 3)."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).float() / 255


def _resized(heat: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(h, w) -> (H, W) for a size (W, H), smooth."""
    width, height = size
    return F.interpolate(heat[None, None].float().cpu(), size=(height, width), mode="bicubic")[0, 0].clamp(0, 1).numpy()


def _readable(image: Image.Image) -> Image.Image:
    """Small pictures enlarged, so that a legend below them can be read."""
    factor = -(-_LEAST_WIDTH // image.width)
    return (
        image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC) if factor > 1 else image
    )


def _tinted(image: Image.Image, layers: Sequence[tuple[np.ndarray, Colour]], strength: float = 0.82) -> Image.Image:
    """The picture in grey, with a colour where each heat (H, W) from 0 to 1 is."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    out = np.repeat(grey * 0.62 + 18, 3, -1)
    for heat, colour in layers:
        alpha = (strength * heat**1.3)[..., None]
        lit = np.array(colour, dtype=np.float32) * (0.45 + 0.55 * grey / 255)
        out = out * (1 - alpha) + lit * alpha
    return Image.fromarray(out.clip(0, 255).astype(np.uint8), "RGB")


def _outline(mask: np.ndarray, width: int) -> Image.Image:
    """The border of a mask (H, W) as an image mask."""
    inside = torch.from_numpy(mask.astype(np.float32))[None, None]
    size = 2 * width + 1
    wide = F.max_pool2d(inside, size, 1, width)
    narrow = -F.max_pool2d(-inside, size, 1, width)
    return Image.fromarray(((wide - narrow)[0, 0] > 0.5).to(torch.uint8).mul(255).numpy(), "L")


def overlay(picture: Tensor, heats: Tensor, masks: Tensor, labels: Sequence[tuple[str, str]]) -> Tensor:
    """A picture (H, W, 3) with each subject's relative heat (S, h, w) in its colour, the outline of its mask (S, h, w),
    and a legend of (placeholder, class word) below; at least 512 wide."""
    image = _readable(to_image(picture))
    shown = _tinted(image, [(_resized(heat, image.size), colour_of(i)) for i, heat in enumerate(heats)])
    line = max(1, image.width // 400)
    for i, mask in enumerate(masks):
        shown.paste(colour_of(i), (0, 0), _outline(_resized(mask, image.size) > 0.5, line))
    return to_tensor(_with_legend(shown, [(colour_of(i), *label) for i, label in enumerate(labels)]))


def _with_legend(image: Image.Image, entries: Sequence[tuple[Colour, str, str]]) -> Image.Image:
    size = max(15, image.width // 30)
    font, gap, row = typeface(size), size // 2, size + size // 2
    places, x, y = [], gap, gap
    for colour, name, word in entries:
        width = int(size * 1.5 + font.getlength(name) + gap + font.getlength(word))
        if x > gap and x + width > image.width - gap:
            x, y = gap, y + row
        places.append((x, y, colour, name, word))
        x += width + 2 * size
    sheet = Image.new("RGB", (image.width, image.height + y + row), PAPER)
    sheet.paste(image, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for x, y, colour, name, word in places:
        top = image.height + y
        draw.rounded_rectangle((x, top + size // 6, x + size, top + size + size // 6), size // 5, fill=colour)
        draw.text((x + size * 1.5, top), name, INK, font)
        draw.text((x + size * 1.5 + font.getlength(name) + gap, top), word, FAINT, font)
    return sheet


# --- a grid of pictures -----------------------------------------------------------------------------------------------


def picture_grid(
    pictures: Sequence[Tensor], across: Sequence[str], down: Sequence[str], titles: tuple[str, str], cell: int
) -> Tensor:
    """Pictures (H, W, 3 or 4), row by row, with what stands above the columns and beside the rows; (H', W', 3).

    titles: of the columns and of the rows. cell: the longer side of each picture in the grid, in pixels.
    """
    images = [to_image(picture[..., :3]) for picture in pictures]
    factor = cell / max(max(image.size) for image in images)
    width = max(1, round(max(image.width for image in images) * factor))
    height = max(1, round(max(image.height for image in images) * factor))
    size = max(15, cell // 20)
    font, faint, gap = typeface(size), typeface(max(13, size * 3 // 4)), max(6, cell // 64)
    beside = gap * 2 + int(max([faint.getlength(titles[1]), *(font.getlength(text) for text in down)]))
    above = gap * 2 + 2 * size + size // 2
    sheet = Image.new("RGB", (beside + len(across) * (width + gap), above + len(down) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((beside, gap), titles[0], FAINT, faint)
    for column, text in enumerate(across):
        draw.text((beside + column * (width + gap) + width / 2, above - gap), text, INK, font, anchor="ms")
    for row, text in enumerate(down):
        middle = above + row * (height + gap) + height / 2
        if row == 0:
            draw.text((gap, above), titles[1], FAINT, faint)
        draw.text((gap, middle), text, INK, font, anchor="lm")
    for number, image in enumerate(images):
        x = beside + number % len(across) * (width + gap)
        y = above + number // len(across) * (height + gap)
        size_in_cell = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        sheet.paste(image.resize(size_in_cell, Image.Resampling.LANCZOS), (x, y))
    return to_tensor(sheet)


# --- the look into one point ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointFigure:
    """What `explain` draws.

    picture: (H, W, 3). at: the point in it, (x, y) from 0 to 1. name, word: the subject's placeholder and class word.
    values: the query-dependent values as colours (h, w, 3); constant: the one value of a layer without nested
    attention, (3,). tokens: nested attention of the query over the subject's tokens, (N,). photos: what the encoder was
    shown (views, S, S, 3). sources: (views, g, g) for the strongest token and for all tokens, each summing to 1 over
    the views; or, where there are none, why.
    """

    picture: Tensor
    at: tuple[float, float]
    name: str
    word: str
    values: Tensor
    constant: Tensor
    tokens: Tensor
    photos: Tensor | None
    sources: tuple[Tensor, Tensor] | str
    footer: str


_PANEL, _GAP, _TITLE = 420, 28, 62


def explain(point: PointFigure) -> Tensor:
    """The figure for one point of the picture (the paper's figures 4 and 5), (H, W, 3), 1372 pixels wide."""
    columns, rows = 3, 2
    sheet = Image.new(
        "RGB",
        (columns * _PANEL + (columns + 1) * _GAP, rows * (_PANEL + _TITLE) + (rows + 1) * _GAP + 30),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    accent = PALETTE[0]
    strongest = int(point.tokens.argmax())

    def place(number: int, title: str, under: str, image: Image.Image) -> None:
        x = _GAP + (number % columns) * (_PANEL + _GAP)
        y = _GAP + (number // columns) * (_PANEL + _TITLE + _GAP)
        draw.text((x, y), title, INK, typeface(23))
        draw.text((x, y + 30), under, FAINT, typeface(17))
        image.thumbnail((_PANEL, _PANEL), Image.Resampling.LANCZOS)
        sheet.paste(image, (x, y + _TITLE))

    picture = _fitted(to_image(point.picture))
    marked = picture.copy()
    _mark(ImageDraw.Draw(marked), point.at, marked.size, accent)
    place(0, "The picture, and the point", f"x {point.at[0]:.2f}, y {point.at[1]:.2f}", marked)

    colours = to_image(point.values).resize(picture.size, Image.Resampling.BICUBIC)
    shown = colours.copy()
    _mark(ImageDraw.Draw(shown), point.at, shown.size, INK)
    place(1, f"What {point.name} is, place by place", "values of the nested attention, as colours", shown)
    constant = to_image(point.constant[None, None].expand(2, 2, 3)).resize(picture.size)
    place(2, f'What "{point.word}" would be', "without nested attention: one value everywhere", constant)

    place(3, f"Which of {len(point.tokens)} tokens answer", f"nested attention there; strongest: {strongest}",
          _bars(point.tokens, accent))  # fmt: skip
    if isinstance(point.sources, str) or point.photos is None:
        place(4, "Where they come from", "", _note(str(point.sources)))
    else:
        one, every = point.sources
        place(4, f"Where token {strongest} comes from", "Q-Former attention over the photo",
              _photo(point.photos, one, accent))  # fmt: skip
        place(5, "Where the answer comes from", "all tokens, by how much they answer",
              _photo(point.photos, every, accent))  # fmt: skip
    draw.text((_GAP, sheet.height - 30 - _GAP // 2), point.footer, FAINT, typeface(17))
    return to_tensor(sheet)


def _fitted(image: Image.Image) -> Image.Image:
    factor = _PANEL / max(image.size)
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def _mark(draw: ImageDraw.ImageDraw, at: tuple[float, float], size: tuple[int, int], colour: Colour) -> None:
    x, y, r = at[0] * size[0], at[1] * size[1], 11
    for width, fill in ((7, PAPER), (4, colour)):
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=width)


def _bars(tokens: Tensor, accent: Colour) -> Image.Image:
    """Bars over the tokens in their order, the strongest in colour; of many, the highest of each group."""
    image = Image.new("RGB", (_PANEL, _PANEL), (30, 33, 39))
    draw = ImageDraw.Draw(image)
    most = 64
    group = -(-len(tokens) // most)
    heights = F.max_pool1d(F.pad(tokens.float(), (0, -len(tokens) % group))[None], group)[0]
    top = float(heights.max()) or 1.0
    margin = 30
    width = (_PANEL - 2 * margin) / len(heights)
    floor = _PANEL - margin
    for i, height in enumerate(heights.tolist()):
        x = margin + i * width
        colour = accent if height == top else (118, 126, 140)
        draw.rectangle(
            (x, floor - height / top * (_PANEL - 2 * margin - 24), x + max(1.0, width * 0.72), floor), fill=colour
        )
    draw.line((margin, floor, _PANEL - margin, floor), fill=FAINT)
    draw.text((margin, 8), f"{top:.0%} at most", FAINT, typeface(16))
    for number, x in ((0, margin), (len(tokens) - 1, _PANEL - margin - 34)):
        draw.text((x, floor + 5), str(number), FAINT, typeface(15))
    return image


def _photo(photos: Tensor, sources: Tensor, accent: Colour) -> Image.Image:
    """The view that most comes from, with the source in colour; of several views it says which."""
    strongest = int(sources.flatten(1).sum(1).argmax())
    image = to_image(photos[strongest]).resize((_PANEL, _PANEL), Image.Resampling.LANCZOS)
    heat = sources[strongest]
    low, high = heat.median(), heat.amax()
    shown = _tinted(image, [(_resized((heat - low) / (high - low).clamp_min(1e-12), image.size), accent)])
    if len(photos) > 1:
        ImageDraw.Draw(shown).text((12, 10), f"view {strongest + 1} of {len(photos)}", INK, typeface(18))
    return shown


def _note(text: str) -> Image.Image:
    image = Image.new("RGB", (_PANEL, _PANEL), (30, 33, 39))
    ImageDraw.Draw(image).multiline_text((30, 150), text, FAINT, typeface(22), spacing=10)
    return image
