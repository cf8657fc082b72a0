"""Encoder files with fp8 weights, as ComfyUI makes them: a weight is its numbers times a scale."""

import re

import torch
from torch import Tensor

from .errors import NestedAttentionError

USE_PLAIN = "Of quantised encoders, fp8 with one scale a weight can be read: use that, or the fp16, bf16 or fp32 file."
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Of ComfyUI's files ("..._fp8_scaled"), the older names first. A weight is its fp8 numbers times its scale.
_SCALE = re.compile(r"(?P<layer>(?:.*\.)?)(?:scale_weight|weight_scale)")
# Scales of what goes into a layer, and notes: of no meaning to who computes with the weights themselves.
_NOTE = re.compile(r"(?:.*\.)?(?:scale_input|input_scale|scaled_fp8|comfy_quant)")
_OTHER_SCALE = re.compile(r".*\.(?:weight_scale_2|weight_scale_inv|pre_quant_scale)")


def split_scales(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[str, Tensor]]]:
    """The tensors without those of quantisation, and {weight: (scale's name, scale)}.

    Raises NestedAttentionError for a quantisation that has more than one scale to a weight.
    """
    scales, rest = {}, {}
    for key, tensor in tensors.items():
        if _OTHER_SCALE.fullmatch(key):
            raise NestedAttentionError(f"The file has {key}, of a quantisation this pack does not know. {USE_PLAIN}")
        if match := _SCALE.fullmatch(key):
            scales[f"{match['layer']}weight"] = key, tensor
        elif not _NOTE.fullmatch(key):
            rest[key] = tensor
    return rest, scales


def check_scale(weight: Tensor, key: str, scale: tuple[str, Tensor]) -> None:
    """One number for the weight, or one for each of its rows."""
    name, numbers = scale
    known = numbers.numel() == 1 or (weight.ndim == 2 and numbers.shape == (weight.shape[0], 1))
    if weight.dtype not in _FP8 or not numbers.is_floating_point() or numbers.element_size() == 1 or not known:
        raise NestedAttentionError(
            f"{name} should be a floating-point number that belongs to an fp8 weight, got {numbers.dtype} of the shape "
            f"{tuple(numbers.shape)} for {key}, {weight.dtype} {tuple(weight.shape)}. {USE_PLAIN}"
        )
