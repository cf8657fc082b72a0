"""Makes the pictures of the evaluation in diffusers, many at a time: what KSampler makes of the nodes' graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from demo import data, drawing, export, models, shipped
from demo.sampling import sample
from nested_core.encoder import NestedEncoder
from nested_core.hosts.diffusers import BoundSubject
from nested_core.images import prepare
from nested_core.training import VisionTower, load_trained
from nested_core.training.model import attention

from .. import small_world
from .cases import WITHOUT_SUBJECT, Bench, Case, Condition

AT_ONCE = {"cuda": 96, "cpu": 12}


class Batched(Bench):
    """Any trained encoder, whether ComfyUI opens it or not; on a GPU where there is one."""

    def __init__(self, encoders: dict[str, Path], identities: int, known: Path, seeds: int = 3) -> None:
        super().__init__(encoders, identities, seeds, known)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parts: Any = export.load_checkpoint(shipped.WEIGHTS / shipped.CHECKPOINT)
        self.unet, self.text_encoder, self.codec = (part.to(self.device) for part in parts)
        tower: Any = export.load_vision(shipped.WEIGHTS / shipped.VISION)
        self.tower = VisionTower(tower, models.VISION_MEAN, models.VISION_STD).to(self.device)
        self._seen: dict[tuple[str, str, int], Tensor] = {}

    @torch.no_grad()
    def pictures(self, condition: Condition, cases: Sequence[Case]) -> Iterator[np.ndarray]:
        at_once = max(1, AT_ONCE[self.device.type] // self.seeds)
        encoder = self._encoder(condition)
        title = f"{condition.encoder or condition.method} x{condition.strength:g}"
        for start in tqdm(range(0, len(cases), at_once), desc=title, mininterval=2):
            made = self._make(condition, encoder, cases[start : start + at_once])
            yield from made.permute(0, 2, 3, 1).cpu().numpy().reshape(-1, self.seeds, *made.shape[2:], 3)

    def _encoder(self, condition: Condition) -> tuple[NestedEncoder, str] | None:
        """The encoder of a condition and the method that it was trained with."""
        if condition.method in WITHOUT_SUBJECT:
            return None
        method, encoder = load_trained(self.encoders[condition.encoder], torch.float32)
        return encoder.to(self.device), method

    def _make(self, condition: Condition, chosen: tuple[NestedEncoder, str] | None, cases: Sequence[Case]) -> Tensor:
        prompts = [data.plain_prompt(case.entry) for case in cases]
        words = [[figure.kind for figure in case.entry.figures] for case in cases]
        negatives = [f"a {of_case[0]}" if condition.negative else "" for of_case in words]
        tokens = models.tokenizer()(
            [*prompts, *negatives], padding="max_length", max_length=models.TEXT_LENGTH, return_tensors="pt"
        ).input_ids
        text = self.text_encoder(tokens.to(self.device)).last_hidden_state
        shape = (self.seeds, models.LATENT_CHANNELS, models.LATENT_SIZE, models.LATENT_SIZE)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)) for case in cases]
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
            return sample(
                self.unet, self.codec, text.repeat_interleave(self.seeds, 0), torch.cat(noise).to(self.device),
                cfg=condition.cfg,
            )  # fmt: skip

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
        return self._bound(condition, encoder, x, _places(tokens, words), len(words) * self.seeds)

    def _bound(
        self, condition: Condition, encoder: NestedEncoder, x: Tensor, places: Tensor, first: int
    ) -> BoundSubject:
        return BoundSubject(
            encoder, x.repeat_interleave(self.seeds, 0), places.repeat_interleave(self.seeds, 0).to(self.device),
            rows=(first, first + len(x) * self.seeds), strength=condition.strength,
            alpha=encoder.config.alpha * condition.alpha, focus=condition.focus,
        )  # fmt: skip

    def _features(self, case: Case, i: int, view: int) -> Tensor:
        figure, reference = case.entry.figures[i], case.references[i]
        key = (repr(figure), repr(reference), view)
        if key not in self._seen:
            image = small_world.portrait(figure, view, reference).image
            self._seen[key] = self._look(torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None])[0]
        return self._seen[key]

    def _look(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in 0..1 -> (B, T, E)."""
        squares = prepare(pictures, size=models.VISION_SIZE).mul(255).round().div(255)
        return self.tower.features(squares.to(self.device))


def _places(tokens: Tensor, words: Sequence[str]) -> Tensor:
    """Where each row's word stands in its tokens (B, 77): (B, 1)."""
    ids = torch.tensor([models.tokenizer().convert_tokens_to_ids(f"{word}</w>") for word in words])
    return (tokens == ids[:, None]).int().argmax(1, keepdim=True)
