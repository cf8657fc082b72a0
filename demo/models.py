"""The small world's models: classes of diffusers and transformers that ComfyUI has counterparts of, made small.

text encoder   CLIPTextModel, 2 layers of 128, with a CLIP tokenizer whose vocabulary is the world's words
codec          AutoencoderTiny (TAESD), 8 x 8 pixels to 32 channels
U-Net          UNet2DConditionModel with 7 cross-attention layers, predicting v
vision tower   CLIPVisionModelWithProjection, 4 layers of 128, 96 px in patches of 12
probe          a small residual network that only scores pictures; no other model sees it
"""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from nested_core.encoder import EncoderConfig
from nested_core.training import BaseModel, EncoderSettings, VisionTower

from . import FAMILY, data, drawing, world

LATENT_CHANNELS = 32
LATENT_SIZE = drawing.SIZE // 8
CONTEXT_DIM = 128
TEXT_LENGTH = 77
VISION_SIZE = 96
VISION_MEAN, VISION_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


# --- text -------------------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    """Writes vocab.json and merges.txt of a CLIP tokenizer in which each word of the world is one token.

    Any other text is spelled in letters, so no prompt is an error.
    """
    letters = [chr(c) for c in range(33, 127)] + ["£", "Ġ"]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in world.words():
        # Later merges rank below earlier ones, so a word that is one token already stays one.
        while len(pieces := _pieces(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, indent=0) + "\n", "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """A word as byte pair encoding with these merges leaves it."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    for pair in merges:
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == pair:
                pieces[i : i + 2] = ["".join(pair)]
            i += 1
    return pieces


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """The world's tokenizer, from the files beside this one."""
    folder = Path(__file__).parent / "tokenizer"
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TEXT_LENGTH, unk_token="<|endoftext|>"
    )


def text_config() -> CLIPTextConfig:
    end = len(json.loads((Path(__file__).parent / "tokenizer" / "vocab.json").read_text("utf-8"))) - 1
    return CLIPTextConfig(
        vocab_size=end + 1, hidden_size=CONTEXT_DIM, intermediate_size=512, projection_dim=CONTEXT_DIM,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, hidden_act="quick_gelu",
        bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip


def text_encoder() -> CLIPTextModel:
    return CLIPTextModel(text_config())


# --- codec, U-Net, vision tower ---------------------------------------------------------------------------------------


def codec() -> AutoencoderTiny:
    """Its `scaling_factor` brings latents to unit variance; set when it is trained."""
    return AutoencoderTiny(latent_channels=LATENT_CHANNELS, scaling_factor=1.0)


@torch.no_grad()
def start_codec(codec: Any, patches: Tensor) -> None:
    """Starts a codec as the best linear one, from 8 x 8 patches (N, 3, 8, 8) of pictures in [0, 1].

    The encoder's strided convolutions take pixels apart (space to depth), the last of them projects on the patches'
    principal components; the decoder begins with each patch's mean colour. Residual blocks begin as identities. All
    other channels keep their random weights. From here training is about detail, not about finding colours.
    """
    encoder, decoder = codec.encoder.layers, codec.decoder.layers
    for module in codec.modules():
        if isinstance(module, AutoencoderTinyBlock):
            module.conv[-1].weight.zero_()
            module.conv[-1].bias.zero_()
    enter, *strided, leave = [layer for layer in encoder if isinstance(layer, nn.Conv2d)]
    _pass(enter, 3)
    for conv, channels in zip(strided[:2], (3, 12), strict=True):
        conv.weight[: 4 * channels] = 0
        for c, dy, dx in itertools.product(range(channels), (0, 1), (0, 1)):
            conv.weight[4 * c + 2 * dy + dx, c, 1 + dy, 1 + dx] = 1
    # Patches in the order in which the two convolutions and the four taps of the third list them.
    n = len(patches)
    flat = patches.reshape(n, 3, 2, 2, 2, 2, 2, 2).permute(0, 1, 4, 7, 3, 6, 2, 5).reshape(n, 192)
    _, sizes, basis = torch.linalg.svd(flat, full_matrices=False)
    basis = basis[:LATENT_CHANNELS]
    # Between raw components (details would drown) and equal ones (noise would count like the picture).
    spread = (flat @ basis.T).std(0)
    factor = (spread / spread.max()).sqrt() / spread
    third = strided[2]
    assert leave.bias is not None
    third.weight[: 2 * LATENT_CHANNELS] = 0
    for (m, sign), (dy, dx) in itertools.product(
        itertools.product(range(LATENT_CHANNELS), (1, -1)), itertools.product((0, 1), (0, 1))
    ):
        taps = basis[m].reshape(48, 4)[:, 2 * dy + dx]
        third.weight[m + (0 if sign > 0 else LATENT_CHANNELS), :48, 1 + dy, 1 + dx] = sign * taps
    leave.weight.mul_(0.1)
    leave.bias.copy_(-factor * (flat @ basis.T).mean(0))
    for m in range(LATENT_CHANNELS):
        leave.weight[m, m, 1, 1], leave.weight[m, m + LATENT_CHANNELS, 1, 1] = factor[m], -factor[m]

    latents = (flat @ basis.T) * factor + leave.bias
    means = patches.mean((2, 3))
    known = torch.cat([latents, torch.ones(n, 1)], 1)
    colour = torch.linalg.lstsq(known, means).solution  # (C + 1, 3)
    enter, *middle, leave = [layer for layer in decoder if isinstance(layer, nn.Conv2d)]
    assert enter.bias is not None
    signed = (enter.out_channels - 8) // 2  # the first components; some channels are left to learn
    kept = 3 + 2 * signed
    enter.weight[:kept], enter.bias[:kept] = 0, 0
    enter.weight[:3, :, 1, 1], enter.bias[:3] = colour[:-1].T, colour[-1]
    for m in range(signed):
        enter.weight[3 + m, m, 1, 1], enter.weight[3 + signed + m, m, 1, 1] = 1, -1
    for conv in middle:
        _pass(conv, kept)
    leave.weight.mul_(0.1)
    _pass(leave, 3)


def _pass(conv: nn.Conv2d, channels: int) -> None:
    """Makes a convolution hand its first channels on as they are."""
    conv.weight[:channels] = 0
    for c in range(channels):
        conv.weight[c, c, 1, 1] = 1
    if conv.bias is not None:
        conv.bias[:channels] = 0


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, layers_per_block=1,
        block_out_channels=(64, 128), down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, attention_head_dim=(2, 4),  # diffusers' name for heads
        cross_attention_dim=CONTEXT_DIM, use_linear_projection=True,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, projection_dim=64, num_hidden_layers=4, num_attention_heads=4,
        image_size=VISION_SIZE, patch_size=12, hidden_act="quick_gelu",
    )  # fmt: skip


