"""The small world's files in ComfyUI's own loaders and objects, against the modules they were made of.

Weights are random and seeded: what is tested is that both sides compute the same with the same file.
"""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.cli_args
import comfy.clip_vision
import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from demo import drawing, export, models
from demo import world as drawn
from kit import random_models
from kit.studio import host_nodes
from nested_core.checkpoint import load_encoder, write_encoder
from nested_core.encoder import EncoderConfig, NestedEncoder
from nested_core.hosts.diffusers import BoundSubject, cross_attention, nested_attention
from nested_core.resampler import ResamplerShape

REPO = Path(__file__).resolve().parents[2]
DEMO = REPO / "demo"


PROMPT = "a smiling wooden robot waving in the forest, flat drawing"
SCALING = 0.7183
ONE, TWO = "a <bolt> in the forest, comic drawing", "a <bolt> and a <momo> in the snow, flat drawing"
SUBJECTS = [("<bolt>", "robot"), ("<momo>", "creature")]
PLACES = [[2], [5]]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.cpu().float() - expected).norm() / expected.norm())


def psnr(got: torch.Tensor, expected: torch.Tensor, peak: float) -> float:
    return float(10 * torch.log10(peak**2 / (got.cpu().float() - expected).square().mean().clamp(min=1e-20)))


def random_modules() -> SimpleNamespace:
    """The modules that are exported, with weights of sane scale."""
    modules = SimpleNamespace(
        unet=models.unet(), text=models.text_encoder(), codec=models.codec(), tower=models.vision_tower()
    )
    for module in (modules.unet, modules.text, modules.tower, modules.codec):
        module.load_state_dict(random_models.randomise(module.state_dict()))
    modules.codec.register_to_config(scaling_factor=SCALING)
    for module in vars(modules).values():
        module.eval().requires_grad_(False)
    return modules


def nested_encoder(seed: int) -> Any:
    """An encoder of nested_core, as training has it, for the small world."""
    config = EncoderConfig(
        family="small_world",
        base_model="random small world",
        tokens=8,
        token_dim=128,
        feature_dim=128,
        value_norm="match_per_head",
        alpha=1.5,
        licence=export.LICENCE,
        title=f"small world {seed}",
        resampler=ResamplerShape(dim=64, depth=1, heads=2, dim_head=32, ff_mult=2),
    )
    encoder = NestedEncoder(config)
    encoder.load_state_dict(random_models.randomise(encoder.state_dict(), seed))
    return encoder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small_world_nodes(pack):
    assert asyncio.run(host_nodes.load_custom_node(str(DEMO / "comfyui"))), "the host did not load it: see the log"


@pytest.fixture(scope="module")
def world(pack, small_world_nodes):
    """The files, what the stock loaders make of them, and the modules that were in them."""
    torch.manual_seed(0)
    made = random_modules()
    folder = Path(folder_paths.models_dir)
    checkpoint = folder / "checkpoints" / "small_world.safetensors"
    vision = folder / "clip_vision" / "small_world.safetensors"
    export.write_checkpoint(checkpoint, made.unet, made.text, made.codec)
    export.write_vision(vision, made.tower)
    unet, text, codec = export.load_checkpoint(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        for option in ("fp32_unet", "fp32_vae", "fp32_text_enc"):
            patch.setattr(comfy.cli_args.args, option, True)
        model, clip, vae = pack.host_nodes["CheckpointLoaderSimple"]().load_checkpoint(checkpoint.name)
        (clip_vision,) = pack.host_nodes["CLIPVisionLoader"]().load_clip(vision.name)
    return SimpleNamespace(
        made=made, checkpoint=checkpoint, vision=vision, model=model, clip=clip, vae=vae, clip_vision=clip_vision,
        unet=unet, text=text, codec=codec, tower=export.load_vision(vision),
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoders(pack):
    """Two encoder files, and what Load Nested Encoder makes of them."""
    folder = Path(folder_paths.get_folder_paths("nested_attention")[0])
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"small_world_{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(files):
        write_encoder(path, nested_encoder(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "FORCE_FP32", True)  # as the host's option --force-fp32 does
        loaded = [pack.nodes["NestedEncoderLoader"].execute(path.name)[0] for path in files]
    return SimpleNamespace(files=files, loaded=loaded)


@pytest.fixture(scope="module")
def pictures():
    """IMAGE (2, 128, 128, 3): of the world, in whole 255ths."""
    rng = random.Random(0)
    shown = [
        drawing.render([drawn.random_figure(rng, kind)], [drawn.random_look(rng, style)], scene, style, rng).image
        for kind, scene, style in (("robot", "city", "flat"), ("creature", "sea", "crayon"))
    ]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in shown])).float() / 255


