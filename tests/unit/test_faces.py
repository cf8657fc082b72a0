"""Which face, and the square around it: with landmarks of a real photograph by two programs (tests/data)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut
from torch import Tensor

from nested_core.errors import NestedAttentionError
from nested_core.faces import align_face, choose_face, describe_faces, ffhq_square, unlike_aligned
from nested_core.images import crop_to_subject

POINTS = np.load(Path(__file__).resolve().parents[1] / "data" / "astronaut_landmarks.npz")
VARIANTS = [(int(name.split()[1]), float(name.split()[2])) for name in POINTS.files if name.startswith("mesh")]
FACE = (225, 122)  # as in make_face_landmarks.py: the photograph is turned about it


def mesh(degrees: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.asarray(POINTS[f"mesh {degrees} {scale}"])


def photograph(degrees: int = 0, scale: float = 1.0) -> Tensor:
    turned = Image.fromarray(astronaut()).rotate(degrees, Image.Resampling.BICUBIC, center=FACE)
    side = round(512 * scale)
    return torch.from_numpy(np.array(turned.resize((side, side), Image.Resampling.LANCZOS))).float()[None] / 255


def landmarks(*frames: list[np.ndarray], height: int = 512, width: int = 512) -> dict[str, Any]:
    """The host's FACE_LANDMARKS."""
    faces = [[{"landmarks_xy": points} for points in frame] for frame in frames]
    return {"frames": faces, "image_size": (height, width), "connection_sets": {}}


