"""A folder of 30 photographs to try a training with: those that scikit-image ships, and faces of its part of LFW.

python demo/photographs.py photos
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
    "motorcycle_right.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
FACES = 11  # of 100, 25 x 25 pixels each


def lay_out(folder: Path) -> list[Path]:
    """Writes the photographs into a folder, each a subject of its own, without captions; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(skimage.data_dir)
    written = [Path(shutil.copyfile(source / name, folder / name)) for name in PHOTOS]
    for number, face in enumerate(np.load(source / "lfw_subset.npy")[:FACES]):
        written.append(folder / f"face_{number:02}.png")
        Image.fromarray((face * 255).astype(np.uint8)).save(written[-1])
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"Expected the folder to write the photographs to. {__doc__.strip().splitlines()[-1]}")
    print(f"{len(lay_out(Path(sys.argv[1])))} photographs in {sys.argv[1]}")