def ids(prompt: str) -> torch.Tensor:
    return models.tokenizer()(
        prompt, padding="max_length", max_length=models.TEXT_LENGTH, return_tensors="pt"
    ).input_ids


# -- the files ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was_up_to_fp16(world):
    for made, loaded in ((world.made.unet, world.unet), (world.made.text, world.text), (world.made.codec, world.codec)):
        state = loaded.state_dict()
        assert all(torch.equal(w.half().float(), state[name]) for name, w in made.state_dict().items())
    again = export.checkpoint_state_dict(world.unet, world.text, world.codec)
    first = export.checkpoint_state_dict(world.made.unet, world.made.text, world.made.codec)
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
    assert world.codec.config.scaling_factor == SCALING


def test_a_vision_tower_comes_back_as_it_was_up_to_fp16(world):
    state = world.tower.state_dict()
    assert all(torch.equal(w.half().float(), state[name]) for name, w in world.made.tower.state_dict().items())


def test_files_say_what_they_are(world):
    for path in (world.checkpoint, world.vision):
        with safe_open(path, "pt") as file:
            said = file.metadata()
        assert said["licence"] == "Apache-2.0" and "Small World" in said["title"] and said["format"] == "pt"
        assert not list(path.parent.glob("*.part"))
    with safe_open(world.checkpoint, "pt") as file:
        assert float(file.metadata()["scaling_factor"]) == SCALING


def test_another_file_is_refused_by_name_of_a_weight(world, tmp_path):
    with pytest.raises(ValueError, match="scaled"):
        export.load_checkpoint(world.vision)
    with pytest.raises(ValueError, match="class_embedding is nothing"):
        export.load_vision(world.checkpoint)
    state = export.checkpoint_state_dict(world.unet, world.text, world.codec)
    export.write_file(tmp_path / "more.safetensors", {**state, "lora.up": torch.zeros(1)}, "more")
    with pytest.raises(ValueError, match="lora.up"):
        export.load_checkpoint(tmp_path / "more.safetensors")


def test_weights_that_fp16_cannot_hold_are_refused(world):
    broken = models.vision_tower()
    broken.visual_projection.weight.data[0, 0] = 1e9
    with pytest.raises(ValueError, match="visual_projection"):
        export.vision_state_dict(broken)


def test_names_of_the_unet_are_the_hosts(world):
    config = world.model.model.model_config.unet_config
    hosts = comfy.utils.unet_to_diffusers(config)  # names more layers than this U-Net has
    names = export.unet_names(world.unet.state_dict())
    assert names == {name: hosts[name] for name in names}


def test_the_pipeline_folder_opens_in_diffusers(world, tmp_path):
    folder = tmp_path / "base"
    for _ in range(2):  # the second replaces the first
        export.write_pipeline(folder, world.unet, world.text, world.codec, world.tower)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert type(DiffusionPipeline.from_pretrained(folder)) is StableDiffusionPipeline
    for name, original in (("unet", world.unet), ("text_encoder", world.text), ("vae", world.codec)):
        state = getattr(pipeline, name).state_dict()
        assert all(torch.equal(w, state[key]) for key, w in original.state_dict().items())
    assert pipeline.vae.config.scaling_factor == SCALING and pipeline.vae_scale_factor == 8
    assert pipeline.scheduler.config.prediction_type == "sample"
    text = pipeline.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(text, ids(PROMPT))
    tower = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    assert torch.equal(tower.visual_projection.weight, world.tower.visual_projection.weight)
    processor = CLIPImageProcessor.from_pretrained(folder / "image_encoder")
    assert tuple(processor.image_mean) == models.VISION_MEAN and tuple(processor.image_std) == models.VISION_STD
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(PROMPT, num_inference_steps=2, output_type="latent").images
    assert pipeline.vae.decode(latents / SCALING).sample.shape == (1, 3, 128, 128)
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(FileExistsError):
        export.write_pipeline(tmp_path, world.unet, world.text, world.codec, world.tower)


# -- the host's objects ---------------------------------------------------------------------------------------------


def test_stock_loaders_make_the_hosts_own_classes(world):
    assert type(world.model.model) is comfy.model_base.BaseModel
    assert type(world.model.model.diffusion_model) is UNetModel
    assert type(world.clip) is comfy.sd.CLIP
    assert type(world.vae.first_stage_model).__name__ == "Codec"  # the one module that the host has not
    assert type(world.clip_vision) is comfy.clip_vision.ClipVisionModel


