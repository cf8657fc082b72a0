"""A ComfyUI in this process (inside.py), with models of random weights: for the host tests and the benchmark.

Models are ComfyUI's own classes: U-Nets with every layer of SDXL or SD 1.5, by default 128 channels wide, text encoders
of few layers behind the real tokenizers, the vision tower of ViT-H's kind. The pack is loaded as ComfyUI loads it.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import torch

from . import random_models
from .paths import REPO

#: ComfyUI's module of that name, which stands in front of this repository's package.
host_nodes: Any = importlib.import_module("nodes")
CHANNELS = 128
_SMALL_TEXT = {"num_hidden_layers": 3, "intermediate_size": 256}
#: `comfy.clip_vision`'s description of ViT-H/14
VIT_H = {
    "hidden_size": 1280,
    "image_size": 224,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
    "model_type": "clip_vision_model",
    "layer_norm_eps": 1e-5,
}


_MODULES = [
    *(f"nested_core.hosts.comfy.{name}" for name in (
        "layer", "apart", "attend", "store", "unet", "values", "apply", "run", "text", "prompt", "recording", "check")),
    *(f"nested_core.{name}" for name in ("attention", "encoder", "subject", "layers", "checkpoint", "errors")),
    "nested_core.kernels",
    "nodes.folders",
]  # fmt: skip


def load_pack() -> SimpleNamespace:
    """The loaded pack: `nodes` (node id -> class), the host's nodes, and the modules of its nested_core."""
    asyncio.run(host_nodes.init_builtin_extra_nodes())
    before = set(sys.modules)
    assert asyncio.run(host_nodes.load_custom_node(str(REPO))), "the host did not load the pack: see the log above"
    (name,) = {m.removesuffix(".nested_core") for m in set(sys.modules) - before if m.endswith(".nested_core")}

    return SimpleNamespace(
        nodes={k: v for k, v in host_nodes.NODE_CLASS_MAPPINGS.items() if k.startswith("Nested")},
        host_nodes=host_nodes.NODE_CLASS_MAPPINGS,
        **{path.rpartition(".")[2]: sys.modules[f"{name}.{path}"] for path in _MODULES},
    )


def run_node(cls: Any, where_known: dict[str, Any] | None = None, **inputs: Any) -> tuple[Any, ...]:
    """The outputs of a node of the host's or ours, what is not given at its default.

    where_known: inputs that older hosts do not have.
    """
    types = cls.INPUT_TYPES()
    defaults = {}
    for name, (kind, *options) in {**types.get("required", {}), **types.get("optional", {})}.items():
        options = options[0] if options else {}
        if "default" in options:
            defaults[name] = options["default"]
        elif choices := kind if isinstance(kind, list) else options.get("options"):
            defaults[name] = choices[0]
    method = getattr(cls, "execute", None) or getattr(cls(), cls.FUNCTION)
    taken = inspect.signature(method).parameters
    known = {k: v for k, v in {**defaults, **(where_known or {})}.items() if k in taken}
    result = method(**{**known, **inputs})
    return getattr(result, "result", result)


def make_model(
    family: str,
    channels: int = CHANNELS,
    weights: torch.dtype | None = None,
    compute: torch.dtype | None = None,
    tapered: bool = False,
) -> Any:
    """MODEL of a family, `channels` wide on every level: all layers at their addresses.

    tapered: wider towards the middle, as the published models, which begin with 320.
    weights, compute: types of the weights (fp32 unless told) and of the arithmetic (the same unless told).
    """

    kind = {"sdxl": comfy.supported_models.SDXL, "sd15": comfy.supported_models.SD15}[family]
    shape = random_models.unet_config(family)
    shape["model_channels"] = channels
    if tapered:
        shape["channel_mult"] = {"sdxl": [1, 2, 4], "sd15": [1, 2, 4, 4]}[family]
    config: Any = kind(shape)
    config.set_inference_dtype(weights or torch.float32, compute)
    model = config.get_model({}, device=torch.device("cpu"))
    model.diffusion_model.load_state_dict(random_models.randomise(model.diffusion_model.state_dict()))
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu"))


def make_clip(family: str) -> Any:
    """CLIP of a family: the real tokenizer, and text encoders of three layers."""

    clip, tokenizer = {
        "sdxl": (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
        "sd15": (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer),
    }[family]
    target = SimpleNamespace(clip=clip, tokenizer=tokenizer, params={})
    options = {"clip_l_model_config": _SMALL_TEXT, "clip_g_model_config": _SMALL_TEXT, "dtype": torch.float32}
    made = comfy.sd.CLIP(target, model_options=options)
    made.cond_stage_model.load_state_dict(random_models.randomise(made.cond_stage_model.state_dict()))
    return made


def make_clip_vision(**changes: Any) -> Any:
    """CLIP_VISION: ViT-H/14, with changes to its sizes."""

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({**VIT_H, **changes}), "utf-8")
        tower = comfy.clip_vision.ClipVisionModel(str(file))
    tower.load_sd(random_models.randomise(tower.model.state_dict(), dtype=tower.dtype))
    return tower


