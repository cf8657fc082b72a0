"""Models with random weights, for trying the nodes and testing them where no real ones can be had.

Everything has the shapes, the names and the file layout of the real thing, and nothing of its sense: a picture made
with these is noise. Weights are N(0, 1/fan_in), biases 0, norms 1, so that activations stay finite and of order 1. Each
tensor has its own seed, made of the seed and its name: the same weights on every ComfyUI version.

The shapes come from ComfyUI's own classes on the meta device: ComfyUI is in this process (inside.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.ops
import comfy.sdxl_clip
import comfy.supported_models
import skimage.data
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from filelock import FileLock
from PIL import Image

from nested_core.checkpoint import write_encoder
from nested_core.encoder import EncoderConfig, NestedEncoder
from nested_core.files import save_tensors, whole
from nested_core.resampler import ResamplerShape

from .environment import say
from .paths import REPO

# Names in the graph: {input of a loader node: file in its models folder}
CHECKPOINT = "random_narrow_sdxl.safetensors"
CLIP_VISION = "random_clip_vit_l14.safetensors"
ENCODER = "random_narrow_nested_encoder.safetensors"
PHOTO = "astronaut.png"


def provide_models(models: Path, pictures: Path) -> dict[str, str]:
    """Makes the models, and the photo, for a server of SDXL's shapes, where they are not there yet.

    Returns the file names by the graph's input: "ckpt_name", "clip_name", "encoder_name" and "image".
    """
    this, core = Path(__file__), sorted((REPO / "nested_core").glob("[!_]*.py"))
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / ".lock"):  # tests of several hosts run side by side
        _provide(models / "checkpoints" / CHECKPOINT, "SDXL with a narrow U-Net, 1.2 billion random weights, 2.4 GB",
                 [this], lambda path: save_tensors(path, checkpoint_state_dict(), None, "model"))  # fmt: skip
        _provide(models / "clip_vision" / CLIP_VISION, "CLIP ViT-L/14, random weights, 0.6 GB",
                 [this], lambda path: save_tensors(path, clip_vision_state_dict(), None, "model"))  # fmt: skip
        _provide(models / "nested_attention" / ENCODER, "nested encoder, 64 tokens, random weights, 0.2 GB",
                 [this, *core], lambda path: write_encoder(path, nested_encoder().to(torch.float16)))  # fmt: skip
    if not (pictures / PHOTO).is_file():
        pictures.mkdir(parents=True, exist_ok=True)
        # Eileen Collins, by NASA, in the public domain.
        with whole(pictures / PHOTO) as part:
            Image.fromarray(skimage.data.astronaut()).save(part, "PNG")
    return {"ckpt_name": CHECKPOINT, "clip_name": CLIP_VISION, "encoder_name": ENCODER, "image": PHOTO}


def _provide(path: Path, what: str, sources: Sequence[Path], write: Callable[[Path], None]) -> None:
    """Makes a file unless it is there as these sources make it."""
    recipe = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    # Not beside the file: a folder of models should list nothing else.
    stamp = path.parents[1] / ".stamps" / path.name
    if path.is_file() and stamp.is_file() and stamp.read_text("utf-8") == recipe:
        return
    say(f"making {path.name}: {what}")
    for folder in (path.parent, stamp.parent):
        folder.mkdir(exist_ok=True)
    write(path)
    stamp.write_text(recipe, "utf-8")


def unet_config(family: str) -> dict[str, Any]:
    """Arguments of ComfyUI's UNetModel for a narrow U-Net: one width, 320, everything else the family's own.

    family  "sdxl": 283 M parameters, 70 cross-attention layers; "sd15": 16 cross-attention layers
    """
    common = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "use_spatial_transformer": True,
        "legacy": False,
    }
    if family == "sdxl":
        return common | {
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 1, 1],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "context_dim": 2048,
            "num_heads": -1,
            "num_head_channels": 64,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        }
    if family == "sd15":
        return common | {
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 1, 1, 1],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "context_dim": 768,
            "num_heads": 8,
            "num_head_channels": -1,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
        }
    raise ValueError(f'family is "sdxl" or "sd15", got "{family}"')


def checkpoint_state_dict() -> dict[str, torch.Tensor]:
    """A whole SDXL checkpoint with a narrow U-Net, fp16: what CheckpointLoaderSimple opens."""
    unet = UNetModel(**unet_config("sdxl"), device="meta", operations=comfy.ops.manual_cast).state_dict()
    texts = comfy.sdxl_clip.SDXLClipModel(device="meta").state_dict()
    shape = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    with torch.device("meta"):
        vae = AutoencoderKL(ddconfig=shape, embed_dim=4)
    # A model config only for the renaming that ComfyUI does when it saves a checkpoint.
    sdxl = comfy.supported_models.SDXL({})
    return {
        **{f"model.diffusion_model.{k}": v for k, v in randomise(unet, dtype=torch.float16).items()},
        **sdxl.process_clip_state_dict_for_saving(randomise(texts, dtype=torch.float16)),
        **{f"first_stage_model.{k}": v for k, v in randomise(vae.state_dict(), dtype=torch.float16).items()},
    }


def clip_vision_state_dict() -> dict[str, torch.Tensor]:
    """A CLIP ViT-L/14 vision tower (224 px, hidden 1024), fp16: what CLIPVisionLoader opens."""
    config = json.loads(Path(comfy.__path__[0], "clip_vision_config_vitl.json").read_text("utf-8"))
    tower = comfy.clip_model.CLIPVisionModelProjection(config, torch.float16, "meta", comfy.ops.manual_cast)
    return randomise(tower.state_dict(), dtype=torch.float16)


def nested_encoder() -> NestedEncoder:
    """A nested encoder for the narrow SDXL: all 70 layers 320 wide, a small resampler; for CLIP ViT-L/14."""
    config = EncoderConfig(
        kind="nested",
        family="sdxl",
        base_model="random narrow SDXL",
        tokens=64,
        token_dim=2048,
        feature_dim=1024,
        licence="none needed: random numbers",
        title="random weights, for trying the nodes: knows no subject",
        widths=(320,) * 70,
        resampler=ResamplerShape(dim=512, depth=2, heads=8, dim_head=64, ff_mult=2),
    )
    encoder = NestedEncoder(config, device="meta")
    encoder.load_state_dict(randomise(encoder.state_dict()), assign=True)
    return encoder.eval().requires_grad_(False)


def randomise(
    shapes: Mapping[str, torch.Tensor], seed: int = 0, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of these shapes and sane scale; float32 unless told. Scalars keep their value.

    Matrices, convolutions and embeddings: N(0, 1/fan_in); vectors: norm weights 1, biases 0, others as embeddings.
    """
    made = {}
    for name, like in shapes.items():
        if like.ndim == 0:
            made[name] = like.clone()  # CLIP's temperature: has its value even on the meta device
        elif name.endswith("bias"):
            made[name] = torch.zeros(like.shape, dtype=dtype)
        elif like.ndim == 1 and name.endswith("weight"):
            made[name] = torch.ones(like.shape, dtype=dtype)
        else:
            learned_tokens = like.ndim == 1 or name.endswith("latents")
            fan_in = like.shape[-1] if learned_tokens else like[0].numel()
            key = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:6], "big"))
            made[name] = (torch.randn(like.shape, generator=generator) * fan_in**-0.5).to(dtype or torch.float32)
    return made
