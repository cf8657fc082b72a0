"""The account of a running host for a bug report: what one would ask first. Served by nodes/health.py."""

from __future__ import annotations

import comfy.ldm.modules.attention as attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_base
import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfyui_version
from comfy.cli_args import args

from ...health import TITLE, section, versions
from . import last_run, unet

#: The host's functions that packs are known to put their own in place of.
_WATCHED = {
    "attention": (
        (attention, "optimized_attention"),
        (attention.CrossAttention, "forward"),
        (attention.BasicTransformerBlock, "forward"),
        (attention.SpatialTransformer, "forward"),
        (openaimodel.UNetModel, "forward"),
        (openaimodel.UNetModel, "_forward"),
        (comfy.model_base.BaseModel, "apply_model"),
        (comfy.model_base.BaseModel, "_apply_model"),
    ),
    "sampling": (
        (comfy.samplers, "calc_cond_batch"),
        (comfy.samplers, "_calc_cond_batch"),
        (comfy.samplers, "sampling_function"),
        (comfy.samplers.CFGGuider, "sample"),
        (comfy.samplers.CFGGuider, "outer_sample"),
    ),
    "text encoding": (
        (comfy.sd.CLIP, "tokenize"),
        (comfy.sd.CLIP, "encode_from_tokens"),
        (comfy.sd.CLIP, "encode_from_tokens_scheduled"),
        (comfy.sd1_clip, "token_weights"),
        (comfy.sd1_clip.SDTokenizer, "tokenize_with_weights"),
        (comfy.sd1_clip.ClipTokenWeightEncoder, "encode_token_weights"),
        (comfy.sd1_clip.SDClipModel, "forward"),
        (comfy.sd1_clip.SD1ClipModel, "encode_token_weights"),
        (comfy.sdxl_clip.SDXLClipModel, "encode_token_weights"),
    ),
}


def account() -> str:
    """All of it, as text to be pasted. No names of files or people, no prompts, no paths."""
    run = last_run.last
    parts = [
        TITLE,
        section("versions", [f"ComfyUI: {comfyui_version.__version__}", *versions()]),
        section("devices", _devices()),
        section("encoder loaded last", [last_run.described(unet.loaded)] if unet.loaded else []),
        section("functions of ComfyUI that other packs have replaced", last_run.replaced(_WATCHED)),
    ]
    if run is None:
        parts.append(section("last run with subjects", ["none yet"]))
    else:
        parts += [
            section("last run with subjects", [run.model, run.sampling, *run.encoders, run.ended]),
            section("its subjects", run.subjects),
            section("on its model, beside Nested Attention", run.patches),
        ]
    return "\n\n".join(parts)


def _devices() -> list[str]:
    device = comfy.model_management.get_torch_device()
    name = comfy.model_management.get_torch_device_name(device)
    total, free = (
        memory / 2**30
        for memory in (comfy.model_management.get_total_memory(device), comfy.model_management.get_free_memory(device))
    )
    root = getattr(args, "front_end_root", None)
    return [
        f"{name}, {total:.1f} GiB, {free:.1f} free",
        f"memory: {comfy.model_management.vram_state.name}",
        f"attention: {attention.optimized_attention.__name__}",
        f"frontend: {'another one, by --front-end-root' if root else 'the installed package, or --front-end-version'}",
    ]