def vision_tower() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(vision_config())


# --- scoring ----------------------------------------------------------------------------------------------------------

OF_FIGURE: dict[str, tuple[str, ...]] = {**world.ATTRIBUTES, **world.LOOKS}
SCORED: dict[str, int] = {
    **{f"{kind}.present": 2 for kind in world.KINDS},
    **{f"{kind}.{name}": len(values) for kind in world.KINDS for name, values in OF_FIGURE.items()},
    "scene": len(world.SCENES),
    "style": len(world.STYLES),
}
"""What the probe tells of a picture, and among how many choices."""


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Probe(nn.Module):
    """Pictures (B, 3, 128, 128) in [-1, 1] -> logits of each of SCORED, {name: (B, choices)}."""

    SIDE = drawing.SIZE // 16  # of its last grid

    def __init__(self, widths: tuple[int, ...] = (24, 48, 64, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, stride=2, padding=1)]
        for before, width in zip((widths[0], *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2 if width != widths[0] else 1, padding=1), _Residual(width)]
        self.trunk = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU())
        # Which rows and columns of the last grid matter differs by question: each looks where it wants.
        self.look = nn.Conv2d(widths[-1], len(SCORED), 1)
        self.heads = nn.ModuleDict({name.replace(".", "_"): nn.Linear(widths[-1], n) for name, n in SCORED.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.seen(pixels)[0]

    def seen(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The logits, and where each question looked: shares of the cells of the last grid, (B, questions, cells)."""
        grid = self.trunk(pixels)
        looks = self.look(grid).flatten(2).float().softmax(-1)
        seen = looks.to(grid.dtype) @ grid.flatten(2).transpose(1, 2)
        out = {name: self.heads[name.replace(".", "_")](seen[:, i]) for i, name in enumerate(SCORED)}
        return out, looks


PORTRAIT: dict[str, int] = {"kind": 2, **{name: len(values) for name, values in OF_FIGURE.items()}}
"""What can be told of a portrait, and among how many choices."""


class Matching(nn.Module):
    """Trains a vision tower as CLIP's are: pictures are to match the texts that are true of them, and no others.

    A text is a phrase of `world.all_facts`. Each is matched with the picture's embedding and, so that no detail is lost
    on the way, with the patches that it looks at. The loss is SigLIP's, a yes or no for every pair.
    """

    tokens: Tensor

    def __init__(self, tower: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        config = vision_config()
        self.tower, self.text = tower, CLIPTextModel(text_config())
        tokens = tokenizer()(world.all_facts(), padding=True, return_tensors="pt").input_ids
        self.register_buffer("tokens", tokens, persistent=False)
        self.whole = nn.Linear(CONTEXT_DIM, config.projection_dim)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.query, self.value = (nn.Linear(CONTEXT_DIM, config.hidden_size) for _ in range(2))
        self.scale, self.bias = nn.Parameter(torch.full((2,), 2.0)), nn.Parameter(torch.full((2,), -3.0))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """pixels (B, 3, H, W) -> logits of all facts by embedding and by patches, (B, facts) each."""
        seen = self.tower(pixels, output_hidden_states=True)
        said = self.text(self.tokens).pooler_output
        whole = F.normalize(seen.image_embeds, dim=-1) @ F.normalize(self.whole(said), dim=-1).T
        patches = self.norm(seen.hidden_states[-2])
        looks = (self.query(said) @ patches.transpose(1, 2) / patches.shape[-1] ** 0.5).softmax(-1)  # (B, facts, N)
        found = F.cosine_similarity(looks @ patches, self.value(said), dim=-1)
        return [cos * self.scale[i].exp() + self.bias[i] for i, cos in enumerate((whole, found))]


class TokenReader(nn.Module):
    """Heads that warm up the Q-Former: what its tokens (B, N, 128) tell of a portrait, {name: (B, choices)}."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.look = nn.Parameter(torch.zeros(len(PORTRAIT), tokens))
        self.heads = nn.ModuleDict({name: nn.Linear(CONTEXT_DIM, n) for name, n in PORTRAIT.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        seen = self.look.softmax(1).to(tokens.dtype) @ tokens
        return {name: head(seen[:, i]) for i, (name, head) in enumerate(self.heads.items())}


def encoder_settings(**changes: Any) -> EncoderSettings:
    """The small world's nested encoder, as its training is told."""
    return replace(
        EncoderSettings(
            tokens=16, token_dim=CONTEXT_DIM, dim=128, depth=2, heads=4, dim_head=32, ff_mult=2, value_norm="match",
            alpha=4.0, learn_alpha=True, base_model="Small World", licence="Apache-2.0",
            title="Small World: figures",
        ),
        **changes,
    )  # fmt: skip


def pipeline(unet: Any, text_encoder: CLIPTextModel, codec: Any, tower: Any = None) -> Any:
    """The base model as diffusers has it."""
    return StableDiffusionPipeline(
        vae=codec, text_encoder=text_encoder, tokenizer=tokenizer(), unet=unet, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, image_encoder=tower, requires_safety_checker=False,
    )  # fmt: skip


def base_model(unet: Any, text_encoder: CLIPTextModel, codec: Any, tower: Any) -> BaseModel:
    """The base model and the vision tower as the training has them."""
    return BaseModel(
        pipeline(unet, text_encoder, codec), VisionTower(tower, VISION_MEAN, VISION_STD), name="Small World"
    )


def encoder_config() -> EncoderConfig:
    """The same as an encoder file has it."""
    settings = encoder_settings()
    return EncoderConfig(
        family=FAMILY.name, base_model=settings.base_model, tokens=settings.tokens, token_dim=CONTEXT_DIM,
        feature_dim=vision_config().hidden_size, value_norm=settings.value_norm, alpha=settings.alpha,
        licence=settings.licence, title=settings.title, resampler=settings.resampler(),
    )  # fmt: skip


def load_probe(path: Path) -> Probe:
    """The probe of a file, fp32, frozen."""
    probe = Probe()
    probe.load_state_dict(load_file(path))
    return probe.float().eval().requires_grad_(False)


def labels(entry: data.Entry) -> dict[str, int]:
    """The right answers to SCORED for a picture; -1 where the question makes no sense (an absent figure)."""
    answers = {"scene": world.SCENES.index(entry.scene), "style": world.STYLES.index(entry.style)}
    shown = {
        figure.kind: {**vars(figure), **vars(look)} for figure, look in zip(entry.figures, entry.looks, strict=True)
    }
    for kind in world.KINDS:
        answers[f"{kind}.present"] = int(kind in shown)
        for name, values in OF_FIGURE.items():
            answers[f"{kind}.{name}"] = values.index(shown[kind][name]) if kind in shown else -1
    return answers


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> [-1, 1] (B, 3, H, W)."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