def test_registering_twice_is_harmless_and_other_towers_stay_the_hosts(world):
    def known():
        return list(comfy.supported_models.models), comfy.clip_vision.load_clipvision_from_sd, comfy.taesd.taesd.TAESD

    before = known()
    assert asyncio.run(host_nodes.load_custom_node(str(DEMO / "comfyui")))
    assert known() == before
    assert sum(m.__name__ == "SmallWorld" for m in comfy.supported_models.models) == 1
    fewer = {k: v for k, v in world.tower.state_dict().items() if ".layers.3." not in k}
    assert comfy.clip_vision.load_clipvision_from_sd(fewer) is None
    with pytest.raises(RuntimeError, match="post_layernorm"):
        comfy.clip_vision.load_clipvision_from_sd(
            {k: v for k, v in world.tower.state_dict().items() if "post_layernorm" not in k}
        )


def test_a_taesd_of_other_channels_stays_the_hosts(world):
    theirs = comfy.taesd.taesd.TAESD(latent_channels=16)
    theirs.load_state_dict(random_models.randomise(theirs.state_dict()))
    vae = comfy.sd.VAE(sd={k: v.clone() for k, v in theirs.state_dict().items()})
    assert isinstance(vae.first_stage_model, comfy.taesd.taesd.TAESD) and vae.latent_channels == 16
    picture = torch.rand(1, 64, 64, 3)
    torch.testing.assert_close(vae.encode(picture), theirs.encode(picture.permute(0, 3, 1, 2) * 2 - 1))


def test_the_hosts_configurations_are_the_models():
    for name, config in (("text", models.text_config()), ("vision", models.vision_config())):
        said = json.loads((DEMO / "comfyui" / f"{name}.json").read_text("utf-8"))
        assert {k: v for k, v in said.items() if k in config.to_dict()} == {
            k: v for k, v in config.to_dict().items() if k in said
        }
    assert (tuple(said["image_mean"]), tuple(said["image_std"])) == (models.VISION_MEAN, models.VISION_STD)


@pytest.mark.parametrize("prompt", [PROMPT, "", "blurry, not a word of this world!"])
def test_text_conditioning_equals_transformers(pack, world, prompt):
    tokens = [token for token, _ in world.clip.tokenize(prompt)["l"][0]]
    assert tokens == ids(prompt)[0].tolist()
    ((cond, values),) = pack.host_nodes["CLIPTextEncode"]().encode(world.clip, prompt)[0]
    expected = world.text(ids(prompt)).last_hidden_state
    assert cond.shape == (1, 77, 128) and relative(cond, expected) < 1e-4
    assert values["pooled_output"].isfinite().all()


def test_vision_features_equal_transformers(world, pictures):
    squares = pictures[:, 16:112, 16:112]
    got = world.clip_vision.encode_image(squares)
    pixels = (squares.permute(0, 3, 1, 2) - models.VISION_MEAN[0]) / models.VISION_STD[0]
    expected = world.tower(pixel_values=pixels, output_hidden_states=True)
    assert relative(got["penultimate_hidden_states"], expected.hidden_states[-2]) < 1e-4
    assert relative(got["last_hidden_state"], expected.hidden_states[-1]) < 1e-4
    assert relative(got["image_embeds"], expected.image_embeds) < 1e-4
    assert world.clip_vision.image_size == models.VISION_SIZE


def test_codec_equals_diffusers(world, pictures):
    """Latents too, with diffusers' scaling: they are what both U-Nets see."""
    expected = world.codec.encode(pictures.permute(0, 3, 1, 2) * 2 - 1).latent * SCALING
    got = world.vae.encode(pictures)
    assert got.shape == (2, models.LATENT_CHANNELS, 16, 16)
    assert psnr(got, expected, float(expected.max() - expected.min())) > 60
    assert torch.equal(world.model.model.process_latent_in(got), got)

    latents = torch.randn(2, models.LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0))
    decoded = (world.codec.decode(latents / SCALING).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert decoded.std() > 1e-3
    assert psnr(world.vae.decode(latents), decoded, 1.0) > 60


def test_noise_schedule_is_the_schedulers(world):
    kept = models.scheduler().alphas_cumprod
    sampling = world.model.get_model_object("model_sampling")
    torch.testing.assert_close(sampling.sigmas.cpu(), ((1 - kept) / kept).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 250, 500, 750, 999])
