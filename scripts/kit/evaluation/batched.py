"""Makes the pictures of the evaluation in diffusers, many at a time: what KSampler makes of the nodes' graph."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from demo import data, drawing, export, models, shipped
from demo.lessons import other_entry, unit
from demo.sampling import sample, to_bytes
from nested_core.encoder import NestedEncoder
from nested_core.hosts.diffusers import BoundSubject
from nested_core.images import prepare
from nested_core.training import VisionTower, load_trained
from nested_core.training.model import attention

from .. import small_world
from .cases import WITHOUT_SUBJECT, Bench, Case, Condition, Wanted

AT_ONCE = {"cuda": 96, "cpu": 12}


class Batched(Bench):
    """Any trained encoder, whether ComfyUI opens it or not; on a GPU where there is one."""

    sources = (
        "nested_core/attention.py", "nested_core/encoder.py", "nested_core/resampler.py", "nested_core/images.py",
        "nested_core/checkpoint.py", "nested_core/hosts/diffusers.py", "nested_core/training", "demo/sampling.py",
        "scripts/kit/evaluation/batched.py",
    )  # fmt: skip

    def __init__(self, encoders: dict[str, Path], identities: int, known: Path) -> None:
        super().__init__(encoders, identities, known)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parts: Any = export.load_checkpoint(shipped.WEIGHTS / shipped.CHECKPOINT)
        self.unet, self.text_encoder, self.codec = (part.to(self.device) for part in parts)
        tower: Any = export.load_vision(shipped.WEIGHTS / shipped.VISION)
        self.tower = VisionTower(tower, models.VISION_MEAN, models.VISION_STD).to(self.device)
        self._seen: dict[str, Tensor] = {}

    @torch.no_grad()
    def pictures(self, condition: Condition, wanted: Sequence[Wanted]) -> Iterator[np.ndarray]:
        encoder = self._encoder(condition)
        title = f"{condition.encoder or condition.method} x{condition.strength:g}"
        at_once = AT_ONCE[self.device.type]
        for start in tqdm(range(0, len(wanted), at_once), desc=title, mininterval=2):
            some = wanted[start : start + at_once]
            made = self._drawn(some) if condition.method == "drawn" else self._make(condition, encoder, some)
            yield from made.permute(0, 2, 3, 1).cpu().numpy()

    def _drawn(self, wanted: Sequence[Wanted]) -> Tensor:
        drawn = [data.draw(case.entry, random.Random(case.noise(number))).image for case, number in wanted]
        pixels = models.normalise(torch.from_numpy(np.stack([np.asarray(image) for image in drawn])))
        return to_bytes(self.codec.decode(self.codec.encode(pixels.to(self.device)).latent).sample)

    def _encoder(self, condition: Condition) -> tuple[NestedEncoder, str] | None:
        """The encoder of a condition and the method that it was trained with."""
        if condition.method in WITHOUT_SUBJECT:
            return None
        method, encoder = load_trained(self.encoders[condition.encoder], torch.float32)
        return encoder.to(self.device), method

    def _make(self, condition: Condition, chosen: tuple[NestedEncoder, str] | None, wanted: Sequence[Wanted]) -> Tensor:
        cases = [case for case, _ in wanted]
        prompts = [data.plain_prompt(case.entry, condition.word_first) for case in cases]
        words = [[figure.kind for figure in case.entry.figures] for case in cases]
        negatives = [f"a {of_case[0]}" if condition.negative else "" for of_case in words]
        tokens = models.tokenizer()(
            [*prompts, *negatives], padding="max_length", max_length=models.TEXT_LENGTH, return_tensors="pt"
        ).input_ids
        text = self.text_encoder(tokens.to(self.device)).last_hidden_state
        shape = (1, models.LATENT_CHANNELS, models.LATENT_SIZE, models.LATENT_SIZE)
        seeds = [torch.Generator().manual_seed(case.noise(number)) for case, number in wanted]
        noise = torch.cat([torch.randn(shape, generator=seed) for seed in seeds])
        active: AbstractContextManager[None] = nullcontext()
        if chosen is not None:
            positive, negative = tokens.chunk(2)
            subjects = [
                self._subject(condition, chosen[0], cases, i, positive, [of_case[i] for of_case in words])
                for i in range(len(cases[0].entry.figures))
            ]
            if condition.negative == "black":
                subjects.append(self._black(condition, chosen[0], negative, [of_case[0] for of_case in words]))
            active = attention(self.unet, subjects, chosen[1])
        with active:
            return sample(self.unet, self.codec, text, noise.to(self.device), cfg=condition.cfg)

    def _subject(
        self, condition: Condition, encoder: NestedEncoder, cases: Sequence[Case], i: int, tokens: Tensor,
        words: Sequence[str],
    ) -> BoundSubject:  # fmt: skip
        """The figure of that place in each case, bound to its class word. tokens: of the prompts."""
        seen = [self._features(case, i, view + 1) for case in cases for view in range(condition.views)]
        x = encoder.encode(torch.stack(seen)).reshape(len(cases), -1, encoder.config.token_dim)
        return self._bound(condition, encoder, x, _places(tokens, words), 0)

    def _black(
        self, condition: Condition, encoder: NestedEncoder, tokens: Tensor, words: Sequence[str]
    ) -> BoundSubject:
        features = self._look(torch.zeros(1, drawing.SIZE, drawing.SIZE, 3))
        x = encoder.encode(features).expand(len(words), -1, -1)
        return self._bound(condition, encoder, x, _places(tokens, words), len(words))

    def _bound(
        self, condition: Condition, encoder: NestedEncoder, x: Tensor, places: Tensor, first: int
    ) -> BoundSubject:
        return BoundSubject(
            encoder, x, places.to(self.device), rows=(first, first + len(x)), strength=condition.strength,
            alpha=encoder.config.alpha * condition.alpha, focus=condition.focus,
        )  # fmt: skip

    def _features(self, case: Case, i: int, view: int) -> Tensor:
        """Of a figure's reference (view 1), or of another picture that differs from what is asked for in every axis."""
        figure, reference = case.entry.figures[i], case.references[i]
        if view > 1:
            reference = other_entry(case.entry, i, random.Random(f"evaluation view {case.seed} {i} {view}"))
        key = repr((figure, reference, view))
        if key not in self._seen:
            image = small_world.portrait(figure, view, reference).image
            self._seen[key] = self._look(unit(np.asarray(image))[None])[0]
        return self._seen[key]

    def _look(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in 0..1 -> (B, T, E)."""
        squares = prepare(pictures, size=models.VISION_SIZE).mul(255).round().div(255)
        return self.tower.features(squares.to(self.device))


def _places(tokens: Tensor, words: Sequence[str]) -> Tensor:
    """Where each row's word stands in its tokens (B, 77): (B, 1)."""
    ids = torch.tensor([models.tokenizer().convert_tokens_to_ids(f"{word}</w>") for word in words])
    return (tokens == ids[:, None]).int().argmax(1, keepdim=True)
