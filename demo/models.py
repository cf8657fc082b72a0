"""The small world's models: classes of diffusers and transformers that ComfyUI has counterparts of, made small.

text encoder   CLIPTextModel, 2 layers of 128, with a CLIP tokenizer whose vocabulary is the world's words
codec          AutoencoderDC, 8 x 8 pixels to 24 channels
U-Net          UNet2DConditionModel with 7 cross-attention layers, predicting the picture
vision tower   CLIPVisionModelWithProjection, 4 layers of 128, 96 px in patches of 12
probe          a small residual network that only scores pictures; no other model sees it
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.autoencoder_dc import ResBlock
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

LATENT_CHANNELS = 24  # what 64 of width hand through: GroupNorm takes means away, SiLU wants two channels for a number
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


def codec() -> AutoencoderDC:
    """Its `scaling_factor` brings latents to unit variance; set when it is trained.

    Pixels are folded into channels and out of them again (space to depth), so that few convolutions run at full size.
    """
    nothing: Any = ((), (), (), ())
    made: Any = AutoencoderDC(
        latent_channels=LATENT_CHANNELS, scaling_factor=1.0, encoder_out_shortcut=False, decoder_in_shortcut=False,
        encoder_block_out_channels=(32, 32, 64, 128), encoder_layers_per_block=(0, 1, 1, 2),
        decoder_block_out_channels=(64, 64, 128, 128), decoder_layers_per_block=(0, 3, 3, 1),
        encoder_qkv_multiscales=nothing, decoder_qkv_multiscales=nothing,
    )  # fmt: skip
    # Where Stable Diffusion's pipeline reads the size of a latent.
    made.register_to_config(block_out_channels=made.config.encoder_block_out_channels)
    return made


@torch.no_grad()
def start_codec(codec: Any, pixels: Tensor) -> None:
    """Starts a codec as the best linear one of 8 x 8 patches of pictures (N, 3, H, W) in [-1, 1].

    From here training is about what is seldom, not about finding colours. Residual blocks begin as identities.
    """
    encoder: Any = codec.encoder
    decoder: Any = codec.decoder
    blocks: list[Any] = [block for block in codec.modules() if isinstance(block, ResBlock)]
    for block in blocks:
        block.norm.weight.zero_()
    halves = F.pixel_unshuffle(F.pixel_unshuffle(pixels, 2), 2)  # 4 x 4 pixels as 48 channels
    patches, quarters = _rows(F.pixel_unshuffle(halves, 2)), _rows(halves)
    mean, spread, basis = _components(patches, LATENT_CHANNELS)
    # Between raw components (details would drown) and equal ones (noise would count like the picture).
    factor = (spread / spread.max()).sqrt() / spread

    first, second = encoder.down_blocks[1][-1], encoder.down_blocks[2][-1]
    _pass(encoder.conv_in.conv, 3)
    _pass(first.conv, 12)
    seen = first(encoder.down_blocks[1][:-1](encoder.conv_in(pixels)))
    # A block's shortcut adds means of its channels; what the pixels were is solved for.
    pick = _solve(_rows(seen), quarters) @ _components(quarters, second.conv.out_channels)[2]
    _set(second.conv, pick)
    seen = encoder.down_blocks[3](encoder.down_blocks[2](seen))
    _set(encoder.conv_out, _solve(_rows(seen), (patches - mean) @ basis * factor))

    eye = torch.eye(2 * LATENT_CHANNELS)[:, :LATENT_CHANNELS]
    decoder.conv_in.weight.mul_(0.5)  # of the channels that are left to learn
    decoder.conv_in.weight[:LATENT_CHANNELS] = 0
    decoder.conv_in.weight[:LATENT_CHANNELS, :, 1, 1] = eye[:LATENT_CHANNELS]
    decoder.conv_in.bias.zero_()
    _fold_out(decoder.up_blocks[2][0], basis / factor, mean)
    # The last norm divides by the length of all channels: one that is constant and large makes it nearly linear. What
    # follows takes only what is positive, so each pixel goes with its negative.
    signed = torch.cat([torch.eye(12), -torch.eye(12)])
    signed = signed[:, None].expand(-1, 4, -1).reshape(24 * 4, 12)
    places = torch.arange(12 * 4).reshape(12, 4).repeat(2, 1).reshape(-1)  # channel c, phase p -> 4 c + p
    rows = torch.zeros(24 * 4, 48)
    rows[torch.arange(24 * 4), places] = signed.sum(1)
    large = 16.0
    _fold_out(decoder.up_blocks[1][0], torch.cat([rows, torch.zeros(4, 48)]),
              torch.cat([torch.zeros(24 * 4), torch.full((4,), large)]))  # fmt: skip
    length = (large**2 + 2 * quarters.square().sum(1).mean() / 4) / decoder.norm_out.weight.numel()
    decoder.norm_out.weight.fill_(length.sqrt())
    leave = decoder.conv_out.conv
    leave.weight.zero_()
    leave.bias.zero_()
    for c in range(12):
        leave.weight[c, c, 1, 1], leave.weight[c, 12 + c, 1, 1] = 1, -1


def _rows(grid: Tensor) -> Tensor:
    """(B, C, H, W) -> (B * H * W, C)."""
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def _components(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, spread along the first principal components, and these as columns."""
    mean = rows.mean(0)
    _, sizes, basis = torch.linalg.svd((rows - mean).T @ (rows - mean) / len(rows))
    return mean, sizes[:count].sqrt(), basis[:count].T


def _solve(rows: Tensor, wanted: Tensor) -> Tensor:
    """The best linear map, its last row is the constant: rows (N, C), wanted (N, D) -> (C + 1, D)."""
    return torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], 1), wanted).solution


def _set(conv: nn.Conv2d, solved: Tensor) -> None:
    """Makes a convolution the linear map of `_solve`."""
    assert conv.bias is not None
    conv.weight.zero_()
    conv.weight[:, :, 1, 1], conv.bias[:] = solved[:-1].T, solved[-1]


def _fold_out(block: Any, rows: Tensor, constant: Tensor) -> None:
    """Makes a block that doubles a grid give, before channels become pixels, a linear map of its first channels."""
    conv = block.conv
    conv.weight.zero_()
    conv.bias.zero_()
    for made in range(conv.out_channels):
        conv.weight[made, made // block.repeats, 1, 1] -= 1  # what its shortcut adds
    conv.weight[: len(rows), : rows.shape[1], 1, 1] += rows
    conv.bias[: len(constant)] = constant


def _pass(conv: nn.Conv2d, channels: int) -> None:
    """Makes a convolution hand its first channels on as they are."""
    assert conv.bias is not None
    conv.weight[:channels], conv.bias[:channels] = 0, 0
    for c in range(channels):
        conv.weight[c, c, 1, 1] = 1


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, layers_per_block=1,
        block_out_channels=(64, 128), down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, attention_head_dim=(2, 4),  # diffusers' name for heads
        cross_attention_dim=CONTEXT_DIM, use_linear_projection=True,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, for a U-Net that predicts the picture."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample",
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


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> [-1, 1] (B, 3, H, W)."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
