"""The small world's models in ComfyUI's terms, and how its loaders recognise them.

Every module but the codec's (`codec.py`) is ComfyUI's own class; only sizes, the tokenizer's files and the vocabulary
are the small world's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import comfy.latent_formats
import comfy.model_base
import comfy.model_sampling
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.utils
import torch
from torch import Tensor

from .codec import CHANNELS, Taesd

# `resolve` follows the link from custom_nodes to where the tokenizer is.
_HERE = Path(__file__).resolve().parent
_TOKENIZER = _HERE.parent / "tokenizer"
_TEXT, _VISION = _HERE / "text.json", _HERE / "vision.json"
_WIDTH = 128
_SPECIAL = {"start": "bos", "end": "eos", "pad": "pad"}


# --- text -------------------------------------------------------------------------------------------------------------


class _ClipLTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: Mapping[str, Any] | None = None) -> None:
        super().__init__(
            str(_TOKENIZER),
            embedding_directory=embedding_directory,
            embedding_size=_WIDTH,
            embedding_key="clip_l",
            tokenizer_data=tokenizer_data or {},
        )


class SmallWorldTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: Mapping[str, Any] | None = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, clip_name="l", tokenizer=_ClipLTokenizer)


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's text model, whose vocabulary has a fixed size, with the small world's."""

    def __init__(self, config_dict: Mapping[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config_dict, dtype, device, operations)
        words, width = config_dict["vocab_size"], config_dict["hidden_size"]
        self.set_input_embeddings(operations.Embedding(words, width, dtype=dtype, device=device))


class _ClipL(comfy.sd1_clip.SDClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Mapping[str, Any] | None = None) -> None:
        tokens = json.loads(_TEXT.read_text("utf-8"))
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=str(_TEXT),
            model_class=_TextModel,
            special_tokens={name: tokens[f"{key}_token_id"] for name, key in _SPECIAL.items()},
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class SmallWorldClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Mapping[str, Any] | None = None) -> None:
        super().__init__(device, dtype, model_options or {}, clip_name="l", clip_model=_ClipL)


# --- the checkpoint ---------------------------------------------------------------------------------------------------


class SmallWorldLatent(comfy.latent_formats.LatentFormat):
    """Latents need no scaling between codec and U-Net: the codec's own weights say it."""

    latent_channels = CHANNELS


class _Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
    """The picture is what the U-Net predicts: noise of 24 channels would take all that its 64 can hold."""


class SmallWorld(comfy.supported_models_base.BASE):
    """A U-Net of the Stable Diffusion kind with two levels and heads of 32 channels."""

    unet_config = {
        "context_dim": _WIDTH,
        "model_channels": 64,
        "in_channels": CHANNELS,
        "channel_mult": [1, 2],
        "num_res_blocks": [1, 1],
        "use_linear_in_transformer": True,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}
    latent_format = SmallWorldLatent
    memory_usage_factor = 1.0
    nested_attention_family = json.loads((_HERE.parent / "family.json").read_text("utf-8"))

    def model_type(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.EPS  # there is no type for it: `get_model` sets it right

    def get_model(self, state_dict: Mapping[str, Tensor], prefix: str = "", device: Any = None) -> Any:
        model = super().get_model(state_dict, prefix, device)
        model.model_sampling = _Sampling(self)
        return model

    def inpaint_model(self) -> bool:
        return False  # its latents have more than four channels, which ComfyUI takes for an inpainting model's

    def process_clip_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        found = comfy.utils.state_dict_prefix_replace(state_dict, {"cond_stage_model.": "clip_l."}, filter_keys=True)
        # Nothing reads the projected vector, but ComfyUI computes it: better of defined numbers.
        found["clip_l.transformer.text_projection.weight"] = torch.eye(_WIDTH)
        return found

    def process_clip_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in ("clip_l.transformer.text_projection.weight", "clip_l.logit_scale"):
            state_dict.pop(name, None)
        return comfy.utils.state_dict_prefix_replace(state_dict, {"clip_l.": "cond_stage_model."})

    def clip_target(self, state_dict: Mapping[str, Tensor] | None = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(SmallWorldTokenizer, SmallWorldClip)


# --- the vision tower -------------------------------------------------------------------------------------------------


def _is_our_tower(state_dict: Mapping[str, Any]) -> bool:
    config = json.loads(_VISION.read_text("utf-8"))
    layers, patch = config["num_hidden_layers"], config["patch_size"]
    layer = "vision_model.encoder.layers.{}.layer_norm1.weight"
    patches = state_dict.get("vision_model.embeddings.patch_embedding.weight")
    positions = state_dict.get("vision_model.embeddings.position_embedding.weight")
    return (
        patches is not None
        and positions is not None
        and tuple(patches.shape) == (config["hidden_size"], config["num_channels"], patch, patch)
        and positions.shape[0] == (config["image_size"] // patch) ** 2 + 1
        and layer.format(layers - 1) in state_dict
        and layer.format(layers) not in state_dict
    )


def _load_tower(state_dict: Mapping[str, Tensor]) -> comfy.clip_vision.ClipVisionModel:
    """Raises RuntimeError naming the weights that the file lacks."""
    tower = comfy.clip_vision.ClipVisionModel(str(_VISION))
    missing, _ = tower.load_sd(state_dict)
    if missing:
        raise RuntimeError(f"This vision tower of the small world is incomplete: it lacks {', '.join(missing[:4])}.")
    return tower


def _with_our_tower(load: Callable[..., Any]) -> Callable[..., Any]:
    """ComfyUI's recognition of vision towers, after a look whether it is ours."""

    def load_clipvision_from_sd(sd: dict[str, Tensor], prefix: str = "", convert_keys: bool = False) -> Any:
        if not prefix and not convert_keys and _is_our_tower(sd):
            return _load_tower(sd)
        return load(sd, prefix, convert_keys)

    load_clipvision_from_sd.knows_small_world = True  # type: ignore[attr-defined]
    return load_clipvision_from_sd


def register() -> None:
    """Tells ComfyUI of the small world; once, however often it is called."""
    models = comfy.supported_models.models
    if SmallWorld.__name__ not in {model.__name__ for model in models}:
        models.append(SmallWorld)
    load = comfy.clip_vision.load_clipvision_from_sd
    if not getattr(load, "knows_small_world", False):
        comfy.clip_vision.load_clipvision_from_sd = _with_our_tower(load)
    if comfy.taesd.taesd.TAESD.__name__ != Taesd.__name__:
        comfy.taesd.taesd.TAESD = Taesd
