"""What nested attention is compared with: the same subject by decoupled cross-attention, as IP-Adapter has it.

    out = Attn(q, K, V) + w · α · Attn(q, K̈, V̈)

with the encoder's α, in every cross-attention layer, for the rows of the positive prompt. No word of the prompt is
the subject's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
from comfy_api.v0_0_2 import io
from torch import Tensor

Block = tuple[str, int, int]


def _cross_attention(unet: Any) -> Iterator[tuple[Block, int]]:
    """Address and width of each cross-attention layer, in the order in which encoders number them: down, up, middle."""
    for kind, blocks in (
        ("input", unet.input_blocks),
        ("output", unet.output_blocks),
        ("middle", [unet.middle_block]),
    ):
        for number, block in enumerate(blocks):
            for module in block:
                for i, transformer in enumerate(getattr(module, "transformer_blocks", ())):
                    yield (kind, number, i), transformer.attn2.to_q.out_features


class _Decoupled:
    """attn2 replacement of one layer. key, value: (1, N, C)."""

    def __init__(self, key: Tensor, value: Tensor, strength: float, previous: Callable[..., Tensor] | None) -> None:
        self.key, self.value, self.strength, self.previous = key, value, strength, previous

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return host_attention.optimized_attention(
                q,
                k,
                v,
                extra_options["n_heads"],
                attn_precision=extra_options.get("attn_precision"),
                transformer_options=extra_options,
            )

        out = self.previous(q, k, v, extra_options) if self.previous else attend(q, k, v)
        chunks = extra_options["cond_or_uncond"]
        rows = len(q) // len(chunks)
        added = out.clone()
        for i, kind in enumerate(chunks):
            if kind == 0:
                at = slice(i * rows, (i + 1) * rows)
                key, value = (t.to(q).expand(rows, -1, -1) for t in (self.key, self.value))
                added[at] += self.strength * attend(q[at], key, value)
        return added


class DecoupledSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DecoupledSubject",
            display_name="Decoupled Subject (baseline)",
            category="Nested Attention/Small World",
            description=(
                "For comparison: shows the model a subject as IP-Adapter does, beside the prompt and not inside it. "
                "Chain one per subject for several."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From the checkpoint, or another Decoupled Subject."),
                io.Custom("NESTED_SUBJECT").Input("subject", tooltip="From Encode Subject."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Factor on what the subject adds. 0 is the untouched model.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For the sampler.")],
        )

    @classmethod
    def execute(cls, model: Any, subject: Any, strength: float) -> io.NodeOutput:
        """Raises ValueError when the subject's encoder is for another model, or its views have weights."""
        layers = list(_cross_attention(model.model.diffusion_model))
        encoder, tokens = subject.encoder, subject.subject.tokens
        if encoder.config.widths != tuple(width for _, width in layers):
            raise ValueError(f"The encoder {encoder.name} is for another model than this one.")
        if subject.subject.token_weights is not None:
            raise ValueError("This baseline knows no weights of views: merge the subject with equal weights.")
        model = model.clone()
        if strength == 0:
            return io.NodeOutput(model)
        comfy.model_management.load_models_gpu([encoder.patcher])
        tokens = tokens.to(encoder.patcher.load_device, next(encoder.module.parameters()).dtype)
        there = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        for i, (block, _) in enumerate(layers):
            key, value = encoder.module.keys_values(tokens, i)
            previous = there.get(block) or there.get(block[:2])  # the host takes either address
            model.set_model_attn2_replace(_Decoupled(key, value, strength * encoder.config.alpha, previous), *block)
        return io.NodeOutput(model)
