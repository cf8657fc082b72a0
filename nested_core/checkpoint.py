"""Reading, validating and writing encoder files.

Four families are read: this pack's own files; nested attention encoders in the layout of the public release (a
Q-Former and 70 pairs of layers, whatever their names); 4-token SD 1.5 encoders fed by the pooled image embedding;
and IP-Adapter Plus files, which have the same structure. Names differ from trainer to trainer, so the reader goes by
suffixes and shapes: it finds the Q-Former by its parts, the K̈ / V̈ layers as pairs of matrices whose names differ in
k / v only, and settles the order of numbered layers by the sequence of their output widths. Whatever does not add up
is refused with what was expected and what came.
"""

import hashlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .encoder import EncoderConfig, NestedEncoder, ResamplerShape
from .errors import NestedAttentionError
from .files import few, flatten, looks_like, open_weights, save_tensors
from .layers import DIFFUSERS_ORDER, EXECUTION_ORDER, FAMILIES, PUBLISHED, Family, compress

log = logging.getLogger(__name__)

FORMAT = "nested_attention.encoder"
BASELINE = "nested_attention.decoupled_baseline"
"""What the training code marks encoders of its decoupled baseline with."""
VERSION = 1
DIM_HEAD = 64
"""Channels per head of every known resampler; a file can't tell, only our own metadata says otherwise."""

_OWN = " (this pack's format)"

# IP-Adapter Plus files have 16 tokens; the release, whose layers may well carry the same names, 1024.
_MOST_IP_ADAPTER_TOKENS = 64

_DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

