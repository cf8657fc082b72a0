"""The small world's codec in ComfyUI: a deep compression autoencoder (diffusers' AutoencoderDC), without attention.

Pixels are folded into channels and out of them again (space to depth), so that few convolutions run at full size.
"""

from __future__ import annotations

from typing import Any

import comfy.ops
import comfy.taesd.taesd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 24
_ENCODER, _DECODER = (32, 64, 128), (64, 128, 128)
"""Channels from the largest grid to the smallest."""

_Conv = comfy.ops.disable_weight_init.Conv2d


class _Norm(nn.Module):
    """Divides the channels of each place by their root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        size = x.float().square().mean(1, keepdim=True)
        x = x * torch.rsqrt(size + 1e-5).to(x.dtype)
        weight, bias = (t.to(x)[:, None, None] for t in (self.weight, self.bias))
        return x * weight + bias


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _Conv(width, width, 3, padding=1), _Conv(width, width, 3, padding=1, bias=False)
        self.norm = _Norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


class _Fold(nn.Module):
    """Halves a grid: 2 x 2 places become channels. The shortcut takes means of neighbouring channels."""

    def __init__(self, width: int, made: int, shortcut: bool = True) -> None:
        super().__init__()
        self.conv, self.made, self.shortcut = _Conv(width, made // 4, 3, padding=1), made, shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.pixel_unshuffle(self.conv(x), 2)
        return out + F.pixel_unshuffle(x, 2).unflatten(1, (self.made, -1)).mean(2) if self.shortcut else out


class _Unfold(nn.Module):
    """Doubles a grid: channels become 2 x 2 places. The shortcut repeats channels."""

    def __init__(self, width: int, made: int, shortcut: bool = True) -> None:
        super().__init__()
        self.conv = _Conv(width, 4 * made, 3, padding=1)
        self.repeats = 4 * made // width if shortcut else 0

    def forward(self, x: Tensor) -> Tensor:
        out = F.pixel_shuffle(self.conv(x), 2)
        return out + F.pixel_shuffle(x.repeat_interleave(self.repeats, 1), 2) if self.repeats else out


class Codec(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 24, H/8, W/8); its parts are named as a TAESD's in ComfyUI."""

    def __init__(self) -> None:
        super().__init__()
        low, middle, high = _ENCODER
        self.taesd_encoder = nn.Sequential(
            _Fold(3, low, False), _Residual(low), _Fold(low, middle), _Residual(middle), _Fold(middle, high),
            _Residual(high), _Residual(high), _Conv(high, CHANNELS, 3, padding=1),
        )  # fmt: skip
        low, middle, high = _DECODER
        self.taesd_decoder = nn.Sequential(
            nn.Identity(), _Conv(CHANNELS, high, 3, padding=1), _Residual(high),
            _Unfold(high, middle), *(_Residual(middle) for _ in range(3)),
            _Unfold(middle, low), *(_Residual(low) for _ in range(3)), _Norm(low), nn.ReLU(), _Unfold(low, 3, False),
        )  # fmt: skip
        self.vae_scale, self.vae_shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))

    def encode(self, x: Tensor) -> Tensor:
        return self.taesd_encoder(x) / self.vae_scale + self.vae_shift

    def decode(self, x: Tensor) -> Tensor:
        return self.taesd_decoder((x - self.vae_shift) * self.vae_scale)


class Taesd(comfy.taesd.taesd.TAESD):
    """ComfyUI's TAESD, and of those with 24 channels, of which there are no others, the small world's codec.

    ComfyUI knows a VAE by the names of its weights, and a TAESD's channels by a shape.
    """

    def __new__(cls, encoder_path: Any = None, decoder_path: Any = None, latent_channels: int = 4) -> Any:
        return Codec() if latent_channels == CHANNELS else super().__new__(cls)
