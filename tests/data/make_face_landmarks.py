"""Makes astronaut_landmarks.npz: points on a real photograph's face, by MediaPipe's mesh and by dlib's 68 points.

    python -m venv apart
    apart/bin/pip install "mediapipe==0.10.21" dlib-bin face_recognition_models "setuptools<80" scikit-image
    apart/bin/python tests/data/make_face_landmarks.py

In an environment of its own, outside of the repository: these packages want an older numpy than the tests have. Only
the points are kept. The photograph (NASA, public domain) comes with scikit-image; the tests turn and scale it alike.
"""

from __future__ import annotations

from pathlib import Path

import dlib
import face_recognition_models
import mediapipe
import numpy as np
from PIL import Image
from skimage.data import astronaut

# (degrees, counter-clockwise as Pillow turns, about the face; factor on the size)
VARIANTS = [(0, 1.0), (-30, 1.0), (-15, 1.0), (15, 1.0), (30, 1.0), (0, 0.5), (0, 2.0), (-20, 2.0), (20, 0.5)]
FACE = (225, 122)


def variant(degrees: int, scale: float) -> Image.Image:
    """The photograph turned and scaled."""
    photo = Image.fromarray(astronaut()).rotate(degrees, Image.Resampling.BICUBIC, center=FACE)
    side = round(512 * scale)
    return photo.resize((side, side), Image.Resampling.LANCZOS)


def mesh_points(picture: np.ndarray) -> np.ndarray:
    """(478, 2) in pixels, the first pixel covering 0..1."""
    with mediapipe.solutions.face_mesh.FaceMesh(static_image_mode=True, refine_landmarks=True) as mesh:
        (face,) = mesh.process(picture).multi_face_landmarks
    height, width = picture.shape[:2]
    return np.array([(point.x * width, point.y * height) for point in face.landmark], np.float32)


def dlib_points(picture: Image.Image) -> np.ndarray:
    """(68, 2) in the same pixels. dlib gives whole pixels, so it reads the points off an enlarged picture."""
    box = dlib.get_frontal_face_detector()(np.asarray(picture), 1)[0]  # the surest comes first
    more = round(2048 / picture.width)
    enlarged = np.asarray(picture.resize((picture.width * more, picture.height * more), Image.Resampling.BICUBIC))
    box = dlib.rectangle(*(side * more for side in (box.left(), box.top(), box.right(), box.bottom())))
    shape = dlib.shape_predictor(face_recognition_models.pose_predictor_model_location())(enlarged, box)
    return np.array([((p.x + 0.5) / more, (p.y + 0.5) / more) for p in shape.parts()], np.float32)


def main() -> None:
    kept: dict[str, np.ndarray] = {}
    for degrees, scale in VARIANTS:
        picture = variant(degrees, scale)
        kept[f"mesh {degrees} {scale}"] = mesh_points(np.asarray(picture))
        kept[f"dlib {degrees} {scale}"] = dlib_points(picture)
    np.savez_compressed(Path(__file__).with_name("astronaut_landmarks.npz"), **kept)


if __name__ == "__main__":
    main()