def test_predicted_latents_equal_diffusers(world, step):
    comfy.model_management.load_models_gpu([world.model])
    device = world.model.load_device
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, models.LATENT_CHANNELS, 16, 24, generator=generator)
    context = torch.randn(2, 77, 128, generator=generator)
    at = torch.full((2,), step)
    expected = world.unet(x, at, encoder_hidden_states=context).sample
    unet = world.model.model.diffusion_model
    assert relative(unet(x.to(device), at.to(device).float(), context=context.to(device)), expected) < 1e-4

    # And the host takes it for the picture. It scales noisy latents otherwise, by 1 / sqrt(kept).
    kept = models.scheduler().alphas_cumprod[step]
    sigma = world.model.get_model_object("model_sampling").sigmas[step].repeat(2)
    clean = world.model.model.apply_model(
        x.to(device) / kept.sqrt(), sigma.to(device), c_crossattn=context.to(device), transformer_options={}
    )
    assert relative(clean, expected) < 1e-4


def test_a_checkpoint_that_the_host_saves_opens_again(world, tmp_path):
    path = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(path), world.model, world.clip, world.vae)
    unet, text, codec = export.load_checkpoint(path)
    for saved, before in ((unet, world.unet), (text, world.text), (codec, world.codec)):
        state = before.state_dict()
        assert all(torch.equal(w, state[name]) for name, w in saved.state_dict().items())
    assert codec.config.scaling_factor == SCALING


# -- graphs ---------------------------------------------------------------------------------------------------------


def encode(pack, clip, text):
    return pack.host_nodes["CLIPTextEncode"]().encode(clip, text)[0]


def sample(pack, model, positive, negative, steps=2, batch=1):
    """LATENT of the stock nodes: an empty 128 x 128, then KSampler."""
    (latent,) = pack.host_nodes["EmptyLatentImage"]().generate(128, 128, batch)
    (out,) = pack.host_nodes["KSampler"]().sample(model, 5, steps, 4.0, "euler", "normal", positive, negative, latent)
    return out


def subject_of(pack, world, encoders, i, pictures):
    node = pack.nodes["NestedEncodeSubject"]
    return node.execute(encoders.loaded[i], world.clip_vision, pictures[i : i + 1], *SUBJECTS[i], "crop")[0]


def apply(pack, model, clip, subject, **inputs):
    node = pack.nodes["NestedApplySubject"]
    inputs = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, **inputs}
    return node.execute(model, clip, subject, **inputs).result


def test_empty_latent_sampler_and_decoder(pack, world):
    out = sample(pack, world.model, encode(pack, world.clip, PROMPT), encode(pack, world.clip, ""), batch=2)
    assert out["samples"].shape == (2, models.LATENT_CHANNELS, 16, 16) and out["samples"].isfinite().all()
    (picture,) = pack.host_nodes["VAEDecode"]().decode(world.vae, out)
    assert picture.shape == (2, 128, 128, 3) and picture.std() > 0


def test_encoder_files_of_the_family_open_in_the_loader(encoders):
    for seed, loaded in enumerate(encoders.loaded):
        encoder = nested_encoder(seed)
        config = loaded.config
        assert (config.family, config.kind, config.tokens) == ("small_world", "nested", 8)
        assert (config.alpha, config.value_norm, config.licence) == (1.5, "match_per_head", export.LICENCE)
        assert config.widths == (64, 128, 128, 128, 64, 64, 128)
        state = loaded.module.state_dict()
        assert state.keys() == encoder.state_dict().keys()
        assert all(torch.equal(w, state[name].cpu()) for name, w in encoder.state_dict().items())


def test_a_subject_acts_in_all_seven_layers(pack, world, encoders, pictures, fired):
    family, layers = pack.unet.unet_layers_of(world.model)
    assert family.name == "small_world" and len(layers) == 7
    model, clip = apply(pack, world.model, world.clip, subject_of(pack, world, encoders, 0, pictures))
    sample(pack, model, encode(pack, clip, ONE), encode(pack, clip, "blurry"), steps=1)
    assert [call.q[-1] for call in fired] == [64, 128, 128, 128, 128, 64, 64]
    assert all(call.delta.any() for call in fired)


