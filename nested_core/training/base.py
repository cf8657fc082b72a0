"""The frozen models: a diffusers pipeline and a CLIP vision tower, loaded from a folder, a file or the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..errors import NestedAttentionError
from ..files import open_weights
from ..hosts.diffusers import cross_attention
from ..layers import FAMILIES, Family, described_family, family_of, family_with, register
from ..towers import BY_WIDTH
from .config import BaseConfig


class VisionTower(nn.Module):
    """A CLIP vision tower that gives its hidden states, as the host's CLIP Vision does.

    model: transformers' CLIPVisionModel or CLIPVisionModelWithProjection. mean, std: of the pictures it was trained on.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: Any, mean: Sequence[float] = OPENAI_CLIP_MEAN, std: Sequence[float] = OPENAI_CLIP_STD
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def image_size(self) -> int:
        return self.model.config.image_size

    @property
    def feature_dim(self) -> int:
        return self.model.config.hidden_size

    @torch.no_grad()
    def features(self, images: Tensor, which: str = "penultimate") -> Tensor:
        """Square pictures (B, S, S, 3) in 0..1 -> hidden states (B, T, E), "penultimate" or "last"."""
        pixels = (images.permute(0, 3, 1, 2).to(self.mean) - self.mean) / self.std
        weights = next(self.model.parameters())
        states = self.model(pixels.to(weights.dtype), output_hidden_states=True).hidden_states
        return states[{"penultimate": -2, "last": -1}[which]]


@dataclass
class BaseModel:
    """Everything that stays frozen.

    pipeline: a StableDiffusionPipeline or StableDiffusionXLPipeline, from which all parts are taken. vision: the
    tower whose features the encoder reads. name: in words, for the exported file.

    Raises NestedAttentionError when the U-Net is of no family that this pack knows.
    """

    pipeline: Any
    vision: VisionTower
    name: str = ""

    def __post_init__(self) -> None:
        self.family: Family = family_of_unet(self.unet)
        for part in (self.unet, self.vae, *self.text_encoders, self.vision):
            part.requires_grad_(False).eval()

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @property
    def text_encoders(self) -> list[Any]:
        return self._parts("text_encoder", "text_encoder_2")

    @property
    def tokenizers(self) -> list[Any]:
        return self._parts("tokenizer", "tokenizer_2")

    def _parts(self, *names: str) -> list[Any]:
        parts = [getattr(self.pipeline, name, None) for name in names]
        return [part for part in parts if part is not None]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each cross-attention layer, in diffusers' order."""
        return tuple(self.unet.get_submodule(name).to_k.out_features for name in cross_attention(self.unet))

    @property
    def context_dim(self) -> int:
        """Width of the text tokens."""
        return self.unet.get_submodule(cross_attention(self.unet)[0]).to_k.in_features

    @property
    def latent_channels(self) -> int:
        return self.unet.config.in_channels

    @property
    def vae_step(self) -> int:
        """Picture pixels per latent pixel."""
        return self.pipeline.vae_scale_factor


def family_of_unet(unet: Any) -> Family:
    """The family of a diffusers U-Net, by its cross-attention layers and the width of its text.

    Raises NestedAttentionError when there is none.
    """
    names = cross_attention(unet)
    if not names:
        raise NestedAttentionError("This U-Net has no cross-attention: there is no prompt to bind a subject in.")
    context = unet.get_submodule(names[0]).to_k.in_features
    if family := family_with(names, context):
        return family
    known = ", ".join(f"{f.title} ({len(f.layers())} layers, text {f.context_dim})" for f in FAMILIES.values())
    raise NestedAttentionError(
        f"This U-Net has {len(names)} cross-attention layers and text of width {context}; this pack knows {known}."
    )


