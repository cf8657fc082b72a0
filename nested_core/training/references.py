"""Where the subject is in a picture, as its files say it, and the reference that is cut out there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from ..errors import NestedAttentionError
from ..faces import LANDMARKS, align_points
from ..images import crop_to_subject
from .pictures import to_tensor


@dataclass(frozen=True)
class Place:
    """Where the subject is: a box (left, top, right, bottom), or a face's landmarks (x, y); in pixels of the picture
    as it is seen, upright."""

    box: tuple[float, float, float, float] | None = None
    landmarks: tuple[tuple[float, float], ...] | None = None


def place_of(name: str, said: dict[str, Any]) -> Place | None:
    """What 01.json or a table's row says of the subject's place; None where it says nothing.

    Raises NestedAttentionError for a box that is none, and for landmarks of another number.
    """
    box, points = said.get("box"), said.get("landmarks")
    if box is not None and not (_numbers(box, 4) and box[0] < box[2] and box[1] < box[3]):
        raise NestedAttentionError(
            f'{name}: "box" should be [left, top, right, bottom] in pixels of the upright picture; got {box}. '
            "(A box of position and size, [x, y, width, height], is [x, y, x + width, y + height].)"
        )
    if points is not None:
        if not (isinstance(points, Sequence) and len(points) in LANDMARKS and all(_numbers(p, 2) for p in points)):
            got = f"{len(points)} entries" if isinstance(points, Sequence) else f"a {type(points).__name__}"
            raise NestedAttentionError(
                f'{name}: "landmarks" should be points [x, y] of a face, in pixels of the upright picture: '
                f"{', '.join(f'{count} ({what})' for count, what in LANDMARKS.items())}; got {got}."
            )
        return Place(landmarks=tuple((float(x), float(y)) for x, y in points))
    return None if box is None else Place(box=tuple(map(float, box)))  # type: ignore[arg-type]


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, Sequence) and len(value) == count and all(isinstance(v, int | float) for v in value)


def cut(image: Image.Image, place: Place | None, mask: Image.Image | None, margin: float, name: str) -> Image.Image:
    """The square around the subject: a face turned upright as in FFHQ (512 x 512), else around the box or the mask.

    Args:
        image: the picture, RGB or RGBA.
        place: where the subject is; it wins over `mask`.
        mask: white where the subject is.
        margin: room on each side, in sides of the square.
        name: for messages.

    Raises NestedAttentionError: landmarks that form no face, a box outside of the picture.
    """
    if place is not None and place.landmarks is not None:
        try:
            face = align_points(to_tensor(image), torch.tensor(place.landmarks, dtype=torch.float64), margin)
        except NestedAttentionError as error:
            raise NestedAttentionError(f"{name}: {error}") from error
        return _image(face)
    if place is not None and place.box is not None:
        mask = Image.new("L", image.size, 0)
        mask.paste(255, _whole_pixels(place.box, image.size, name))
    elif mask is None:
        return image
    # Four planes through a function for pictures: the alpha channel is cut like the colours.
    planes = to_tensor(image)
    around = to_tensor(mask)[None, ..., 0]
    square, _ = crop_to_subject(planes[None, ..., :3], around, margin)
    if planes.shape[-1] == 3:
        return _image(square[0])
    alpha, _ = crop_to_subject(planes[None, ..., 3:].expand(-1, -1, -1, 3), around, margin)
    return _image(torch.cat((square[0], alpha[0, ..., :1]), dim=-1))


def _image(picture: torch.Tensor) -> Image.Image:
    return to_pil_image((picture.permute(2, 0, 1) * 255).round().to(torch.uint8))


def _whole_pixels(box: Sequence[float], size: tuple[int, int], name: str) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(value) for value in box)
    inside = (max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1]))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise NestedAttentionError(
            f"{name}: the box {list(box)} is not in the picture of {size[0]}x{size[1]}. It should be [left, top, "
            "right, bottom] in pixels of the upright picture."
        )
    return inside
