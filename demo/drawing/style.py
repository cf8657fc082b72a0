"""What a style makes of a drawing once everything is drawn."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageFilter

from .canvas import INKS, SIZE, Canvas


def finish(canvas: Canvas, style: str, rng: random.Random, size: int) -> Image.Image:
    """The canvas at its size, in a style."""
    small = canvas.image.resize((size, size), Image.Resampling.BOX)
    figure = np.asarray(canvas.regions.resize((size, size), Image.Resampling.NEAREST)) > 0
    if style == "flat":
        return small
    pixels = np.asarray(small, np.float32)
    y, x = np.mgrid[:size, :size] * (SIZE / size)
    if style == "comic":  # halftone dots behind the figures; the ink is in the drawing already
        dots = (np.hypot(x % 6 - 3, y % 6 - 3) < 1.7) & ~figure
        pixels = np.where(dots[..., None], pixels * 0.72, pixels)
    elif style == "watercolour":
        soft = np.asarray(small.filter(ImageFilter.GaussianBlur(1.1 * size / SIZE)), np.float32)
        edge = np.abs(soft - pixels).mean(-1, keepdims=True)
        wash = 1 + 0.13 * _smooth_noise(rng, size, 9)[..., None]
        pixels = 255 - (255 - soft) * 0.74 * wash - edge * 0.5
    elif style == "crayon":  # slanted strokes through which the paper shows
        strokes = np.sin((x + y) * 1.15 + 2 * _smooth_noise(rng, size, 20)) + 0.5 * _smooth_noise(rng, size, 43)
        paper = np.clip(strokes - 0.15, 0, 1)[..., None] * np.where(figure, 0.34, 0.6)[..., None]
        pixels = pixels + (250 - pixels) * paper
    elif style == "pencil":  # lines of changing pressure, fainter behind the figures
        paper = np.asarray(INKS[style].paper, np.float32)
        pressure = np.where(figure, 1.0, 0.55) * (0.92 + 0.16 * _smooth_noise(rng, size, 24))
        pixels = paper + (pixels - paper) * np.minimum(pressure, 1.1)[..., None]
    else:  # neon: lines glow, those behind the figures less
        dark = np.asarray(INKS[style].paper, np.float32)
        pixels = dark + (pixels - dark) * np.where(figure, 1.0, 0.6)[..., None]
        light = Image.fromarray(np.clip(pixels - dark, 0, 255).astype(np.uint8))
        glow = np.asarray(light.filter(ImageFilter.GaussianBlur(2.4 * size / SIZE)), np.float32)
        pixels = pixels + 0.8 * glow
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def _smooth_noise(rng: random.Random, size: int, cells: int) -> np.ndarray:
    """Values of -1 to 1, (size, size), that change over size / cells pixels."""
    grid = np.random.default_rng(rng.getrandbits(32)).uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid, "F").resize((size, size), Image.Resampling.BICUBIC))
