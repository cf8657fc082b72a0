"""The reference photos of a subject: crop, align, pad, resize, hash.

Everything takes and returns torch tensors in the host's layout: images (B, H, W, 3), float, 0..1; masks (B, H, W),
float, 0..1, 1 where the subject is. B counts the views of one subject. Results are fp32, on the image's device.

An image may have a fourth channel: its alpha says where the subject is. It is used as a mask (times the mask that is
given, if one is), so a cut-out shows the encoder the cut-out and not what lies hidden under its transparent pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import NestedAttentionError
from .faces import choose_face

NEUTRAL = (0.48145466, 0.4578275, 0.40821073)
"""RGB painted where there is no subject: the mean colour of CLIP's training pictures. CLIP subtracts it before its
first layer, so such a pixel reaches the encoder as zeros."""

# Points of MediaPipe's face mesh. The six points per eye are those of the 68-point scheme that FFHQ was aligned with:
# both corners, two on the upper and two on the lower lid. The irises (468..477) are left out: they follow the gaze.
# "left" and "right" are sides of the picture of a face that looks at us, as in FFHQ's own recipe.
_EYE_LEFT = (33, 160, 158, 133, 153, 144)
_EYE_RIGHT = (362, 385, 387, 263, 373, 380)
_MOUTH_LEFT, _MOUTH_RIGHT = 61, 291
_MESH_POINTS = (468, 478)
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
    size = _checked_size(size)
    rgb, alpha = _checked_image(image)
    selected = _combine(_checked_mask(mask, rgb), alpha)
    if selected is not None:
        rgb = _paint_outside(rgb, selected)
    height, width = rgb.shape[1:3]
    views = []
    for i, view in enumerate(rgb):
        if fit == "pad":
            side = max(height, width)
            top, left = (height - side) // 2, (width - side) // 2
        else:
            region = None if selected is None else _region(selected[i])
            top, left, side = _square(region, height, width)
        views.append(_resize(_cut(view, top, left, side), size))
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
    margin = _checked_margin(margin)
    rgb, alpha = _checked_image(image)
    if alpha is not None:
        rgb = _paint_outside(rgb, alpha)
    selected = _combine(_checked_mask(mask, rgb), alpha)
    height, width = rgb.shape[1:3]
    squares = [
        _square(None if selected is None else _region(selected[i]), height, width, margin) for i in range(rgb.shape[0])
    ]
    size = max(side for _, _, side in squares)
    if selected is None:
        selected = torch.ones_like(rgb[..., 0])
    images, masks = [], []
    for view, view_mask, (top, left, side) in zip(rgb, selected, squares, strict=True):
        images.append(_resize(_cut(view, top, left, side), size))
        cut_mask = _cut(view_mask[..., None], top, left, side, fill=(0.0,))
        # Bilinear: bicubic would ring around a hard edge.
        masks.append(_snap(_resize(cut_mask, size, mode="bilinear")[..., 0]))
    return torch.stack(images).clamp_(0, 1), torch.stack(masks)


def align_face(
    image: Tensor,
    landmarks: Mapping[str, Any],
    margin: float = 0.0,
    size: int = 512,
    *,
    face: str = "largest",
    number: int = 1,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The face of every view, upright and in the place FFHQ has it: what encoders trained on FFHQ-like faces expect.

    The geometry is that of CelebA-HQ (Karras et al. 2018, arXiv 1710.10196, appendix C), which FFHQ (arXiv 1812.04948)
    took over. With the centres of both eyes and of the mouth, e = eye to eye, m = between the eyes to the mouth:
    half-axis x = e - rot90(m), scaled to length max(2.0 |e|, 1.8 |m|); centre = between the eyes + 0.1 m. Using e and
    m together keeps turned and tilted heads steady.

    A view in which no face was found stays as it is. Between others, which are squares, that is its middle square; with
    a mask the one around it, as `crop_to_subject` cuts it.

    Args:
        image: (B, H, W, 3 or 4), float, 0..1: the picture the landmarks were found in. One that was resized since is
            fine as long as its shape is the same.
        landmarks: the host's MediaPipe FACE_LANDMARKS: {"frames": [[face, ...] per view], "image_size": (H, W), ...},
            a face being {"landmarks_xy": (468 or 478, 2) pixels, "bbox_xyxy": (4,), "score": float, ...}.
        margin: 0 or more; added on each side, in sides of FFHQ's square.
        size: side of the result in pixels.
        face, number: which one of several, as in `faces.choose_face`.
        mask: as in `prepare`; only for views without a face.

    Returns:
        image (B, size, size, 3) and mask (B, size, size), fp32. Where the square leaves the picture the image
        continues in mirrored, quickly blurred colours, and the mask is 0; elsewhere it is 1 (or the image's alpha).
        Without a face in any view: as `crop_to_subject` with a mask, else the image as it came.

    Raises:
        NestedAttentionError: as `prepare`; as `choose_face`; landmarks of another picture or kind.
    """
    margin = _checked_margin(margin)
    size = _checked_size(size)
    rgb, alpha = _checked_image(image)
    if alpha is None:
        alpha = torch.ones_like(rgb[..., 0])
    else:
        rgb = _paint_outside(rgb, alpha)
    faces = _chosen_faces(landmarks, rgb.shape[0], rgb.shape[1], rgb.shape[2], face, number)
    if not any(points is not None for points in faces):
        return (rgb, alpha) if mask is None else crop_to_subject(image, mask, margin)
    selected = _checked_mask(mask, rgb)
    images, masks = [], []
    for i, points in enumerate(faces):
        if points is None:
            square, cut = crop_to_subject(image[i : i + 1], None if selected is None else selected[i : i + 1], margin)
            images.append(_resize(square[0], size).clamp(0, 1))
            masks.append(_snap(_resize(cut[0, ..., None], size, mode="bilinear")[..., 0]))
            continue
        centre, axis = _ffhq_square(points, i)
        picture = torch.cat((rgb[i], alpha[i, ..., None]), dim=-1)
        sampled, inside = _sample_square(picture, centre, axis * (1 + 2 * margin), size)
        images.append(sampled[..., :3])
        masks.append(_snap(sampled[..., 3]) * inside)
    return torch.stack(images), torch.stack(masks)


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


