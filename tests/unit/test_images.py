"""Crop, pad, mask, align, hash: on a real photograph (scikit-image's astronaut) and on pictures one can count."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.data import astronaut
from skimage.transform import rotate
from torch import Tensor

from nested_core.errors import NestedAttentionError
from nested_core.faces import align_face
from nested_core.images import NEUTRAL, checked_mask, content_hash, crop_to_subject, prepare

NEUTRAL_PIXEL = torch.tensor(NEUTRAL)
EYE_LEFT, EYE_RIGHT = (33, 160, 158, 133, 153, 144), (362, 385, 387, 263, 373, 380)
# Read off the photograph, x and y: eyes and corners of the mouth, those on the picture's left first.
ASTRONAUT_FACE = ((202.0, 101.5), (248.0, 103.5), (206.0, 142.0), (243.0, 145.0))


@pytest.fixture(scope="module")
def photo(device: torch.device) -> Tensor:
    return torch.from_numpy(astronaut()).to(device).float()[None] / 255


def face_mesh(eye_left: Any, eye_right: Any, mouth_left: Any, mouth_right: Any, points: int = 478) -> np.ndarray:
    """A face mesh as the host's detector gives it, with the eyes and the mouth where they are wanted."""
    eye_left, eye_right, mouth_left, mouth_right = (
        np.array(point, float) for point in (eye_left, eye_right, mouth_left, mouth_right)
    )
    across = (eye_right - eye_left) / np.linalg.norm(eye_right - eye_left)
    down = np.array((-across[1], across[0]))
    middle = (eye_left + eye_right + mouth_left + mouth_right) / 4
    turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
    radius = 1.2 * np.linalg.norm(eye_right - eye_left)
    mesh = middle + radius * np.stack((np.cos(turn), 1.2 * np.sin(turn)), axis=1) @ np.stack((across, down))
    lid = ((-1, 0), (-0.4, -0.4), (0.4, -0.4), (1, 0), (0.4, 0.4), (-0.4, 0.4))
    for indices, centre in ((EYE_LEFT, eye_left), (EYE_RIGHT, eye_right)):
        for index, (u, v) in zip(indices, lid, strict=True):
            mesh[index] = centre + 0.2 * np.linalg.norm(eye_right - eye_left) * (u * across + v * down)
    mesh[61], mesh[291] = mouth_left, mouth_right
    return mesh.astype(np.float32)


def landmarks(*frames: list[np.ndarray], height: int = 512, width: int = 512) -> dict[str, Any]:
    """The host's FACE_LANDMARKS."""
    return {
        "frames": [
            [
                {"landmarks_xy": mesh, "bbox_xyxy": np.concatenate((mesh.min(0), mesh.max(0))), "score": 0.9}
                for mesh in frame
            ]
            for frame in frames
        ],
        "image_size": (height, width),
        "connection_sets": {},
    }


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10(((a - b) ** 2).mean()))


def is_neutral(pixels: Tensor) -> bool:
    return bool(torch.isclose(pixels, NEUTRAL_PIXEL.to(pixels.device), atol=1e-3).all())


# --- prepare ---------------------------------------------------------------------------------------------------------


def test_crop_takes_the_largest_square_at_the_centre(photo: Tensor) -> None:
    wide = photo[:, 100:400]
    assert torch.equal(prepare(wide, size=300), wide[:, :, 106:406])
    tall = photo[:, :, 100:400]
    assert torch.equal(prepare(tall, size=300), tall[:, 106:406])


def test_pad_shows_the_whole_picture_on_the_neutral_colour(photo: Tensor) -> None:
    wide = photo[:, 100:356]
    padded = prepare(wide, fit="pad", size=512)
    assert torch.equal(padded[:, 128:384], wide)
    assert is_neutral(padded[:, :128]) and is_neutral(padded[:, 384:])


def test_neutral_is_zero_for_clip() -> None:
    """The mean CLIP's preprocessing subtracts."""
    assert NEUTRAL == (0.48145466, 0.4578275, 0.40821073)