def make_encoder(
    pack: SimpleNamespace,
    family: str,
    widths: tuple[int, ...],
    seed: int = 0,
    tokens: int = 8,
    resampler: dict[str, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """NESTED_ENCODER for layers of these widths. resampler: sizes of the Q-Former; small unless told."""

    config = pack.encoder.EncoderConfig(
        family=family,
        base_model="random",
        tokens=tokens,
        token_dim=pack.layers.family_of(family).context_dim,
        feature_dim=VIT_H["hidden_size"],
        fingerprint=f"random-{family}-{tokens}-{seed}",
        title=f"random encoder {family} {tokens} {seed}",
        widths=widths,
        resampler=pack.encoder.ResamplerShape(
            **(resampler or {"dim": 64, "depth": 1, "heads": 1, "dim_head": 64, "ff_mult": 2})
        ),
    )
    dtype = dtype or torch.float32
    module = pack.encoder.NestedEncoder(config, operations=comfy.ops.manual_cast, dtype=dtype)
    module.load_state_dict(random_models.randomise(module.state_dict(), seed, dtype))
    module = module.eval().requires_grad_(False)
    patcher = comfy.model_patcher.CoreModelPatcher(
        module, comfy.model_management.get_torch_device(), torch.device("cpu")
    )
    return pack.values.HostEncoder(patcher, config, f"{family}.test")


def _as_a_graph(method: Callable[..., Any]) -> Callable[..., Any]:
    """As the host executes nodes: without gradients, also where a fixture calls it."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:

        with torch.inference_mode():
            return method(*args, **kwargs)

    return run


class Studio:
    """A base model of one family with what a graph around it has: text encoder, nested encoder, nodes, sampler."""

    def __init__(
        self,
        pack: SimpleNamespace,
        family: str,
        clip_vision: Any,
        photo: torch.Tensor,
        channels: int = CHANNELS,
        weights: torch.dtype | None = None,
        tapered: bool = False,
    ) -> None:
        self.pack, self.family, self.clip_vision, self.photo = pack, family, clip_vision, photo
        self.channels, self.tapered = channels, tapered
        self.model, self.clip = make_model(family, channels, weights, tapered=tapered), make_clip(family)
        self.widths = tuple(layer.width for layer in pack.unet.unet_layers_of(self.model)[1])
        self.encoder = self.make_encoder()
        self._subjects: dict[tuple[str, str, int], Any] = {}

    def make_model(self, weights: torch.dtype | None = None, compute: torch.dtype | None = None) -> Any:
        """Another MODEL of the family, in other types."""
        return make_model(self.family, self.channels, weights, compute, self.tapered)

    def make_encoder(self, seed: int = 0, tokens: int = 8, **options: Any) -> Any:
        return make_encoder(self.pack, self.family, self.widths, seed, tokens, **options)

    @_as_a_graph
    def subject(
        self, placeholder: str = "<person>", class_word: str = "person", view: int = 0, encoder: Any = None
    ) -> Any:
        """NESTED_SUBJECT from Encode Subject; another `view` is another picture.

        One of the studio's own encoder is encoded once, as the host's cache has it: nothing can change it.
        """
        node = self.pack.nodes["NestedEncodeSubject"]
        image = self.photo.roll(view * 40, 2)

        def encoded(by: Any) -> Any:
            return node.execute(by, self.clip_vision, image, placeholder, class_word, "crop")[0]

        if encoder is not None:
            return encoded(encoder)
        asked = (placeholder, class_word, view)
        if asked not in self._subjects:
            self._subjects[asked] = encoded(self.encoder)
        return self._subjects[asked]

    def apply(self, subject: Any = None, model: Any = None, clip: Any = None, **inputs: Any) -> Any:
        """(model, clip) after Apply Subject; its inputs have their defaults unless given."""
        return self._apply("NestedApplySubject", subject, model, clip, inputs)

    def apply_advanced(self, subject: Any = None, model: Any = None, clip: Any = None, **inputs: Any) -> Any:
        return self._apply("NestedApplySubjectAdvanced", subject, model, clip, inputs)

    @_as_a_graph
    def _apply(self, node_id: str, subject: Any, model: Any, clip: Any, inputs: dict[str, Any]) -> Any:
        model, clip, subject = model or self.model, clip or self.clip, subject or self.subject()
        return run_node(self.pack.nodes[node_id], model=model, clip=clip, subject=subject, **inputs)

    @_as_a_graph
    def encode(self, clip: Any, text: str) -> Any:
        """CONDITIONING of the stock CLIP Text Encode."""
        return self.pack.host_nodes["CLIPTextEncode"]().encode(clip, text)[0]

    @_as_a_graph
    def sample(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        steps: int = 1,
        cfg: float = 4.0,
        size: tuple[int, int] = (16, 16),
        batch: int = 1,
        seed: int = 3,
        callback: Any = None,
    ) -> torch.Tensor:
        """Latent of the stock sampler, (batch, 4, *size). callback: called after each step, as the host does."""
        latent = torch.zeros(batch, 4, *size)
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", positive, negative, latent,
            disable_pbar=True, seed=seed, callback=callback,
        )  # fmt: skip
