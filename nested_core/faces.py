"""Aligned faces: which face of a photo, the square it is cut by (FFHQ's), and what such a crop looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import NestedAttentionError
from .images import (
    checked_image,
    checked_margin,
    checked_size,
    crop_to_subject,
    fitted_mask,
    paint_outside,
    resize,
    snap,
)

CHOICES = ("largest", "first", "number")
"""Which of several faces: the one with the largest mesh; the one the detector is surest of, which it names first (what
the public release takes); or by its number, counted from the left of the picture."""

ALIGNED_SIDE = 512
"""Of the crops that the public release was trained on."""
_NEAR = 1.5  # a crop that was resized a little is still a crop; of a picture beyond that factor it is unlikely

# Points of MediaPipe's face mesh. The six points per eye are those of the 68-point scheme that FFHQ was aligned with:
# both corners, two on the upper and two on the lower lid. The irises (468..477) are left out: they follow the gaze.
# "left" and "right" are sides of the picture of a face that looks at us, as in FFHQ's own recipe.
_EYE_LEFT = (33, 160, 158, 133, 153, 144)
_EYE_RIGHT = (362, 385, 387, 263, 373, 380)
_MOUTH_LEFT, _MOUTH_RIGHT = 61, 291
_MESH_POINTS = (468, 478)

LANDMARKS = {
    5: "eyes, nose and corners of the mouth, left before right, as RetinaFace and MTCNN give them",
    68: "dlib's, as FFHQ has them",
    468: "MediaPipe's face mesh",
    478: "the same with irises",
}
"""Numbers of a face's points that say where its eyes and its mouth are, and whose they are."""


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

    `ffhq_square` is the geometry. A view in which no face was found stays as it is. Between others, which are squares,
    that is its middle square; with a mask the one around it, as `crop_to_subject` cuts it.

    Args:
        image: (B, H, W, 3 or 4), float, 0..1: the picture the landmarks were found in. One that was resized since is
            fine as long as its shape is the same.
        landmarks: the host's MediaPipe FACE_LANDMARKS: {"frames": [[face, ...] per view], "image_size": (H, W), ...},
            a face being {"landmarks_xy": (468 or 478, 2) pixels, "bbox_xyxy": (4,), "score": float, ...}.
        margin: 0 or more; added on each side, in sides of FFHQ's square.
        size: side of the result in pixels.
        face, number: which one of several, as in `choose_face`.
        mask: as in `prepare`; only for views without a face.

    Returns:
        image (B, size, size, 3) and mask (B, size, size), fp32. Where the square leaves the picture the image
        continues in mirrored, quickly blurred colours, and the mask is 0; elsewhere it is 1 (or the image's alpha).
        Without a face in any view: as `crop_to_subject` with a mask, else the image as it came.

    Raises:
        NestedAttentionError: as `prepare`; as `choose_face`; landmarks of another picture or kind.
    """
    margin = checked_margin(margin)
    size = checked_size(size)
    rgb, alpha = checked_image(image)
    if alpha is None:
        alpha = torch.ones_like(rgb[..., 0])
    else:
        rgb = paint_outside(rgb, alpha)
    faces = _chosen_faces(landmarks, rgb.shape[0], rgb.shape[1], rgb.shape[2], face, number)
    if not any(points is not None for points in faces):
        return (rgb, alpha) if mask is None else crop_to_subject(image, mask, margin)
    selected = fitted_mask(mask, rgb)
    images, masks = [], []
    for i, points in enumerate(faces):
        if points is None:
            square, cut = crop_to_subject(image[i : i + 1], None if selected is None else selected[i : i + 1], margin)
            images.append(resize(square[0], size).clamp(0, 1))
            masks.append(snap(resize(cut[0, ..., None], size, mode="bilinear")[..., 0]))
        else:
            centre, axis = ffhq_square(points, i)
            picture = torch.cat((rgb[i], alpha[i, ..., None]), dim=-1)
            sampled, inside = _sample_square(picture, centre, axis * (1 + 2 * margin), size)
            images.append(sampled[..., :3])
            masks.append(snap(sampled[..., 3]) * inside)
    return torch.stack(images), torch.stack(masks)


def choose_face(faces: Sequence[Tensor], choice: str, number: int, view: int) -> Tensor:
    """One face of a view.

    Args:
        faces: their meshes (P, 2), in pixels, in the detector's order. At least one.
        choice: of `CHOICES`.
        number: for "number": 1 is the leftmost.
        view: which picture it is, from 0: for the message.

    Raises:
        NestedAttentionError: an unknown choice; a number that the view has no face for.
    """
    if choice == "largest":
        return max(faces, key=_extent)
    if choice == "first":
        return faces[0]
    if choice != "number":
        raise NestedAttentionError(f'face must be one of {", ".join(CHOICES)}; got "{choice}".')
    if not 1 <= number <= len(faces):
        raise NestedAttentionError(
            f"Face {number} of image {view + 1} is asked for, and {len(faces)} came with it. Set num_faces to 0 (all "
            "faces) in Detect Face Landmarks, lower its min_confidence, or choose another number."
        )
    return sorted(faces, key=lambda mesh: float(mesh[:, 0].mean()))[number - 1]


def describe_faces(counts: Sequence[int], choice: str, number: int) -> str:
    """What became of each view, in words.

    counts: how many faces were found in each view.
    """
    lines = []
    for view, count in enumerate(counts):
        where = f" in image {view + 1} of {len(counts)}" if len(counts) > 1 else ""
        if not count:
            lines.append(
                f"No face found{where}: the photo goes on as it is. To find one, lower min_confidence or set "
                'detector_variant to "both" in Detect Face Landmarks, or use a clearer photo.'
            )
        elif count > 1:
            taken = {"largest": "the largest", "first": "the surest"}.get(choice, f"number {number} from the left")
            lines.append(f"{count} faces{where}: {taken} is taken.")
    return "\n".join(lines) or ("Turned upright." if len(counts) == 1 else f"{len(counts)} faces, turned upright.")


def unlike_aligned(height: int, width: int) -> str:
    """Why a picture of this size is hardly an aligned crop, in words; empty if it may well be one.

    Only the size is looked at: an aligned crop is a square of 512 pixels, a photo or a rendered picture mostly is not.
    """
    if height != width:
        return f"it is {width} x {height}, not square"
    if not ALIGNED_SIDE / _NEAR <= height <= ALIGNED_SIDE * _NEAR:
        return f"it is {width} x {height}, not about {ALIGNED_SIDE} x {ALIGNED_SIDE}"
    return ""


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


def _extent(mesh: Tensor) -> float:
    """Area of the bounding box of the points (the host's bbox_xyxy is the same box)."""
    return float((mesh.amax(dim=0) - mesh.amin(dim=0)).prod())


def _rot90(vector: Tensor) -> Tensor:
    """A quarter turn from the x axis to the y axis of the picture (y points down: clockwise to the eye)."""
    return torch.stack((-vector[1], vector[0]))


def _parts(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P, 2) points, P of `LANDMARKS` -> the centres of the left eye, the right eye and the mouth, (2,) each."""
    if len(points) == 5:
        return points[0], points[1], (points[3] + points[4]) / 2
    if len(points) == 68:
        return points[36:42].mean(dim=0), points[42:48].mean(dim=0), (points[48] + points[54]) / 2
    mouth = (points[_MOUTH_LEFT] + points[_MOUTH_RIGHT]) / 2
    return points[list(_EYE_LEFT)].mean(dim=0), points[list(_EYE_RIGHT)].mean(dim=0), mouth


def align_points(picture: Tensor, points: Tensor, margin: float = 0.0, size: int = ALIGNED_SIDE) -> Tensor:
    """`align_face` for one picture whose face is known by its points.

    Args:
        picture: (H, W, C), float, 0..1; a fourth channel is cut like the colours, and 0 outside of the picture.
        points: (P, 2) x, y in pixels, P of `LANDMARKS`.
        margin, size: as in `align_face`.

    Returns:
        (size, size, C), fp32.

    Raises NestedAttentionError for points that do not form a face.
    """
    centre, axis = ffhq_square(points, 0)
    sampled, inside = _sample_square(picture, centre, axis * (1 + 2 * checked_margin(margin)), checked_size(size))
    return torch.cat((sampled[..., :3], snap(sampled[..., 3:]) * inside[..., None]), dim=-1)


def ffhq_square(points: Tensor, view: int) -> tuple[Tensor, Tensor]:
    """(P, 2) points, P of `LANDMARKS` -> centre (2,) and half-axis (2,) of FFHQ's square, in pixels (x, y).

    The geometry is that of CelebA-HQ (Karras et al. 2018, arXiv 1710.10196, appendix C), which FFHQ (arXiv 1812.04948)
    took over. With the centres of both eyes and of the mouth, e = eye to eye, m = between the eyes to the mouth:
    half-axis x = e - rot90(m), scaled to length max(2.0 |e|, 1.8 |m|); centre = between the eyes + 0.1 m. Using e and
    m together keeps turned and tilted heads steady.
    """
    eye_left, eye_right, mouth = _parts(points)
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
    square = resize(sampled[0].permute(1, 2, 0), size).clamp(0, 1)
    return square, snap(resize(inside[..., None], size, mode="bilinear")[..., 0])
