"""The small world's files: what ComfyUI opens, and what diffusers opens.

    checkpoint   U-Net, text encoder and codec in one file in the names that ComfyUI and the original Stable Diffusion
                 use; with `demo/comfyui` among its custom nodes, ComfyUI's own checkpoint loader opens it
    vision       the vision tower in transformers' names, for ComfyUI's own CLIP vision loader
    pipeline     a folder for `StableDiffusionPipeline.from_pretrained`, with the vision tower in `image_encoder`; the
                 pipeline makes latents (`output_type="latent"`), its `vae` pictures of them

Weights are kept in fp16. A latent is the same numbers in ComfyUI's sampler, in diffusers' pipeline and in training: the
codec's own, times its `scaling_factor`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPVisionModelWithProjection

from nested_core.files import save_tensors

from . import models

LICENCE = "Apache-2.0"
UNET, TEXT, CODEC = "model.diffusion_model.", "cond_stage_model.transformer.text_model.", "first_stage_model."
_SCALE, _SHIFT = f"{CODEC}vae_scale", f"{CODEC}vae_shift"

# --- names ------------------------------------------------------------------------------------------------------------

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_CONTROLNET_NAME = re.compile(
    r"(controlnet_(?:down_blocks|mid_block|cond_embedding\.(?:conv_in|conv_out|blocks)))(?:\.(\d+))?\.(weight|bias)"
)
_CODEC_NAME = re.compile(r"(encoder|decoder)\.(?:(conv_in|norm_out|conv_out)|(?:down|up)_blocks\.(\d+)\.(\d+))\.(.+)")
_UNET_NAME = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def unet_names(names: Iterable[str], layers_per_block: int = 1) -> dict[str, str]:
    """{diffusers' name: original name} of the weights of a U-Net with attention on every level."""
    return {name: _original(name, layers_per_block) for name in names}


def _original(name: str, layers: int) -> str:
    module, kind = name.rsplit(".", 1)
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    found = _UNET_NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is no weight of a U-Net of this kind.")
    side, level, part, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if part == "resnets":
        inner, kind = rest.split(".")
        rest = f"{_RESNET[inner]}.{kind}"
    if side == "mid":  # resnet, attention, resnet
        return f"middle_block.{1 if part == 'attentions' else 2 * number}.{rest}"
    if part == "downsamplers":  # after the first convolution, each level is its resnets and then one of these
        return f"input_blocks.{(layers + 1) * (level + 1)}.0.{rest.replace('conv', 'op')}"
    if part == "upsamplers":  # the last module of the level's last block
        return f"output_blocks.{(layers + 1) * (level + 1) - 1}.2.{rest}"
    place = 0 if part == "resnets" else 1
    if side == "down":
        return f"input_blocks.{1 + (layers + 1) * level + number}.{place}.{rest}"
    return f"output_blocks.{(layers + 1) * level + number}.{place}.{rest}"


def codec_names(names: Iterable[str]) -> dict[str, str]:
    """{diffusers' name: name in `comfyui/codec.py`} of the weights of the codec: its layers, numbered as they run.

    Raises ValueError where a name is none of an AutoencoderDC without attention.
    """
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for name in names:
        match = _CODEC_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no weight of an AutoencoderDC without attention.")
        side, end, level, number, rest = match.groups()
        place = {"conv_in": (-1,), "norm_out": (1,), "conv_out": (2,)}.get(end)
        found[name] = side, place or (0, int(level) if side == "encoder" else -int(level), int(number)), rest
    layers = {side: sorted({place for of, place, _ in found.values() if of == side}) for side in ("encoder", "decoder")}

    def numbered(side: str, place: tuple[int, ...]) -> int:
        # The decoder's first layer is where a TAESD clamps its latents; between its last two is an activation.
        return layers[side].index(place) + (side == "decoder") * (1 + (place == (2,)))

    return {name: f"taesd_{side}.{numbered(side, place)}.{rest}" for name, (side, place, rest) in found.items()}


def text_names(names: Iterable[str]) -> dict[str, str]:
    """{transformers' name: original name, without "text_model."} of a text encoder's weights."""
    # Releases of transformers differ in whether the module puts "text_model." in front.
    return {name: name.removeprefix("text_model.") for name in names}


def _renamed(module: nn.Module, names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{names[name]}": _half(name, weight) for name, weight in module.state_dict().items()}


def _half(name: str, weight: Tensor) -> Tensor:
    half = weight.detach().to("cpu", torch.float16).contiguous()
    if not half.isfinite().all():
        raise ValueError(f"{name} has values that are not finite, or become so in fp16.")
    return half


# --- to files ---------------------------------------------------------------------------------------------------------


def checkpoint_state_dict(unet: Any, text_encoder: CLIPTextModel, codec: Any) -> dict[str, Tensor]:
    """U-Net, text encoder and codec as a checkpoint for ComfyUI, fp16.

    Raises ValueError where a weight is not finite or has no counterpart.
    """
    return {
        **_renamed(unet, unet_names(unet.state_dict()), UNET),
        **_renamed(text_encoder, text_names(text_encoder.state_dict()), TEXT),
        **_renamed(codec, codec_names(codec.state_dict()), CODEC),
        # ComfyUI's codec divides what it encodes by the first and adds the second. They go in fp32: a picture's
        # contrast hangs on one number.
        _SCALE: torch.tensor(1 / codec.config.scaling_factor, dtype=torch.float32),
        _SHIFT: torch.tensor(0.0),
    }


def vision_state_dict(tower: CLIPVisionModelWithProjection) -> dict[str, Tensor]:
    """The vision tower's weights, fp16. Raises ValueError where one is not finite."""
    return {name: _half(name, weight) for name, weight in tower.state_dict().items()}


def write_checkpoint(path: Path, unet: Any, text_encoder: CLIPTextModel, codec: Any) -> None:
    """Writes `checkpoint_state_dict`. Raises ValueError as that does, and OSError."""
    said = {"scaling_factor": str(codec.config.scaling_factor), "prediction_type": "sample"}
    write_file(path, checkpoint_state_dict(unet, text_encoder, codec), "Small World: U-Net, text encoder, codec", said)


def write_vision(path: Path, tower: CLIPVisionModelWithProjection) -> None:
    """Writes `vision_state_dict`. Raises ValueError as that does, and OSError."""
    write_file(path, vision_state_dict(tower), "Small World: CLIP vision tower, 96 px")


def controlnet_state_dict(controlnet: Any) -> dict[str, Tensor]:
    """A ControlNet's weights in the original names, fp16. Raises ValueError as `checkpoint_state_dict` does."""
    renamed = {}
    for name, weight in controlnet.state_dict().items():
        if found := _CONTROLNET_NAME.fullmatch(name):
            part, number, kind = found[1], found[2], found[3]
            original = {
                "controlnet_down_blocks": f"zero_convs.{number}.0",
                "controlnet_mid_block": "middle_block_out.0",
                "controlnet_cond_embedding.conv_in": "input_hint_block.0",
                # One convolution, one activation, and so on: 2, 4, ... 12, and the last is 14.
                "controlnet_cond_embedding.blocks": f"input_hint_block.{2 * int(number or 0) + 2}",
                "controlnet_cond_embedding.conv_out": "input_hint_block.14",
            }[part]
            renamed[f"{original}.{kind}"] = _half(name, weight)
        else:
            renamed[_original(name, 1)] = _half(name, weight)
    return renamed


def write_controlnet(path: Path, controlnet: Any) -> None:
    """Writes `controlnet_state_dict`. Raises ValueError as that does, and OSError."""
    write_file(path, controlnet_state_dict(controlnet), "Small World: ControlNet for edges (Canny)")


def write_lora(path: Path, unet: Any) -> None:
    """Writes the LoRA that peft has put on a U-Net, in the names of kohya's scripts, fp16. Raises OSError."""
    lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    named = convert_state_dict_to_kohya({f"unet.{name}": weight for name, weight in lora.items()})
    halves = {name: _half(name, weight) for name, weight in named.items()}
    write_file(path, halves, "Small World: LoRA, at night")


def write_file(path: Path, tensors: Mapping[str, Tensor], title: str, said: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all, with what it is and its licence in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, {"format": "pt", "title": title, "licence": LICENCE, **(said or {})}, title)


def fingerprint(unet: Any) -> str:
    """A hash of a U-Net's weights in fp16: the same before they are shipped and after."""
    digest = hashlib.sha256()
    for name, weight in sorted(unet.state_dict().items()):
        digest.update(name.encode() + _half(name, weight).numpy().tobytes())
    return digest.hexdigest()[:32]


def write_pipeline(
    folder: Path,
    unet: Any,
    text_encoder: CLIPTextModel,
    codec: Any,
    tower: CLIPVisionModelWithProjection,
) -> None:
    """Writes the base model and the vision tower as a diffusers folder; an older one is replaced.

    Raises FileExistsError where something else is in the way.
    """
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise FileExistsError(f"{folder} is there and is no diffusers folder: name another place, or move it away.")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline = models.pipeline(unet, text_encoder, codec, tower)
    try:
        pipeline.save_pretrained(part)
        # Beside the tower, as transformers has it: what it was trained on is not what CLIP models usually are.
        CLIPImageProcessor(
            size={"shortest_edge": models.VISION_SIZE},
            crop_size={"height": models.VISION_SIZE, "width": models.VISION_SIZE},
            image_mean=list(models.VISION_MEAN),
            image_std=list(models.VISION_STD),
        ).save_pretrained(part / "image_encoder")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# --- and back ---------------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path) -> tuple[Any, CLIPTextModel, Any]:
    """U-Net, text encoder and codec of a checkpoint file, fp32, frozen.

    Raises ValueError naming the weights when the file is not one of the small world.
    """
    state = load_file(path)
    text_encoder = models.text_encoder()
    unet: Any = models.unet()
    codec: Any = models.codec()
    scale = state.pop(_SCALE, None)
    shift = state.pop(_SHIFT, torch.tensor(0.0))
    if scale is None or float(shift) != 0:
        raise ValueError(f"{path} does not say how its latents are scaled ({_SCALE}, and {_SHIFT} = 0).")
    codec.register_to_config(scaling_factor=round(1 / float(scale), 4))
    _fill(unet, unet_names(unet.state_dict()), UNET, state)
    _fill(text_encoder, text_names(text_encoder.state_dict()), TEXT, state)
    _fill(codec, codec_names(codec.state_dict()), CODEC, state)
    if state:
        raise ValueError(f"{path} has weights that the small world has not: {', '.join(sorted(state)[:4])}.")
    return unet, text_encoder, codec


def load_vision(path: Path) -> CLIPVisionModelWithProjection:
    """The vision tower of a file, fp32, frozen. Raises ValueError when the file is not one of the small world."""
    state, tower = load_file(path), models.vision_tower()
    _fill(tower, {name: name for name in tower.state_dict()}, "", state)
    if state:
        raise ValueError(f"{path} has weights that the small world has not: {', '.join(sorted(state)[:4])}.")
    return tower


def _fill(module: nn.Module, names: Mapping[str, str], prefix: str, state: dict[str, Tensor]) -> None:
    """Moves a module's weights out of `state` into it."""
    for name, weight in module.state_dict().items():
        original = f"{prefix}{names[name]}"
        found = state.pop(original, None)
        if found is None or found.shape != weight.shape:
            came = "nothing" if found is None else f"shape {tuple(found.shape)}"
            raise ValueError(f"Not a file of the small world: {original} is {came}, expected {tuple(weight.shape)}.")
        weight.copy_(found)
    module.eval().requires_grad_(False)
