"""Reading, validating and writing encoder files.

Four kinds are read: this pack's own files; nested attention encoders in the layout of the public release (a Q-Former
and 70 pairs of layers, whatever their names); 4-token SD 1.5 encoders fed by the pooled image embedding; and IP-Adapter
Plus files, which have the same structure. Where the parts are in a file, `layouts` finds; what they are, `recognise`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .encoder import EncoderConfig, NestedEncoder
from .errors import NestedAttentionError
from .files import PRECISIONS, few, flatten, open_weights, save_tensors
from .layouts import State, check_rest, families_of, find_layers, find_projection
from .metadata import FORMAT, OWN, metadata_of, own_metadata
from .quantised import USE_PLAIN, check_scale, split_scales
from .recognise import config_of
from .remembered import path_beside, remembered

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .encoder import Overrides

log = logging.getLogger(__name__)
_NAMES = {dtype: name for name, dtype in PRECISIONS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_encoder(
    path: str | os.PathLike[str], *, baseline: bool = False, **overrides: Unpack[Overrides]
) -> tuple[EncoderConfig, State]:
    """An encoder file as its config and the state dict of a `NestedEncoder`, in the file's dtype.

    Safetensors, or a .bin / .pt that holds tensors only; the content tells which, not the name. The state is in memory
    of its own, whatever becomes of the file; scaled fp8 weights come as fp32.
    `baseline` also takes encoders of the training code's decoupled baseline. What the file leaves open is as Check
    Encoder remembered it beside the file, else the default of its kind.

    Raises NestedAttentionError, naming the file, when it can't be read, changes meanwhile, isn't an encoder this pack
    knows, or has weights that are not numbers.
    """
    path = Path(path)
    try:
        weights = open_weights(path)
        config, state = _identified(weights.tensors, weights.metadata, weights.read, overrides, baseline)
        return _with_remembered(path, config, overrides), state
    except NestedAttentionError as error:
        raise NestedAttentionError(f"{path.name}: {error}") from error.__cause__


def _with_remembered(path: Path, config: EncoderConfig, overrides: Overrides) -> EncoderConfig:
    """The config with what Check Encoder has found out about a file that does not say it itself."""
    if config.title.endswith(OWN):
        return config
    kinds = {"image_features": str, "value_norm": str, "alpha": float, "pooled": str}
    found = remembered(path, config.fingerprint, kinds)
    found = {name: value for name, value in found.items() if overrides.get(name) is None}
    if found:
        said = ", ".join(f"{name} {value}" for name, value in found.items())
        log.info("%s: %s, as Check Encoder found (%s)", path.name, said, path_beside(path).name)
    return replace(config, **found)


def load_encoder(
    path: str | os.PathLike[str],
    operations: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    baseline: bool = False,
    **overrides: Unpack[Overrides],
) -> NestedEncoder:
    """The encoder of a file, ready for inference (eval mode, no gradients); dtype None keeps the file's.

    The rest is as in `read_encoder`, whose errors it raises.
    """
    config, state = read_encoder(path, baseline=baseline, **overrides)
    encoder = NestedEncoder(config, operations=operations, dtype=dtype, device="meta")
    try:
        cast_weights(state, dtype, device, "Load it in bf16 or fp32 (ComfyUI: start it with --force-fp32).")
    except NestedAttentionError as error:
        raise NestedAttentionError(f"{Path(path).name}: {error}") from error
    encoder.load_state_dict(state, strict=True, assign=True)
    return encoder.eval().requires_grad_(False)


def cast_weights(state: State, dtype: torch.dtype | None, device: torch.device | str | None, advice: str) -> None:
    """Puts weights into another type and onto a device, None keeping theirs; in place, so that never more than one
    tensor is held twice.

    Raises NestedAttentionError, ending in `advice`, for values that the type can't hold.
    """
    for name, tensor in state.items():
        state[name] = tensor.to(device=device or tensor.device, dtype=dtype)
        if dtype not in (None, tensor.dtype) and not _is_finite(state[name]):
            raise NestedAttentionError(
                f"{name} has values up to {tensor.abs().max().item():.4g}, which {_NAMES.get(dtype, dtype)} "
                f"can't hold. {advice}"
            )


def identify(
    state_dict: Mapping[str, Any], metadata: Mapping[str, str] | None = None, **overrides: Unpack[Overrides]
) -> tuple[EncoderConfig, State]:
    """What encoder a state dict is (flat, or nested dictionaries), and its tensors under `NestedEncoder`'s names.

    `metadata` is a safetensors file's; it counts where this pack wrote it. Works on meta tensors too, but for the
    fingerprint. An override wins over the file's metadata, that over the defaults.

    Raises NestedAttentionError when it is no encoder this pack knows, saying what it looks like instead.
    """
    tensors = dict(flatten(state_dict))
    return _identified(tensors, metadata or {}, lambda names: {name: tensors[name] for name in names}, overrides)


def _identified(
    tensors: State,
    metadata: Mapping[str, str],
    read: Callable[[list[str]], State],
    overrides: Overrides,
    baseline: bool = False,
) -> tuple[EncoderConfig, State]:
    """`identify` by the shapes of `tensors`; then `read` gives the content of those that are the encoder's."""
    said = own_metadata(metadata, baseline)
    tensors, scales = split_scales(tensors)
    projection = find_projection(tensors)
    layers = find_layers(tensors, projection, families_of(said))
    check_rest(tensors, projection, layers)

    config = config_of(tensors, projection, layers, said)
    given: Any = {name: value for name, value in overrides.items() if value is not None}
    config = replace(config, **given)

    names = {f"resampler.{name}": key for name, key in projection.names.items()}
    for index, pair in enumerate(layers.pairs):
        names |= {f"to_k.{index}.weight": pair.k, f"to_v.{index}.weight": pair.v}
    for index, pair in enumerate(layers.biases):
        names |= {f"to_k.{index}.bias": pair.k, f"to_v.{index}.bias": pair.v}
    shapes = {name: tensors[key] for name, key in names.items()}
    if not projection.pooled and shapes["resampler.latents"].ndim == 2:
        shapes["resampler.latents"] = shapes["resampler.latents"][None]
    _check_state(config, shapes, names)
    used = {key: scales[key] for key in names.values() if key in scales}
    for key, scale in used.items():
        check_scale(tensors[key], key, scale)
    content = read([*names.values(), *(name for name, _ in used.values())])
    state = {}
    for name, key in names.items():
        tensor = content.pop(key)
        if key in used:
            tensor = tensor.float().mul_(content[used[key][0]].float())
        state[name] = tensor.reshape(shapes[name].shape)
    bad = [names[name] for name, tensor in state.items() if not _is_finite(tensor)]
    if bad:
        raise NestedAttentionError(
            f"The file has weights that are not numbers (NaN or infinite), in {few(bad)}. Its training or conversion "
            "failed, or it is damaged, and pictures would be black: get it again, or in a wider type (bf16, fp32)."
        )
    return replace(config, fingerprint=said.get("fingerprint") or fingerprint(state)), state


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A short hash of an encoder's weights, whatever the file and names they came from; empty for meta tensors.

    Shapes and eight evenly spread runs of each tensor are hashed, not all of 2 GB: any training step changes them.
    It does depend on the precision, so our own files carry the hash of the weights they were converted from.
    """
    if any(tensor.is_meta for tensor in state.values()):
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 8)
        runs = torch.cat([flat[start : start + 256] for start in range(0, flat.numel(), step)])
        digest.update(runs.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:32]


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.numel():
        return True
    values = tensor if tensor.element_size() > 1 else tensor.float()  # torch compares no fp8
    return bool(torch.stack(values.aminmax()).isfinite().all())  # without a mask as large as the tensor


def _check_state(config: EncoderConfig, state: State, names: dict[str, str]) -> None:
    """The state dict against the module built from the config: all there, nothing more, the right shapes."""
    expected = NestedEncoder(config, device="meta").state_dict()
    missing = [name for name in expected if name not in state]
    if missing:
        raise NestedAttentionError(
            f"The file lacks parts of the encoder: {few(missing)}. It is incomplete: get it again, or export it again."
        )
    wrong = [name for name in state if name not in expected or state[name].shape != expected[name].shape]
    if wrong:
        details = [
            f"{names[name]} {tuple(state[name].shape)}, "
            + (f"expected {tuple(expected[name].shape)}" if name in expected else "not expected")
            for name in wrong
        ]
        raise NestedAttentionError(f"Parts of the encoder don't fit together: {few(details)}.")
    quantised = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    if quantised:
        raise NestedAttentionError(
            f"Weights should be floating-point numbers, but {few([names[name] for name in quantised])} are "
            f"{state[quantised[0]].dtype}. {USE_PLAIN}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_encoder(path: str | os.PathLike[str], encoder: NestedEncoder, *, keep_fingerprint: bool = False) -> None:
    """Writes an encoder as this pack's own file: safetensors with what the config says as metadata.

    The file appears whole or not at all. A fresh fingerprint is taken of the weights, since they may have been trained
    since they were read; `keep_fingerprint` carries the config's on, for weights that only changed precision, so that
    subjects saved with the original still fit.

    Raises NestedAttentionError when the file can't be written there.
    """
    write_state(path, encoder.config, encoder.state_dict(), keep_fingerprint=keep_fingerprint)


def write_state(
    path: str | os.PathLike[str],
    config: EncoderConfig,
    state: Mapping[str, Tensor],
    *,
    keep_fingerprint: bool = False,
    form: str = FORMAT,
) -> None:
    """`write_encoder` for a config and state dict as `read_encoder` returns them, without building the module.

    Another `form` marks weights of the same structure that are no nested attention encoder: reading refuses them.
    """
    if not (keep_fingerprint and config.fingerprint):
        config = replace(config, fingerprint=fingerprint(state))
    tensors = {_file_name(name): tensor for name, tensor in state.items()}
    save_tensors(path, tensors, {**metadata_of(config), "format": form}, "encoder")


def _file_name(name: str) -> str:
    """`to_k.3.weight` of the module is `layers.3.to_k.weight` in the file: a layer's pair stands together."""
    return re.sub(r"^(to_[kv])\.(\d+)\.", r"layers.\2.\1.", name)
