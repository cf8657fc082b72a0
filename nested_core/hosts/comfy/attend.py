"""The host's attention, for what we compute beside that of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.ldm.modules.attention as host_attention
from comfy.cli_args import args
from torch import Tensor

from ...attention import Attend


def as_the_host(options: Mapping[str, Any], beside: bool = False) -> Attend:
    """Attention in the backend, with the precision and the overrides that a layer with these extra_options has.

    beside: for what is not the layer's own. Unless it is told otherwise, the host cuts attention on a CPU in parts, to
    save memory; beside it, PyTorch's own is taken there, in half the time.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        attention = host_attention.optimized_attention
        if mask is not None:  # not every backend takes one: the host has another for those
            attention = host_attention.optimized_attention_masked
        by_default = attention is host_attention.attention_sub_quad and not args.use_quad_cross_attention
        if beside and by_default and q.device.type == "cpu":
            attention = host_attention.attention_pytorch
        precision = options.get("attn_precision")
        return attention(q, k, v, heads, mask, attn_precision=precision, transformer_options=options)

    return attend
