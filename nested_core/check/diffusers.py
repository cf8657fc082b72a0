"""Denoising losses on diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from ..attention import ValueNorm
from ..encoder import EncoderConfig, NestedEncoder
from ..hosts.diffusers import BoundSubject, check_fits, cross_attention, nested_attention
from ..images import prepare
from ..training.base import BaseModel
from ..training.examples import Collate, Example, ExampleSubject
from ..training.frozen import FrozenEncoders
from ..training.objective import picture_of
from .keys import Kinship, kinship
from .search import noise_of
from .settings import Settings

PLACEHOLDER = "<subject>"
BATCH = 4
"""Photos that are denoised at once."""


class DiffusersBench:
    """The losses of photos (B, H, W, 3), 0 to 1, with an encoder on a base model. A `search.Bench`.

    caption: has PLACEHOLDER once. size: side of the squares that are denoised, in pixels. All on `device`; the U-Net in
    its own type.

    Raises NestedAttentionError: encoder and base model don't fit; a caption without the placeholder; a scheduler of an
    unknown prediction type.
    """

    def __init__(
        self,
        base: BaseModel,
        encoder: NestedEncoder,
        photos: Tensor,
        caption: str,
        class_word: str,
        size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        check_fits(base.unet, encoder.config)
        self.base, self.device, self.encoder = base, torch.device(device), encoder.to(device).eval()
        for part in (base.unet, base.vae, *base.text_encoders, base.vision):
            part.to(self.device)
        self.size = size
        self.squares = prepare(photos, None, "crop", base.vision.image_size).to(self.device)
        pictures = prepare(photos, None, "crop", size)
        frozen = FrozenEncoders(base, self.device, base.unet.dtype, encoder.config.image_features)
        self.latents = frozen.encoded(pictures)
        subject = ExampleSubject(PLACEHOLDER, class_word, [pictures[0]])
        prompt, places = Collate(base.tokenizers).read(Example(pictures[0], caption, [subject]))
        self.places = places[PLACEHOLDER]
        self.states, pooled = frozen.text([prompt])
        self.pooled = {"eos": pooled, "placeholder": None if pooled is None else self._pooled_at_placeholder(prompt)}
        self.tokens = cache(self._tokens)  # of a photo, by which features

    @property
    def config(self) -> EncoderConfig:
        return self.encoder.config

    @property
    def photos(self) -> int:
        return len(self.latents)

    def kinship(self) -> Kinship:
        modules = [self.base.unet.get_submodule(name) for name in cross_attention(self.base.unet)]
        return kinship(self.encoder, [m.to_k.weight for m in modules], [m.heads for m in modules])

    def losses(self, settings: Settings | None, shown: Sequence[int], level: float) -> Iterator[float]:
        photos = list(range(self.photos))
        for start in range(0, self.photos, BATCH):
            at = slice(start, start + BATCH)
            yield from self._batch(settings, photos[at], shown[at], level)

    @torch.inference_mode()
    def _batch(
        self, settings: Settings | None, photos: Sequence[int], shown: Sequence[int], level: float
    ) -> list[float]:
        scheduler, unet = self.base.scheduler, self.base.unet
        clean = self.latents[list(photos)]
        time = torch.tensor([round((1 - level) * (scheduler.config.num_train_timesteps - 1))])
        noise = torch.cat([noise_of(clean[:1].shape, photo, level) for photo in photos]).to(clean)
        noisy = scheduler.add_noise(clean, noise, time)
        subjects = [] if settings is None else [self._subject(settings, shown)]
        with nested_attention(unet, subjects):
            out = unet(
                noisy.to(unet.dtype),
                time.to(self.device),
                encoder_hidden_states=self.states.expand(len(photos), -1, -1),
                added_cond_kwargs=self._added("eos" if settings is None else settings.pooled, len(photos)),
            ).sample.float()
        return (picture_of(scheduler, noisy, out, time) - clean).square().mean((1, 2, 3)).tolist()

    def _subject(self, settings: Settings, shown: Sequence[int]) -> BoundSubject:
        return BoundSubject(
            self.encoder,
            torch.cat([self.tokens(photo, settings.image_features) for photo in shown]),
            self.places,
            alpha=settings.alpha or 1.0,
            value_norm=cast(ValueNorm, settings.value_norm),
        )

    def _tokens(self, photo: int, features: str) -> Tensor:
        weights = next(self.encoder.parameters())
        return self.encoder.encode(self.base.vision.features(self.squares[photo][None], features).to(weights))

    def _added(self, pooled: str, rows: int) -> dict[str, Any] | None:
        vector = self.pooled[pooled]
        if vector is None:
            return None
        ids = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]], device=self.device, dtype=vector.dtype)
        return {"text_embeds": vector.expand(rows, -1), "time_ids": ids.expand(rows, -1)}

    @torch.inference_mode()
    def _pooled_at_placeholder(self, prompt: str) -> Tensor:
        """SDXL's pooled vector, taken at the subject's first token: (1, D')."""
        encoder, tokenizer = self.base.text_encoders[-1], self.base.tokenizers[-1]
        ids = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        states = encoder(ids.input_ids.to(self.device)).last_hidden_state
        return encoder.text_projection(states[:, self.places[0]]).to(self.base.unet.dtype)
