"""The picture of what Crop Subject makes of photos: what goes in, with the square that is cut, and what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.data import astronaut

from nested_core.faces import align_face, ffhq_square

from .paths import REPO

POINTS = REPO / "tests" / "data" / "astronaut_landmarks.npz"
#: Of that file: degrees and scale.
SHOWN = [(0, 1.0), (-30, 1.0), (15, 1.0), (20, 0.5)]
_FACE = (225, 122)
_SIDE, _GAP = 300, 12


def upright_faces(path: Path) -> None:
    """Writes the picture: a column for each photo, the crop below it. The photograph (NASA) is in the public domain."""
    page = Image.new("RGB", (len(SHOWN) * (_SIDE + _GAP) + _GAP, 2 * _SIDE + 3 * _GAP), (24, 26, 31))
    points = np.load(POINTS)
    for number, (degrees, scale) in enumerate(SHOWN):
        photo = Image.fromarray(astronaut()).rotate(degrees, Image.Resampling.BICUBIC, center=_FACE)
        side = round(512 * scale)
        photo = photo.resize((side, side), Image.Resampling.LANCZOS)
        mesh = points[f"mesh {degrees} {scale}"]
        found = {"frames": [[{"landmarks_xy": mesh}]], "image_size": (side, side)}
        upright, _ = align_face(torch.from_numpy(np.array(photo)).float()[None] / 255, found)
        crop = Image.fromarray((upright[0].numpy() * 255).round().astype(np.uint8))
        left = _GAP + number * (_SIDE + _GAP)
        shown = round(_SIDE * scale)
        drawn = photo.resize((shown, shown), Image.Resampling.LANCZOS)
        centre, axis = (part.numpy() * shown / side for part in ffhq_square(torch.from_numpy(mesh).double(), 0))
        down = np.array((-axis[1], axis[0]))
        corners = [tuple(centre + s * axis + t * down) for s, t in ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))]
        ImageDraw.Draw(drawn).line(corners, fill=(90, 220, 120), width=3, joint="curve")
        page.paste(drawn, (left + (_SIDE - shown) // 2, _GAP + _SIDE - shown))
        page.paste(crop.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), (left, _SIDE + 2 * _GAP))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=86)
