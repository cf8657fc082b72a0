"""A nested attention encoder: image features -> subject tokens x -> K̈ = W_K̈ x and V̈ = W_V̈ x for every layer.

arXiv 2501.01407, section 3: the vision tower and the U-Net stay frozen; what is here is all that was trained.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from .attention import VALUE_NORMS
from .errors import NestedAttentionError
from .layers import compress, family_of
from .resampler import ImageProjection, Resampler, ResamplerShape
from .towers import of_width

KINDS = ("nested", "nested-sd15-pooled", "ip-adapter-plus")
IMAGE_FEATURES = ("penultimate", "last", "pooled")
POOLED = ("eos", "placeholder")


class Overrides(TypedDict, total=False):
    """What a user may say about an encoder against its file, as in `EncoderConfig`; None is what the file says, or the
    default of its kind."""

    image_features: str | None
    value_norm: str | None
    alpha: float | None
    pooled: str | None


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder file is and how it wants to be used. The defaults are the public release's, but for `pooled`.

    kind            "nested" (Q-Former and nested layers), "nested-sd15-pooled" (a few tokens from the pooled image
                    embedding) or "ip-adapter-plus" (same structure, trained for another attention: experimental)
    family          "sdxl" or "sd15": which U-Net the layers belong to
    base_model      the model it was trained on, in words
    tokens          N, subject tokens per image
    token_dim       C, width of a subject token (input of the K̈ / V̈ layers)
    feature_dim     width of the vision tower's features
    image_features  which of them: "penultimate" or "last" hidden states, or the "pooled" embedding
    value_norm      how v* is rescaled (equation 4): "match", "match_per_head", "unit" or "none"
    alpha           the factor α of equation 4
    pooled          where SDXL's pooled text vector is taken: "eos", at the end of the text as SDXL does, or
                    "placeholder", as the public release does
    licence         of the weights, in words
    fingerprint     content hash of the weights as first published; empty where there is no content (meta tensors)
    title           what the reader took the file for, one line for the log
    widths          channels of each layer in diffusers' order; empty means the family's published widths
    resampler       sizes of the Q-Former; of no meaning for "nested-sd15-pooled"
    bias            whether the K̈ / V̈ layers add a bias
    training        what it was trained on and how, as JSON (`metadata.describe_training`); empty where nothing is known

    Raises NestedAttentionError for a value outside these choices, and for widths that no U-Net of the family has.
    """

    kind: str = "nested"
    family: str = "sdxl"
    base_model: str = "SDXL 1.0"
    tokens: int = 1024
    token_dim: int = 2048
    feature_dim: int = 1280
    image_features: str = "penultimate"
    value_norm: str = "match"
    alpha: float = 2.0
    pooled: str = "eos"
    licence: str = "unknown"
    fingerprint: str = ""
    title: str = ""
    widths: tuple[int, ...] = ()
    resampler: ResamplerShape = ResamplerShape()
    bias: bool = False
    training: str = ""

    def __post_init__(self) -> None:
        choices = {
            "kind": KINDS, "image_features": IMAGE_FEATURES, "value_norm": VALUE_NORMS, "pooled": POOLED
        }  # fmt: skip
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise NestedAttentionError(f'Unknown {name} "{value}". Known: {", ".join(known)}.')
        if not 0 < self.alpha < float("inf"):
            raise NestedAttentionError(f"alpha must be a number above 0 (the release uses 2.0), got {self.alpha}.")
        if (self.kind == "nested-sd15-pooled") != (self.image_features == "pooled"):
            wants = '"pooled"' if self.kind == "nested-sd15-pooled" else '"penultimate" or "last"'
            raise NestedAttentionError(
                f'image_features is "{self.image_features}", but an encoder of kind "{self.kind}" reads {wants}.'
            )
        if not 0 <= self.resampler.mean_pooled < self.tokens:
            raise NestedAttentionError(
                f"mean_pooled is {self.resampler.mean_pooled}; expected fewer than the {self.tokens} tokens."
            )
        family = family_of(self.family)
        if not self.widths:
            object.__setattr__(self, "widths", family.widths())
        if family.levels_of(self.widths) is None:
            raise NestedAttentionError(
                f"These {len(self.widths)} layer widths are not those of an {family.title} U-Net: "
                f"{compress(self.widths)}. Expected {len(family.widths())} in the order {compress(family.widths())}."
            )


class NestedEncoder(nn.Module):
    """Q-Former (or pooled projection) and the nested K̈ / V̈ layers, in diffusers' layer order. Weights are fresh; on the
    device "meta" there are none, to load into with assign=True.

    `resampler` makes the subject's tokens; `to_k[i]` and `to_v[i]` are W_K̈ and W_V̈ of layer i of
    `family_of(config.family).layers()`. `operations` has Linear, LayerNorm and Embedding as torch.nn does; with the
    host's own, the host casts and moves weights.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        made: dict[str, Any] = {"operations": operations, "dtype": dtype, "device": device}
        self.resampler: nn.Module
        if config.kind == "nested-sd15-pooled":
            self.resampler = ImageProjection(config.feature_dim, config.token_dim, config.tokens, **made)
        else:
            self.resampler = Resampler(config.resampler, config.tokens, config.feature_dim, config.token_dim, **made)

        def projections() -> nn.ModuleList:
            return nn.ModuleList(
                operations.Linear(config.token_dim, width, bias=config.bias, dtype=dtype, device=device)
                for width in config.widths
            )

        self.to_k = projections()
        self.to_v = projections()

    def encode(self, features: Tensor) -> Tensor:
        """Image features -> subject tokens x (B, N, C).

        `features` are the vision tower's hidden states (B, T, E), or its pooled embedding (B, E) for an encoder of
        kind "nested-sd15-pooled"; which ones, `config.image_features` says.

        Raises NestedAttentionError when they have another shape, as with the wrong vision tower.
        """
        config = self.config
        pooled = config.image_features == "pooled"
        if features.ndim != (2 if pooled else 3) or features.shape[-1] != config.feature_dim:
            expected = f"(images, {config.feature_dim})" if pooled else f"(images, tokens, {config.feature_dim})"
            came = of_width(features.shape[-1], features.ndim == 2) if features.ndim else ""
            looks = f", which looks like {came}" if came and features.shape[-1] != config.feature_dim else ""
            raise NestedAttentionError(
                f"This encoder reads the {config.image_features} features of the vision tower, {expected}; "
                f"got {tuple(features.shape)}{looks}. "
                f"Load the CLIP vision model it was trained with (the public one: CLIP ViT-H/14, 1.26 GB)."
            )
        return self.resampler(features)

    def keys_values(self, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Subject tokens x (B, N, C) -> (K̈, V̈) of one layer, each (B, N, width); `layer` counts in diffusers' order.

        Raises NestedAttentionError when the tokens are not C wide, as with a subject of another encoder.
        """
        if tokens.ndim != 3 or tokens.shape[-1] != self.config.token_dim:
            raise NestedAttentionError(
                f"This encoder's layers read subject tokens of shape (batch, tokens, {self.config.token_dim}); "
                f"got {tuple(tokens.shape)}. Encode the subject with this encoder."
            )
        return self.to_k[layer](tokens), self.to_v[layer](tokens)
