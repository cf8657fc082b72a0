"""Check Encoder on diffusers: `python -m nested_core.check ENCODER --base ... --vision ... --photos ...`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from ..checkpoint import load_encoder
from ..errors import NestedAttentionError
from ..figures import to_image
from ..files import PRECISIONS
from ..images import prepare
from ..training.base import load_base
from ..training.config import BaseConfig
from .chart import chart
from .diffusers import PLACEHOLDER, DiffusersBench
from .keep import keep
from .search import passes_of, search
from .verdict import headline, report, table_text

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nested_core.check",
        description="Finds out which settings an encoder was trained with, and whether it does anything at all: by how "
        "well photos are denoised under each.",
    )
    parser.add_argument("encoder", type=Path, metavar="ENCODER", help="encoder file")
    parser.add_argument("--base", required=True, help="diffusers folder, single-file checkpoint or hub id")
    parser.add_argument("--vision", required=True, help="CLIP vision tower: folder, .safetensors file or hub id")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photos, each of another subject")
    parser.add_argument("--class-word", default="person", help="what the subjects are (default: person)")
    parser.add_argument("--caption", default=f"a photo of {PLACEHOLDER}", help="of all photos (default: %(default)s)")
    parser.add_argument("--size", type=int, default=768, help="side of the pictures that are denoised (default: 768)")
    parser.add_argument("--family", default="auto", help="as base.family of the training: sdxl, sd15 or a .json file")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="fp32", help="of the base model (default: fp32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for report.txt and chart.png")
    parser.add_argument("--remember", action="store_true", help="write what is sure beside ENCODER, for auto")
    return parser


def photos_of(folder: Path) -> torch.Tensor:
    """The photos of a folder, by name, as squares of one size (B, S, S, 3).

    Raises NestedAttentionError when there is none, or one can't be read.
    """
    names = sorted(path for path in folder.glob("*") if path.suffix.lower() in _PICTURES)
    if not names:
        raise NestedAttentionError(f"No photos in {folder}: expected files ending in {', '.join(sorted(_PICTURES))}.")
    squares = []
    for path in names:
        try:
            picture = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        except OSError as error:
            raise NestedAttentionError(f"{path} can't be read as a picture: {error}") from error
        squares.append(prepare(torch.from_numpy(picture.copy()).float()[None] / 255, None, "crop", 1024))
    return torch.cat(squares)


def check(arguments: argparse.Namespace) -> None:
    """Does what the parsed command line says.

    Raises NestedAttentionError: something can't be loaded, or does not fit.
    """
    encoder = load_encoder(arguments.encoder, dtype=torch.float32)
    photos = photos_of(arguments.photos)
    base = load_base(BaseConfig(arguments.base, arguments.family, arguments.vision), PRECISIONS[arguments.dtype])
    caption, size = arguments.caption, arguments.size
    bench = DiffusersBench(base, encoder, photos, caption, arguments.class_word, size, arguments.device)
    passes = passes_of(encoder.config, len(photos))
    print(f"{arguments.encoder.name}: {passes} forward passes of the U-Net at {size} x {size} are ahead")
    with tqdm(total=passes, unit="pass", mininterval=1) as bar:
        found = search(bench, bar.update)
    kin = bench.kinship()
    text = report(found, encoder.config, arguments.encoder.name, kin) + f"\n\n{table_text(found)}"
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "report.txt").write_text(text + "\n", "utf-8")
        picture = chart(found, arguments.encoder.name, headline(found))
        to_image(picture).save(arguments.out / "chart.png")
    if arguments.remember:
        print(keep(arguments.encoder, encoder.config, found, base.name))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry point: 0, or 1 with the reason on standard error."""
    logging.basicConfig(format="%(message)s")
    try:
        check(_parser().parse_args(argv))
    except NestedAttentionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