def load_base(config: BaseConfig, dtype: torch.dtype = torch.float32) -> BaseModel:
    """The models that a config names, with weights of `dtype` (the VAE's stay fp32).

    Raises NestedAttentionError: nothing is named; a file is missing or can't be read; another family than was said.
    """
    if not config.model or not config.vision:
        missing = [f"base.{name}" for name in ("model", "vision") if not getattr(config, name)]
        raise NestedAttentionError(
            f"{' and '.join(missing)} not set: name a diffusers folder, a single-file checkpoint or a hub id (model), "
            "and the CLIP vision tower (vision)."
        )
    family = config.family
    if family.endswith(".json"):
        family = _family_of_file(Path(family)).name
    pipeline = _load_pipeline(config.model, family, config.variant, dtype)
    pipeline.vae.to(torch.float32)  # SDXL's overflows in fp16
    base = BaseModel(pipeline, load_vision(config.vision, dtype), _title(config.model))
    if family not in ("auto", base.family.name):
        wanted = family_of(family)
        raise NestedAttentionError(
            f"{config.model} is a model of the family {base.family.title}, not {wanted.title}, as base.family says."
        )
    return base


def _title(model: str) -> str:
    """A model's name in words: of a hub id its last part, of a file what stands before the extension."""
    return Path(model).stem if Path(model).is_file() else Path(model).name


def _family_of_file(path: Path) -> Family:
    try:
        return register(described_family(json.loads(path.read_text("utf-8"))))
    except (OSError, ValueError, NestedAttentionError) as error:
        raise NestedAttentionError(f"base.family: {path} does not describe a base model family: {error}") from error


def _load_pipeline(model: str, family: str, variant: str | None, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"torch_dtype": dtype}
    try:
        if Path(model).is_file():
            kind = StableDiffusionXLPipeline if family in ("auto", "sdxl") else StableDiffusionPipeline
            return kind.from_single_file(model, **options)
        if variant:
            options["variant"] = variant
        # The safety checker of SD 1.5 has no part in training.
        return DiffusionPipeline.from_pretrained(model, **options, safety_checker=None)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise NestedAttentionError(
            f"Could not load the base model {model}: {error}\nExpected a folder with model_index.json, a "
            "checkpoint file (for one that is not SDXL also set base.family), or the id of a model on the hub."
        ) from error


def load_vision(path: str, dtype: torch.dtype = torch.float32) -> VisionTower:
    """A CLIP vision tower: a transformers folder, a hub id, or one file as in ComfyUI's models/clip_vision.

    The mean and deviation of its pictures are those of the folder's preprocessor_config.json, else CLIP's own.

    Raises NestedAttentionError when it can't be loaded.
    """
    try:
        if Path(path).is_file():
            return VisionTower(_tower_of_file(path).to(dtype=dtype))
        model = CLIPVisionModelWithProjection.from_pretrained(path, torch_dtype=dtype)
        return VisionTower(model, *_statistics_of(path))
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise NestedAttentionError(
            f"Could not load the vision tower {path}: {error}\nExpected a transformers folder or hub id of a CLIP "
            "vision model, or its .safetensors file with transformers' names."
        ) from error


def _statistics_of(path: str) -> tuple[Sequence[float], Sequence[float]]:
    try:
        processor = CLIPImageProcessor.from_pretrained(path)
    except OSError:  # the usual towers come without
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    return processor.image_mean, processor.image_std


def _tower_of_file(path: str) -> Any:
    state = {name: tensor for name, tensor in open_weights(path).read().items() if not name.endswith("position_ids")}
    if "vision_model.embeddings.class_embedding" not in state:
        raise ValueError(f"it has no CLIP vision tower; its first tensors are {', '.join(sorted(state)[:4])}")
    patches, projection = state["vision_model.embeddings.patch_embedding.weight"], state["visual_projection.weight"]
    hidden, patch = patches.shape[0], patches.shape[-1]
    if hidden not in BY_WIDTH:
        raise ValueError(f"its hidden width is {hidden}; known are {', '.join(map(str, BY_WIDTH))}. Use a folder")
    grid = round((state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("self_attn.q_proj.weight") for name in state),
        patch_size=patch,
        image_size=grid * patch,
        projection_dim=projection.shape[0],
        # Neither can be read off the weights.
        num_attention_heads=BY_WIDTH[hidden].heads,
        hidden_act=BY_WIDTH[hidden].activation,
    )
    model = CLIPVisionModelWithProjection(config)
    model.load_state_dict(state, strict=True)
    return model