def _checked_image(image: Tensor) -> tuple[Tensor, Tensor | None]:
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


def _checked_mask(mask: Tensor | None, rgb: Tensor) -> Tensor | None:
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
        mask = _snap(F.interpolate(mask[:, None], size=(height, width), mode="bilinear", antialias=True)[:, 0])
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


def _checked_size(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise NestedAttentionError(f"size must be a whole number of pixels, 1 or more; got {size!r}.")
    return size


def _checked_margin(margin: float) -> float:
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


def _paint_outside(rgb: Tensor, mask: Tensor) -> Tensor:
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


def _resize(view: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """(S, S, C) -> (size, size, C), antialiased. Not clamped."""
    if view.shape[:2] == (size, size):
        return view
    channels_first = view.permute(2, 0, 1)[None]
    return F.interpolate(channels_first, size=(size, size), mode=mode, antialias=True)[0].permute(1, 2, 0)


def _snap(mask: Tensor) -> Tensor:
    """Makes 0 and 1 exact again after resampling: a pixel that is selected is to be shown as it is, bit for bit."""
    mask = torch.where(mask > 1 - 1e-5, torch.ones_like(mask), mask)
    return torch.where(mask < 1e-5, torch.zeros_like(mask), mask)


# --- faces -----------------------------------------------------------------------------------------------------------


def _chosen_faces(
    landmarks: Mapping[str, Any], batch: int, height: int, width: int, face: str, number: int
) -> list[Tensor | None]:
    """The host's payload -> each view's face: mesh points (P, 2), fp64, in pixels of these images; or None."""
    if not isinstance(landmarks, Mapping) or not isinstance(landmarks.get("frames"), Sequence):
        keys = f" with the keys {sorted(map(str, landmarks))}" if isinstance(landmarks, Mapping) else ""
        raise NestedAttentionError(
            "Face landmarks must be what Detect Face Landmarks (MediaPipe) gives, a dictionary with a list of "
            f"'frames'; got a {type(landmarks).__name__}{keys}."
        )
    frames = landmarks["frames"]
    if len(frames) != batch:
        raise NestedAttentionError(
            f"There are {batch} image(s), and face landmarks of {len(frames)}. Connect the same images to the face "
            "detector and here."
        )
    found_height, found_width = landmarks.get("image_size") or (height, width)
    scale_y, scale_x = height / found_height, width / found_width
    if abs(scale_x / scale_y - 1) > 0.02:  # rounding in a resize is not another picture
        raise NestedAttentionError(
            f"The face landmarks were found in pictures of {found_width}x{found_height}, these are {width}x{height}: "
            "another shape, so another crop. Connect the same images to the face detector and here."
        )
    scale = torch.tensor((scale_x, scale_y), dtype=torch.float64)
    meshes = [[_mesh(found, i) * scale for found in frame] for i, frame in enumerate(frames)]
    return [choose_face(found, face, number, i) if found else None for i, found in enumerate(meshes)]


def _mesh(face: Mapping[str, Any], view: int) -> Tensor:
    points = face.get("landmarks_xy") if isinstance(face, Mapping) else None
    if points is None:
        raise NestedAttentionError(
            f"A face of image {view + 1} has no 'landmarks_xy'. Connect Detect Face Landmarks (MediaPipe)."
        )
    mesh = torch.as_tensor(points).detach().to(device="cpu", dtype=torch.float64)
    if mesh.dim() != 2 or mesh.shape[0] not in _MESH_POINTS or mesh.shape[1] != 2:
        raise NestedAttentionError(
            f"A face of image {view + 1} has landmarks of shape {tuple(mesh.shape)}; MediaPipe's face mesh has "
            "(478, 2), or (468, 2) without irises. Connect Detect Face Landmarks (MediaPipe)."
        )
    if not torch.isfinite(mesh).all():
        raise NestedAttentionError(
            f"A face of image {view + 1} has landmarks that are not numbers (NaN or infinite). Detect it again."
        )
    return mesh


def _rot90(vector: Tensor) -> Tensor:
    """A quarter turn from the x axis to the y axis of the picture (y points down: clockwise to the eye)."""
    return torch.stack((-vector[1], vector[0]))


def _ffhq_square(points: Tensor, view: int) -> tuple[Tensor, Tensor]:
    """(P, 2) mesh points -> centre (2,) and half-axis (2,) of FFHQ's square, in pixels (x, y)."""
    eye_left, eye_right = points[list(_EYE_LEFT)].mean(dim=0), points[list(_EYE_RIGHT)].mean(dim=0)
    mouth = (points[_MOUTH_LEFT] + points[_MOUTH_RIGHT]) / 2
    between_eyes = (eye_left + eye_right) / 2
    eye_to_eye = eye_right - eye_left
    eye_to_mouth = mouth - between_eyes
    axis = eye_to_eye - _rot90(eye_to_mouth)
    length = axis.norm()
    scale = torch.maximum(eye_to_eye.norm() * 2.0, eye_to_mouth.norm() * 1.8)
    # Half a pixel: below that there is no direction to read off, and nothing to see in the crop.
    if scale < 0.5 or length < 0.1 * scale:
        raise NestedAttentionError(
            f"The landmarks of the face in image {view + 1} do not form a face (eyes and mouth nearly coincide, or "
            "the face is mirrored upside down). Use a larger or clearer picture of the face, or a mask instead."
        )
    return between_eyes + eye_to_mouth * 0.1, axis / length * scale


def _sample_square(picture: Tensor, centre: Tensor, axis: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Reads an oriented square out of a picture.

    Args:
        picture: (H, W, C).
        centre: (2,) x, y in pixels, the first pixel covering 0..1.
        axis: (2,) from the centre to the middle of the square's right side.
        size: side of the result.

    Returns:
        (size, size, C), clamped to 0..1, continued in blurred colours outside of the picture; (size, size), 1 inside.
    """
    height, width = picture.shape[:2]
    step = float(axis.norm()) * 2 / size  # source pixels per result pixel
    source = picture.permute(2, 0, 1)[None]
    if step > 2:  # first shrink so that a step is 2 pixels: grid_sample looks at 4 x 4 pixels and skips the rest
        shrunk = (max(1, round(height * 2 / step)), max(1, round(width * 2 / step)))
        source = F.interpolate(source, size=shrunk, mode="bicubic", antialias=True)
    samples = size if step <= 1 else size * 2
    ticks = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples * 2 - 1
    down = _rot90(axis)
    points = centre + ticks[None, :, None] * axis + ticks[:, None, None] * down
    grid = (points / torch.tensor((width, height), dtype=torch.float64) * 2 - 1).float().to(picture.device)
    inside = (grid.abs() <= 1).all(dim=-1).to(picture)
    sampled = F.grid_sample(source, grid[None], mode="bicubic", padding_mode="reflection", align_corners=False)
    if not bool(inside.all()):
        # A mirror image alone could show half of a second face: it fades into blurred colours, as FFHQ's does.
        cells = [max(1, round(extent * 4 / float(axis.norm()))) for extent in (height, width)]
        blurred = F.interpolate(source, size=cells, mode="bilinear", antialias=True)
        blurred = F.grid_sample(blurred, grid[None], mode="bilinear", padding_mode="border", align_corners=False)
        beyond = (grid.abs() - 1).clamp(min=0) * grid.new_tensor((width, height)) / 4 / axis.norm().float()
        fade = (beyond.amax(dim=-1) / 0.08).clamp(max=1)  # done within 8 % of the square's side
        sampled = torch.lerp(sampled, blurred, fade)
    square = _resize(sampled[0].permute(1, 2, 0), size).clamp(0, 1)
    return square, _snap(_resize(inside[..., None], size, mode="bilinear")[..., 0])
