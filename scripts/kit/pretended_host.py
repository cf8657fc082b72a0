"""ComfyUI on a GPU that is not there: models at full size, and what a step of sampling does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import torch
from torch import Tensor

from . import random_models
from .pretend import Counts, PretendedGpu
from .studio import VIT_H

GPU = torch.device("cuda", 0)
_FAMILIES: dict[str, Any] = {
    "sdxl": (comfy.supported_models.SDXL, [1, 2, 4]),
    "sd15": (comfy.supported_models.SD15, [1, 2, 4, 4]),
}


class _TwoSteps(comfy.samplers.Sampler):
    """A sampler that calls the model at two noise levels and reads nothing. What each call did is in `calls`."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu, self.calls = gpu, list[Counts]()

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *_: Any) -> Tensor:
        x = noise
        for i in range(2):
            sigma = sigmas[i] * x.new_ones(len(x))
            with self.gpu.counted() as counts:
                x = model_wrap(x, sigma, model_options=extra_args["model_options"])
            self.calls.append(counts)
        return x


class PretendedHost:
    """A model of a family at its published size, and an encoder for it, on the pretended GPU."""

    def __init__(self, pack: SimpleNamespace, gpu: PretendedGpu, family: str, dtype: torch.dtype) -> None:
        self.pack, self.gpu, self.family, self.dtype = pack, gpu, family, dtype
        kind, widths = _FAMILIES[family]
        config: Any = kind({**random_models.unet_config(family), "channel_mult": widths})
        config.set_inference_dtype(dtype, None)
        self.model = comfy.model_patcher.ModelPatcher(config.get_model({}, device=GPU), GPU, torch.device("cpu"))
        self.encoder = self._encoder()

    def _encoder(self) -> Any:
        encoder, layers = self.pack.encoder, self.pack.layers
        config = encoder.EncoderConfig(
            family=self.family, base_model="random", tokens=16, token_dim=layers.family_of(self.family).context_dim,
            feature_dim=VIT_H["hidden_size"], fingerprint="pretended", title="pretended",
            widths=tuple(layer.width for layer in self.pack.unet.unet_layers_of(self.model)[1]),
            resampler=encoder.ResamplerShape(dim=64, depth=1, heads=1, dim_head=64, ff_mult=2),
        )  # fmt: skip
        module = encoder.NestedEncoder(config, operations=comfy.ops.manual_cast, dtype=torch.float32)
        return self.pack.values.HostEncoder(
            comfy.model_patcher.ModelPatcher(module.to(GPU).eval(), GPU, torch.device("cpu")), config, "pretended"
        )

    def subject(self, tokens: int, placeholder: str = "<person>", class_word: str = "person") -> Any:
        """NESTED_SUBJECT of so many tokens."""
        x = torch.randn(1, tokens, self.encoder.config.token_dim)
        return self.pack.values.HostSubject(
            self.encoder, self.pack.subject.Subject(x, placeholder, class_word, "pretended", "pretended", self.family)
        )

    def sample(
        self, model: Any, positive: Any, negative: Any, size: tuple[int, int] = (1024, 1024), cfg: float = 7.0,
        pictures: int = 1,
    ) -> list[Counts]:  # fmt: skip
        """What the second of two steps did, and the first before it. size: width and height of the pictures."""
        guider, sampler = comfy.samplers.CFGGuider(model), _TwoSteps(self.gpu)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        noise = torch.randn(pictures, 4, size[1] // 8, size[0] // 8)
        with _as_on_a_gpu():
            guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor([14.6, 7.0, 0.0]))
        return sampler.calls


def _much(device: Any = None, torch_free_too: bool = False) -> Any:
    """The host's `get_free_memory`: bytes, or those and how many of them PyTorch holds."""
    return (2**40, 0) if torch_free_too else 2**40


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Everything is on the GPU already, which has room for everything; attention is what the host has for CUDA."""
    with (
        mock.patch.object(attention, "optimized_attention", attention.attention_pytorch),
        mock.patch.object(attention, "optimized_attention_masked", attention.attention_pytorch),
        mock.patch.object(comfy.model_management, "load_models_gpu", lambda *_, **__: None),
        mock.patch.object(comfy.model_management, "get_free_memory", _much),
        mock.patch.object(torch.cuda, "current_device", lambda: GPU.index),
        mock.patch.object(torch.cuda, "set_device", lambda _: None),
    ):
        yield
