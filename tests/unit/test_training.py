"""Training on a narrow SDXL (all 70 cross-attention layers, 32 channels wide) and a narrow small world."""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import demo
from nested_core import training
from nested_core.checkpoint import load_encoder, read_encoder
from nested_core.errors import NestedAttentionError
from nested_core.hosts.diffusers import BoundSubject, cross_attention, nested_attention
from nested_core.training import (
    BaseModel,
    EncoderSettings,
    Example,
    ExampleSubject,
    InitConfig,
    LossConfig,
    OptimiserConfig,
    SampleConfig,
    TrainingConfig,
    VisionTower,
    load_trained,
    loop,
    precision,
    train,
)
from nested_core.training.__main__ import main, make_parser
from nested_core.training.base import load_base, load_vision
from nested_core.training.examples import Collate, Draws
from nested_core.training.frozen import FrozenEncoders, make_cache
from nested_core.training.initial import make_encoder
from nested_core.training.model import SubjectDenoiser
from nested_core.training.report import dry_run

DEMO = Path(demo.__file__).parent
CONFIGS = Path(training.__file__).parent / "configs"


def tokenizer():
    """A CLIP tokenizer that spells: every letter is a token."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def text_encoder(kind, width, layers=2):
    config = CLIPTextConfig(
        vocab_size=190, hidden_size=width, intermediate_size=64, projection_dim=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, bos_token_id=188, eos_token_id=189, pad_token_id=189,
    )  # fmt: skip
    return kind(config)


def tower():
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, projection_dim=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return VisionTower(CLIPVisionModelWithProjection(config))


@pytest.fixture(scope="module")
def sdxl():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10], attention_head_dim=1, use_linear_projection=True,
        cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=1280 + 48,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae, text_encoder(CLIPTextModel, 768), text_encoder(CLIPTextModelWithProjection, 1280), tokenizer(),
        tokenizer(), unet, EulerDiscreteScheduler(),
    )  # fmt: skip
    return BaseModel(pipeline, tower(), "narrow SDXL")


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=2, cross_attention_dim=128, use_linear_projection=True,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny(latent_channels=4, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                            num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4),
        text_encoder=text_encoder(CLIPTextModel, 128), tokenizer=tokenizer(), unet=unet,
        scheduler=DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return BaseModel(pipeline, tower(), "narrow small world")


@contextmanager
def on(device, base):
    """A base model on a device for a while: runs, whose device accelerate chooses once a process, stay on the CPU."""
    parts = [base.unet, base.vae, *base.text_encoders, base.vision]
    try:
        for part in parts:
            part.to(device)
        yield base
    finally:
        for part in parts:
            part.to("cpu")


@pytest.fixture
def small_there(small, device):
    with on(device, small) as base:
        yield base


def picture(seed, channels=3, size=64):
    """Smooth random colours (H, W, C)."""
    coarse = torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")[0].permute(1, 2, 0)


class Pictures:
    """Examples of one, two or no subjects, some with two views."""

    def __init__(self, kinds=(1, 2, 0, 1)):
        self.kinds = kinds

    def __len__(self):
        return len(self.kinds)

    def draw(self, index, rng):
        words = ["dog", "old cat"][: self.kinds[index]]
        subjects = [
            ExampleSubject(f"<{word[0]}>", word, [picture(rng.randrange(9)) for _ in range(1 + (index == 3))])
            for word in words
        ]
        mask = picture(7, 1)[..., 0].round() if index == 0 else None
        prompt = " with ".join(f"a <{word[0]}>" for word in words) or "nobody"
        return Example(picture(100 + index), prompt, subjects, mask, name=f"example {index}")


SMALL = EncoderSettings(tokens=4, dim=32, depth=1, heads=1, dim_head=64, ff_mult=1)


def noise(device, rows=1):
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)


def config(folder, **changes):
    standard = {
        "output": str(folder), "steps": 2, "batch_size": 2, "precision": "fp32", "cpu": True, "workers": 0,
        "save_every": 0, "log_every": 1, "tracker": "none", "encoder": SMALL, "optimiser": OptimiserConfig(warmup=0),
    }  # fmt: skip
    return TrainingConfig(**{**standard, **changes})


def predictor(base, settings=SMALL, init=None, seed=0):
    """A denoiser where the base model is, four examples, and a function from examples to its conditions."""
    device = base.unet.device
    encoder = make_encoder(settings, init or InitConfig(), base, seed).to(device)
    frozen = FrozenEncoders(base, device, torch.float32, "penultimate")
    draws = Draws(Pictures(), 0, LossConfig(), base.vision.image_size).undropped()
    collate = Collate(base.tokenizers, 1.0, base.vision.image_size)
    whole = [draws._show(draws.data.draw(i, random.Random(i))) for i in range(4)]
    model = SubjectDenoiser(encoder, base.unet, settings.method).to(device)
    return model, whole, lambda examples: frozen.conditions(collate(examples))


# --- the module


@pytest.mark.parametrize("method", ["nested", "decoupled"])
def test_each_row_is_as_if_alone(small_there, device, method):
    model, examples, conditions = predictor(small_there, replace(SMALL, method=method))
    latents, time = noise(device, rows=4), torch.full((4,), 500, device=device)
    order = [1, 0, 3, 2]  # as the batch has them: by their number of subjects
    with torch.no_grad(), model.attached():
        together = model(latents, time, conditions(examples))
        for row, i in enumerate(order):
            alone = model(latents[row : row + 1], time[:1], conditions([examples[i]]))
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_training_sees_what_inference_sees(small_there, device):
    """The same subject, bound by hand: the places of "old cat" in "a dog with a old cat" are its six letters."""
    small = small_there
    model, examples, conditions = predictor(small)
    latents, time = noise(device), torch.tensor([500], device=device)
    example = examples[1]
    with torch.no_grad():
        with model.attached():
            got = model(latents, time, conditions([example]))
        tokens = [
            model.encoder.encode(small.vision.features(s.references[0][None].to(device))) for s in example.subjects
        ]
        places = [range(2, 5), range(10, 16)]
        bound = [BoundSubject(model.encoder, x, list(at)) for x, at in zip(tokens, places, strict=True)]
        text = small.pipeline.encode_prompt("a dog with a old cat", device, 1, False)[0]
        with nested_attention(small.unet, bound):
            expected = small.unet(latents, time, encoder_hidden_states=text).sample
        torch.testing.assert_close(got, expected)
        plain = small.unet(latents, time, encoder_hidden_states=text).sample
    assert not torch.allclose(got, plain, atol=1e-3)


def test_gradient_checkpointing_changes_no_gradient(small_there, device):
    small, grads = small_there, []
    for checkpointing in (False, True):
        model, examples, conditions = predictor(small)
        if checkpointing:
            small.unet.enable_gradient_checkpointing()
        with model.attached():
            time = torch.full((4,), 9, device=device)
            model(torch.ones(4, 4, 8, 8, device=device), time, conditions(examples)).square().mean().backward()
        small.unet.disable_gradient_checkpointing()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads[0])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_without_subjects_has_a_gradient_of_zero(small_there, device):
    model, examples, conditions = predictor(small_there)
    latents, time = torch.ones(1, 4, 8, 8, device=device), torch.tensor([9], device=device)
    with model.attached():
        out = model(latents, time, conditions([examples[2]]))
        out.sum().backward()
        expected = small_there.unet(latents, time, encoder_hidden_states=conditions([examples[2]]).text).sample
    assert all(torch.count_nonzero(parameter.grad) == 0 for parameter in model.parameters())
    torch.testing.assert_close(out, expected)


# --- the start


def test_layers_start_as_the_unets_own(sdxl):
    encoder = make_encoder(SMALL, InitConfig(), sdxl, 0)
    names = cross_attention(sdxl.unet)
    assert len(names) == len(encoder.to_k) == 70
    for i, name in enumerate(names):
        module = sdxl.unet.get_submodule(name)
        assert torch.equal(encoder.to_k[i].weight, module.to_k.weight)
        assert torch.equal(encoder.to_v[i].weight, module.to_v.weight)


def test_starts_from_an_earlier_run(small, tmp_path):
    run = config(tmp_path / "run", steps=1)
    path = train(run, small, Pictures())
    again = make_encoder(replace(SMALL, tokens=6), InitConfig(str(path)), small, 5)
    first = load_encoder(path)
    assert torch.equal(again.to_k[3].weight, first.to_k[3].weight)
    assert torch.equal(again.resampler.latents[:, :4], first.resampler.latents)
    assert not torch.equal(again.resampler.latents[:, 4:], first.resampler.latents[:, :2])


def test_starts_from_an_ip_adapter(sdxl, tmp_path):
    """IP-Adapter Plus files number the same layers 1, 3, 5..."""
    made = make_encoder(SMALL, InitConfig(), sdxl, 1)
    state = {f"image_proj.{name}": tensor for name, tensor in made.resampler.state_dict().items()}
    for i, (k, v) in enumerate(zip(made.to_k, made.to_v, strict=True)):
        state |= {
            f"ip_adapter.{2 * i + 1}.to_k_ip.weight": k.weight,
            f"ip_adapter.{2 * i + 1}.to_v_ip.weight": v.weight,
        }
    path = tmp_path / "ip-adapter-plus.bin"
    torch.save({name: tensor.detach().half() for name, tensor in state.items()}, path)
    whole = make_encoder(SMALL, InitConfig(str(path)), sdxl, 2)
    assert torch.equal(whole.to_v[69].weight, made.to_v[69].weight.half().float())
    warm = make_encoder(SMALL, InitConfig(str(path), "random"), sdxl, 2)
    assert torch.equal(warm.resampler.proj_in.weight, whole.resampler.proj_in.weight)
    assert not torch.equal(warm.to_v[69].weight, whole.to_v[69].weight)


def test_other_sizes_are_refused(small, tmp_path):
    path = train(config(tmp_path, steps=1), small, Pictures())
    with pytest.raises(NestedAttentionError, match=r"(?s)Q-Former dim 32, depth 1.*latents"):
        make_encoder(replace(SMALL, dim=64), InitConfig(str(path)), small, 0)
    with pytest.raises(NestedAttentionError, match="read tokens of width 128, encoder.token_dim is 64"):
        make_encoder(replace(SMALL, token_dim=64), InitConfig(layers="unet"), small, 0)


# --- whole runs


class FixedNoise(loop.Trainer):
    """Every step has the noise of the first."""

    def _pass(self, batch):
        return super()._pass(replace(batch, positions=[0] * len(batch.positions)))


def test_overfits_one_batch_on_narrow_sdxl(sdxl, tmp_path):
    """Another encoder's picture is learnt, from nothing but that picture; what is frozen stays as it is."""
    run = config(
        tmp_path, steps=24, batch_size=1, loss=LossConfig(drop_text=0),
        optimiser=OptimiserConfig(3e-3, 3e-3, weight_decay=0, warmup=0),
    )  # fmt: skip
    # A scheduler whose every step is all but pure noise, and that predicts the picture: then the other encoder's
    # prediction of the first noise is the picture that has a loss of about 0.
    scheduler = DDPMScheduler(trained_betas=[0.9999] * 1000, prediction_type="sample")
    pipeline = StableDiffusionXLPipeline(**{**sdxl.pipeline.components, "scheduler": scheduler})
    base = BaseModel(pipeline, sdxl.vision, "narrow SDXL")
    teacher, examples, conditions = predictor(base, init=InitConfig(layers="random"), seed=1)
    generator = loop.noise_generator(run.seed, 0)
    drawn, time = torch.randn(1, 4, 8, 8, generator=generator), torch.randint(1000, (1,), generator=generator)
    with torch.no_grad(), teacher.attached():
        goal = teacher(drawn, time, conditions(examples[:1]))[0]

    frozen = {name: tensor.clone() for name, tensor in sdxl.unet.state_dict().items()}
    losses = []
    with loop.accelerated(run) as accelerator:
        made = loop.prepare(run, accelerator, base, [replace(examples[0], latents=goal)])
        with made.model.attached():
            FixedNoise(made, lambda entry: losses.append(entry["loss"])).train(None)
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in sdxl.unet.state_dict().items())


