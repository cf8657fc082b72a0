"""The reference photos of a subject: crop, pad, resize, check, hash.

Everything takes and returns torch tensors in the host's layout: images (B, H, W, 3), float, 0..1; masks (B, H, W),
float, 0..1, 1 where the subject is. B counts the views of one subject. Results are fp32, on the image's device.

An image may have a fourth channel: its alpha says where the subject is. It is used as a mask (times the mask that is
given, if one is), so a cut-out shows the encoder the cut-out and not what lies hidden under its transparent pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import NestedAttentionError

NEUTRAL = (0.48145466, 0.4578275, 0.40821073)
"""RGB painted where there is no subject: the mean colour of CLIP's training pictures. CLIP subtracts it before its
first layer, so such a pixel reaches the encoder as zeros."""

_ROUNDING = 1e-3  # what a mask may be outside of 0..1


def prepare(
    image: Tensor, mask: Tensor | None = None, fit: Literal["crop", "pad"] | str = "crop", size: int = 224
) -> Tensor:
    """What the encoder is shown: a square of `size` x `size` per view.

    Args:
        image: (B, H, W, 3), or (B, H, W, 4) with alpha; float, 0..1.
        mask: (B, H, W), (1, H, W) or (H, W), 1 where the subject is; any height and width (it is stretched to the
            image). Outside of it `NEUTRAL` is painted, soft edges in proportion.
        fit: "crop" takes a square: the largest one at the centre, or with a mask the smallest one around the masked
            region, moved to lie in the image as far as it can and padded with `NEUTRAL` where it cannot. A mask that
            selects the whole image is no mask. "pad" keeps the whole image and letterboxes it with `NEUTRAL`.
        size: side of the result in pixels.

    Returns:
        (B, size, size, 3), fp32, 0..1.

    Raises:
        NestedAttentionError: wrong rank, channels, dtype, range or batch; NaN; an empty mask; an unknown `fit`.
    """
    if fit not in ("crop", "pad"):
        raise NestedAttentionError(f'fit must be "crop" or "pad", got {fit!r}.')
    size = checked_size(size)
    rgb, alpha = checked_image(image)
    selected = _combine(fitted_mask(mask, rgb), alpha)
    if selected is not None:
        rgb = paint_outside(rgb, selected)
    height, width = rgb.shape[1:3]
    views = []
    for i, view in enumerate(rgb):
        if fit == "pad":
            side = max(height, width)
            top, left = (height - side) // 2, (width - side) // 2
        else:
            region = None if selected is None else _region(selected[i])
            top, left, side = _square(region, height, width)
        views.append(resize(_cut(view, top, left, side), size))
    return torch.stack(views).clamp_(0, 1)


def crop_to_subject(image: Tensor, mask: Tensor | None = None, margin: float = 0.25) -> tuple[Tensor, Tensor]:
    """A square around the subject of every view, with some of its surroundings; nothing is painted over.

    The square is the mask's bounding box made square, plus `margin` times its side on each of the four sides. It is
    moved to lie in the image; a margin that does not fit is made smaller; only a subject that is itself longer than
    the image's short side makes padding (with `NEUTRAL`, and 0 in the mask) necessary. Without a mask (or with one
    that selects everything) it is the largest square at the centre.

    Args:
        image: (B, H, W, 3 or 4), float, 0..1.
        mask: as in `prepare`.
        margin: 0 or more, in sides of the subject's square.

    Returns:
        image (B, S, S, 3) and mask (B, S, S), fp32. S is the largest square's side, so no view loses pixels. The mask
        is the one that was given, cut alike; without one it is 1 everywhere.

    Raises:
        NestedAttentionError: as `prepare`; a margin that is negative or not a number.
    """
    margin = checked_margin(margin)
    rgb, alpha = checked_image(image)
    if alpha is not None:
        rgb = paint_outside(rgb, alpha)
    selected = _combine(fitted_mask(mask, rgb), alpha)
    height, width = rgb.shape[1:3]
    squares = [
        _square(None if selected is None else _region(selected[i]), height, width, margin) for i in range(rgb.shape[0])
    ]
    size = max(side for _, _, side in squares)
    if selected is None:
        selected = torch.ones_like(rgb[..., 0])
    images, masks = [], []
    for view, view_mask, (top, left, side) in zip(rgb, selected, squares, strict=True):
        images.append(resize(_cut(view, top, left, side), size))
        cut_mask = _cut(view_mask[..., None], top, left, side, fill=(0.0,))
        # Bilinear: bicubic would ring around a hard edge.
        masks.append(snap(resize(cut_mask, size, mode="bilinear")[..., 0]))
    return torch.stack(images).clamp_(0, 1), torch.stack(masks)


def content_hash(image: Tensor) -> str:
    """Names a picture by what is in it: for a subject's provenance.

    SHA-256 of the shape and the pixels at 8 bits per channel, first 16 hexadecimal digits. So it does not depend on
    file name, dtype or device, and a picture that was saved as PNG and loaded again keeps it.

    Args:
        image: (B, H, W, C) or (H, W, C), float, 0..1.
    """
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.dim() not in (3, 4):
        raise NestedAttentionError(
            f"An image to hash must be a float tensor (B, H, W, C) or (H, W, C), got {_describe(image)}."
        )
    pixels = image.detach().float().mul(255).round_().nan_to_num_().clamp_(0, 255).to(device="cpu", dtype=torch.uint8)
    if pixels.dim() == 4 and pixels.shape[0] == 1:
        pixels = pixels[0]  # one picture has one name, batched or not
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    digest.update(pixels.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- what came in ----------------------------------------------------------------------------------------------------


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"


def checked_image(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, H, W, 3 | 4) of any float dtype -> rgb (B, H, W, 3) fp32 0..1, alpha (B, H, W) or None."""
    if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        hint = "Connect an IMAGE."
        if isinstance(image, Tensor):
            if image.dim() == 3:
                hint = "A single picture needs a batch axis too; a MASK is not an image."
            elif image.dim() == 4 and 0 in image.shape:
                hint = "It is empty: check the node that made it."
            elif image.dim() == 4 and image.shape[1] in (3, 4):
                hint = "The channels must come last."
            elif image.dim() == 4:
                hint = "Convert it to RGB first."
        raise NestedAttentionError(
            f"An image must be a tensor (batch, height, width, 3), or 4 channels with alpha; got {_describe(image)}. "
            f"{hint}"
        )
    if not image.is_floating_point():
        raise NestedAttentionError(f"An image must hold floats from 0 to 1; got {_describe(image)}. Divide by 255.")
    image = image.detach().float()
    _checked_finite(image, "image")
    if image[..., :3].mean() > 2:  # clamping would turn the whole picture white without a word
        raise NestedAttentionError(
            f"An image must hold values from 0 to 1; this one goes up to {image[..., :3].max():.0f}. "
            "If it is in 0..255, divide by 255."
        )
    if image[..., 3:].gt(2).any():  # overshoot of a resize is clamped as that of the colours is; this is no overshoot
        _checked_range(image[..., 3], "alpha channel")
    image = image.clamp(0, 1)
    if image.shape[-1] == 3:
        return image, None
    alpha = image[..., 3]
    for i, peak in enumerate(alpha.amax(dim=(1, 2)).tolist()):
        if peak <= 0:
            raise NestedAttentionError(
                f"Image {i + 1} of {image.shape[0]} has an alpha channel that is 0 everywhere: there is nothing to "
                "see in it. Remove the alpha channel, or invert it if it was made from an inverted mask."
            )
    return image[..., :3], alpha


