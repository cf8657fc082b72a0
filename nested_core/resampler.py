"""From image features to the subject's tokens: the paper's Q-Former, and the small projection of pooled encoders.

The Q-Former (arXiv 2501.01407, section 3.2) is a Perceiver resampler: learned queries read the frozen vision tower's
patch tokens through a few attention layers. Module names are those of published weights, so a file loads as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    """Q-Former: `num_queries` learned queries summarise the vision tower's tokens.

    `dim` is the width inside, `embedding_dim` that of the features, `output_dim` that of the subject's tokens.
    `operations` has Linear and LayerNorm as torch.nn does; a host passes its own to manage weights. The defaults are
    the public release's.
    """

    def __init__(
        self,
        dim: int = 2048,
        depth: int = 4,
        dim_head: int = 64,
        heads: int = 12,
        num_queries: int = 1024,
        embedding_dim: int = 1280,
        output_dim: int = 2048,
        ff_mult: int = 4,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim, **made) / dim**0.5)
        self.proj_in = operations.Linear(embedding_dim, dim, **made)
        self.proj_out = operations.Linear(dim, output_dim, **made)
        self.norm_out = operations.LayerNorm(output_dim, **made)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, dim_head, heads, operations, **made),
                    feed_forward(dim, ff_mult, operations, **made),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        """features (B, T, embedding_dim) -> subject tokens x (B, num_queries, output_dim)."""
        features = self.proj_in(features)
        # A host may keep weights on another device or in another dtype than it computes in.
        latents = self.latents.to(features).expand(features.shape[0], -1, -1)
        for layer in self.layers:
            attention, mlp = layer.children()
            latents = latents + attention(features, latents)
            latents = latents + mlp(latents)
        return self.norm_out(self.proj_out(latents))

    def attention(self, features: Tensor) -> Tensor:
        """Where each subject token comes from: features (B, T, embedding_dim) -> (B, num_queries, T) in fp32, rows
        that sum to 1.

        Attention of all layers, rolled out (Abnar and Zuidema, arXiv 2005.00928): a latent holds in equal parts what it
        held and what it looks at, the other latents among it.
        """
        features = self.proj_in(features)
        latents = self.latents.to(features).expand(features.shape[0], -1, -1)
        count = features.shape[1]
        held = torch.zeros(*latents.shape[:2], count, device=features.device)
        for layer in self.layers:
            attention, mlp = layer.children()
            assert isinstance(attention, PerceiverAttention)
            looks = attention.weights(features, latents)
            held = (held + looks[..., :count] + looks[..., count:] @ held) / 2
            latents = latents + attention(features, latents)
            latents = latents + mlp(latents)
        return held / held.sum(-1, keepdim=True).clamp_min(1e-12)


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
