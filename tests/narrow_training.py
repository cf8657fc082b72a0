"""A run of the training on the narrowest small world, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

import demo

#: What no two runs have in common
MEASURED = {"examples_per_second", "hours_left", "memory_gb"}


def save_base(folder):
    """The narrowest small world, its vision tower, and two pictures of each of four dogs."""
    torch.manual_seed(1)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    text = CLIPTextConfig(
        vocab_size=190, hidden_size=128, intermediate_size=64, projection_dim=128, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=188, eos_token_id=189, pad_token_id=189,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny(latent_channels=4, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                            num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77),
        unet=UNet2DConditionModel(
            in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
            attention_head_dim=2, cross_attention_dim=128, use_linear_projection=True,
        ),
        scheduler=DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "base")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, projection_dim=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "vision")
    for i in range(8):
        place = folder / "pets" / f"dog{i % 4}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 40 + 10 * i).convert("RGB").save(place)
        place.with_suffix(".txt").write_text("a <subject> on grass\na dog" if i else "a dog and a <subject>")


def save_config(folder):
    """Models, pictures and config.yaml, which says all but output and how many share the work; returns the folder."""
    save_base(folder)
    said = {
        "steps": 4, "batch_size": 1, "cpu": True, "workers": 0, "precision": "fp32", "log_every": 1,
        "base": {
            "model": str(folder / "base"), "vision": str(folder / "vision"),
            "family": str(Path(demo.__file__).parent / "family.json"),
        },
        "data": {"folders": [str(folder / "pets")], "class_word": "dog", "resolution": 64, "flip": 0.5},
        "encoder": {"tokens": 4, "dim": 32, "depth": 1, "heads": 1, "dim_head": 32, "learn_alpha": True},
        # A large epsilon: AdamW divides a gradient of nearly 0 by nearly 0, and rounding would decide its step.
        "optimiser": {"warmup": 2, "ema": 0.9, "schedule": "cosine", "epsilon": 1.0e-4},
        "loss": {"drop_text": 0.2, "drop_both": 0.2, "min_snr_gamma": 5},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(said))
    return folder


def arguments(configured, output, **changes):
    """Options of the command line; "__" stands for the dot in a name."""
    options = {"config": configured / "config.yaml", "output": output, **changes}
    return [part for name, value in options.items() for part in (f"--{name.replace('__', '.')}", str(value))]


def entries(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").open()]


def checkpoint(output, step):
    return output / "checkpoints" / f"step-{step:08}"


def assert_same_run(one, other, step, since=0):
    """Losses and weights of two runs are equal to rounding."""
    for a, b in zip(entries(one)[since:], entries(other)[since:], strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - MEASURED:
            # A gap is the difference of two losses.
            near = {"abs": 1e-5} if name.startswith("validation_") else {"rel": 1e-4}
            assert a[name] == pytest.approx(b[name], **near), (a["step"], name)
    for name in (f"checkpoints/step-{step:08}/model.safetensors", "encoder.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def newest(output):
    return max(int(path.name.split("-")[1]) for path in (output / "checkpoints").glob("step-*"))
