"""A real ComfyUI in this process: COMFYUI_PATH names it (`python scripts/test.py` gets one and sets that).

Models are the real classes with seeded random weights: a U-Net of 128 channels with every layer of SDXL or SD 1.5,
text encoders and vision towers of few layers behind the real tokenizers. The pack is loaded as the host loads it, as a
custom node.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

REPO = Path(__file__).resolve().parents[2]
HOST = Path(os.environ["COMFYUI_PATH"]).resolve()


def _import_host(base: Path) -> None:
    # The host goes first: the repository's own `nodes` package must not hide the host's module of that name.
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != REPO]
    sys.path.insert(0, str(HOST))
    sys.path += [str(REPO / "scripts"), str(REPO / "demo"), str(REPO)]
    from comfy.cli_args import args

    args.base_directory = str(base)
    # As in the host's main.py: before `nodes`, which puts the folder of another `utils` in front.
    import torch
    import utils.extra_config  # noqa: F401

    args.cpu = not torch.cuda.is_available()
    for folder in ("custom_nodes", "models", "input", "output", "temp"):
        (base / folder).mkdir(parents=True, exist_ok=True)


def pytest_configure(config: pytest.Config) -> None:
    import tempfile

    _import_host(Path(tempfile.mkdtemp(prefix="nested-attention-host-")))


@pytest.fixture(autouse=True)
def _as_the_host_executes_nodes():
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def pack() -> SimpleNamespace:
    """The loaded pack: `nodes` (node id -> class), and the modules of its nested_core."""
    import nodes as host_nodes

    asyncio.run(host_nodes.init_builtin_extra_nodes())
    before = set(sys.modules)
    assert asyncio.run(host_nodes.load_custom_node(str(REPO))), "the host did not load the pack: see the log above"
    (name,) = {m.removesuffix(".nested_core") for m in set(sys.modules) - before if m.endswith(".nested_core")}

    def module(path: str) -> ModuleType:
        return sys.modules[f"{name}.{path}"]

    return SimpleNamespace(
        nodes={k: v for k, v in host_nodes.NODE_CLASS_MAPPINGS.items() if k.startswith("Nested")},
        host_nodes=host_nodes.NODE_CLASS_MAPPINGS,
        comfy=module("nested_core.hosts.comfy"),
        prompt=module("nested_core.hosts.comfy_prompt"),
        attention=module("nested_core.attention"),
        encoder=module("nested_core.encoder"),
        subject=module("nested_core.subject"),
        layers=module("nested_core.layers"),
        checkpoint=module("nested_core.checkpoint"),
        errors=module("nested_core.errors"),
        folders=module("nodes.folders"),
    )


CHANNELS = 128


def _model(family: str, weights=None, compute=None):
    """The host's model of a family at 128 channels on every level: all layers at their addresses, quick on a CPU.

    weights, compute: types of the weights (fp32) and of the arithmetic (the same).
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    import random_models

    kind = {"sdxl": comfy.supported_models.SDXL, "sd15": comfy.supported_models.SD15}[family]
    config = kind({**random_models.unet_config(family), "model_channels": CHANNELS})
    config.set_inference_dtype(weights or torch.float32, compute)
    model = config.get_model({}, device=torch.device("cpu"))
    model.diffusion_model.load_state_dict(random_models.randomise(model.diffusion_model.state_dict()))
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu"))


_SMALL = {"num_hidden_layers": 3, "intermediate_size": 256}


def _clip(clip: type, tokenizer: type):
    import comfy.sd
    import torch

    import random_models

    target = SimpleNamespace(clip=clip, tokenizer=tokenizer, params={})
    options = {"clip_l_model_config": _SMALL, "clip_g_model_config": _SMALL, "dtype": torch.float32}
    made = comfy.sd.CLIP(target, model_options=options)
    weights = random_models.randomise(made.cond_stage_model.state_dict())
    made.cond_stage_model.load_state_dict(weights)
    return made


@pytest.fixture(scope="session")
def clip_vision(tmp_path_factory):
    """CLIP_VISION of the kind of ViT-H (hidden 1280) with three layers."""
    import comfy.clip_vision

    import random_models

    config = {
        "hidden_size": 1280,
        "image_size": 224,
        "intermediate_size": 256,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 3,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
        "model_type": "clip_vision_model",
        "layer_norm_eps": 1e-5,
    }
    file = tmp_path_factory.mktemp("clip_vision") / "config.json"
    file.write_text(json.dumps(config))
    tower = comfy.clip_vision.ClipVisionModel(str(file))
    tower.load_sd(random_models.randomise(tower.model.state_dict(), dtype=tower.dtype))
    return tower