def test_strength_0_is_the_plain_model(pack, world, encoders, pictures):
    subject = subject_of(pack, world, encoders, 0, pictures)
    model, clip = apply(pack, world.model, world.clip, subject, strength=0.0)
    (decoupled,) = pack.host_nodes["DecoupledSubject"].execute(world.model, subject, 0.0).result
    positive, negative = encode(pack, clip, ONE), encode(pack, clip, "")
    plain = sample(pack, world.model, positive, negative)["samples"]
    assert torch.equal(sample(pack, model, positive, negative)["samples"], plain)
    assert torch.equal(sample(pack, decoupled, positive, negative)["samples"], plain)


def watched(model):
    """A clone of a MODEL, and a list that every call of its U-Net goes into: inputs, options and output."""
    calls = []

    def watch(executor, x, timesteps, context, *args, **kwargs):
        out = executor(x, timesteps, context, *args, **kwargs)
        options = kwargs.get("transformer_options") or args[-1]
        calls.append((x.cpu(), timesteps.cpu(), context.cpu(), options, out))
        return out

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", watch)
    return model, calls


@pytest.mark.parametrize("count", [1, 2])
def test_prediction_with_subjects_equals_diffusers(pack, world, encoders, pictures, count):
    model, clip, subjects = world.model, world.clip, []
    for i in range(count):
        subjects.append(subject_of(pack, world, encoders, i, pictures))
        model, clip = apply(pack, model, clip, subjects[i], strength=(1.0, 0.7)[i])
    model, calls = watched(model)
    sample(pack, model, encode(pack, clip, (ONE, TWO)[count - 1]), encode(pack, clip, "blurry"), steps=1)
    ((x, timesteps, context, options, got),) = calls
    positive = options["cond_or_uncond"].index(0)
    bound = [
        BoundSubject(
            load_encoder(encoders.files[i]),
            subject.subject.tokens,
            PLACES[i],
            (positive, positive + 1),
            strength=(1.0, 0.7)[i],
        )
        for i, subject in enumerate(subjects)
    ]
    with nested_attention(world.unet, bound):
        expected = world.unet(x, timesteps, encoder_hidden_states=context).sample
    assert relative(got, expected) < 1e-4
    without = world.unet(x, timesteps, encoder_hidden_states=context).sample
    assert relative(got, without) > 1e-2  # and the subjects are what makes them agree


class Decoupled:
    """The baseline as a diffusers processor, in the open: softmax twice, one sum."""

    def __init__(self, layer, subjects, row):
        self.layer, self.subjects, self.row = layer, subjects, row

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        def heads(t):
            return t.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def attend(q, k, v):
            q, k, v = heads(q), heads(k), heads(v)
            probabilities = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            return (probabilities @ v).transpose(1, 2).flatten(2)

        q = attn.to_q(hidden_states)
        out = attend(q, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        row = slice(self.row, self.row + 1)
        for encoder, tokens, strength in self.subjects:
            own = attend(q[row], *encoder.keys_values(tokens, self.layer))
            out[row] += strength * encoder.config.alpha * own  # as nested_core.training.baselines trains it
        return attn.to_out[0](out)


def test_the_baseline_adds_a_second_attention_in_the_positive_rows(pack, world, encoders, pictures):
    strengths = (0.8, 0.5)
    model, subjects = world.model, []
    for i, strength in enumerate(strengths):  # chained: the second adds to the first
        subject = subject_of(pack, world, encoders, i, pictures)
        subjects.append((load_encoder(encoders.files[i]), subject.subject.tokens, strength))
        (model,) = pack.host_nodes["DecoupledSubject"].execute(model, subject, strength).result
    assert "patches_replace" not in world.model.model_options["transformer_options"]
    model, calls = watched(model)
    sample(pack, model, encode(pack, world.clip, PROMPT), encode(pack, world.clip, "blurry"), steps=1)
    ((x, timesteps, context, options, got),) = calls
    row = options["cond_or_uncond"].index(0)

    before = dict(world.unet.attn_processors)
    plain = world.unet(x, timesteps, encoder_hidden_states=context).sample
    names = [f"{name}.processor" for name in cross_attention(world.unet)]
    world.unet.set_attn_processor({**before, **{n: Decoupled(i, subjects, row) for i, n in enumerate(names)}})
    expected = world.unet(x, timesteps, encoder_hidden_states=context).sample
    world.unet.set_attn_processor(before)
    assert relative(got, expected) < 1e-4
    assert relative(got[row], plain[row]) > 1e-2
    assert relative(got[1 - row], plain[1 - row]) < 1e-4


def test_the_baseline_refuses_another_models_encoder(pack, world, sd15):
    with pytest.raises(ValueError, match="another model"):
        pack.host_nodes["DecoupledSubject"].execute(world.model, sd15.subject(), 1.0)
