"""Faces for encoders that were trained on aligned ones: which face of a photo, and what an aligned crop looks like."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .errors import NestedAttentionError

CHOICES = ("largest", "first", "number")
"""Which of several faces: the one with the largest mesh; the one the detector is surest of, which it names first (what
the public release takes); or by its number, counted from the left of the picture."""

ALIGNED_SIDE = 512
"""Of the crops that the public release was trained on."""
_NEAR = 1.5  # a crop that was resized a little is still a crop; of a picture beyond that factor it is unlikely


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


def _extent(mesh: Tensor) -> float:
    """Area of the bounding box of the points (the host's bbox_xyxy is the same box)."""
    return float((mesh.amax(dim=0) - mesh.amin(dim=0)).prod())
