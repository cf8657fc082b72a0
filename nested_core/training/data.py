"""Folders of subjects and webdataset shards as examples.

A picture is a sample in the way of webdataset: files that share a name up to its first dot. The folder that it lies in
is its subject, in a shard as on the disk:

    rex/class.txt         what the subject is: "golden retriever"
    rex/01.jpg            a picture
    rex/01.txt            its captions, one per line
    rex/01.mask.png       where the subject is, in white (optional)
    both/01.json          {"subjects": {"<anna>": "anna", "<rex>": "rex"}}: a picture of several subjects (optional)
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2
from webdataset.cache import FileCache, islocal
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from ..errors import NestedAttentionError
from ..prompt import Placeholder, PromptReader
from .config import DataConfig
from .examples import Example, ExampleSubject

_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
_LAYOUT = "Expected one folder per subject with pictures and captions: <subject>/01.jpg, <subject>/01.txt."


@dataclass
class Sample:
    """Files that share a name: `files` maps what follows the first dot to what reads it."""

    name: str
    files: dict[str, Callable[[], bytes]] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def picture(self) -> str | None:
        """The extension of the picture, if there is one."""
        return next((extension for extension in _PICTURES if extension in self.files), None)

    def text(self, extension: str) -> str:
        """A text file's content, stripped; empty where there is none. Raises NestedAttentionError if it is no text."""
        if extension not in self.files:
            return ""
        try:
            return self.files[extension]().decode("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise NestedAttentionError(f"Could not read {self.name}.{extension} as UTF-8 text: {error}.") from error

    def image(self, extension: str, mode: str) -> Image.Image:
        """A picture file, upright. Raises NestedAttentionError when it can't be read."""
        try:
            with Image.open(io.BytesIO(self.files[extension]())) as opened:
                return ImageOps.exif_transpose(opened).convert(mode)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            raise NestedAttentionError(
                f"Could not read the picture {self.name}.{extension}: {error}. Repair or remove it."
            ) from error


def folder_samples(folder: str | Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(path below the folder, reader) of each file. Raises NestedAttentionError when there is no such folder."""
    root = Path(folder)
    if not root.is_dir():
        raise NestedAttentionError(f"There is no data folder {root.resolve()}. {_LAYOUT}")
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield path.relative_to(root).as_posix(), path.read_bytes


def shard_samples(shard: str, cache: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(path in the shard, reader) of each file. A shard with an address is copied to `cache` first.

    Shards are read by position, not as streams: so a subject's pictures may lie anywhere in any of them, and a
    resumed run finds its place at once.
    """
    try:
        if not Path(shard).exists() and not islocal(shard):
            # A folder for each address: the cache itself goes by file names.
            folder = Path(cache, hashlib.sha256(shard.encode()).hexdigest()[:16])
            folder.mkdir(parents=True, exist_ok=True)
            shard = FileCache(str(folder)).get_file(shard)
        path = Path(shard.removeprefix("file:"))
        with tarfile.open(path, "r:") as archive:  # not compressed, so that it can be read by position
            members = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    except (OSError, tarfile.TarError, ValueError) as error:
        raise NestedAttentionError(f"Could not read the shard {shard} as a plain .tar file: {error}.") from error
    for name, offset, size in members:
        yield name.removeprefix("./"), _Range(path, offset, size)


@dataclass(frozen=True)
class _Range:
    """Reads a part of a file; a class, so that workers can be sent it."""

    path: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_samples(config: DataConfig) -> dict[str, Sample]:
    """All samples of the folders and shards, by name."""
    samples: dict[str, Sample] = {}
    sources = [folder_samples(folder) for folder in config.folders]
    sources += [shard_samples(shard, config.shard_cache) for s in config.shards for shard in expand_urls(s)]
    for source in sources:
        for path, read in source:
            name, extension = base_plus_ext(path)
            if name and extension:
                files = samples.setdefault(name, Sample(name)).files
                if extension.lower() in files:
                    raise NestedAttentionError(
                        f"There are two files {name}.{extension.lower()}, in different folders or shards. Rename one "
                        "of the subjects: each needs a folder name of its own."
                    )
                files[extension.lower()] = read
    return samples


@dataclass
class Picture:
    """A picture that examples are made of: its captions, and who is in it by placeholder."""

    sample: Sample
    captions: list[str]
    subjects: dict[str, str]
    several: bool


class SubjectData:
    """The examples of folders and shards: every captioned picture is a target once per epoch.

    Its references are other pictures of its subject, or itself, augmented, where there is no other.

    Raises NestedAttentionError when made: no subjects; a caption without its class word; a subject without pictures.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        samples = read_samples(config)
        self.classes = {s.subject: s.text("txt") for s in samples.values() if s.name.endswith("/class")}
        pictured = [s for s in samples.values() if s.picture and s.subject]
        self.pictures = [
            self._picture(sample) for sample in pictured if "txt" in sample.files or "json" in sample.files
        ]
        together = {picture.sample.name for picture in self.pictures if picture.several}
        #: pictures of one subject alone: what references are taken from
        self.views: dict[str, list[Sample]] = defaultdict(list)
        for sample in pictured:
            if sample.name not in together:
                self.views[sample.subject].append(sample)
        self._check(samples)

    def __len__(self) -> int:
        return len(self.pictures)

    def __repr__(self) -> str:
        return f"{len(self.pictures)} captioned pictures of {len(self.views)} subjects"

    def draw(self, index: int, rng: random.Random) -> Example:
        """An example with this picture as its target."""
        picture = self.pictures[index]
        caption = rng.choice(picture.captions)
        subjects = [
            ExampleSubject(placeholder, class_word, self._references(name, picture.sample, rng))
            for placeholder, class_word, name in self.bindings(picture, caption)
        ]
        target, mask, size, corner = self._target(picture.sample, rng)
        return Example(target, caption, subjects, mask, size, corner, name=picture.sample.name)

    def captions(self) -> Iterator[Example]:
        """Every caption that is long enough to lose its end in a text encoder, as an example without pictures."""
        for picture in self.pictures:
            for caption in picture.captions:
                if len(caption) > 70:
                    who = [ExampleSubject(*found[:2], ()) for found in self.bindings(picture, caption)]
                    yield Example(torch.zeros(0, 0, 3), caption, who, name=picture.sample.name)

    def bindings(self, picture: Picture, caption: str) -> list[tuple[str, str, str]]:
        """(placeholder, class word, subject) of everyone a caption of the picture binds.

        The placeholder is the class word itself where the caption has that and no placeholder.
        """
        found = []
        for placeholder, name in picture.subjects.items():
            word = self.class_word(name)
            if not picture.several and not _mentions(caption, placeholder, word):
                placeholder = word
            found.append((placeholder, word, name))
        return found

    def class_word(self, subject: str) -> str:
        """What a subject is. Raises NestedAttentionError when nothing says so."""
        word = self.classes.get(subject) or self.config.class_word
        if not word:
            raise NestedAttentionError(
                f'Nothing says what the subject "{subject}" is. Write it into {subject}/class.txt ("dog"), or set '
                "data.class_word if all subjects are of one kind."
            )
        return word

    # --- when made

    def _picture(self, sample: Sample) -> Picture:
        said: Any = {}
        if "json" in sample.files:
            try:
                said = json.loads(sample.text("json") or "{}")
            except json.JSONDecodeError as error:
                raise NestedAttentionError(f"{sample.name}.json is no JSON: {error}.") from error
        captions = [line.strip() for line in sample.text("txt").splitlines() if line.strip()]
        subjects = said.get("subjects") if isinstance(said, dict) else None
        if "subjects" in said and not (
            isinstance(subjects, dict) and subjects and all(isinstance(name, str) for name in subjects.values())
        ):
            raise NestedAttentionError(
                f'{sample.name}.json: "subjects" should map placeholders to subject folders, as in '
                f'{{"<anna>": "anna", "<rex>": "rex"}}; got {json.dumps(subjects)}.'
            )
        return Picture(sample, captions, subjects or {self.config.placeholder: sample.subject}, bool(subjects))

    def _check(self, samples: dict[str, Sample]) -> None:
        if not self.pictures:
            searched = [str(Path(folder).resolve()) for folder in self.config.folders] + list(self.config.shards)
            pictures = sum(sample.picture is not None for sample in samples.values())
            raise NestedAttentionError(
                f"No captioned pictures of subjects in {', '.join(searched) or 'nothing: set data.folders or shards'}. "
                f"There are {len(samples)} samples, {pictures} of them pictures. {_LAYOUT}"
            )
        wrong = []
        for picture in self.pictures:
            for name in picture.subjects.values():
                if not self.views.get(name):
                    raise NestedAttentionError(
                        f'{picture.sample.name}: there is no picture of the subject "{name}" alone to take references '
                        f"from. Subjects with pictures: {', '.join(sorted(self.views)[:10]) or 'none'}."
                    )
            if not picture.captions:
                wrong.append(f"{picture.sample.name}: no caption")
            for caption in picture.captions:
                for placeholder, word, _ in self.bindings(picture, caption):
                    if not _mentions(caption, placeholder, word):
                        wrong.append(f'{picture.sample.name}: "{caption}" has no {self._expected(picture, word)}')
        if wrong:
            more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise NestedAttentionError(
                "These captions do not mention their subject, so there is no word to bind it to:\n  "
                + "\n  ".join(wrong[:10])
                + more
            )

    def _expected(self, picture: Picture, word: str) -> str:
        if picture.several:
            return " and ".join(picture.subjects)
        return f"{self.config.placeholder} and no class word ({word})"

    # --- pictures

    def _references(self, subject: str, target: Sample, rng: random.Random) -> list[Tensor]:
        others = [view for view in self.views[subject] if view.name != target.name]
        count = self.config.references
        if self.config.vary_references:
            count = rng.randint(1, count)
        chosen = rng.sample(others, min(count, len(others))) if others else [target]
        return [self._reference(view, rng, augment=not others) for view in chosen]

    def _reference(self, sample: Sample, rng: random.Random, augment: bool) -> Tensor:
        """(H, W, 3), or (H, W, 4) with the mask as alpha."""
        assert sample.picture is not None
        image = sample.image(sample.picture, "RGB")
        if self.config.use_masks and "mask.png" in sample.files:
            image.putalpha(_mask_of(sample, image.size))
        if augment or rng.random() < self.config.augment:
            image = _augmented(image, rng)
        return _tensor(image)

    def _target(
        self, sample: Sample, rng: random.Random
    ) -> tuple[Tensor, Tensor | None, tuple[int, int], tuple[int, int]]:
        """The target (S, S, 3), its mask (S, S) or None, its original size and where it was cropped."""
        assert sample.picture is not None
        image = sample.image(sample.picture, "RGB")
        mask = _mask_of(sample, image.size) if "mask.png" in sample.files else None
        size, side = (image.height, image.width), self.config.resolution
        scale = side / min(image.size)
        shape = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        spare = (shape[0] - side, shape[1] - side)
        share = (rng.random(), rng.random()) if self.config.crop == "random" else (0.5, 0.5)
        left, top = round(spare[0] * share[0]), round(spare[1] * share[1])
        mirror = rng.random() < self.config.flip

        def cut(picture: Image.Image, resample: Image.Resampling) -> Tensor:
            picture = picture.resize(shape, resample).crop((left, top, left + side, top + side))
            return _tensor(ImageOps.mirror(picture) if mirror else picture)

        target = cut(image, Image.Resampling.LANCZOS)
        return target, None if mask is None else cut(mask, Image.Resampling.BILINEAR)[..., 0], size, (top, left)


def _mentions(caption: str, placeholder: str, class_word: str) -> bool:
    return PromptReader([Placeholder(placeholder, class_word)]).mentions_any(caption)


def _mask_of(sample: Sample, size: tuple[int, int]) -> Image.Image:
    mask = sample.image("mask.png", "L")
    if abs(mask.width * size[1] / (mask.height * size[0]) - 1) > 0.02:
        raise NestedAttentionError(
            f"The mask {sample.name}.mask.png is {mask.width}x{mask.height}, its picture {size[0]}x{size[1]}: another "
            "shape. Make it of the same picture."
        )
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def _tensor(image: Image.Image) -> Tensor:
    """(H, W, C), float, 0..1."""
    return v2.functional.pil_to_tensor(image).permute(1, 2, 0).float() / 255


_AUGMENT = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.RandomAffine(degrees=15, scale=(0.8, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
        v2.RandomResizedCrop(512, scale=(0.6, 1), ratio=(0.8, 1.25), antialias=True),
    ]
)
_COLOURS = v2.ColorJitter(brightness=0.15, contrast=0.15, saturation=0.15, hue=0.02)


def _augmented(image: Image.Image, rng: random.Random) -> Image.Image:
    """Another view of the one picture there is: mirrored, turned, cropped, in slightly other colours."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(rng.getrandbits(63))  # torchvision takes no generator
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        image = _COLOURS(image.convert("RGB"))
        if alpha is not None:
            image.putalpha(alpha)
        return _AUGMENT(image)
    finally:
        torch.set_rng_state(state)
