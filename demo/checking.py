"""Check Encoder in the small world: photos, base models that fit an encoder or do not, encoders that say nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nested_core.check.diffusers import DiffusersBench
from nested_core.checkpoint import load_encoder
from nested_core.encoder import EncoderConfig, NestedEncoder

from . import data, drawing, export, models
from .lessons import unit
from .shipped import CHECKPOINT, ENCODER, VISION, WEIGHTS

CAPTION = "a <subject>"


def portraits(count: int) -> Tensor:
    """Robots in some look, scene and style, as the base model knows them: whole. (count, 128, 128, 3), 0 to 1."""
    rng = random.Random("check 0")
    entries = [data.random_entry(rng) for _ in range(count)]
    robots = [replace(entry, figures=[replace(entry.figures[0], kind="robot")]) for entry in entries]
    return torch.stack([unit(np.asarray(data.draw(entry, rng).image)) for entry in robots])


def bench(
    encoder: NestedEncoder, photos: Tensor, turned: bool = False, tower_seed: int | None = None
) -> DiffusersBench:
    """turned: the U-Net in another basis. tower_seed: a vision tower of random weights."""
    unet, text, codec = export.load_checkpoint(WEIGHTS / CHECKPOINT)
    if turned:
        turn(unet)
    tower = export.load_vision(WEIGHTS / VISION)
    if tower_seed is not None:
        torch.manual_seed(tower_seed)
        tower = type(tower)(tower.config)
    base = models.base_model(unet, text, codec, tower)
    return DiffusersBench(base, encoder, photos, CAPTION, "robot", drawing.SIZE)


def turn(unet: torch.nn.Module) -> None:
    """Keys and queries, and values, in a basis of their own: another base model that computes the same."""
    torch.manual_seed(7)
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            size = module.to_q.out_features // module.heads
            keys, values = (
                torch.block_diag(*(torch.linalg.qr(torch.randn(size, size))[0] for _ in range(module.heads)))
                for _ in range(2)
            )
            for matrix, basis in ((module.to_q, keys), (module.to_k, keys), (module.to_v, values)):
                matrix.weight.data = basis @ matrix.weight.data
            module.to_out[0].weight.data = module.to_out[0].weight.data @ values.T


def silent(path: Path = WEIGHTS / ENCODER) -> tuple[NestedEncoder, EncoderConfig]:
    """An encoder that does not say how it was trained, and what its file says."""
    encoder = load_encoder(path, dtype=torch.float32)
    said = encoder.config
    encoder.config = replace(said, image_features="penultimate", value_norm="match", alpha=2.0)
    return encoder, said


def random_encoder() -> NestedEncoder:
    """Of the same structure, with the weights that a training starts from without an initialisation."""
    torch.manual_seed(8)
    return NestedEncoder(silent()[0].config).eval().requires_grad_(False)