def published_square(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dlib's 68 points -> centre and half-axis of FFHQ's square, by the recipe that FFHQ's authors published."""
    eye_left, eye_right = points[36:42].mean(0), points[42:48].mean(0)
    eye_avg, eye_to_eye = (eye_left + eye_right) / 2, eye_right - eye_left
    eye_to_mouth = (points[48] + points[54]) / 2 - eye_avg
    x = eye_to_eye - np.flipud(eye_to_mouth) * [-1, 1]
    x /= np.hypot(*x)
    x *= max(np.hypot(*eye_to_eye) * 2.0, np.hypot(*eye_to_mouth) * 1.8)
    return eye_avg + eye_to_mouth * 0.1, x


# --- the square ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees, scale", VARIANTS)
def test_the_square_is_the_one_of_dlibs_points(degrees: int, scale: float) -> None:
    """Each edge within 1 % of the side, and half a pixel: on that the programs need not agree."""
    theirs, their_axis = published_square(POINTS[f"dlib {degrees} {scale}"].astype(float))
    ours, our_axis = (part.numpy() for part in ffhq_square(torch.from_numpy(mesh(degrees, scale)).double(), 0))
    side = 2 * np.hypot(*their_axis)
    for turn in (np.eye(2), -np.eye(2), np.array(((0, -1), (1, 0))), np.array(((0, 1), (-1, 0)))):
        outwards = turn @ their_axis
        off = ((ours + turn @ our_axis) - (theirs + outwards)) @ outwards / np.hypot(*outwards)
        assert abs(off) < 0.01 * side + 0.5
    angle = np.degrees(np.arctan2(our_axis[1], our_axis[0]) - np.arctan2(their_axis[1], their_axis[0]))
    assert abs(angle) < 1


@pytest.mark.parametrize("degrees, scale", VARIANTS[1:])
def test_a_turned_or_scaled_photo_gives_the_same_face(degrees: int, scale: float) -> None:
    straight, _ = align_face(photograph(), landmarks([mesh()]), size=128)
    turned, points = photograph(degrees, scale), mesh(degrees, scale)
    side = turned.shape[1]

    def difference(points: np.ndarray) -> float:
        again, mask = align_face(turned, landmarks([points], height=side, width=side), size=128)
        return float((straight - again)[mask == 1].abs().mean())

    beside = points + np.float32(10 * scale)  # 6 % of the square's side
    assert 2 * difference(points) < difference(beside)
    assert difference(points) < 0.04


def test_the_face_is_upright_and_in_its_place() -> None:
    """Eyes level, at FFHQ's height, symmetric: the mesh's own points, taken along into the crop."""
    for degrees, scale in VARIANTS:
        points = mesh(degrees, scale).astype(float)
        centre, axis = (part.numpy() for part in ffhq_square(torch.from_numpy(points), 0))
        right, down = axis / (axis @ axis), np.array((-axis[1], axis[0])) / (axis @ axis)
        left_eye, right_eye = ((points[list(p)].mean(0) - centre) for p in ((33, 133), (362, 263)))
        assert (left_eye + right_eye) @ right == pytest.approx(0, abs=0.06)
        assert (left_eye - right_eye) @ down == pytest.approx(0, abs=0.06)
        assert (left_eye + right_eye) @ down / 2 == pytest.approx(-0.06, abs=0.03)


def test_a_painted_face_with_margin_is_nearly_that_square() -> None:
    """The tooltip's 0.3: for hosts that find no landmarks."""
    points = mesh()
    (left, top), (right, bottom) = points.min(0).astype(int), points.max(0).astype(int)
    painted = torch.zeros(1, 512, 512)
    painted[:, top:bottom, left:right] = 1
    cut, _ = crop_to_subject(photograph(), painted, margin=0.3)
    _, axis = ffhq_square(torch.from_numpy(points).double(), 0)
    assert cut.shape[1] == pytest.approx(2 * float(axis.norm()), rel=0.05)


# --- which face ------------------------------------------------------------------------------------------------------


def faces() -> list[np.ndarray]:
    """Three, in the detector's order: middle, large and at the right, small and at the left."""
    own = mesh()
    centre = own.mean(0)
    return [(own - centre) * size + place for size, place in ((0.5, (256, 300)), (1, (400, 300)), (0.3, (100, 300)))]


def test_the_face_that_is_asked_for() -> None:
    found = [torch.from_numpy(points) for points in faces()]
    assert choose_face(found, "largest", 1, 0) is found[1]
    assert choose_face(found, "first", 3, 0) is found[0]
    assert [choose_face(found, "number", n, 0) is found[i] for n, i in ((1, 2), (2, 0), (3, 1))] == [True] * 3
    for number, words in ((4, ["Face 4 of image 2", "3 came", "num_faces to 0"]), (0, ["Face 0"])):
        with pytest.raises(NestedAttentionError) as error:
            choose_face(found, "number", number, 1)
        assert all(word in str(error.value) for word in words)
    with pytest.raises(NestedAttentionError, match="largest, first, number"):
        choose_face(found, "smallest", 1, 0)


@pytest.mark.parametrize("face, number, index", [("largest", 1, 1), ("first", 1, 0), ("number", 1, 2)])
def test_that_face_is_aligned(face: str, number: int, index: int) -> None:
    found = faces()
    several, _ = align_face(photograph(), landmarks(found), size=64, face=face, number=number)
    alone, _ = align_face(photograph(), landmarks([found[index]]), size=64)
    assert torch.equal(several, alone)


def test_without_a_face_the_photo_stays_as_it_is() -> None:
    wide = photograph()[:, 100:400]
    image, mask = align_face(wide, landmarks([], height=300))
    assert torch.equal(image, wide) and mask.shape == (1, 300, 512) and mask.min() == 1


def test_without_a_face_a_mask_says_where_it_is() -> None:
    painted = torch.zeros(1, 512, 512)
    painted[:, 60:180, 160:290] = 1
    for ours, theirs in zip(
        align_face(photograph(), landmarks([]), 0.3, mask=painted),
        crop_to_subject(photograph(), painted, 0.3),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    upright = align_face(photograph(), landmarks([mesh()]))[0]
    assert torch.equal(align_face(photograph(), landmarks([mesh()]), mask=painted)[0], upright), "not needed"


def test_a_photo_without_a_face_between_others() -> None:
    """A batch has one size: that of the squares. The others are what they are alone."""
    views = photograph()[:, 20:380].repeat(3, 1, 1, 1)
    points = mesh() - [0, 20]
    image, mask = align_face(views, landmarks([points], [], [points], height=360), size=128)
    alone, _ = align_face(views[:1], landmarks([points], height=360), size=128)
    assert torch.equal(image[0], alone[0]) and torch.equal(image[2], alone[0])
    middle, _ = crop_to_subject(views[1:2])
    assert middle.shape[1] == 360
    assert torch.equal(mask[1], torch.ones(128, 128))
    small = torch.nn.functional.interpolate(middle.movedim(-1, 1), size=(128, 128), mode="area").movedim(1, -1)
    assert (image[1] - small[0]).abs().mean() < 0.02 < (image[1] - image[0]).abs().mean()


def test_what_is_said() -> None:
    assert describe_faces([1], "largest", 1) == "Turned upright."
    assert describe_faces([1, 1], "largest", 1) == "2 faces, turned upright."
    assert describe_faces([0], "largest", 1).startswith("No face found: the photo goes on as it is.")
    told = describe_faces([1, 0, 3], "number", 2).split("\n")
    assert len(told) == 2 and "image 2 of 3" in told[0] and told[1].startswith("3 faces in image 3 of 3: number 2")
    assert "the surest" in describe_faces([2], "first", 1) and "the largest" in describe_faces([2], "largest", 1)


# --- what an aligned crop looks like ---------------------------------------------------------------------------------


def test_sizes_that_aligned_crops_hardly_have() -> None:
    assert unlike_aligned(512, 512) == ""
    for height, width, word in (
        (768, 512, "not square"),
        (512, 513, "not square"),
        (1024, 1024, "512"),
        (224, 224, "512"),
    ):
        assert word in unlike_aligned(height, width)
    image, _ = align_face(photograph(), landmarks([mesh()]))
    assert unlike_aligned(*image.shape[1:3]) == ""
