"""Folders of subjects, shards and data sets on disk as examples."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import NestedAttentionError
from .catalogue import Catalogue, Picture
from .config import DataConfig
from .examples import Example, ExampleSubject
from .pictures import BrokenPicture, augmented, flat, open_picture, to_tensor
from .references import cut
from .sources import Sample

log = logging.getLogger(__name__)
Made = TypeVar("Made")
_TRIES = 100  # broken pictures in a row; where most are broken no training is wanted


class SubjectData:
    """The examples of folders, shards and data sets: every captioned picture is a target once per epoch.

    What its reference is, `DataConfig.reference` says.

    Raises NestedAttentionError when made: no subjects; a caption without its class word; a subject without pictures.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.catalogue = Catalogue(config)
        if self.catalogue.problems:
            raise NestedAttentionError("\n".join(map(str, self.catalogue.problems)))
        self.views = self.catalogue.views
        #: what an epoch shows, each as often as its folder says
        self.pictures = [p for p in self.catalogue.pictures for _ in range(self.catalogue.repeats(p))]
        if homeless := self.catalogue.homeless:
            log.warning("%d pictures lie in no subject's folder and are not used: %s", len(homeless), homeless[0])
        if config.reference == "self" and (whole := self.catalogue.uncut()):
            log.warning(
                "%d of %d pictures do not say where their subject is (landmarks, a box, a mask): their reference is "
                "the whole picture, augmented. The first: %s",
                len(whole), len(self.catalogue.pictures), whole[0],
            )  # fmt: skip
        self._numbers = {name: number for number, name in enumerate(self.catalogue.samples)}
        # Which broken pictures were named: one memory for all workers of this process.
        self._named = torch.zeros(len(self._numbers), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.pictures)

    def __repr__(self) -> str:
        return f"{len(self.catalogue.pictures)} captioned pictures of {len(self.views)} subjects"

    def draw(self, index: int, rng: random.Random) -> Example:
        """An example with this picture as its target; with another's, where it is broken and `broken` is "skip"."""
        for _ in range(_TRIES):
            picture = self.pictures[index]
            example = self._unbroken(picture.sample, partial(self._example, picture, rng))
            if example is not None:
                return example
            # Drawn again whether it is known to be broken or not: what is drawn depends on the position alone.
            index = rng.randrange(len(self.pictures))
        raise NestedAttentionError(
            f"{_TRIES} pictures in a row can't be read, {self.pictures[index].sample.name} among them. Look at what is "
            "there with --look."
        )

    def captions(self) -> Iterator[Example]:
        """Every caption that is long enough to lose its end in a text encoder, as an example without pictures."""
        for picture in self.catalogue.pictures:
            for caption in picture.captions:
                if len(caption) > 70:
                    who = [ExampleSubject(*found[:2], ()) for found in self.catalogue.bindings(picture, caption)]
                    yield Example(torch.zeros(0, 0, 3), caption, who, name=picture.sample.name)

    def _example(self, picture: Picture, rng: random.Random) -> Example:
        caption = rng.choice(picture.captions)
        subjects = [
            ExampleSubject(placeholder, class_word, self._references(name, picture, rng))
            for placeholder, class_word, name in self.catalogue.bindings(picture, caption)
        ]
        target, mask, size, corner = self._target(picture.sample, rng)
        return Example(target, caption, subjects, mask, size, corner, name=picture.sample.name)

    def _unbroken(self, sample: Sample, make: Callable[[], Made]) -> Made | None:
        """What is made of a picture; None for a broken one that is to be skipped, named the first time."""
        try:
            return make()
        except BrokenPicture as error:
            if self.config.broken == "stop":
                raise
            number = self._numbers[sample.name]
            if not self._named[number]:
                self._named[number] = 1
                log.warning("skipped: %s", error)
            return None

    # --- pictures

    def _references(self, subject: str, picture: Picture, rng: random.Random) -> list[Tensor]:
        target = picture.sample
        if target.reference and not picture.several:
            image = open_picture(target.name, target.reference, target.files[target.reference])
            return [to_tensor(self._varied(image if self.config.use_masks else flat(image), rng, False))]
        others = [view for view in self.views[subject] if view.name != target.name]
        if not picture.several and (self.config.reference == "self" or not others):
            is_cut = self.config.reference == "self" and self.catalogue.is_cut(target)
            return [self._reference(target, rng, augment=not is_cut)]
        count = self.config.references
        if self.config.vary_references:
            count = rng.randint(1, count)
        chosen = rng.sample(others, min(count, len(others)))
        spare = [view for view in others if view not in chosen]
        found = []
        while chosen:
            view = chosen.pop(0)
            reference = self._unbroken(view, partial(self._reference, view, rng))
            if reference is not None:
                found.append(reference)
            elif spare:
                chosen.append(spare.pop(rng.randrange(len(spare))))
        if not found:
            raise BrokenPicture(f"{target.name}: no other picture of {subject} can be read as its reference.")
        return found

    def _reference(self, sample: Sample, rng: random.Random, augment: bool = False) -> Tensor:
        """(H, W, 3), or (H, W, 4) with the mask as alpha."""
        image = picture_of(sample)
        mask = mask_of(sample, image)
        place = self.catalogue.places.get(sample.name)
        if mask is not None and self.config.use_masks:
            # `prepare` cuts a square around what is not transparent.
            image = image.convert("RGB")
            image.putalpha(mask)
            mask = None
        else:
            image = flat(image)
        image = cut(image, place, mask, self.config.margin, sample.name)
        return to_tensor(self._varied(image, rng, augment))

    def _varied(self, image: Image.Image, rng: random.Random, augment: bool) -> Image.Image:
        return augmented(image, rng) if augment or rng.random() < self.config.augment else image

    def _target(
        self, sample: Sample, rng: random.Random
    ) -> tuple[Tensor, Tensor | None, tuple[int, int], tuple[int, int]]:
        """The target (S, S, 3), its mask (S, S) or None, its original size and where it was cropped."""
        image = picture_of(sample)
        mask = mask_of(sample, image)
        image = flat(image)
        size, side = (image.height, image.width), self.config.resolution
        scale = side / min(image.size)
        shape = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        spare = (shape[0] - side, shape[1] - side)
        share = (rng.random(), rng.random()) if self.config.crop == "random" else (0.5, 0.5)
        left, top = round(spare[0] * share[0]), round(spare[1] * share[1])
        mirror = rng.random() < self.config.flip

        def cut_out(picture: Image.Image, resample: Image.Resampling) -> Tensor:
            picture = picture.resize(shape, resample).crop((left, top, left + side, top + side))
            return to_tensor(ImageOps.mirror(picture) if mirror else picture)

        target = cut_out(image, Image.Resampling.LANCZOS)
        return target, None if mask is None else cut_out(mask, Image.Resampling.BILINEAR)[..., 0], size, (top, left)


def picture_of(sample: Sample) -> Image.Image:
    """A sample's picture, RGB or RGBA. Raises BrokenPicture when it can't be read."""
    assert sample.picture is not None
    return open_picture(sample.name, sample.picture, sample.files[sample.picture])


def mask_of(sample: Sample, image: Image.Image) -> Image.Image | None:
    """White where the subject is: 01.mask.png, else what is not transparent; None where neither says so."""
    if "mask.png" not in sample.files:
        return image.getchannel("A") if image.mode == "RGBA" else None
    mask = open_picture(sample.name, "mask.png", sample.files["mask.png"]).convert("L")
    size = image.size
    if abs(mask.width * size[1] / (mask.height * size[0]) - 1) > 0.02:
        raise NestedAttentionError(
            f"The mask {sample.name}.mask.png is {mask.width}x{mask.height}, its picture {size[0]}x{size[1]}: another "
            "shape. Make it of the same picture."
        )
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)
