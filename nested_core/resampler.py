"""From image features to the subject's tokens: the paper's Q-Former, and the small projection of pooled encoders.

The Q-Former (arXiv 2501.01407, section 3.2) is a Perceiver resampler: learned queries read the frozen vision tower's
patch tokens through a few attention layers. Module names are those of published weights, so a file loads as it is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import NestedAttentionError


@dataclass(frozen=True)
class ResamplerShape:
    """The Q-Former's inner sizes. The defaults are the public release's.

    dim, depth, heads, dim_head, ff_mult    width inside, layers, attention heads, their channels, width of the
                                            feed-forwards as a multiple of dim
    positions   rows of a learned position embedding that is added to the features; 0: there is none. Newer IP-Adapter
                code has it as `apply_pos_emb`.
    mean_pooled how many of the latents are made from the mean of the features, by a norm and a matrix; the others are
                learned. Newer IP-Adapter code has it as `num_latents_mean_pooled`.
    """

    dim: int = 2048
    depth: int = 4
    heads: int = 12
    dim_head: int = 64
    ff_mult: int = 4
    positions: int = 0
    mean_pooled: int = 0


class PerceiverAttention(nn.Module):
    """Latents attend to the features and to themselves: keys and values come from both."""

    def __init__(
        self, dim: int, dim_head: int, heads: int, operations: Any = nn, dtype: Any = None, device: Any = None
    ) -> None:
        super().__init__()
        self.heads = heads
        inner = dim_head * heads
        self.norm1 = operations.LayerNorm(dim, dtype=dtype, device=device)
        self.norm2 = operations.LayerNorm(dim, dtype=dtype, device=device)
        self.to_q = operations.Linear(dim, inner, bias=False, dtype=dtype, device=device)
        self.to_kv = operations.Linear(dim, inner * 2, bias=False, dtype=dtype, device=device)
        self.to_out = operations.Linear(inner, dim, bias=False, dtype=dtype, device=device)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """features (B, T, dim), latents (B, N, dim) -> update of the latents (B, N, dim)."""
        features = self.norm1(features)
        latents = self.norm2(latents)
        q = self._split(self.to_q(latents))
        k, v = (self._split(part) for part in self.to_kv(torch.cat((features, latents), dim=1)).chunk(2, dim=-1))
        # The fused kernel keeps logits and softmax in fp32 for fp16 inputs: q·k of a trained resampler overflows fp16.
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def weights(self, features: Tensor, latents: Tensor) -> Tensor:
        """What `forward` looks at, the mean over heads: (B, N, T + N) in fp32, features first."""
        features, latents = self.norm1(features), self.norm2(latents)
        q = self._split(self.to_q(latents)).float()
        k = self._split(self.to_kv(torch.cat((features, latents), dim=1)).chunk(2, dim=-1)[0]).float()
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)

    def _split(self, x: Tensor) -> Tensor:
        """(B, L, heads·d) -> (B, heads, L, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def feed_forward(dim: int, mult: int, operations: Any = nn, dtype: Any = None, device: Any = None) -> nn.Sequential:
    """Pre-norm MLP of the resampler; places 0, 1 and 3 are the ones with weights, as in published files."""
    return nn.Sequential(
        operations.LayerNorm(dim, dtype=dtype, device=device),
        operations.Linear(dim, dim * mult, bias=False, dtype=dtype, device=device),
        nn.GELU(),
        operations.Linear(dim * mult, dim, bias=False, dtype=dtype, device=device),
    )


class Resampler(nn.Module):
    """Q-Former: `tokens` latents summarise the vision tower's tokens.

    `embedding_dim` is the width of the features, `output_dim` that of the subject's tokens. `operations` has Linear,
    LayerNorm and Embedding as torch.nn does; a host passes its own to manage weights. The defaults are the public
    release's.
    """

    def __init__(
        self,
        shape: ResamplerShape = ResamplerShape(),
        tokens: int = 1024,
        embedding_dim: int = 1280,
        output_dim: int = 2048,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        dim, pooled = shape.dim, shape.mean_pooled
        self.pos_emb = operations.Embedding(shape.positions, embedding_dim, **made) if shape.positions else None
        self.latents = nn.Parameter(torch.randn(1, tokens - pooled, dim, **made) / dim**0.5)
        self.proj_in = operations.Linear(embedding_dim, dim, **made)
        self.proj_out = operations.Linear(dim, output_dim, **made)
        self.norm_out = operations.LayerNorm(output_dim, **made)
        self.to_latents_from_mean_pooled_seq = (
            nn.Sequential(operations.LayerNorm(dim, **made), operations.Linear(dim, dim * pooled, **made))
            if pooled
            else None
        )
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, shape.dim_head, shape.heads, operations, **made),
                    feed_forward(dim, shape.ff_mult, operations, **made),
                ]
            )
            for _ in range(shape.depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        """features (B, T, embedding_dim) -> subject tokens x (B, tokens, output_dim).

        Raises NestedAttentionError for more features than there are positions.
        """
        features, latents = self._begin(features)
        for layer in self.layers:
            attention, mlp = layer.children()
            latents = latents + attention(features, latents)
            latents = latents + mlp(latents)
        return self.norm_out(self.proj_out(latents))

    def attention(self, features: Tensor) -> Tensor:
        """Where each subject token comes from: features (B, T, embedding_dim) -> (B, tokens, T) in fp32, rows that sum
        to 1.

        Attention of all layers, rolled out (Abnar and Zuidema, arXiv 2005.00928): a latent holds in equal parts what it
        held and what it looks at, the other latents among it. Latents made from the mean of the features begin with
        equal parts of all of them.
        """
        features, latents = self._begin(features)
        count = features.shape[1]
        held = torch.zeros(*latents.shape[:2], count, device=features.device)
        held[:, : latents.shape[1] - self.latents.shape[1]] = 1 / count
        for layer in self.layers:
            attention, mlp = layer.children()
            assert isinstance(attention, PerceiverAttention)
            looks = attention.weights(features, latents)
            held = (held + looks[..., :count] + looks[..., count:] @ held) / 2
            latents = latents + attention(features, latents)
            latents = latents + mlp(latents)
        return held / held.sum(-1, keepdim=True).clamp_min(1e-12)

    def _begin(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, T, embedding_dim) -> what the layers read (B, T, dim), and the latents (B, tokens, dim)."""
        if self.pos_emb is not None:
            features = features + self._positions(features.shape[1], features.device).to(features)
        features = self.proj_in(features)
        # A host may keep weights on another device or in another dtype than it computes in.
        latents = self.latents.to(features).expand(features.shape[0], -1, -1)
        if self.to_latents_from_mean_pooled_seq is not None:
            made = self.to_latents_from_mean_pooled_seq(features.mean(dim=1))
            latents = torch.cat((made.unflatten(-1, (-1, features.shape[-1])), latents), dim=1)
        return features, latents

    def _positions(self, count: int, device: torch.device) -> Tensor:
        """The first `count` rows of the position embedding (T, embedding_dim)."""
        assert self.pos_emb is not None
        if count > self.pos_emb.num_embeddings:
            raise NestedAttentionError(
                f"This encoder knows {self.pos_emb.num_embeddings} positions of image features, got {count}. "
                "Load the CLIP vision model it was trained with, at its own resolution."
            )
        return self.pos_emb(torch.arange(count, device=device))


class ImageProjection(nn.Module):
    """The pooled image embedding as a few tokens: what 4-token SD 1.5 encoders have in place of a Q-Former."""

    def __init__(
        self,
        embedding_dim: int = 1024,
        output_dim: int = 768,
        tokens: int = 4,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = operations.Linear(embedding_dim, tokens * output_dim, dtype=dtype, device=device)
        self.norm = operations.LayerNorm(output_dim, dtype=dtype, device=device)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled (B, embedding_dim) -> subject tokens x (B, tokens, output_dim)."""
        return self.norm(self.proj(pooled).unflatten(-1, (self.tokens, -1)))
