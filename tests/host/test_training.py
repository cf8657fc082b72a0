"""An encoder trained on diffusers opens in Load Nested Encoder, and the nodes predict what training predicts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import comfy.sd1_clip
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from diffusers import AutoencoderTiny, DDPMScheduler, StableDiffusionXLPipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from kit.twin import diffusers_unet
from nested_core.checkpoint import load_encoder
from nested_core.training import (
    BaseModel,
    EncoderSettings,
    Example,
    ExampleSubject,
    LossConfig,
    OptimiserConfig,
    TrainingConfig,
    VisionTower,
    train,
)
from nested_core.training.examples import Collate, Draws
from nested_core.training.frozen import FrozenEncoders
from nested_core.training.model import SubjectDenoiser

PROMPT = "a photo of <rex> in the garden, next to <anna>"
HEIGHT, WIDTH = 128, 192


def tokenizer(pad):
    folder = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


def base_of(studio):
    """The host's model, text encoders and vision tower as a `BaseModel` of diffusers and transformers."""

    def text(kind, theirs, width, act):
        made = kind(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=width, intermediate_size=256, projection_dim=width, hidden_act=act,
                num_hidden_layers=3, num_attention_heads=width // 64, bos_token_id=49406, eos_token_id=49407,
            )
        )  # fmt: skip
        theirs = theirs.transformer.state_dict()
        made.load_state_dict({name: theirs[_named_as(name, theirs)] for name in made.state_dict()})
        return made

    clip = studio.clip.cond_stage_model
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline = StableDiffusionXLPipeline(
        AutoencoderTiny(), text(CLIPTextModel, clip.clip_l, 768, "quick_gelu"),
        text(CLIPTextModelWithProjection, clip.clip_g, 1280, "gelu"), tokenizer("<|endoftext|>"), tokenizer("!"),
        diffusers_unet(studio), scheduler,
    )  # fmt: skip
    tower = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=1280, image_size=224, intermediate_size=256, num_attention_heads=16, num_hidden_layers=2,
            patch_size=14, projection_dim=1024, hidden_act="gelu",
        )
    )  # fmt: skip
    theirs = {name: tensor.float() for name, tensor in studio.clip_vision.model.state_dict().items()}
    tower.load_state_dict({name: theirs[_named_as(name, theirs)] for name in tower.state_dict()})
    return BaseModel(pipeline, VisionTower(tower), "the host's narrow SDXL")


def _named_as(name, theirs):
    """The host's name of a weight: newer transformers leave out the prefix of a model that stands alone."""
    return next(n for n in (name, f"text_model.{name}", f"vision_model.{name}") if n in theirs)


@pytest.fixture(scope="module")
def trained(pack, sdxl, tmp_path_factory):
    """Two steps of training on the host's own weights: file name, base model, the example that was trained on."""
    with torch.inference_mode(False), torch.enable_grad():
        base = base_of(sdxl)
        views = [sdxl.photo.clone()[0], sdxl.photo.clone().roll(40, 2)[0]]
        subjects = [
            ExampleSubject("<rex>", "golden retriever", [views[0]]),
            ExampleSubject("<anna>", "woman", [views[1]]),
        ]
        latents = torch.randn(4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))
        example = Example(torch.zeros(HEIGHT, WIDTH, 3), PROMPT, subjects, latents=latents)
        config = TrainingConfig(
            output=str(tmp_path_factory.mktemp("run")), steps=2, batch_size=1, precision="fp32", cpu=True, workers=0,
            tracker="none", optimiser=OptimiserConfig(1e-2, 1e-2, warmup=0),
            encoder=EncoderSettings(tokens=8, dim=64, depth=1, heads=1, ff_mult=2, alpha=3.0),
        )  # fmt: skip
        path = train(config, base, [example])
    models = folder_paths.get_folder_paths("nested_attention")[0]
    os.makedirs(models, exist_ok=True)
    os.replace(path, os.path.join(models, "trained.safetensors"))
    return SimpleNamespace(name="trained.safetensors", base=base, example=example, models=models)


def test_what_training_exports_opens_and_agrees(pack, sdxl, trained):
    loader = pack.nodes["NestedEncoderLoader"]
    assert loader.validate_inputs(encoder_name=trained.name) is True
    encoder = loader.execute(trained.name)[0]
    assert (encoder.config.alpha, encoder.config.base_model) == (3.0, "the host's narrow SDXL")

    model, clip = sdxl.apply(sdxl.subject("<rex>", "golden retriever", encoder=encoder))
    model, clip = sdxl.apply(sdxl.subject("<anna>", "woman", view=1, encoder=encoder), model, clip)
    calls = []

    def watch(executor, x, timesteps, context, y, *args, **kwargs):
        out = executor(x, timesteps, context, y, *args, **kwargs)
        calls.append((x, timesteps, kwargs.get("transformer_options") or args[-1], out))
        return out

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", watch)
    size = (HEIGHT // 8, WIDTH // 8)
    sdxl.sample(model, sdxl.encode(clip, PROMPT), sdxl.encode(clip, "blurry"), size=size)
    ((x, timesteps, options, out),) = calls
    row = options["cond_or_uncond"].index(0)

    base = trained.base
    denoiser = SubjectDenoiser(load_encoder(os.path.join(trained.models, trained.name)), base.unet)
    batch = Collate(base.tokenizers)([Draws([trained.example], 0, LossConfig(drop_text=0), base.vision.image_size)[0]])
    conditions = FrozenEncoders(base, torch.device("cpu"), torch.float32, "penultimate").conditions(batch)
    x, timesteps, expected = (t[row : row + 1].cpu() for t in (x, timesteps, out))
    with denoiser.attached():
        got = denoiser(x, timesteps, conditions)
    assert (got - expected).norm() / expected.norm() < 1e-4
    plain = base.unet(x, timesteps, encoder_hidden_states=conditions.text, added_cond_kwargs=conditions.added).sample
    assert (plain - expected).norm() / expected.norm() > 1e-3