def fitted_mask(mask: Tensor | None, rgb: Tensor) -> Tensor | None:
    """As `checked_mask` takes it, for 1 or B images and black in none of them -> (B, H, W) at the image's size."""
    if mask is None:
        return None
    batch, height, width = rgb.shape[:3]
    mask = checked_mask(mask).to(rgb.device)
    if mask.shape[0] not in (1, batch):
        raise NestedAttentionError(
            f"There are {batch} image(s) and {mask.shape[0]} masks. Give one mask for all images, or one mask for "
            "each image, in the same order."
        )
    for i, peak in enumerate(mask.amax(dim=(1, 2)).tolist()):
        if peak <= 0:
            which = "The mask" if mask.shape[0] == 1 else f"Mask {i + 1} of {mask.shape[0]}"
            raise NestedAttentionError(
                f"{which} is empty (0 everywhere): it must be 1 where the subject is. Load Image gives an empty mask "
                "for a picture without transparency: disconnect the mask, or paint one in the mask editor."
            )
    if mask.shape[1:] != (height, width):
        mask = snap(F.interpolate(mask[:, None], size=(height, width), mode="bilinear", antialias=True)[:, 0])
    return mask.expand(batch, -1, -1)


def checked_mask(mask: Tensor) -> Tensor:
    """A mask (M, H, W), (H, W) or (M, 1, H, W) of any type -> (M, H, W), fp32, 0..1.

    Raises NestedAttentionError: another shape; no images or no pixels; NaN; values outside of 0..1.
    """
    values = mask
    if isinstance(mask, Tensor) and mask.dim() == 2:
        values = mask[None]
    elif isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1:
        values = mask[:, 0]
    if not isinstance(values, Tensor) or values.dim() != 3 or 0 in values.shape:
        advice = "To use an image as a mask, convert it with Convert Image to Mask."
        if isinstance(values, Tensor) and values.dim() == 3:
            advice = "It has no images or no pixels: look at the node that makes it."
        raise NestedAttentionError(
            f"A mask must be a tensor (images, height, width) or (height, width); got {_describe(mask)}. {advice}"
        )
    values = values.detach().float()
    _checked_finite(values, "mask")
    _checked_range(values, "mask")
    return values.clamp(0, 1)  # what rounding left over