def test_resize_is_antialiased(device: torch.device) -> None:
    """Stripes of one pixel are grey from afar, not the stripes one happens to hit."""
    stripes = torch.zeros(1, 512, 512, 3, device=device)
    stripes[:, :, ::2] = 1
    small = prepare(stripes, size=37)
    assert (small[:, 2:-2, 2:-2] - 0.5).abs().max() < 0.05


def test_views_are_prepared_one_by_one(photo: Tensor) -> None:
    views = torch.cat((photo, photo.flip(2), photo.flip(1)))
    masks = photo.new_zeros(3, 512, 512)
    masks[0, 50:200, 150:300] = 1
    masks[1, 300:, 100:220] = 1
    masks[2, :, 200:210] = 1
    together = prepare(views, masks, size=64)
    assert together.shape == (3, 64, 64, 3)
    for i in range(3):
        assert torch.equal(together[i : i + 1], prepare(views[i : i + 1], masks[i], size=64))


def test_masked_crop_is_the_square_around_the_subject_and_paints_the_rest(photo: Tensor) -> None:
    mask = photo.new_zeros(512, 512)
    mask[100:200, 150:190] = 1
    shown = prepare(photo, mask, size=100)[0]
    assert torch.equal(shown[:, 30:70], photo[0, 100:200, 150:190])
    assert is_neutral(shown[:, :30]) and is_neutral(shown[:, 70:])


def test_masked_crop_stays_in_the_picture(photo: Tensor) -> None:
    mask = photo.new_zeros(512, 512)
    mask[412:512, 500:512] = 1  # a square around its centre would reach over the right edge
    shown = prepare(photo, mask, size=100)[0]
    assert torch.equal(shown[:, 88:], photo[0, 412:, 500:])
    assert is_neutral(shown[:, :88])


def test_masked_crop_pads_where_the_subject_is_longer_than_the_picture_is_high(photo: Tensor) -> None:
    wide = photo[:, :100]
    mask = photo.new_zeros(100, 512)
    mask[:, 100:300] = 1
    shown = prepare(wide, mask, size=200)[0]
    assert torch.equal(shown[50:150], wide[0, :, 100:300])
    assert is_neutral(shown[:50]) and is_neutral(shown[150:])


def test_masked_pad_keeps_the_place_of_the_subject(photo: Tensor) -> None:
    mask = photo.new_zeros(512, 512)
    mask[100:200, 150:190] = 1
    shown = prepare(photo, mask, fit="pad", size=512)[0]
    assert torch.equal(shown[100:200, 150:190], photo[0, 100:200, 150:190])
    assert is_neutral(shown[mask == 0])


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_mask_of_everything_is_no_mask(photo: Tensor, fit: str) -> None:
    wide = photo[:, 100:300]
    assert torch.equal(prepare(wide, photo.new_ones(200, 512), fit), prepare(wide, None, fit))
    assert torch.equal(prepare(wide, photo.new_ones(7, 99), fit), prepare(wide, None, fit))


def test_half_a_mask_value_is_half_the_colour(photo: Tensor) -> None:
    mask = photo.new_ones(512, 512)
    mask[:, 256:] = 0.5
    mask[0] = 0
    shown = prepare(photo, mask, fit="pad", size=512)[0]
    assert torch.allclose(shown[1:, 256:], (photo[0, 1:, 256:] + NEUTRAL_PIXEL.to(photo.device)) / 2, atol=1e-6)


def test_a_blurred_mask_is_centred_on_its_outline(photo: Tensor) -> None:
    hard = photo.new_zeros(1, 1, 512, 512)
    hard[..., 200:300, 200:300] = 1
    soft = torch.nn.functional.avg_pool2d(hard, 41, stride=1, padding=20)[0]
    one, other = prepare(photo, hard[0], size=100), prepare(photo, soft, size=100)
    assert torch.allclose(one[:, 30:70, 30:70], other[:, 30:70, 30:70], atol=1e-5)