def _encoder(pack, family: str, seed: int = 0):
    """NESTED_ENCODER for the U-Net of a family: 8 tokens per view."""
    import comfy.model_patcher
    import torch

    import random_models

    layers = {"sdxl": pack.layers.SDXL, "sd15": pack.layers.SD15}[family]
    config = pack.encoder.EncoderConfig(
        family=family,
        base_model="random",
        tokens=8,
        token_dim=layers.context_dim,
        feature_dim=1280,
        fingerprint=f"test-{family}-{seed}",
        title=f"test encoder {family} {seed}",
        widths=(CHANNELS,) * len(layers.layers()),
        resampler=pack.encoder.ResamplerShape(dim=64, depth=1, heads=1, dim_head=64, ff_mult=2),
    )
    import comfy.ops

    module = pack.encoder.NestedEncoder.from_config(config, operations=comfy.ops.manual_cast, dtype=torch.float32)
    module.load_state_dict(random_models.randomise(module.state_dict(), seed))
    module = module.eval().requires_grad_(False)
    device = torch.device("cpu")
    return pack.comfy.HostEncoder(comfy.model_patcher.ModelPatcher(module, device, device), config, f"{family}.test")


@pytest.fixture(scope="session")
def photo():
    """IMAGE (1, 512, 512, 3): the astronaut."""
    import skimage.data
    import torch

    return torch.from_numpy(skimage.data.astronaut()).float()[None] / 255


class Studio:
    """A base model of one family with what a graph around it has: text encoder, nested encoder, nodes, sampler."""

    def __init__(self, pack, family, clip_class, tokenizer, clip_vision, photo):
        self.pack, self.family, self.clip_vision, self.photo = pack, family, clip_vision, photo
        self.model, self.clip = _model(family), _clip(clip_class, tokenizer)
        self.encoder = self.make_encoder()

    def make_model(self, weights, compute=None):
        """Another MODEL of the family, in other types."""
        return _model(self.family, weights, compute)

    def make_encoder(self, seed=0):
        return _encoder(self.pack, self.family, seed)

    def subject(self, placeholder="<person>", class_word="person", view=0, encoder=None):
        """NESTED_SUBJECT from Encode Subject; another `view` is another picture."""
        node = self.pack.nodes["NestedEncodeSubject"]
        image = self.photo.roll(view * 40, 2)
        return node.execute(encoder or self.encoder, self.clip_vision, image, placeholder, class_word, "crop")[0]

    def diffusers_unet(self):
        """diffusers' U-Net with the weights of this model."""
        import comfy.utils
        from diffusers import UNet2DConditionModel

        sdxl = self.family == "sdxl"
        cross, plain = "CrossAttn{}Block2D", "{}Block2D"
        kinds = [plain, cross, cross] if sdxl else [cross, cross, cross, plain]
        config = self.model.model.model_config.unet_config
        options = (
            dict(
                transformer_layers_per_block=[1, 2, 10],
                attention_head_dim=CHANNELS // 64,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            )
            if sdxl
            else dict(attention_head_dim=8)
        )
        unet = UNet2DConditionModel(
            block_out_channels=(CHANNELS,) * len(kinds),
            down_block_types=[k.format("Down") for k in kinds],
            up_block_types=[k.format("Up") for k in reversed(kinds)],
            cross_attention_dim=config["context_dim"],
            **options,
        )
        theirs, ours = self.model.model.diffusion_model.state_dict(), unet.state_dict()
        names = comfy.utils.unet_to_diffusers(config)  # names more layers than this U-Net has
        unet.load_state_dict({new: theirs[old] for new, old in names.items() if new in ours})
        return unet.eval()

    def apply(self, subject=None, model=None, clip=None, **inputs):
        """(model, clip) after Apply Subject; its inputs have their defaults unless given."""
        return self._apply("NestedApplySubject", subject, model, clip, inputs)

    def apply_advanced(self, subject=None, model=None, clip=None, **inputs):
        return self._apply("NestedApplySubjectAdvanced", subject, model, clip, inputs)

    def _apply(self, node_id, subject, model, clip, inputs):
        node = self.pack.nodes[node_id]
        defaults = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}
        model, clip, subject = model or self.model, clip or self.clip, subject or self.subject()
        return node.execute(model, clip, subject, **{**defaults, **inputs}).result

    def encode(self, clip, text):
        """CONDITIONING of the stock CLIP Text Encode."""
        return self.pack.host_nodes["CLIPTextEncode"]().encode(clip, text)[0]

    def sample(self, model, positive, negative, steps=1, cfg=4.0, size=(16, 16), batch=1, seed=3):
        """Latent of the stock sampler, (batch, 4, *size)."""
        import comfy.sample
        import torch

        latent = torch.zeros(batch, 4, *size)
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", positive, negative, latent, disable_pbar=True, seed=seed
        )


@pytest.fixture(scope="session")
def sdxl(pack, clip_vision, photo):
    import comfy.sdxl_clip

    return Studio(pack, "sdxl", comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer, clip_vision, photo)


@pytest.fixture(scope="session")
def sd15(pack, clip_vision, photo):
    import comfy.sd1_clip

    return Studio(pack, "sd15", comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer, clip_vision, photo)


@pytest.fixture
def fired(pack, monkeypatch):
    """One entry per layer call in which subjects act: q's and k's shape, the terms, and what they added."""
    calls = []
    original = pack.comfy.nested_delta

    def spy(q, k, v, heads, terms, attend, into, one_hot):
        delta = original(q, k, v, heads, terms, attend, one_hot=one_hot)
        calls.append(SimpleNamespace(q=q.shape, k=k.shape, terms=terms, delta=delta))
        return original(q, k, v, heads, terms, attend, into, one_hot)

    monkeypatch.setattr(pack.comfy, "nested_delta", spy)
    return calls
