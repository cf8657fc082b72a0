"""What a subject would cost on a GPU, counted without one: kernels, arithmetic, memory traffic, memory.

The counts are exact for the operations that PyTorch is asked for; how long a GPU takes for them is not known from here.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import skimage.data
import torch
from torch import Tensor

from . import studio
from .cost import NAMES, PROMPT, WORDS, Rows, literal
from .environment import say
from .pretend import Counts, PretendedGpu
from .pretended_host import GPU, PretendedHost

TITLES = {"sdxl": "SDXL", "sd15": "SD 1.5"}
SIZES = {"sdxl": (1024, 1024), "sd15": (512, 512)}
HEAD = ["condition", "kernels", "a layer and subject, beside attention", "TFLOP", "x plain", "GB read and written",
        "x plain", "peak above plain", "more waits"]  # fmt: skip


@torch.inference_mode()
def measure(version: str) -> dict[str, Any]:
    """All tables, as titles and rows of text."""
    pack = studio.load_pack()
    photo = torch.from_numpy(skimage.data.astronaut()).float()[None] / 255
    tower = studio.make_clip_vision(num_hidden_layers=2, intermediate_size=256)
    tables = [_layer_table(pack)]
    for family in ("sdxl", "sd15"):
        texts = studio.Studio(pack, family, tower, photo)
        for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
            with PretendedGpu() as gpu:
                tables.append(_table(texts, PretendedHost(pack, gpu, family, dtype), name))
    machine = f"Counted on a GPU that is not there, PyTorch {torch.__version__}, ComfyUI {version}"
    return {"machine": machine, "device": "counted", "tables": tables}


def _table(texts: Any, host: PretendedHost, name: str) -> dict[str, Any]:
    size, layers = SIZES[host.family], len(host.encoder.config.widths)

    def step(subjects: int, tokens: int, triton: bool) -> Counts:
        model, clip = host.model, texts.clip
        for i in range(subjects):
            model, clip = texts.apply(host.subject(tokens, NAMES[i], WORDS[i]), model, clip)
        with patch.object(texts.pack.kernels, "chosen", lambda: triton):
            return host.sample(model, texts.encode(clip, PROMPT), texts.encode(clip, ""), size)[-1]

    plain, rows = step(0, 0, False), Rows()
    for title, subjects, tokens, triton in (
        ("plain", 0, 0, False), ("1 subject, 16 tokens", 1, 16, False), ("1 subject, 256 tokens", 1, 256, False),
        ("1 subject, 1024 tokens", 1, 1024, False), ("2 subjects, 1024 tokens each", 2, 1024, False),
        ("4 subjects, 1024 tokens each", 4, 1024, False),
        ("1 subject, 1024 tokens, Triton's kernel", 1, 1024, True),
        ("4 subjects, 1024 tokens each, Triton's kernel", 4, 1024, True),
    ):  # fmt: skip
        counts = step(subjects, tokens, triton) if subjects else plain
        more = counts.named() - plain.named()
        more.pop("scaled_dot_product_attention", None)
        rows.append(
            [
                title,
                str(len(counts.kernels)),
                f"{sum(more.values()) / (layers * subjects):.1f}" if subjects else "",
                f"{counts.flops / 1e12:.2f}",
                f"{counts.flops / plain.flops:.3f}",
                f"{counts.moved / 1e9:.1f}",
                f"{counts.moved / plain.moved:.3f}",
                f"{(counts.peak - plain.peak) / 2**20:.1f} MiB",
                str(len(counts.waits) - len(plain.waits)),
            ]
        )
        say(" | ".join(rows[-1]))
    title = f"A step of {TITLES[host.family]} at its full size, {name}, CFG, {size[0]} x {size[1]}"
    return {"title": title, "head": HEAD, "rows": rows}


def _layer_table(pack: Any) -> dict[str, Any]:
    """One cross-attention layer by itself: plain, fused and literal."""
    core, rows = pack.attention, Rows()
    for queries, channels in ((1024, 1280), (4096, 640)):
        heads = channels // 64
        with PretendedGpu() as gpu:

            def rand(tokens: int) -> Tensor:
                return torch.randn(1, tokens, channels, device=GPU, dtype=torch.float16)  # noqa: B023

            q, k, v, place = rand(queries), rand(77), rand(77), torch.tensor([5], device=GPU)
            term = core.NestedTerm(rand(1024), rand(1024), place)
            one_hot = core.one_hot_values(place, 77, heads, 64, torch.float16)[None]
            with gpu.counted() as plain:
                out = core.scaled_dot_product(q, k, v, heads)
            with gpu.counted() as fused:
                prob = core.outer_probabilities(q, k, heads, place, one_hot)
                core.nested_delta(q, k, v, heads, [term], into=out, prob=prob)
            with gpu.counted(waiting=True) as written:
                literal(q, k, v, heads, [term])
        for title, counts in (("plain", plain), ("what a subject adds, fused", fused), ("literal", written)):
            rows.append(
                [
                    f"{queries} queries, {channels} channels: {title}",
                    str(len(counts.kernels)),
                    f"{counts.flops / 1e9:.2f}",
                    f"{counts.moved / 2**20:.0f} MiB",
                    f"{counts.peak / 2**20:.1f} MiB",
                ]  # fmt: skip
            )
            say(" | ".join(rows[-1]))
    head = ["one row of the batch, fp16, 1024 tokens", "kernels", "GFLOP", "read and written", "peak"]
    return {"title": "One cross-attention layer of SDXL at 1024 x 1024", "head": head, "rows": rows}
