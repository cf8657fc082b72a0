"""The host's models: which U-Net this is and what its layers are, loading an encoder, running it on photos."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from torch import Tensor

from ...checkpoint import load_encoder
from ...errors import NestedAttentionError
from ...layers import CrossAttentionLayer, Family, described_family, family_of, family_with, register
from ...metadata import describe_training
from ...towers import of_width
from .values import HostEncoder

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ...encoder import EncoderConfig, Overrides

log = logging.getLogger(__name__)

#: Of the encoder that was loaded last, what it is: for bug reports.
loaded: EncoderConfig | None = None

# How the encoder's choice of vision features is called in the host's output of the tower.
_FEATURES = {
    "penultimate": "penultimate_hidden_states",
    "last": "last_hidden_state",
    "pooled": "image_embeds",
}


def learn_families() -> None:
    """Registers the families of base models that other node packs have added to the host.

    Such a pack says on its model class what its U-Net is: `nested_attention_family`, as `described_family` reads it.

    Raises NestedAttentionError for one that says it wrongly.
    """
    for kind in comfy.supported_models.models:
        described = getattr(kind, "nested_attention_family", None)
        if described is not None:
            register(described_family(described))


def load_host_encoder(path: str, name: str, **overrides: Unpack[Overrides]) -> HostEncoder:
    """An encoder file in a patcher. `name` is how the user knows it.

    Raises NestedAttentionError as `nested_core.checkpoint.read_encoder` does.
    """
    device = comfy.model_management.get_torch_device()
    if comfy.model_management.should_use_fp16(device):
        dtype = torch.float16
    elif comfy.model_management.should_use_bf16(device):
        dtype = torch.bfloat16
    else:
        dtype = torch.float32
    learn_families()
    module = load_encoder(path, operations=comfy.ops.manual_cast, dtype=dtype, **overrides)
    # The host's own choice of patcher: with dynamic VRAM, weights come to the device as they are used.
    patcher = comfy.model_patcher.CoreModelPatcher(
        module, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )
    log.info("%s: %s", name, module.config.title)
    if trained := describe_training(module.config.training):
        log.info("%s: %s", name, trained)
    global loaded
    loaded = module.config
    return HostEncoder(patcher, module.config, name)


def vision_features(encoder: HostEncoder, clip_vision: Any, images: Tensor) -> Tensor:
    """What the encoder reads of square images (B, S, S, 3): (B, T, E) tokens or the pooled (B, E).

    Raises NestedAttentionError when the tower's features are not as wide as the encoder expects.
    """
    features: Tensor = clip_vision.encode_image(images, crop=False)[_FEATURES[encoder.config.image_features]]
    expected, got = encoder.config.feature_dim, features.shape[-1]
    if got != expected:
        pooled = encoder.config.image_features == "pooled"
        wanted, came = of_width(expected, pooled), of_width(got, pooled)
        raise NestedAttentionError(
            f"The encoder {encoder.name} reads {'pooled embeddings' if pooled else 'vision features'} of width "
            f"{expected}{f' ({wanted})' if wanted else ''}, this CLIP vision model gives {got}"
            f"{f' ({came})' if came else ''}. Load the vision model that the encoder was trained with."
        )
    return features


def encode_tokens(encoder: HostEncoder, features: Tensor) -> Tensor:
    """Subject tokens (1, B·N, C) of a batch of views, from the vision tower's features (B, T, E) or (B, E)."""
    comfy.model_management.load_models_gpu([encoder.patcher])
    module = encoder.module
    dtype = next(module.parameters()).dtype
    tokens = module.encode(features.to(encoder.patcher.load_device, dtype))
    return tokens.flatten(0, 1)[None].to(comfy.model_management.intermediate_device())


def unet_layers_of(model: comfy.model_patcher.ModelPatcher) -> tuple[Family, tuple[CrossAttentionLayer, ...]]:
    """The family of a MODEL and its cross-attention layers as they are, in diffusers' order.

    Raises NestedAttentionError naming the model when it is not an SDXL base or SD 1.5 U-Net.
    """
    unet = getattr(model.model, "diffusion_model", None)
    present: dict[tuple[str, int, int], tuple[int, int]] = {}  # address -> (channels, width of the text it reads)
    for kind in ("input", "middle", "output"):
        blocks = getattr(unet, "middle_block" if kind == "middle" else f"{kind}_blocks", ())
        # The host counts the middle as one block, whatever its number of modules.
        for number, block in enumerate([blocks] if kind == "middle" else blocks):
            for module in block if blocks else ():
                for i, transformer in enumerate(getattr(module, "transformer_blocks", ())):
                    attn2 = getattr(transformer, "attn2", None)
                    if attn2 is not None:
                        present[kind, number, i] = (attn2.to_q.out_features, attn2.to_k.in_features)
    text_width = {width for _, width in present.values()}
    learn_families()
    family = family_with(present, *text_width) if len(text_width) == 1 else None
    if family is not None:
        return family, tuple(replace(layer, width=present[layer.block][0]) for layer in family.layers())
    found = f"{len(present)} cross-attention layers" if present else "no U-Net cross-attention"
    reads = f" reading text of width {', '.join(map(str, sorted(text_width)))}" if text_width else ""
    raise NestedAttentionError(
        f"This model ({type(model.model).__name__}) has {found}{reads}. Nested Attention works with SDXL base models "
        "(70 layers, text width 2048) and SD 1.5 (16 layers, text width 768): load such a checkpoint."
    )


def check_encoder_fits(
    encoder: HostEncoder, model: comfy.model_patcher.ModelPatcher
) -> tuple[Family, tuple[CrossAttentionLayer, ...]]:
    """The model's family and layers, once it is clear that the encoder was made for such a model.

    Raises NestedAttentionError naming both when it was not.
    """
    family, layers = unet_layers_of(model)
    config = encoder.config
    if config.family != family.name:
        made_for = family_of(config.family).title
        raise NestedAttentionError(
            f"The encoder {encoder.name} is for {made_for}, the model ({type(model.model).__name__}) is "
            f"{family.title}. Load an encoder for {family.title}, or a {made_for} checkpoint."
        )
    widths = tuple(layer.width for layer in layers)
    if config.widths != widths:
        differing = next(i for i, (a, b) in enumerate(zip(config.widths, widths, strict=True)) if a != b)
        raise NestedAttentionError(
            f"The encoder {encoder.name} and the model are both {family.title} but of other widths: layer "
            f"{layers[differing].diffusers} has {widths[differing]} channels, the encoder was made for "
            f"{config.widths[differing]}. Use the encoder with the base model that it was trained on."
        )
    return family, layers
