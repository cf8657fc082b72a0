"""The encoder that training starts from: fresh, with the U-Net's own keys and values, or from a file."""

from __future__ import annotations

import logging

import torch

from ..checkpoint import read_encoder
from ..encoder import EncoderConfig, NestedEncoder
from ..errors import NestedAttentionError
from ..hosts.diffusers import check_fits, cross_attention
from ..layers import compress
from .base import BaseModel
from .config import EncoderSettings, InitConfig

log = logging.getLogger(__name__)


def encoder_config(settings: EncoderSettings, base: BaseModel) -> EncoderConfig:
    """What the encoder file will say, for this base model."""
    return EncoderConfig(
        family=base.family.name,
        base_model=settings.base_model or base.name or base.family.title,
        tokens=settings.tokens,
        token_dim=settings.token_dim or base.context_dim,
        feature_dim=base.vision.feature_dim,
        image_features=settings.image_features,
        value_norm=settings.value_norm,
        alpha=settings.alpha,
        licence=settings.licence,
        title=settings.title,
        widths=base.widths,
        resampler=settings.resampler(),
        bias=settings.bias,
    )


def make_encoder(settings: EncoderSettings, init: InitConfig, base: BaseModel, seed: int) -> NestedEncoder:
    """The encoder to train, fp32, as `init` says.

    Raises NestedAttentionError: the file's encoder has other sizes; the U-Net's own weights can't be copied.
    """
    config = encoder_config(settings, base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = NestedEncoder(config)
    layers = init.layers
    if layers == "auto":
        layers = "file" if init.encoder else "unet" if config.token_dim == base.context_dim else "random"
    if init.encoder:
        _from_file(encoder, init.encoder, with_layers=layers == "file")
    if layers == "unet":
        _from_unet(encoder, base)
    elif layers == "zero":
        for parameter in encoder.to_v.parameters():
            torch.nn.init.zeros_(parameter)
    check_fits(base.unet, config)
    return encoder.train()


def _from_unet(encoder: NestedEncoder, base: BaseModel) -> None:
    """K̈, V̈ of each layer = the layer's own to_k, to_v: subject tokens start out read like text tokens."""
    if encoder.config.token_dim != base.context_dim:
        raise NestedAttentionError(
            f'init.layers is "unet": the U-Net\'s own layers read tokens of width {base.context_dim}, '
            f'encoder.token_dim is {encoder.config.token_dim}. Make them the same, or use init.layers "random".'
        )
    for i, name in enumerate(cross_attention(base.unet)):
        module = base.unet.get_submodule(name)
        for ours, theirs in ((encoder.to_k[i], module.to_k), (encoder.to_v[i], module.to_v)):
            ours.load_state_dict(theirs.state_dict(), strict=False)  # theirs have no bias
            if isinstance(ours.bias, torch.Tensor):
                torch.nn.init.zeros_(ours.bias)


def _from_file(encoder: NestedEncoder, path: str, with_layers: bool) -> None:
    """The Q-Former of an encoder file, and its K̈ and V̈."""
    config, state = read_encoder(path)
    log.info("starting from %s: %s", path, config.title)
    latents = state.get("resampler.latents")
    if latents is not None and latents.shape[-1] == encoder.config.resampler.dim:
        state["resampler.latents"] = _as_many(latents, encoder.config.tokens - encoder.config.resampler.mean_pooled)
    if not with_layers:
        state = {name: tensor for name, tensor in state.items() if name.startswith("resampler.")}
    own = encoder.state_dict()
    other = [
        f"{name}: {tuple(state[name].shape) if name in state else 'missing'}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if (with_layers or name.startswith("resampler.")) and (name not in state or state[name].shape != tensor.shape)
    ]
    other += [f"{name}: not in this encoder" for name in state if name not in own]
    if other:
        shape = ", ".join(f"{name} {value}" for name, value in vars(config.resampler).items())
        raise NestedAttentionError(
            f"init.encoder: {path} ({config.title}) has other sizes than the encoder to train: Q-Former {shape}, "
            f"token_dim {config.token_dim}, vision features {config.feature_dim}, layers "
            f"{compress(config.widths)}{', with bias' if config.bias else ''}. Set the fields of `encoder` to these"
            + (', or take the Q-Former only (init.layers "unet" or "random")' if with_layers else "")
            + ". First differences:\n  "
            + "\n  ".join(other[:5])
        )
    encoder.load_state_dict({**own, **{name: tensor.float() for name, tensor in state.items()}})


def _as_many(latents: torch.Tensor, tokens: int) -> torch.Tensor:
    """(1, M, C) -> (1, tokens, C): dropped, or repeated with a little noise, since equal queries would stay equal."""
    found = latents.shape[1]
    if found >= tokens:
        return latents[:, :tokens]
    repeated = latents.repeat(1, -(-tokens // found), 1)[:, :tokens].clone().float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(repeated[:, found:].shape, generator=generator)
    repeated[:, found:] += 0.1 * noise * latents.float().std()
    return repeated
