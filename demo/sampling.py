"""Sampling in diffusers as the host's KSampler does it: Euler on the "normal" schedule."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from . import models


@torch.no_grad()
def sample(unet: Any, codec: Any, text: Tensor, noise: Tensor, steps: int = 20, cfg: float = 4.0) -> Tensor:
    """Pictures as they are saved, uint8 (B, 3, H, W).

    text   of the prompts and then of the negative prompts, (2 B, 77, C)
    noise  of standard deviation 1, (B, C, h, w)
    """
    scheduler: Any = models.scheduler()
    signal = scheduler.alphas_cumprod
    known = ((1 - signal) / signal).sqrt().log()
    at = torch.linspace(999, 0, steps)
    low = at.floor().long()
    part = at - low
    sigmas = torch.cat([(known[low] * (1 - part) + known[(low + 1).clamp_max(999)] * part).exp(), torch.zeros(1)])
    x = noise * float((1 + sigmas[0] ** 2).sqrt())
    for sigma, following in itertools.pairwise(sigmas.tolist()):
        scale = (1 + sigma**2) ** -0.5
        time = (known - torch.tensor(sigma).log()).abs().argmin().to(x.device)
        positive, negative = unet((x * scale).repeat(2, 1, 1, 1), time, text).sample.float().chunk(2)
        clean = negative + cfg * (positive - negative)
        x = x + (x - clean) / sigma * (following - sigma)
    return to_bytes(codec.decode(x / codec.config.scaling_factor).sample.float())


def to_bytes(pictures: Tensor) -> Tensor:
    """[-1, 1] -> uint8, as the host's Save Image rounds."""
    return ((pictures / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
