"""What an encoder file is, by the sizes of its parts and, where this pack wrote it, by its metadata."""

from dataclasses import replace

from torch import Tensor

from .encoder import EncoderConfig
from .errors import NestedAttentionError
from .layers import SDXL, compress
from .layouts import MEAN_POOLED, PLAIN_IP_ADAPTER, POSITIONS, Layers, Projection, State
from .metadata import OWN, number, with_metadata
from .resampler import ResamplerShape

DIM_HEAD = 64
"""Channels per head of every known resampler; a file can't tell, only our own metadata says otherwise."""

# IP-Adapter Plus files have 16 tokens; the release, whose layers may well carry the same names, 1024.
_MOST_IP_ADAPTER_TOKENS = 64


def config_of(tensors: State, projection: Projection, layers: Layers, said: dict[str, str]) -> EncoderConfig:
    """The config of what was found; what the file's own metadata says wins over what its kind implies."""
    family = layers.family
    first = tensors[layers.pairs[0].k]
    widths = tuple(tensors[pair.k].shape[0] for pair in layers.pairs)
    config = EncoderConfig(
        family=family.name,
        widths=widths,
        token_dim=first.shape[1],
        base_model="SDXL 1.0" if family is SDXL else family.title,
        bias=bool(layers.biases),
    )
    if projection.pooled:
        if layers.named_ip_adapter and not said:
            raise NestedAttentionError(PLAIN_IP_ADAPTER)
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
        shape = _resampler_shape(tensors, projection, number(said, "dim_head", DIM_HEAD))
        tokens = tensors[projection.names["latents"]].shape[-2] + shape.mean_pooled
        features = tensors[projection.names["proj_in.weight"]].shape[1]
        config = replace(config, tokens=tokens, feature_dim=features, resampler=shape)
        if layers.named_ip_adapter and tokens <= _MOST_IP_ADAPTER_TOKENS:
            config = replace(config, kind="ip-adapter-plus", licence="Apache-2.0")
        elif _is_public_release(config):
            # Its text encoders know the placeholder by a number above the end's, and pool at the largest number.
            config = replace(config, licence="CC BY-NC-SA 4.0", pooled="placeholder")
    if said:
        config = with_metadata(config, layers.order, said)
    elif config.kind == "ip-adapter-plus" and config.feature_dim == 512:
        raise NestedAttentionError(
            "This is not a nested attention encoder: it looks like an InstantID file, which reads 512-wide face "
            "recognition embeddings. Expected an encoder that reads the features of a CLIP vision model."
        )
    title = (said.get("title") or _title(config, layers)) + (OWN if said else "")
    return replace(config, title=title)


def _is_public_release(config: EncoderConfig) -> bool:
    """Whether the sizes are those of the published face encoder (arXiv 2501.01407), or of one trained on from it.

    Its file size leaves open whether it has positions and biases.
    """
    release = replace(EncoderConfig(), resampler=replace(ResamplerShape(), positions=config.resampler.positions))
    sizes = ("kind", "family", "tokens", "token_dim", "feature_dim", "widths", "resampler")
    return all(getattr(config, name) == getattr(release, name) for name in sizes)


def _title(config: EncoderConfig, layers: Layers) -> str:
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


def _resampler_shape(tensors: State, projection: Projection, dim_head: int) -> ResamplerShape:
    def weight(name: str) -> Tensor:
        return tensors[projection.names[name]]

    dim = weight("latents").shape[-1]
    inner = weight("layers.0.0.to_q.weight").shape[0]
    if inner % dim_head:
        raise NestedAttentionError(
            f"{projection.names['layers.0.0.to_q.weight']} has {inner} outputs, which is not a whole number of "
            f"attention heads of {dim_head} channels."
        )
    names = projection.names
    return ResamplerShape(
        dim=dim,
        depth=sum(name.endswith(".0.to_q.weight") for name in names),
        heads=inner // dim_head,
        dim_head=dim_head,
        ff_mult=max(1, weight("layers.0.1.1.weight").shape[0] // dim),
        positions=weight(POSITIONS).shape[0] if POSITIONS in names else 0,
        mean_pooled=max(1, weight(MEAN_POOLED).shape[0] // dim) if MEAN_POOLED in names else 0,
    )
