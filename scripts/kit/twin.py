"""The same U-Net in diffusers: what ComfyUI computes is compared with it."""

from __future__ import annotations

import functools
from typing import Any

import comfy.utils
import torch
from diffusers import UNet2DConditionModel

from .studio import Studio


@functools.cache
def diffusers_unet(studio: Studio) -> Any:
    """diffusers' U-Net with the weights of a studio's model, which must have one width on every level."""
    sdxl = studio.family == "sdxl"
    assert not studio.tapered
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    kinds = [plain, cross, cross] if sdxl else [cross, cross, cross, plain]
    config = studio.model.model.model_config.unet_config
    options: dict[str, Any] = (
        dict(
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=studio.channels // 64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        if sdxl
        else dict(attention_head_dim=8)
    )
    with torch.device("meta"):  # no numbers for weights that are about to be replaced
        unet: Any = UNet2DConditionModel(
            block_out_channels=(studio.channels,) * len(kinds),
            down_block_types=[k.format("Down") for k in kinds],
            up_block_types=[k.format("Up") for k in reversed(kinds)],
            cross_attention_dim=config["context_dim"],
            **options,
        )
    theirs, ours = studio.model.model.diffusion_model.state_dict(), unet.state_dict()
    names = comfy.utils.unet_to_diffusers(config)  # names more layers than this U-Net has
    with torch.inference_mode(False):  # training takes it too
        state = {new: theirs[old].detach().clone() for new, old in names.items() if new in ours}
        unet.load_state_dict(state, assign=True)
    return unet.eval()