def test_a_mask_of_another_size_is_stretched_to_the_image(photo: Tensor) -> None:
    small, large = photo.new_zeros(64, 64), photo.new_zeros(512, 512)
    small[8:32, 16:40], large[64:256, 128:320] = 1, 1
    assert psnr(prepare(photo, small), prepare(photo, large)) > 25


@pytest.mark.parametrize("shape", [(512, 512), (1, 512, 512), (2, 512, 512), (2, 1, 512, 512), (1, 1, 512, 512)])
def test_mask_layouts(photo: Tensor, shape: tuple[int, ...]) -> None:
    mask = photo.new_zeros(shape)
    mask[..., 100:200, 100:200] = 1
    views = torch.cat((photo, photo))
    assert torch.equal(prepare(views, mask, size=100), views[:, 100:200, 100:200])


def test_alpha_hides_what_is_transparent(photo: Tensor) -> None:
    alpha = photo.new_zeros(1, 512, 512, 1)
    alpha[:, 100:200, 150:250] = 1
    cutout = torch.cat((photo, alpha), dim=-1)
    assert torch.equal(prepare(cutout, size=64), prepare(photo, alpha[..., 0], size=64))
    opaque = torch.cat((photo, torch.ones_like(alpha)), dim=-1)
    assert torch.equal(prepare(opaque), prepare(photo))
    mask = photo.new_zeros(512, 512)
    mask[150:300, 100:300] = 1
    assert torch.equal(prepare(cutout, mask, size=64), prepare(photo, mask * alpha[..., 0], size=64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_comes_out_as_fp32(photo: Tensor, dtype: torch.dtype) -> None:
    shown = prepare(photo.to(dtype), photo.new_ones(8, 8, dtype=dtype))
    assert shown.dtype == torch.float32
    assert torch.allclose(shown, prepare(photo), atol=0.01)


def test_the_inputs_are_not_written_to(photo: Tensor) -> None:
    image = torch.cat((photo * 1.2, photo.new_ones(1, 512, 512, 1)), dim=-1)
    mask = torch.rand_like(photo[..., 0])
    before = image.clone(), mask.clone()
    prepare(image, mask)
    crop_to_subject(image, mask)
    align_face(image, landmarks([face_mesh(*ASTRONAUT_FACE)]))
    assert torch.equal(image, before[0]) and torch.equal(mask, before[1])


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(1, 48),
    fit=st.sampled_from(["crop", "pad"]),
    channels=st.sampled_from([3, 4]),
    masked=st.booleans(),
    margin=st.floats(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_picture_gives_a_square_within_range(
    device: torch.device,
    height: int,
    width: int,
    size: int,
    fit: str,
    channels: int,
    masked: bool,
    margin: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, height, width, channels, generator=generator).to(device) * 1.2 - 0.1
    image[..., 3:] = image[..., 3:].clamp(min=0.01)
    mask = None
    if masked:
        mask = (torch.rand(2, height, width, generator=generator) > 0.9).float()
        mask[:, height // 2, width // 2] = 1
    shown = prepare(image, mask, fit, size)  # a mask on the CPU may go with a picture elsewhere
    assert shown.shape == (2, size, size, 3) and (shown.dtype, shown.device) == (torch.float32, image.device)
    assert 0 <= shown.min() and shown.max() <= 1
    cropped, cropped_mask = crop_to_subject(image, mask, margin)
    side = cropped.shape[1]
    assert cropped.shape == (2, side, side, 3) and cropped_mask.shape == (2, side, side)
    assert 1 <= side <= max(height, width)
    assert 0 <= cropped.min() and cropped.max() <= 1 and 0 < cropped_mask.max() <= 1


BAD_IMAGES = [
    (torch.rand(8, 8, 3), ["(batch, height, width, 3)", "(8, 8, 3)", "batch axis"]),
    (torch.rand(1, 8, 8, 1), ["(1, 8, 8, 1)", "RGB"]),
    (torch.rand(1, 3, 8, 8), ["(1, 3, 8, 8)", "channels must come last"]),
    (torch.rand(0, 8, 8, 3), ["(0, 8, 8, 3)", "empty"]),
    (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["0 to 1", "uint8", "255"]),
    (torch.full((1, 8, 8, 3), 200.0), ["0 to 1", "200", "divide by 255"]),
    ("photo.png", ["tensor", "a str", "IMAGE"]),
    (torch.cat((torch.rand(1, 8, 8, 3), torch.full((1, 8, 8, 3), torch.nan))), ["NaN", "number 2 of 2"]),
    (torch.full((1, 8, 8, 3), torch.inf), ["infinite", "number 1 of 1"]),
    (torch.cat((torch.rand(1, 8, 8, 3), torch.zeros(1, 8, 8, 1)), -1), ["Image 1 of 1", "alpha", "invert"]),
    (torch.cat((torch.rand(1, 8, 8, 3), torch.full((1, 8, 8, 1), 255.0)), -1), ["alpha channel", "divide it by 255"]),
]


@pytest.mark.parametrize(("image", "words"), BAD_IMAGES)
def test_bad_images_are_refused_in_words(image: Any, words: list[str]) -> None:
    mesh = landmarks([face_mesh(*ASTRONAUT_FACE)])
    for call in (lambda: prepare(image), lambda: crop_to_subject(image), lambda: align_face(image, mesh)):
        with pytest.raises(NestedAttentionError) as error:
            call()
        assert all(word in str(error.value) for word in words), str(error.value)


BAD_MASKS = [
    (torch.zeros(64, 64), ["The mask is empty", "1 where the subject is", "Load Image", "disconnect"]),
    (torch.stack((torch.ones(8, 8), torch.zeros(8, 8))), ["Mask 2 of 2 is empty"]),
    (torch.ones(3, 8, 8), ["2 image(s)", "3 masks", "same order"]),
    (torch.ones(2, 8, 8, 3), ["(2, 8, 8, 3)", "Convert Image to Mask"]),
    (torch.ones(8), ["(8,)", "(height, width)"]),
    (torch.full((8, 8), torch.nan), ["mask", "NaN"]),
    ([1, 2], ["a list"]),
    (torch.eye(8) * 255, ["0 (black) to 1 (white)", "0 to 255", "divide it by 255"]),
    (torch.eye(8, dtype=torch.uint8) * 255, ["0 to 255", "divide it by 255"]),
    (torch.eye(8) * 65535, ["0 to 65535", "value that it has for white"]),
    (torch.eye(8) * 1.5, ["0 to 1.5", "Sums", "Combine Masks"]),
    (torch.eye(8) - 0.5, ["-0.5 to 0.5", "differences", "Combine Masks"]),
    (torch.ones(0, 8, 8), ["(0, 8, 8)", "no images or no pixels"]),
    (torch.ones(2, 0, 8), ["(2, 0, 8)", "no images or no pixels"]),
]


@pytest.mark.parametrize(("mask", "words"), BAD_MASKS)
def test_bad_masks_are_refused_in_words(mask: Any, words: list[str]) -> None:
    image = torch.rand(2, 8, 8, 3)
    for call in (prepare, crop_to_subject):
        with pytest.raises(NestedAttentionError) as error:
            call(image, mask)
        assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("mask", [torch.eye(8) > 0, torch.eye(8, dtype=torch.int64), torch.eye(8) * 1.0005 - 0.0002])
def test_masks_of_other_types_and_what_rounding_leaves_are_fine(mask: Tensor) -> None:
    image = torch.rand(1, 8, 8, 3)
    torch.testing.assert_close(prepare(image, mask), prepare(image, torch.eye(8)), atol=1e-3, rtol=0)
    assert 0 <= checked_mask(mask).min() and checked_mask(mask).max() <= 1


def test_a_mask_of_transparent_pixels_is_refused() -> None:
    image, mask = torch.rand(1, 8, 8, 4), torch.zeros(8, 8)
    image[:, :4, :, 3], mask[:4] = 0, 1
    with pytest.raises(NestedAttentionError, match="image 1 of 1 the mask selects only transparent pixels. Invert"):
        prepare(image, mask)


def test_bad_options_are_refused_in_words(photo: Tensor) -> None:
    with pytest.raises(NestedAttentionError, match='"crop" or "pad", got \'stretch\''):
        prepare(photo, fit="stretch")
    with pytest.raises(NestedAttentionError, match="size must be .* 1 or more; got 0"):
        prepare(photo, size=0)
    for margin in (-0.1, math.nan, math.inf, "a"):
        with pytest.raises(NestedAttentionError, match="margin must be a number, 0 or more"):
            crop_to_subject(photo, margin=margin)  # type: ignore[arg-type]


# --- crop_to_subject -------------------------------------------------------------------------------------------------


def test_crop_to_subject_adds_the_margin_on_each_side(photo: Tensor) -> None:
    mask = photo.new_zeros(512, 512)
    mask[100:200, 200:260] = 1
    image, cropped = crop_to_subject(photo, mask, margin=0.25)
    assert torch.equal(image, photo[:, 75:225, 155:305])
    assert torch.equal(cropped, mask[None, 75:225, 155:305])


def test_crop_to_subject_makes_the_margin_smaller_before_it_pads(photo: Tensor) -> None:
    wide = photo[:, :150]
    mask = photo.new_zeros(150, 512)
    mask[20:120, 0:60] = 1
    image, cropped = crop_to_subject(wide, mask, margin=2.0)
    assert torch.equal(image, wide[:, :, :150]) and torch.equal(cropped, mask[None, :, :150])


def test_crop_to_subject_pads_a_subject_that_is_too_long(photo: Tensor) -> None:
    wide = photo[:, :100]
    mask = photo.new_zeros(100, 512)
    mask[10:90, 100:300] = 1
    image, cropped = crop_to_subject(wide, mask, margin=1.0)
    assert torch.equal(image[:, 50:150], wide[:, :, 100:300]) and is_neutral(image[:, :50])
    assert cropped[:, :50].max() == 0 and torch.equal(cropped[:, 50:150], mask[None, :, 100:300])


def test_crop_to_subject_without_a_mask_is_the_centre_square(photo: Tensor) -> None:
    wide = photo[:, :300]
    for mask in (None, photo.new_ones(10, 10)):
        image, cropped = crop_to_subject(wide, mask)
        assert torch.equal(image, wide[:, :, 106:406])
        assert torch.equal(cropped, photo.new_ones(1, 300, 300))


def test_crop_to_subject_brings_all_views_to_the_largest_square(photo: Tensor) -> None:
    masks = photo.new_zeros(2, 512, 512)
    masks[0, 100:200, 200:260] = 1
    masks[1, 300:340, 200:240] = 1
    image, cropped = crop_to_subject(torch.cat((photo, photo)), masks, margin=0.1)
    assert image.shape == (2, 120, 120, 3) and cropped.shape == (2, 120, 120)
    assert torch.equal(image[0], photo[0, 90:210, 170:290])
    assert torch.allclose(cropped[1].mean(), photo.new_tensor((40 / 48) ** 2), atol=0.01)


def test_a_crop_can_be_prepared_with_its_mask(photo: Tensor) -> None:
    """Crop Subject into Encode Subject shows what Encode Subject alone shows."""
    mask = photo.new_zeros(512, 512)
    mask[50:200, 150:300] = 1
    image, cropped = crop_to_subject(photo, mask)
    assert torch.equal(prepare(image, cropped), prepare(photo, mask))


# --- align_face ------------------------------------------------------------------------------------------------------


def test_aligned_face_is_where_ffhq_has_it() -> None:
    """Eyes level and symmetric, centre of the square a tenth of the way to the mouth: read off with dots."""
    picture = torch.zeros(1, 400, 600, 3)
    eyes_and_mouth = ((250.0, 150.0), (330.0, 180.0), (240.0, 232.0), (300.0, 254.0))
    for channel, (x, y) in enumerate((eyes_and_mouth[0], eyes_and_mouth[1], (270.0, 243.0))):
        picture[0, int(y) - 2 : int(y) + 2, int(x) - 2 : int(x) + 2, channel] = 1
    image, mask = align_face(picture, landmarks([face_mesh(*eyes_and_mouth)], height=400, width=600), size=256)
    assert image.shape == (1, 256, 256, 3) and mask.shape == (1, 256, 256)

    def place(channel: int) -> tuple[float, float]:
        rows, columns = torch.meshgrid(torch.arange(256) + 0.5, torch.arange(256) + 0.5, indexing="ij")
        light = image[0, ..., channel] / image[0, ..., channel].sum()
        return float((light * columns).sum()), float((light * rows).sum())

    # The published recipe, in numpy, for the same points.
    eye_left, eye_right, mouth = np.array(eyes_and_mouth[0]), np.array(eyes_and_mouth[1]), np.array((270.0, 243.0))
    eye_avg, eye_to_eye = (eye_left + eye_right) / 2, eye_right - eye_left
    eye_to_mouth = mouth - eye_avg
    x = eye_to_eye - np.flipud(eye_to_mouth) * [-1, 1]
    x /= np.hypot(*x)
    x *= max(np.hypot(*eye_to_eye) * 2.0, np.hypot(*eye_to_mouth) * 1.8)
    y = np.flipud(x) * [-1, 1]
    centre = eye_avg + eye_to_mouth * 0.1
    for channel, point in enumerate((eye_left, eye_right, mouth)):
        u, v = (point - centre) @ x / (x @ x), (point - centre) @ y / (y @ y)
        assert place(channel) == pytest.approx(((u + 1) * 128, (v + 1) * 128), abs=0.3)


@pytest.mark.parametrize("degrees", [-28, -10, 15, 28])
def test_a_tilted_photo_gives_the_same_face(photo: Tensor, degrees: float) -> None:
    mesh = face_mesh(*ASTRONAUT_FACE)
    turn = math.radians(degrees)
    matrix = np.array(((math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))))
    tilted = torch.from_numpy(rotate(astronaut(), degrees, order=3)).to(photo)[None]
    tilted_mesh = ((mesh - 256) @ matrix.T + 256).astype(np.float32)
    straight, mask = align_face(photo, landmarks([mesh]), size=256)
    again, tilted_mask = align_face(tilted, landmarks([tilted_mesh]), size=256)
    assert mask.min() == 1
    inside = tilted_mask == 1  # tilted, a corner of the square leaves the picture
    assert inside.float().mean() > 0.97 and psnr(straight[inside], again[inside]) > 35


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_quarter_turn_changes_nothing(photo: Tensor, turns: int) -> None:
    mesh = face_mesh(*ASTRONAUT_FACE)
    turned_mesh = mesh.copy()
    for _ in range(turns):  # torch.rot90 turns counter-clockwise
        turned_mesh = np.stack((turned_mesh[:, 1], 512 - turned_mesh[:, 0]), axis=1)
    straight, _ = align_face(photo, landmarks([mesh]), size=128)
    turned, _ = align_face(torch.rot90(photo, turns, (1, 2)), landmarks([turned_mesh]), size=128)
    assert torch.allclose(straight, turned, atol=1e-3)


def test_shrinking_a_face_is_antialiased() -> None:
    noise = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(0))
    mesh = face_mesh((156, 200), (356, 200), (190, 380), (322, 380))
    image, _ = align_face(noise, landmarks([mesh]), size=16)
    assert image[:, 4:12, 4:12].std() < 0.03  # single pixels of the noise would give 0.29


def test_outside_of_the_picture_the_mask_is_zero_and_no_second_face_appears(photo: Tensor) -> None:
    mesh = face_mesh(*ASTRONAUT_FACE)
    image, mask = align_face(photo, landmarks([mesh]), margin=0.6, size=256)
    assert mask[0, :50].max() == 0 and mask[0, 80:].min() == 1
    assert 0 <= image.min() and image.max() <= 1
    assert image[0, :30].diff(dim=0).abs().max() < 0.02  # smooth, where a mirror image would show a face


def test_margin_widens_the_square(photo: Tensor) -> None:
    mesh = face_mesh(*ASTRONAUT_FACE)
    tight, _ = align_face(photo, landmarks([mesh]), size=128)
    wide, _ = align_face(photo, landmarks([mesh]), margin=0.25, size=192)
    assert psnr(wide[:, 32:160, 32:160], tight) > 30


def test_the_largest_face_is_taken_in_each_view(photo: Tensor) -> None:
    mesh = face_mesh(*ASTRONAUT_FACE)
    small = (mesh - mesh.mean(0)) * 0.4 + 300
    views = torch.cat((photo, photo.flip(2)))
    mirrored = face_mesh((512 - 248, 103.5), (512 - 202, 101.5), (512 - 243, 145), (512 - 206, 142), points=468)
    both, _ = align_face(views, landmarks([small, mesh], [mirrored]), size=64)
    one, _ = align_face(photo, landmarks([mesh]), size=64)
    other, _ = align_face(photo.flip(2), landmarks([mirrored]), size=64)
    assert torch.equal(both, torch.cat((one, other)))


def test_a_photo_that_was_resized_after_detection(photo: Tensor) -> None:
    mesh = face_mesh(*ASTRONAUT_FACE)
    half = prepare(photo, size=256)
    assert psnr(align_face(half, landmarks([mesh]), size=64)[0], align_face(photo, landmarks([mesh]), size=64)[0]) > 35


def test_alpha_goes_into_the_mask_of_an_aligned_face(photo: Tensor) -> None:
    alpha = photo.new_ones(1, 512, 512, 1)
    alpha[:, :100] = 0
    image, mask = align_face(torch.cat((photo, alpha), -1), landmarks([face_mesh(*ASTRONAUT_FACE)]), size=128)
    assert mask[0, :40].max() == 0 and mask[0, 90:].min() > 0.99
    assert is_neutral(image[0, :40])


def test_bad_landmarks_are_refused_in_words(photo: Tensor) -> None:
    mesh = face_mesh(*ASTRONAUT_FACE)
    views = torch.cat((photo, photo))
    nan = mesh.copy()
    nan[3] = np.nan
    cases: list[tuple[Any, list[str]]] = [
        (landmarks([mesh]), ["2 image(s)", "landmarks of 1", "same images"]),
        (landmarks([mesh], [mesh], height=400), ["512x400", "512x512", "same images"]),
        (landmarks([mesh], [mesh[:68]]), ["image 2", "(68, 2)", "(478, 2)"]),
        (landmarks([nan], [mesh]), ["image 1", "NaN"]),
        (landmarks([np.full((478, 2), 5.0)], [mesh]), ["image 1", "eyes and mouth", "mask instead"]),
        ({"frames": [[{"score": 1}], [{}]]}, ["image 1", "landmarks_xy", "Detect Face Landmarks"]),
        ({"faces": []}, ["'frames'", "dict", "faces"]),
        ([[mesh]], ["'frames'", "a list"]),
    ]
    for payload, words in cases:
        with pytest.raises(NestedAttentionError) as error:
            align_face(views, payload)
        assert all(word in str(error.value) for word in words), str(error.value)


# --- content_hash ----------------------------------------------------------------------------------------------------


def test_the_hash_names_the_picture(photo: Tensor) -> None:
    name = content_hash(photo)
    assert len(name) == 16 and set(name) <= set("0123456789abcdef")
    assert name == content_hash(photo[0]) == content_hash(photo.double()) == content_hash(photo + 1e-4)
    assert name == content_hash(photo.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3))
    changed = photo.clone()
    changed[0, 5, 5, 1] += 0.01
    assert (
        len({name, content_hash(changed), content_hash(photo.reshape(1, 256, 1024, 3)), content_hash(photo[:, 1:])})
        == 4
    )
    with pytest.raises(NestedAttentionError, match="float tensor"):
        content_hash(photo.new_zeros(1, 8, 8, 3, dtype=torch.uint8))