#: What no two runs have in common
MEASURED = ("examples_per_second", "hours_left", "memory_gb")


class Killed(Exception):
    pass


@pytest.mark.parametrize(("family", "accumulation"), [("sdxl", 1), ("small", 2)])
def test_a_killed_run_resumes_bit_exactly(request, tmp_path, family, accumulation):
    base = request.getfixturevalue(family)
    options = {
        "steps": 4, "save_every": 2, "accumulation": accumulation, "encoder": replace(SMALL, learn_alpha=True),
        "optimiser": OptimiserConfig(1e-3, 1e-3, warmup=2, ema=0.9, schedule="cosine"),
        "loss": LossConfig(drop_text=0.3, drop_subject=0.2, drop_both=0.1, mask_weight=3, min_snr_gamma=5),
    }  # fmt: skip
    straight = train(config(tmp_path / "straight", **options), base, Pictures())

    def kill(entry):
        if entry["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        train(config(tmp_path / "killed", **options), base, Pictures(), kill)
    checkpoints = tmp_path / "killed" / "checkpoints"
    (checkpoints / ".step-00000003.part").mkdir()  # one that was being written
    (checkpoints / "step-00000004").mkdir()  # and one that lost its content
    steps = []
    resumed = train(config(tmp_path / "killed", **options), base, Pictures(), lambda e: steps.append(e["step"]))
    assert steps == [3, 4]
    assert _content(resumed) == _content(straight)
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_1.pkl"):
        one, other = (tmp_path / run / "checkpoints" / "step-00000004" / name for run in ("straight", "killed"))
        assert _content(one) == _content(other), name
    entries = [
        [{**json.loads(line), **dict.fromkeys(MEASURED, 0)} for line in (tmp_path / run / "metrics.jsonl").open()][-2:]
        for run in ("straight", "killed")
    ]
    assert entries[0] == entries[1]
    assert load_encoder(resumed).config.alpha != 2.0


def _content(path):
    """A file's tensors as bytes, whatever the order in which the file has them."""
    if path.suffix == ".safetensors":
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(torch.load(path, weights_only=True))


def test_exports_what_load_nested_encoder_reads(sdxl, tmp_path):
    settings = replace(SMALL, value_norm="match_per_head", alpha=1.5, licence="MIT", title="test pets")
    run = config(tmp_path, encoder=settings, optimiser=OptimiserConfig(ema=0.5, warmup=0))
    found, state = read_encoder(train(run, sdxl, Pictures()))
    assert (found.kind, found.family, found.base_model) == ("nested", "sdxl", "narrow SDXL")
    assert (found.tokens, found.token_dim, found.feature_dim, found.image_features) == (4, 2048, 32, "penultimate")
    assert (found.value_norm, found.alpha, found.licence) == ("match_per_head", 1.5, "MIT")
    assert found.title.startswith("test pets") and found.fingerprint and found.widths == (32,) * 70
    assert found.resampler.dim_head == 64 and len(state) == 158


def test_what_newer_resamplers_have_is_trained(small, tmp_path):
    settings = replace(SMALL, positions=20, mean_pooled=2, bias=True)
    began = make_encoder(settings, InitConfig(), small, 0)
    assert all(not layer.bias.any() for layer in (*began.to_k, *began.to_v))  # the U-Net's own have none
    run = config(tmp_path, steps=2, encoder=settings, optimiser=OptimiserConfig(ema=0.0, warmup=0))
    path = train(run, small, Pictures())
    encoder = load_encoder(path)
    assert (encoder.config.tokens, encoder.config.bias) == (4, True)
    assert (encoder.config.resampler.positions, encoder.config.resampler.mean_pooled) == (20, 2)
    ours, theirs = encoder.state_dict(), began.state_dict()
    for name in ("pos_emb.weight", "latents", "to_latents_from_mean_pooled_seq.1.weight"):
        assert not torch.equal(ours[f"resampler.{name}"], theirs[f"resampler.{name}"]), name
    assert encoder.to_v[0].bias.any()
    again = make_encoder(replace(settings, tokens=6), InitConfig(str(path)), small, 5)
    assert torch.equal(again.resampler.latents[:, :2], encoder.resampler.latents)
    with pytest.raises(NestedAttentionError, match=r"(?s)positions 20, mean_pooled 2.*with bias"):
        make_encoder(SMALL, InitConfig(str(path)), small, 0)


def test_the_baseline_trains_and_is_refused_by_the_nodes(small, tmp_path):
    run = config(tmp_path, encoder=replace(SMALL, method="decoupled", alpha=1.0), init=InitConfig(layers="zero"))
    path = train(run, small, Pictures())
    with pytest.raises(NestedAttentionError, match="decoupled attention, to compare with"):
        load_encoder(path)
    method, encoder = load_trained(path)
    assert method == "decoupled" and encoder.config.family == "small_world"
    assert encoder.to_v[0].weight.abs().sum() > 0  # they began as 0


def test_bf16_samples_and_tensorboard(small, tmp_path):
    run = config(
        tmp_path, precision="bf16", tracker="tensorboard", workers=1, gradient_checkpointing=True, keep=1, save_every=1,
        samples=SampleConfig(every=2, count=2, seeds=2, steps=2), optimiser=OptimiserConfig(ema=0.9, warmup=0),
    )  # fmt: skip
    path = train(run, small, Pictures((1, 1, 1)))
    assert {tensor.dtype for tensor in load_encoder(path).state_dict().values()} == {torch.float32}
    grid = Image.open(tmp_path / "samples" / "step-00000002.png")
    assert grid.size == (4 * 68 + 4, 2 * 68 + 4)  # reference, target and two samples of 64 pixels, padded by 4
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert list((tmp_path / "logs").glob("events*"))
    assert not small.unet.is_gradient_checkpointing


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_cached_pictures_are_encoded_once(small_there, device, tmp_path, kind):
    cache = make_cache(kind, 1.0, tmp_path)
    frozen = FrozenEncoders(small_there, device, torch.float32, "penultimate", cache)
    images = torch.stack([picture(i, size=32) for i in (0, 1, 0)])
    vision = small_there.vision
    with mock.patch.object(vision, "features", wraps=vision.features) as encoded:
        first, second = frozen.features(images), frozen.features(images[1:])
    ((pictures, *_),) = (call.args for call in encoded.call_args_list)
    assert len(pictures) == 2
    assert torch.equal(first[0], first[2]) and torch.equal(first[1:], second)
    torch.testing.assert_close(first, vision.features(images.to(device)))


KINDS_OF_VAE = {
    "KL": (lambda: AutoencoderKL(block_out_channels=(32,)), lambda out: out.latent_dist.mode()),
    "Tiny": (
        lambda: AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
        lambda out: out.latents,
    ),
    "DC": (
        lambda: AutoencoderDC(
            latent_channels=4, encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()), scaling_factor=0.4,
        ),
        lambda out: out.latent,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_VAE)
def test_latents_of_each_kind_of_vae(small, device, kind, monkeypatch):
    make, latent = KINDS_OF_VAE[kind]
    torch.manual_seed(4)
    vae = make().to(device).eval()
    monkeypatch.setattr(small.pipeline, "vae", vae)
    images = torch.stack([picture(i, size=32) for i in (0, 1)])
    got = FrozenEncoders(small, device, torch.float32, "penultimate").encoded(images)
    with torch.no_grad():
        expected = latent(vae.encode(images.permute(0, 3, 1, 2).to(device) * 2 - 1)) * vae.config.scaling_factor
    torch.testing.assert_close(got, expected)


def test_resume_is_checked(small, tmp_path):
    train(config(tmp_path, steps=1), small, Pictures())
    with pytest.raises(NestedAttentionError, match='newest is step-00000001.*resume is "never"'):
        train(config(tmp_path, resume="never"), small, Pictures())
    with pytest.raises(NestedAttentionError, match="value_norm: match there, none now"):
        train(config(tmp_path, encoder=replace(SMALL, value_norm="none")), small, Pictures())
    with pytest.raises(NestedAttentionError, match="those of this run: step-00000001"):
        train(config(tmp_path, resume=str(tmp_path / "step-7")), small, Pictures())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EncoderSettings(method="nesting"), "method is 'nesting'; expected one of nested, decoupled"),
        (lambda: OptimiserConfig(ema=1.0), "ema is 1.0"),
        (lambda: LossConfig(drop_text=0.8, drop_both=0.5), "together at most 1"),
        (lambda: InitConfig(layers="file"), "name the file in init.encoder"),
        (lambda: TrainingConfig(init=InitConfig(layers="zero")), "can't be rescaled"),
        (lambda: TrainingConfig(batch_size=0), "batch_size is 0; expected a number 1 or more"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(NestedAttentionError, match=message):
        make()


# --- the command line


@pytest.fixture
def folders(small, tmp_path):
    """A saved base model, vision tower and data folder, and a config file that names them."""
    small.pipeline.save_pretrained(tmp_path / "base")
    small.vision.model.save_pretrained(tmp_path / "vision")
    for i in range(3):
        place = tmp_path / "pets" / f"dog{i % 2}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture(i) * 255).byte().numpy()).save(place)
        place.with_suffix(".txt").write_text("a <subject> on grass\na dog")
    lines = {
        "output": tmp_path / "run", "steps": 2, "batch_size": 1, "cpu": "true", "workers": 0, "precision": "fp32",
        "base": {"model": tmp_path / "base", "vision": tmp_path / "vision", "family": DEMO / "family.json"},
        "data": {"folders": f"[{tmp_path / 'pets'}]", "class_word": "dog", "resolution": 64},
        "encoder": {"tokens": 4, "dim": 32, "depth": 1, "heads": 1, "dim_head": 32},
    }  # fmt: skip
    text = ""
    for name, value in lines.items():
        text += (
            f"{name}:\n" + "".join(f"  {k}: {v}\n" for k, v in value.items())
            if isinstance(value, dict)
            else f"{name}: {value}\n"
        )  # noqa: E501
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize("file", [CONFIGS / "sdxl.yaml", CONFIGS / "sd15.yaml", DEMO / "encoder.yaml"])
def test_shipped_configs_are_valid(file):
    parser = make_parser()
    made = parser.instantiate(parser.parse_args(["--config", str(file)]))
    assert made["output"].startswith("runs/") and made["init"].layers == "unet"


def test_a_family_file_that_says_nothing_of_use(tmp_path):
    file = tmp_path / "family.json"
    for content, words in (
        ("{", "does not describe a base model family"),
        ('{"name": "mine"}', "is described by channels"),
    ):
        file.write_text(content)
        with pytest.raises(NestedAttentionError, match=words):
            load_base(training.BaseConfig(model="base", vision="vision", family=str(file)))


def test_the_command_line_trains(folders, capsys):
    arguments = ["--config", str(folders / "config.yaml"), "--steps", "1", "--encoder.value_norm", "unit"]
    assert main([*arguments, "--dry_run"]) == 0
    out = capsys.readouterr().out
    for words in ("3 captioned pictures of 2 subjects", "K̈, V̈ of each layer", "forward pass of one row", "Small World"):
        assert words in out
    assert (folders / "run" / "first_batch.png").exists() and not (folders / "run" / "checkpoints").exists()
    assert main(arguments) == 0
    assert load_encoder(folders / "run" / "encoder.safetensors").config.value_norm == "unit"
    assert main([*arguments, "--base.family", "sdxl"]) == 1
    assert "is a model of the family Small World, not SDXL" in capsys.readouterr().err


def test_the_dry_run_counts(sdxl, tmp_path):
    text = dry_run(config(tmp_path, optimiser=OptimiserConfig(ema=0.9)), sdxl, Pictures())
    trained = sum(p.numel() for p in make_encoder(SMALL, InitConfig(), sdxl, 0).parameters())
    assert (
        f"averaged weights              {trained * 4 / 1e9:,.2f} GB".split()
        == next(line for line in text.splitlines() if "averaged" in line).split()
    )


@pytest.mark.parametrize("said", [True, False])
def test_a_vision_tower_is_shown_pictures_as_it_was_trained_on_them(tmp_path: Path, said: bool) -> None:
    tower().model.save_pretrained(tmp_path)
    if said:
        CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    loaded = load_vision(str(tmp_path))
    assert loaded.mean.flatten().tolist() == pytest.approx([0.5] * 3 if said else list(OPENAI_CLIP_MEAN))
    assert loaded.std.flatten().tolist() == pytest.approx([0.25] * 3 if said else list(OPENAI_CLIP_STD))


@pytest.mark.parametrize("faster, expected", [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_precision_is_what_the_machine_is_fastest_with(small, tmp_path, monkeypatch, faster, expected):
    """And a run that goes on, on another machine, keeps what it began with."""

    def on_a_machine_fast_with(dtype):
        monkeypatch.setattr(precision, "_seconds", lambda measured: 1.0 if measured == dtype else 8.0)

    def said():
        return json.loads((tmp_path / "config.json").read_text("utf-8"))["precision"]

    on_a_machine_fast_with(faster)
    train(config(tmp_path, precision="auto", steps=1, save_every=1), small, Pictures())
    assert said() == expected
    on_a_machine_fast_with({torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}[faster])
    train(config(tmp_path, precision="auto", steps=2, save_every=1), small, Pictures())
    assert said() == expected


def test_both_types_are_measured():
    assert 0 < precision._seconds(torch.float32) < 60 and 0 < precision._seconds(torch.bfloat16) < 60
    assert precision.fastest(torch.device("cpu")) in ("bf16", "fp32")
