"""Picture files as people have them: upright, transparent or not, of any depth; and other views of one picture."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from ..errors import NestedAttentionError

with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl")
"""Of pictures; what this machine's Pillow can't read of them is named, not passed over."""
_PLUGINS = {"heic": "pillow-heif", "heif": "pillow-heif", "avif": "pillow>=11.3", "jxl": "pillow-jxl-plugin"}
# What Pillow raises for damaged bytes, one decoder or another.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


class BrokenPicture(NestedAttentionError):
    """A picture file that can't be read."""


def open_picture(name: str, extension: str, read: Callable[[], bytes]) -> Image.Image:
    """A picture file as RGB, upright; as RGBA where some of it is transparent.

    name, extension: for messages. Raises BrokenPicture when it can't be read.
    """
    try:
        with Image.open(io.BytesIO(read())) as opened:
            image = _eight_bits(ImageOps.exif_transpose(opened))
    except _DAMAGED as error:
        said = str(error) or type(error).__name__
        if "cannot identify" in said:
            said = "it is no picture that Pillow knows"
        if package := _PLUGINS.get(extension.rpartition(".")[2]):
            said += f" (.{extension} needs {package}: pip install '{package}')"
        raise BrokenPicture(f"Could not read the picture {name}.{extension}: {said}. Repair or remove it.") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            return image
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pictures of 16 bits per channel scaled: `convert` would clip them to white."""
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, np.float32)
        peak = pixels.max(initial=0)
        scale = 65535 if peak > 255 else 1 if image.mode == "F" and peak <= 1 else 255
        return Image.fromarray((pixels / scale * 255).clip(0, 255).round().astype(np.uint8))
    return image


def flat(image: Image.Image) -> Image.Image:
    """RGB: what is transparent shows white, and not what lies hidden there."""
    if image.mode != "RGBA":
        return image
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return paper


def to_tensor(image: Image.Image) -> Tensor:
    """(H, W, C), float, 0..1."""
    return v2.functional.pil_to_tensor(image).permute(1, 2, 0).float() / 255


_AUGMENT = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.RandomAffine(degrees=15, scale=(0.8, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
        v2.RandomResizedCrop(512, scale=(0.6, 1), ratio=(0.8, 1.25), antialias=True),
    ]
)
_COLOURS = v2.ColorJitter(brightness=0.15, contrast=0.15, saturation=0.15, hue=0.02)


def augmented(image: Image.Image, rng: random.Random) -> Image.Image:
    """Another view of a picture, 512 x 512: mirrored, turned, cropped, in slightly other colours."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(rng.getrandbits(63))  # torchvision takes no generator
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        image = _COLOURS(image.convert("RGB"))
        if alpha is not None:
            image.putalpha(alpha)
        return _AUGMENT(image)
    finally:
        torch.set_rng_state(state)