State = dict[str, Tensor]
_Place = str | tuple[int, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_encoder(
    path: str | os.PathLike[str],
    *,
    image_features: str | None = None,
    value_norm: str | None = None,
    alpha: float | None = None,
    pooled: str | None = None,
    baseline: bool = False,
) -> tuple[EncoderConfig, State]:
    """An encoder file as its config and the state dict of a `NestedEncoder`, in the file's dtype.

    Safetensors, or a .bin / .pt that holds tensors only; the content tells which, not the name. The state is in memory
    of its own, whatever becomes of the file; scaled fp8 weights come as fp32.
    The options override what the file says; None keeps it (or the default of its kind). `baseline` also takes encoders
    of the training code's decoupled baseline.

    Raises NestedAttentionError, naming the file, when it can't be read, changes meanwhile, isn't an encoder this pack
    knows, or has weights that are not numbers.
    """
    path = Path(path)
    options = {"image_features": image_features, "value_norm": value_norm, "alpha": alpha, "pooled": pooled}
    try:
        weights = open_weights(path)
        return _identified(weights.tensors, weights.metadata, weights.read, options, baseline)
    except NestedAttentionError as error:
        raise NestedAttentionError(f"{path.name}: {error}") from error.__cause__


def load_encoder(
    path: str | os.PathLike[str],
    operations: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> NestedEncoder:
    """The encoder of a file, ready for inference (eval mode, no gradients); dtype None keeps the file's.

    `overrides` are the options of `read_encoder`, whose errors it raises.
    """
    config, state = read_encoder(path, **overrides)
    encoder = NestedEncoder.from_config(config, operations=operations, dtype=dtype, device="meta")
    try:
        cast(state, dtype, device, "Load it in bf16 or fp32 (ComfyUI: start it with --force-fp32).")
    except NestedAttentionError as error:
        raise NestedAttentionError(f"{Path(path).name}: {error}") from error
    encoder.load_state_dict(state, strict=True, assign=True)
    return encoder.eval().requires_grad_(False)


def cast(state: State, dtype: torch.dtype | None, device: torch.device | str | None, advice: str) -> None:
    """Puts weights into another type and onto a device, None keeping theirs; in place, so that never more than one
    tensor is held twice.

    Raises NestedAttentionError, ending in `advice`, for values that the type can't hold.
    """
    for name, tensor in state.items():
        state[name] = tensor.to(device=device or tensor.device, dtype=dtype)
        if dtype not in (None, tensor.dtype) and not _is_finite(state[name]):
            raise NestedAttentionError(
                f"{name} has values up to {tensor.abs().max().item():.4g}, which {_DTYPE_NAMES.get(dtype, dtype)} "
                f"can't hold. {advice}"
            )


def identify(
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    image_features: str | None = None,
    value_norm: str | None = None,
    alpha: float | None = None,
    pooled: str | None = None,
) -> tuple[EncoderConfig, State]:
    """What encoder a state dict is (flat, or nested dictionaries), and its tensors under `NestedEncoder`'s names.

    `metadata` is a safetensors file's; it counts where this pack wrote it. Works on meta tensors too, but for the
    fingerprint. Options as in `read_encoder`: an explicit one wins over the file's metadata, that over the defaults.

    Raises NestedAttentionError when it is no encoder this pack knows, saying what it looks like instead.
    """
    tensors = dict(flatten(state_dict))
    options = {"image_features": image_features, "value_norm": value_norm, "alpha": alpha, "pooled": pooled}
    return _identified(tensors, metadata or {}, lambda names: {name: tensors[name] for name in names}, options)


def _identified(
    tensors: State,
    metadata: Mapping[str, str],
    read: Callable[[list[str]], State],
    options: Mapping[str, Any],
    baseline: bool = False,
) -> tuple[EncoderConfig, State]:
    """`identify` by the shapes of `tensors`; then `read` gives the content of those that are the encoder's."""
    said = _own_metadata(metadata, baseline)
    tensors, scales = _split_scales(tensors)
    projection = _find_projection(tensors)
    layers = _find_layers(tensors, projection, _families(said))
    _check_rest(tensors, projection, layers)

    config = _configure(tensors, projection, layers, said)
    config = replace(config, **{name: value for name, value in options.items() if value is not None})

    names = {f"resampler.{name}": key for name, key in projection.names.items()}
    for index, pair in enumerate(layers.pairs):
        names |= {f"to_k.{index}.weight": pair.k, f"to_v.{index}.weight": pair.v}
    shapes = {name: tensors[key] for name, key in names.items()}
    if not projection.pooled and shapes["resampler.latents"].ndim == 2:
        shapes["resampler.latents"] = shapes["resampler.latents"][None]
    _check_state(config, shapes, names)
    used = {key: scales[key] for key in names.values() if key in scales}
    for key, scale in used.items():
        _check_scale(tensors[key], key, scale)
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


# ---------------------------------------------------------------------------------------------------------------------
# Quantised files

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Of ComfyUI's files ("..._fp8_scaled"), the older names first. A weight is its fp8 numbers times its scale.
_SCALE = re.compile(r"(?P<layer>(?:.*\.)?)(?:scale_weight|weight_scale)")
# Scales of what goes into a layer, and notes: of no meaning to who computes with the weights themselves.
_NOTE = re.compile(r"(?:.*\.)?(?:scale_input|input_scale|scaled_fp8|comfy_quant)")
_OTHER_SCALE = re.compile(r".*\.(?:weight_scale_2|weight_scale_inv|pre_quant_scale)")


def _split_scales(tensors: State) -> tuple[State, dict[str, tuple[str, Tensor]]]:
    """The tensors without those of quantisation, and {weight: (scale's name, scale)}.

    Raises NestedAttentionError for a quantisation that has more than one scale to a weight.
    """
    scales, rest = {}, {}
    for key, tensor in tensors.items():
        if _OTHER_SCALE.fullmatch(key):
            raise NestedAttentionError(f"The file has {key}, of a quantisation this pack does not know. {_USE_PLAIN}")
        if match := _SCALE.fullmatch(key):
            scales[f"{match['layer']}weight"] = key, tensor
        elif not _NOTE.fullmatch(key):
            rest[key] = tensor
    return rest, scales


def _check_scale(weight: Tensor, key: str, scale: tuple[str, Tensor]) -> None:
    """One number for the weight, or one for each of its rows."""
    name, numbers = scale
    known = numbers.numel() == 1 or (weight.ndim == 2 and numbers.shape == (weight.shape[0], 1))
    if weight.dtype not in _FP8 or not numbers.is_floating_point() or numbers.element_size() == 1 or not known:
        raise NestedAttentionError(
            f"{name} should be a floating-point number that belongs to an fp8 weight, got {numbers.dtype} of the shape "
            f"{tuple(numbers.shape)} for {key}, {weight.dtype} {tuple(weight.shape)}. {_USE_PLAIN}"
        )


_USE_PLAIN = "Of quantised encoders, fp8 with one scale a weight can be read: use that, or the fp16, bf16 or fp32 file."


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
    save_tensors(path, tensors, {**_metadata_of(config), "format": form}, "encoder")


def _file_name(name: str) -> str:
    """`to_k.3.weight` of the module is `layers.3.to_k.weight` in the file: a layer's pair stands together."""
    return re.sub(r"^(to_[kv])\.(\d+)\.", r"layers.\2.\1.", name)


def _metadata_of(config: EncoderConfig) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "kind": config.kind,
        "family": config.family,
        "base_model": config.base_model,
        "tokens": str(config.tokens),
        "image_features": config.image_features,
        "value_norm": config.value_norm,
        "alpha": repr(float(config.alpha)),
        "pooled": config.pooled,
        "licence": config.licence,
        "fingerprint": config.fingerprint,
        "dim_head": str(config.resampler.dim_head),
        "title": config.title.removesuffix(_OWN),
    }


def _own_metadata(metadata: Mapping[str, str], baseline: bool) -> dict[str, str]:
    """The metadata of a file this pack wrote; empty for others, whose metadata has no meaning here.

    Raises NestedAttentionError for our other kinds of file, and for versions this code does not know.
    """
    kind = metadata.get("format", "")
    if not kind.startswith("nested_attention."):
        return {}
    if kind == "nested_attention.subject":
        raise NestedAttentionError(
            "This is a saved subject, not an encoder. Open it with Load Subject, which takes the encoder beside it."
        )
    if kind == BASELINE and not baseline:
        raise NestedAttentionError(
            "This is an encoder that was trained for decoupled attention, to compare with. It is bound to no word, and "
            'the nodes do not run it. Load one that was trained with the method "nested".'
        )
    if kind not in (FORMAT, BASELINE):
        raise NestedAttentionError(f'Expected a file of format "{FORMAT}", got "{kind}".')
    version = metadata.get("version", "")
    if not version.isdecimal() or int(version) < 1:
        raise NestedAttentionError(f'The file\'s format version is "{version}"; expected a number from 1 to {VERSION}.')
    if int(version) > VERSION:
        raise NestedAttentionError(
            f"The file is of format version {version}, this pack reads up to version {VERSION}: update the pack."
        )
    return dict(metadata)


# ---------------------------------------------------------------------------------------------------------------------
# What the file is


class _Projection(NamedTuple):
    """Where the Q-Former (or the pooled projection) is: `names` maps the module's parameter names to file keys."""

    prefix: str
    names: dict[str, str]
    pooled: bool


class _Pair(NamedTuple):
    k: str
    v: str


@dataclass(frozen=True)
class _Layers:
    """The K̈ / V̈ layers in diffusers' order, `scheme` being the form of their names and `order` how it was settled."""

    family: Family
    scheme: str
    pairs: tuple[_Pair, ...]
    order: str

    @property
    def named_ip_adapter(self) -> bool:
        return _preference(self.scheme)[0] == 1


def _configure(tensors: State, projection: _Projection, layers: _Layers, said: dict[str, str]) -> EncoderConfig:
    """The config of what was found; what the file's own metadata says wins over what its kind implies."""
    family = layers.family
    first = tensors[layers.pairs[0].k]
    widths = tuple(tensors[pair.k].shape[0] for pair in layers.pairs)
    config = EncoderConfig(family=family.name, widths=widths, token_dim=first.shape[1], base_model=_base_model(family))
    if projection.pooled:
        if layers.named_ip_adapter and not said:
            raise NestedAttentionError(_PLAIN_IP_ADAPTER)
        proj, norm = (tensors[projection.names[name]] for name in ("proj.weight", "norm.weight"))
        config = replace(
            config,
            kind="nested-sd15-pooled",
            tokens=proj.shape[0] // norm.shape[0],
            feature_dim=proj.shape[1],
            image_features="pooled",
            # The one published training code of this kind puts v* in the value's place as it is.
            value_norm="none",
        )
    else:
        shape = _resampler_shape(tensors, projection, _number(said, "dim_head", DIM_HEAD))
        tokens = tensors[projection.names["latents"]].shape[-2]
        features = tensors[projection.names["proj_in.weight"]].shape[1]
        config = replace(config, tokens=tokens, feature_dim=features, resampler=shape)
        if layers.named_ip_adapter and tokens <= _MOST_IP_ADAPTER_TOKENS:
            config = replace(config, kind="ip-adapter-plus", licence="Apache-2.0")
        elif _is_public_release(config):
            config = replace(config, licence="CC BY-NC-SA 4.0")
    if said:
        config = _apply_metadata(config, layers, said)
    elif config.kind == "ip-adapter-plus" and config.feature_dim == 512:
        raise NestedAttentionError(
            "This is not a nested attention encoder: it looks like an InstantID file, which reads 512-wide face "
            "recognition embeddings. Expected an encoder that reads the features of a CLIP vision model."
        )
    title = (said.get("title") or _title(config, layers)) + (_OWN if said else "")
    return replace(config, experimental=config.kind == "ip-adapter-plus", title=title)


def _apply_metadata(config: EncoderConfig, layers: _Layers, said: dict[str, str]) -> EncoderConfig:
    kinds = ("nested-sd15-pooled",) if config.kind == "nested-sd15-pooled" else ("nested", "ip-adapter-plus")
    for name, possible in (("kind", kinds), ("family", (config.family,)), ("tokens", (str(config.tokens),))):
        if said.get(name, possible[0]) not in possible:
            raise NestedAttentionError(
                f'The file\'s metadata says {name} "{said[name]}", its weights are of {name} '
                f"{' or '.join(possible)}. The file is damaged, or a newer version of the pack wrote it."
            )
    if not layers.order.startswith(DIFFUSERS_ORDER):
        raise NestedAttentionError(
            f"The file's layers are in the order {layers.order}; this pack writes them in the order {DIFFUSERS_ORDER}. "
            f"The file is damaged or was edited: get it again."
        )
    known = ("kind", "base_model", "image_features", "value_norm", "pooled", "licence")
    changes: dict[str, Any] = {name: said[name] for name in known if name in said}
    if "alpha" in said:
        try:
            changes["alpha"] = float(said["alpha"])
        except ValueError as error:
            raise NestedAttentionError(
                f'The file\'s metadata says alpha "{said["alpha"]}"; expected a number such as 2.0.'
            ) from error
    return replace(config, **changes)


def _number(said: dict[str, str], name: str, default: int) -> int:
    text = said.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise NestedAttentionError(f'The file\'s metadata says {name} "{text}"; expected a whole number above 0.')
    return int(text)


def _base_model(family: Family) -> str:
    return {"sdxl": "SDXL 1.0", "sd15": "SD 1.5"}.get(family.name, family.title)


def _is_public_release(config: EncoderConfig) -> bool:
    """Whether the sizes are those of the published face encoder (arXiv 2501.01407), or of one trained on from it."""
    release = EncoderConfig()
    sizes = ("family", "tokens", "token_dim", "feature_dim", "widths", "resampler")
    return config.kind == release.kind and all(getattr(config, name) == getattr(release, name) for name in sizes)


def _title(config: EncoderConfig, layers: _Layers) -> str:
    family = layers.family
    what = {
        "nested": "nested attention encoder",
        "nested-sd15-pooled": "nested attention encoder reading the pooled image embedding",
        "ip-adapter-plus": "IP-Adapter Plus, experimental as a nested attention encoder",
    }[config.kind]
    if _is_public_release(config):
        what += " (sizes of the public release)"
    narrow = "" if config.widths == family.widths() else f" with narrow layers {compress(config.widths)}"
    return f"{what} for {family.title}{narrow}, {config.tokens} tokens; layer order {layers.order}"


def _resampler_shape(tensors: State, projection: _Projection, dim_head: int) -> ResamplerShape:
    def weight(name: str) -> Tensor:
        return tensors[projection.names[name]]

    dim = weight("latents").shape[-1]
    inner = weight("layers.0.0.to_q.weight").shape[0]
    if inner % dim_head:
        raise NestedAttentionError(
            f"{projection.names['layers.0.0.to_q.weight']} has {inner} outputs, which is not a whole number of "
            f"attention heads of {dim_head} channels."
        )
    depth = sum(name.endswith(".0.to_q.weight") for name in projection.names)
    ff_mult = max(1, weight("layers.0.1.1.weight").shape[0] // dim)
    return ResamplerShape(dim=dim, depth=depth, heads=inner // dim_head, dim_head=dim_head, ff_mult=ff_mult)


# Names inside a resampler, but for the feed-forward, whose parts are told by shape.
_RESAMPLER_NAME = re.compile(
    r"latents|(?:proj_in|proj_out|norm_out)\.(?:weight|bias)"
    r"|layers\.\d+\.0\.(?:norm[12]\.(?:weight|bias)|to_(?:q|kv|out)\.weight)"
)
_FEED_FORWARD_NAME = re.compile(r"(layers\.\d+\.1)\..+")
_NEEDED = ("latents", "proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", "layers.0.1.1.weight")


def _find_projection(tensors: State) -> _Projection:
    """The Q-Former or the pooled projection, under any prefix.

    Raises NestedAttentionError when there is none, more than one, or an incomplete one.
    """
    prefixes = [key[: -len("latents")] for key in tensors if re.search(r"(^|\.)latents$", key)]
    # Training checkpoints hold the U-Net too, so any prefix with a proj and a norm won't do: theirs fit together.
    pooled = [key[: -len("proj.weight")] for key in tensors if re.search(r"(^|\.)proj\.weight$", key)]
    pooled = [prefix for prefix in pooled if _is_pooled_projection(tensors, prefix)]
    found = [_resampler_at(tensors, prefix) for prefix in prefixes] or [
        _Projection(prefix, {name: prefix + name for name in _POOLED_NAMES}, pooled=True) for prefix in pooled
    ]
    if not found:
        raise NestedAttentionError(_refusal(tensors))
    if len(found) > 1:
        places = ", ".join(f'"{projection.prefix}"' for projection in found)
        raise NestedAttentionError(
            f"The file holds {len(found)} image projections, under {places}; expected one. "
            f"If it is a training checkpoint, export the one to use (without the averaged copy, say)."
        )
    return found[0]


_POOLED_NAMES = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")


def _is_pooled_projection(tensors: State, prefix: str) -> bool:
    if not all(prefix + name in tensors for name in _POOLED_NAMES):
        return False
    proj, norm = tensors[f"{prefix}proj.weight"], tensors[f"{prefix}norm.weight"]
    return proj.ndim == 2 and norm.ndim == 1 and proj.shape[0] % norm.shape[0] == 0


def _resampler_at(tensors: State, prefix: str) -> _Projection:
    names: dict[str, str] = {}
    feed_forwards: dict[str, list[str]] = defaultdict(list)
    for key in tensors:
        if key.startswith(prefix):
            name = key[len(prefix) :]
            if _RESAMPLER_NAME.fullmatch(name):
                names[name] = key
            elif match := _FEED_FORWARD_NAME.fullmatch(name):
                feed_forwards[match[1]].append(key)
    for place, keys in feed_forwards.items():
        names |= _feed_forward(tensors, place, sorted(keys, key=_natural))
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise NestedAttentionError(
            f"The file has the queries of a resampler ({_show(tensors, [prefix + 'latents'])}), but no "
            f"{', '.join(prefix + name for name in missing)}. "
            f"{_refusal(tensors)}"
        )
    if tensors[names["latents"]].ndim not in (2, 3):
        raise NestedAttentionError(
            f"The resampler's queries should have the shape (1, tokens, width), "
            f"got {_show(tensors, [names['latents']])}."
        )
    return _Projection(prefix, names, pooled=False)


def _feed_forward(tensors: State, place: str, keys: list[str]) -> dict[str, str]:
    """One feed-forward's tensors under our names: a norm (weight and bias) and two matrices in order."""
    matrices = [key for key in keys if tensors[key].ndim == 2]
    vectors = [key for key in keys if tensors[key].ndim == 1]
    weights = [key for key in vectors if key.endswith("weight")]
    biases = [key for key in vectors if key.endswith("bias")]
    if len(keys) != 4 or len(matrices) != 2 or len(weights) != 1 or len(biases) != 1:
        raise NestedAttentionError(
            f"A feed-forward of the resampler should be a norm (weight and bias) and two matrices without bias, "
            f"got {_show(tensors, keys)}."
        )
    return {
        f"{place}.0.weight": weights[0],
        f"{place}.0.bias": biases[0],
        f"{place}.1.weight": matrices[0],
        f"{place}.3.weight": matrices[1],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The K̈ / V̈ layers

_DIFFUSERS_PLACE = re.compile(
    r"(?:(?P<side>down|up)_blocks[._](?P<block>\d+)|(?P<mid>mid_block))[._]attentions[._](?P<attention>\d+)"
    r"[._]transformer_blocks[._](?P<transformer>\d+)(?:[._]attn(?P<attn>\d))?"
)
_ORIGINAL_PLACE = re.compile(
    r"(?P<place>(?:(?:in|out)put_blocks[._]\d+|middle_block)[._]1[._]transformer_blocks[._]\d+)(?:[._]attn(?P<attn>\d))?"
)
_VALUE_FOR_KEY = {"k": "v", "key": "value", "keys": "values", "wk": "wv", "kproj": "vproj"}
_KEY_FOR_VALUE = {value: key for key, value in _VALUE_FOR_KEY.items()}
_BY_ORIGINAL_NAME = {layer.original: layer.diffusers for family in PUBLISHED.values() for layer in family.layers()}


def _families(said: Mapping[str, str]) -> dict[int, Family]:
    """The families that a file can be for, by number of layers: the published ones, and the one our metadata names."""
    families = [*PUBLISHED.values(), *([FAMILIES[said["family"]]] if said.get("family") in FAMILIES else [])]
    return {len(family.layers()): family for family in families}


def _find_layers(tensors: State, projection: _Projection, counts: dict[int, Family]) -> _Layers:
    """The pairs of K̈ / V̈ layers in diffusers' order, as many as a family of `counts` has.

    Raises NestedAttentionError when there are none, or their number, partners, shapes or order don't add up.
    """
    taken = set(projection.names.values())
    schemes = _schemes(key for key, tensor in tensors.items() if tensor.ndim == 2 and key not in taken)
    complete = [name for name, places in schemes.items() if sum(map(_is_pair, places.values())) in counts]
    if not complete:
        raise NestedAttentionError(_incomplete(tensors, schemes, counts.values()))
    best = max(map(_preference, complete))
    chosen = [name for name in complete if _preference(name) == best]
    if len(chosen) > 1:
        raise NestedAttentionError(
            f"The file holds {len(chosen)} complete sets of key / value layers, named {' and '.join(sorted(chosen))}; "
            f"expected one. Export the one to use."
        )
    scheme, places = chosen[0], schemes[chosen[0]]
    alone = [key for sides in places.values() if not _is_pair(sides) for key in sides.values()]
    if alone:
        raise NestedAttentionError(_without_partner(tensors, alone))
    pairs = {place: _Pair(sides["k"], sides["v"]) for place, sides in places.items()}
    _check_pairs(tensors, list(pairs.values()), projection)
    return _in_order(tensors, counts[len(pairs)], scheme, pairs)


def _in_order(tensors: State, family: Family, scheme: str, pairs: dict[_Place, _Pair]) -> _Layers:
    if "@" in scheme:
        expected = [layer.diffusers for layer in family.layers()]
        missing = [name for name in expected if name not in pairs]
        if missing:
            extra = sorted(str(place) for place in pairs if place not in expected)
            raise NestedAttentionError(
                f"The layers are named by their place in the U-Net, but not those of {family.title}: "
                f"no {few(missing)}; instead {few(extra)}."
            )
        listed = [pairs[name] for name in expected]
    else:
        listed = [pairs[place] for place in sorted(pairs)]
    found = [tensors[pair.k].shape[0] for pair in listed]
    settled = family.order_of(found)
    if settled is None or ("@" in scheme and settled[0] != DIFFUSERS_ORDER):
        raise NestedAttentionError(
            f"The output widths of the {len(found)} key / value layers fit no known order of an {family.title} U-Net. "
            f"Found {compress(found)}; expected {family.describe_orders()}."
        )
    order, indexes = settled
    by_index = dict(zip(indexes, listed, strict=True))
    if "@" in scheme:
        order = f"{order}, by name"
    elif family.is_ambiguous(found):
        order = f"{order} (their widths would fit {EXECUTION_ORDER} as well)"
    return _Layers(family, scheme, tuple(by_index[index] for index in range(len(listed))), order)


def _schemes(keys: Iterable[str]) -> dict[str, dict[_Place, dict[str, str]]]:
    """Keys by the form of their names: scheme -> place -> {"k": key, "v": key}.

    In a scheme, "@" stands for the place in the U-Net or "#" for each number, and "{k}" for the word that is k or v.
    """
    keys = list(keys)
    known = set(keys)
    schemes: dict[str, dict[_Place, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in keys:
        located = _locate(key)
        # A to_k with a to_q beside it is the U-Net's own attention, in a training checkpoint.
        if located is None or re.sub(r"to_[kv](\.weight)$", r"to_q\1", key) in known - {key}:
            continue
        place, rest = located
        for side, scheme in _readings(rest):
            schemes[scheme][place][side] = key
    return schemes


def _locate(key: str) -> tuple[_Place, str] | None:
    """A key's place (name in diffusers, or its numbers) and the rest of its name; None for self-attention."""
    if match := _DIFFUSERS_PLACE.search(key):
        block = "mid_block" if match["mid"] else f"{match['side']}_blocks.{match['block']}"
        place = f"{block}.attentions.{match['attention']}.transformer_blocks.{match['transformer']}.attn2"
    elif match := _ORIGINAL_PLACE.search(key):
        original = re.sub(r"(?<=blocks)_|(?<=middle_block)_|_(?=\d)|(?<=\d)_", ".", match["place"]) + ".attn2"
        place = _BY_ORIGINAL_NAME.get(original, original)
    else:
        return tuple(int(number) for number in re.findall(r"\d+", key)), re.sub(r"\d+", "#", key)
    if match["attn"] == "1":
        return None
    return place, key[: match.start()] + "@" + key[match.end() :]


def _readings(rest: str) -> Iterator[tuple[str, str]]:
    """Which side ("k" or "v") a name can be, each with the name's form once the telling word is left open."""
    pieces = re.split(r"([._])", rest.lower())
    for side, words in (("k", _VALUE_FOR_KEY), ("v", _KEY_FOR_VALUE)):
        where = [i for i, piece in enumerate(pieces) if piece in words]
        # "keys.3.to_k" against "values.3.to_v": every such word may change, or only one of them.
        for changing in [[i] for i in where] + ([where] if len(where) > 1 else []):
            form = [
                f"{{{words[piece] if side == 'v' else piece}}}" if i in changing else piece
                for i, piece in enumerate(pieces)
            ]
            yield side, "".join(form)


def _is_pair(sides: dict[str, str]) -> bool:
    return len(sides) == 2


def _preference(scheme: str) -> tuple[int, bool]:
    """Training checkpoints hold the same layers twice, and IP-Adapter layers beside nested ones: which to take."""
    return (2 if "nest" in scheme else 1 if "ip" in re.split(r"[._]", scheme) else 0), "@" in scheme


def _check_pairs(tensors: State, pairs: list[_Pair], projection: _Projection) -> None:
    unlike = [pair for pair in pairs if tensors[pair.k].shape != tensors[pair.v].shape]
    if unlike:
        raise NestedAttentionError(
            f"The key and the value matrix of a layer should have the same shape, got "
            f"{_show(tensors, [key for pair in unlike for key in pair])}."
        )
    name = "norm.weight" if projection.pooled else "proj_out.weight"
    token_dim = tensors[projection.names[name]].shape[0]
    other = [pair for pair in pairs if tensors[pair.k].shape[1] != token_dim]
    if other:
        raise NestedAttentionError(
            f"The key / value layers should read tokens of width {token_dim}, as the image projection gives them "
            f"({_show(tensors, [projection.names[name]])}), got {_show(tensors, [key for p in other for key in p])}."
        )
    weights = [key for pair in pairs for key in pair if key.endswith("weight")]
    biased = [bias for key in weights if (bias := key[: -len("weight")] + "bias") in tensors]
    if biased:
        raise NestedAttentionError(
            f"The key / value layers of nested attention have no bias, but this file has {_show(tensors, biased)}."
        )


def _incomplete(tensors: State, schemes: dict[str, dict[_Place, dict[str, str]]], families: Collection[Family]) -> str:
    """Why no complete set of layers was found."""
    full = " or ".join(f"{len(family.layers())} ({family.title})" for family in families)
    ranked = sorted(schemes.items(), key=lambda item: (sum(map(_is_pair, item[1].values())), len(item[1])))
    if not ranked:
        return f"The file has an image projection but no key / value layers; expected {full} pairs. {_refusal(tensors)}"
    places = ranked[-1][1]
    pairs = [sides for _, sides in sorted(places.items(), key=lambda item: str(item[0])) if _is_pair(sides)]
    alone = [key for sides in places.values() if not _is_pair(sides) for key in sides.values()]
    if alone:
        return _without_partner(tensors, alone)
    keys = sorted((sides["k"] for sides in pairs), key=_natural)
    return (
        f"Expected {full} pairs of key / value layers, found {len(pairs)}, from {keys[0]} to {keys[-1]}, of widths "
        f"{compress([tensors[key].shape[0] for key in keys])}. Known sequences: "
        + "; ".join(f"{family.title}: {family.describe_orders()}" for family in families)
        + "."
    )


def _without_partner(tensors: State, alone: list[str]) -> str:
    return (
        f"Every cross-attention layer needs a key and a value matrix, but these have no partner: "
        f"{_show(tensors, sorted(alone, key=_natural))}. The file is incomplete: get it again, or export it again."
    )


def _check_rest(tensors: State, projection: _Projection, layers: _Layers) -> None:
    """What is left over: inside the image projection it would change the result, elsewhere it is reported."""
    used = set(projection.names.values()) | {key for pair in layers.pairs for key in pair}
    rest = [key for key in tensors if key not in used]
    # What lies beside a weight of one byte may be its scale, under a name this pack does not know.
    quantised = [key.removesuffix("weight") for key in used if tensors[key].element_size() == 1]
    inside = [key for key in rest if key.startswith((projection.prefix, *quantised))]
    if inside:
        raise NestedAttentionError(
            f"The file has parts of the encoder that this pack does not know: {_show(tensors, inside)}. "
            f"Leaving them out would change the result, so the file was not loaded."
        )
    if rest:
        log.warning("%d tensors of the file are not the encoder's and were left out: %s", len(rest), few(rest))


def _check_state(config: EncoderConfig, state: State, names: dict[str, str]) -> None:
    """The state dict against the module built from the config: all there, nothing more, the right shapes."""
    expected = NestedEncoder.from_config(config, device="meta").state_dict()
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
            f"{state[quantised[0]].dtype}. {_USE_PLAIN}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Other files, and messages

_PLAIN_IP_ADAPTER = (
    "This is not a nested attention encoder: it is a plain IP-Adapter file, which makes its few tokens from the pooled "
    "image embedding. Of the IP-Adapter files only the Plus ones can be used (as an experimental encoder)."
)


def _refusal(tensors: State) -> str:
    """Why a state dict is no encoder: what it looks like instead, or what is in it."""
    other = looks_like(tensors)
    if other:
        return f"This is not a nested attention encoder: it looks like {other[0]}. {other[1]}"
    held = f"{len(tensors)} tensors, such as {_show(tensors, list(tensors))}" if tensors else "no tensors at all"
    return (
        "This is not a nested attention encoder: expected a resampler (latents, proj_in, layers, proj_out, norm_out) "
        "or a pooled projection (proj, norm), and a pair of key / value layers for each cross-attention layer. "
        f"The file has {held}."
    )


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key that reads numbers as numbers: 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _show(tensors: State, keys: list[str]) -> str:
    return few([f"{key} {tuple(tensors[key].shape)}" for key in keys])