def _checked_range(values: Tensor, name: str) -> None:
    """Refused, not clamped: a mask of 0..255 would be a hard one, or a strength of 255."""
    low, high = (value.item() for value in values.aminmax())
    if -_ROUNDING <= low and high <= 1 + _ROUNDING:
        return
    if 2 < high <= 256:
        advice = "It looks like 0..255: divide it by 255."
    elif high > 256:
        advice = "Divide it by the value that it has for white."
    else:
        advice = "Sums, differences and bicubic resizing leave that range: use Combine Masks, and resize bilinear."
    raise NestedAttentionError(
        f"The {name} must hold values from 0 (black) to 1 (white); this one goes from {low:.5g} to {high:.5g}. {advice}"
    )


def _checked_finite(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).flatten(1).any(dim=1).nonzero()[0])
        raise NestedAttentionError(
            f"The {name} has values that are not numbers (NaN or infinite), first in number {bad + 1} of "
            f"{values.shape[0]}. The node that made it failed (a VAE in fp16 often does this): make it again."
        )


def checked_size(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise NestedAttentionError(f"size must be a whole number of pixels, 1 or more; got {size!r}.")
    return size


def checked_margin(margin: float) -> float:
    if not isinstance(margin, (int, float)) or not math.isfinite(margin) or margin < 0:
        raise NestedAttentionError(
            f"margin must be a number, 0 or more (0.25 adds a quarter of the side on each side); got {margin!r}."
        )
    return float(margin)


# --- squares ---------------------------------------------------------------------------------------------------------


def _combine(mask: Tensor | None, alpha: Tensor | None) -> Tensor | None:
    if mask is None or alpha is None:
        return alpha if mask is None else mask
    both = mask * alpha
    for i, peak in enumerate(both.amax(dim=(1, 2)).tolist()):
        if peak <= 0:
            raise NestedAttentionError(
                f"In image {i + 1} of {mask.shape[0]} the mask selects only transparent pixels. Invert the mask, or "
                "disconnect it: an image with alpha needs none."
            )
    return both


def paint_outside(rgb: Tensor, mask: Tensor) -> Tensor:
    """(B, H, W, 3), (B, H, W) -> (B, H, W, 3) with NEUTRAL where the mask is 0."""
    return torch.lerp(rgb.new_tensor(NEUTRAL).expand_as(rgb), rgb, mask[..., None])


def _region(mask: Tensor) -> tuple[int, int, int, int] | None:
    """(H, W) -> top, left, bottom, right (exclusive) of what is selected; None where that is everything.

    Selected is what exceeds half of the mask's peak: for a blurred mask, the outline it had before.
    """
    selected = mask > 0.5 * mask.max()
    if bool(selected.all()):
        return None
    rows, columns = selected.any(dim=1).nonzero()[:, 0], selected.any(dim=0).nonzero()[:, 0]
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _square(
    region: tuple[int, int, int, int] | None, height: int, width: int, margin: float = 0.0
) -> tuple[int, int, int]:
    """Top, left and side of the square around a region; of the largest one at the centre where it is None."""
    short = min(height, width)
    if region is None:
        return (height - short) // 2, (width - short) // 2, short
    top, left, bottom, right = region
    longest = max(bottom - top, right - left)
    side = min(round(longest * (1 + 2 * margin)), max(longest, short))

    def start(low: int, high: int, extent: int) -> int:
        if side > extent:
            return (extent - side) // 2
        return min(max((low + high - side) // 2, 0), extent - side)

    return start(top, bottom, height), start(left, right, width), side


def _cut(view: Tensor, top: int, left: int, side: int, fill: Sequence[float] = NEUTRAL) -> Tensor:
    """(H, W, C) -> (side, side, C); what lies outside of the view is `fill`."""
    height, width = view.shape[:2]
    rows = slice(max(top, 0), min(top + side, height))
    columns = slice(max(left, 0), min(left + side, width))
    inside = view[rows, columns]
    if inside.shape[:2] == (side, side):
        return inside
    square = view.new_tensor(fill).repeat(side, side, 1)
    y, x = rows.start - top, columns.start - left
    square[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return square


def resize(view: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """(S, S, C) -> (size, size, C), antialiased. Not clamped."""
    if view.shape[:2] == (size, size):
        return view
    channels_first = view.permute(2, 0, 1)[None]
    return F.interpolate(channels_first, size=(size, size), mode=mode, antialias=True)[0].permute(1, 2, 0)


def snap(mask: Tensor) -> Tensor:
    """Makes 0 and 1 exact again after resampling: a pixel that is selected is to be shown as it is, bit for bit."""
    mask = torch.where(mask > 1 - 1e-5, torch.ones_like(mask), mask)
    return torch.where(mask < 1e-5, torch.zeros_like(mask), mask)
