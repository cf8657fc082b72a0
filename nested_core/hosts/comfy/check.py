"""Denoising losses in ComfyUI, through its own sampling: whatever stands on the model acts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...attention import ValueNorm
from ...check.keys import Kinship, kinship
from ...check.search import noise_of
from ...check.settings import Settings
from ...encoder import POOLED, EncoderConfig
from ...errors import NestedAttentionError
from ...images import prepare
from ...prompt import Placeholder, PromptReader
from ...subject import Subject
from .apply import apply_subject
from .run import applications_of
from .unet import check_encoder_fits, encode_tokens, unet_layers_of, vision_features
from .values import Application, HostEncoder, HostSubject

PLACEHOLDER = "<subject>"


class HostBench:
    """The losses of photos (B, H, W, 3), 0 to 1, with an encoder on a MODEL. A `check.search.Bench`.

    caption: has PLACEHOLDER. size: side of the squares that are denoised, in pixels.

    Raises NestedAttentionError: encoder and model don't fit; the model has subjects already; a caption without the
    placeholder; another vision tower's features.
    """

    def __init__(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        encoder: HostEncoder,
        clip_vision: Any,
        photos: Tensor,
        caption: str,
        class_word: str,
        size: int,
    ) -> None:
        check_encoder_fits(encoder, model)
        if applications_of(model):
            raise NestedAttentionError(
                "A subject is applied to this model already. Connect the model from the checkpoint or a LoRA."
            )
        word = Placeholder(PLACEHOLDER, class_word)
        reader = PromptReader([word])
        if not reader.mentions_any(caption):
            raise NestedAttentionError(
                f'The caption must have {PLACEHOLDER} where the subject stands, as in "a photo of {PLACEHOLDER}"; '
                f'got "{caption}".'
            )
        self.model, self.clip, self.encoder, self.clip_vision = model, clip, encoder, clip_vision
        self.class_word = class_word
        self.squares = prepare(photos, None, "crop", clip_vision.image_size)
        self.latents = vae.encode(prepare(photos, None, "crop", size))
        self.plain = _encoded(clip, reader.read(caption).text)
        self.texts = {
            pooled: _encoded(self._applied(self._settings(pooled), 0)[1], caption)
            for pooled in (POOLED if encoder.config.family == "sdxl" else (encoder.config.pooled,))
        }

    @property
    def config(self) -> EncoderConfig:
        return self.encoder.config

    @property
    def photos(self) -> int:
        return len(self.latents)

    def kinship(self) -> Kinship | None:
        """None where the host keeps the U-Net's weights in a form that is no matrix (GGUF)."""
        blocks = self.model.model.diffusion_model
        attentions = []
        for layer in unet_layers_of(self.model)[1]:
            kind, number, i = layer.block
            block = [blocks.middle_block] if kind == "middle" else getattr(blocks, f"{kind}_blocks")
            (transformer,) = (m for m in block[number] if hasattr(m, "transformer_blocks"))
            attentions.append(transformer.transformer_blocks[i].attn2)
        own = [attention.to_k.weight for attention in attentions]
        if any(w.ndim != 2 or len(w) != a.to_q.out_features for w, a in zip(own, attentions, strict=True)):
            return None
        return kinship(self.encoder.module, own, [attention.heads for attention in attentions])

    def losses(self, settings: Settings | None, shown: Sequence[int], level: float) -> Iterator[float]:
        sigma = self.model.get_model_object("model_sampling").percent_to_sigma(level)
        for photo, seen in enumerate(shown):
            model, text = self.model, self.plain
            if settings is not None:
                model, text = self._applied(settings, seen)[0], self.texts[settings.pooled]
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(text, text)
            guider.set_cfg(1.0)
            latents = self.latents[photo][None]
            once, sigmas = _Once(), torch.tensor([sigma, 0.0])
            guider.sample(noise_of(latents.shape, photo, level), latents, once, sigmas, disable_pbar=True, seed=photo)
            yield once.loss

    def _settings(self, pooled: str) -> Settings:
        config = self.config
        return Settings(config.image_features, config.value_norm, config.alpha, pooled)

    def _applied(self, settings: Settings, photo: int) -> tuple[Any, Any]:
        """(MODEL, CLIP) with the subject of a photo."""
        encoder, tokens = self._subject(photo, settings.image_features)
        config = encoder.config
        subject = Subject(
            tokens=tokens,
            placeholder=PLACEHOLDER,
            class_word=self.class_word,
            encoder=config.fingerprint,
            encoder_title=config.title,
            family=config.family,
        )
        application = Application(
            source=HostSubject(encoder, subject),
            placeholder=Placeholder(PLACEHOLDER, self.class_word, settings.pooled == "placeholder"),
            strength=1.0,
            start=0.0,
            end=1.0,
            alpha=settings.alpha or 1.0,
            value_norm=cast(ValueNorm, settings.value_norm),
            mask=None,
            layer_weights=(1.0,) * len(config.widths),
        )
        return apply_subject(self.model, self.clip, application)

    @cache  # noqa: B019  a bench lives as long as a check
    def _subject(self, photo: int, features: str) -> tuple[HostEncoder, Tensor]:
        """The encoder reading these features, and the tokens (1, N, C) that it makes of a photo."""
        encoder = replace(self.encoder, config=replace(self.encoder.config, image_features=features))
        seen = vision_features(encoder, self.clip_vision, self.squares[photo][None])
        return encoder, encode_tokens(encoder, seen)


class _Once(comfy.samplers.Sampler):
    """A sampler that looks at the first noise level alone and keeps how far the model's estimate is off."""

    loss = float("nan")

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        sampling = model_wrap.inner_model.model_sampling
        noisy = sampling.noise_scaling(sigmas[0], noise, latent_image, False)
        estimate = model_wrap(noisy, sigmas[:1].to(noisy), **extra_args)
        self.loss = float((estimate - latent_image).float().square().mean())
        return estimate


def _encoded(clip: Any, text: str) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))
