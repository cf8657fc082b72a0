"""The encoder module and its config."""

import dataclasses

import pytest
import torch

from nested_core.encoder import EncoderConfig, NestedEncoder
from nested_core.errors import NestedAttentionError
from nested_core.layers import SD15, SDXL
from nested_core.resampler import ResamplerShape

TINY = EncoderConfig(
    tokens=5,
    token_dim=16,
    feature_dim=24,
    widths=SDXL.widths((8, 8, 16)),
    resampler=ResamplerShape(dim=32, depth=1, heads=2, dim_head=8, ff_mult=2),
)
TINY_POOLED = EncoderConfig(
    kind="nested-sd15-pooled",
    family="sd15",
    tokens=4,
    token_dim=16,
    feature_dim=24,
    image_features="pooled",
    widths=SD15.widths((8, 8, 16, 16)),
)


def test_defaults_are_the_public_release() -> None:
    release = NestedEncoder(EncoderConfig(), device="meta")
    assert sum(parameter.numel() * 4 for parameter in release.parameters()) == pytest.approx(2.037e9, rel=5e-4)
    assert len(release.to_k) == len(release.to_v) == 70
    assert [linear.out_features for linear in release.to_k] == list(SDXL.widths())
    assert all(linear.bias is None and linear.in_features == 2048 for linear in release.to_v)


def test_features_to_tokens_to_keys_and_values(device: torch.device) -> None:
    encoder = NestedEncoder(TINY).to(device)
    tokens = encoder.encode(torch.randn(2, 7, 24, device=device))
    assert tokens.shape == (2, 5, 16)
    for layer, width in enumerate(TINY.widths):
        k, v = encoder.keys_values(tokens, layer)
        assert k.shape == v.shape == (2, 5, width)
        torch.testing.assert_close(k, tokens @ encoder.to_k[layer].weight.T)
        torch.testing.assert_close(v, tokens @ encoder.to_v[layer].weight.T)


def test_pooled_encoder(device: torch.device) -> None:
    encoder = NestedEncoder(TINY_POOLED).to(device)
    tokens = encoder.encode(torch.randn(2, 24, device=device))
    assert tokens.shape == (2, 4, 16)
    assert encoder.keys_values(tokens, 15)[1].shape == (2, 4, 16)


def test_type_device_and_operations_reach_every_weight(device: torch.device, dtype: torch.dtype) -> None:
    class Operations:
        Linear = type("Linear", (torch.nn.Linear,), {})
        LayerNorm = type("LayerNorm", (torch.nn.LayerNorm,), {})

    encoder = NestedEncoder(TINY, operations=Operations, device=device, dtype=dtype)
    assert {(weight.dtype, weight.device.type) for weight in encoder.parameters()} == {(dtype, device.type)}
    kinds = {type(module) for module in encoder.modules() if next(module.parameters(recurse=False), None) is not None}
    assert kinds - {type(encoder.resampler)} == {Operations.Linear, Operations.LayerNorm}


def test_state_dict_names() -> None:
    names = set(NestedEncoder(TINY_POOLED).state_dict())
    layers = {f"to_{side}.{i}.weight" for side in "kv" for i in range(16)}
    projection = {f"resampler.{m}.{p}" for m in ("proj", "norm") for p in ("weight", "bias")}
    assert names == layers | projection


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (TINY, (1, 7, 1664), r"penultimate features.*\(images, tokens, 24\); got \(1, 7, 1664\).*like CLIP ViT-bigG"),
        (TINY, (1, 24), r"\(images, tokens, 24\); got \(1, 24\)\. Load"),
        (TINY, (), r"got \(\)\. Load"),
        (TINY_POOLED, (1, 768), r"pooled features.*\(images, 24\); got \(1, 768\), which looks like CLIP ViT-L/14"),
        (TINY_POOLED, (1, 257, 24), r"\(images, 24\); got \(1, 257, 24\)\. Load the CLIP vision model"),
    ],
)
def test_features_of_another_tower_are_refused(config: EncoderConfig, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(NestedAttentionError, match=message):
        NestedEncoder(config).encode(torch.zeros(shape))


def test_tokens_of_another_encoder_are_refused() -> None:
    with pytest.raises(NestedAttentionError, match=r"\(batch, tokens, 16\); got \(1, 4, 768\)"):
        NestedEncoder(TINY).keys_values(torch.zeros(1, 4, 768), 0)


def test_empty_widths_are_the_published_ones() -> None:
    assert EncoderConfig().widths == SDXL.widths()
    assert EncoderConfig(family="sd15").widths == SD15.widths()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lora"}, 'Unknown kind "lora". Known: nested, nested-sd15-pooled, ip-adapter-plus'),
        ({"family": "flux"}, 'Unknown base model family "flux"'),
        ({"image_features": "first"}, 'Unknown image_features "first". Known: penultimate, last, pooled'),
        ({"value_norm": "l1"}, 'Unknown value_norm "l1". Known: match, match_per_head, unit, none'),
        ({"pooled": "bos"}, 'Unknown pooled "bos". Known: eos, placeholder'),
        ({"alpha": 0.0}, r"alpha must be a number above 0 .* got 0.0"),
        ({"alpha": float("nan")}, "got nan"),
        ({"alpha": float("inf")}, "got inf"),
        ({"image_features": "pooled"}, 'image_features is "pooled", but .* "nested" reads "penultimate" or "last"'),
        ({"kind": "nested-sd15-pooled"}, 'image_features is "penultimate", but .* reads "pooled"'),
        ({"widths": (640,) * 69}, r"These 69 layer widths are not those of an SDXL U-Net: 640x69\. Expected 70"),
        ({"widths": SDXL.widths()[::-1]}, "not those of an SDXL U-Net: 1280x10, 640x6, 1280x50, 640x4"),
        ({"family": "sd15", "widths": SDXL.widths()}, "not those of an SD 1.5 U-Net"),
    ],
)
def test_config_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(NestedAttentionError, match=message):
        dataclasses.replace(EncoderConfig(), **change)
