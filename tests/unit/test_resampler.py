"""The Q-Former and the pooled projection, against diffusers' implementations of the same modules."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import ImageProjection as DiffusersImageProjection
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from torch import Tensor, nn

from nested_core.errors import NestedAttentionError
from nested_core.resampler import ImageProjection, Resampler, ResamplerShape

SHAPE = ResamplerShape(dim=32, depth=2, dim_head=8, heads=3)
TOKENS, FEATURES, WIDTH = 5, 24, 16
SMALL = {"shape": SHAPE, "tokens": TOKENS, "embedding_dim": FEATURES, "output_dim": WIDTH}
NEWER = [{"positions": 9}, {"mean_pooled": 2}, {"positions": 7, "mean_pooled": 3}]
"""What newer resamplers have besides."""


@pytest.fixture
def small(device: torch.device) -> Resampler:
    return filled(SHAPE).to(device)


def filled(shape: ResamplerShape) -> Resampler:
    torch.manual_seed(0)
    resampler = Resampler(**{**SMALL, "shape": shape})
    for parameter in resampler.parameters():  # norms too: fresh ones would hide a missing weight
        nn.init.normal_(parameter, std=0.3)
    return resampler.eval()


def as_diffusers(resampler: Resampler) -> IPAdapterPlusImageProjection:
    """The same weights in diffusers' module."""
    theirs = IPAdapterPlusImageProjection(
        embed_dims=FEATURES,
        output_dims=WIDTH,
        hidden_dims=SHAPE.dim,
        depth=SHAPE.depth,
        dim_head=SHAPE.dim_head,
        heads=SHAPE.heads,
        num_queries=resampler.latents.shape[1],
    )
    names = {
        "0.norm1": "ln0",
        "0.norm2": "ln1",
        "0.to_q": "attn.to_q",
        "0.to_out": "attn.to_out.0",
        "1.0": "ff.0",
        "1.1": "ff.1.net.0.proj",
        "1.3": "ff.1.net.2",
    }
    state: dict[str, Tensor] = {}
    for name, tensor in resampler.state_dict().items():
        if name.startswith(("pos_emb", "to_latents")):
            continue  # not in diffusers'
        match = re.fullmatch(r"(layers\.\d+)\.(\d\.\w+)\.(weight|bias)", name)
        if match is None:
            state[name] = tensor
        elif match[2] == "0.to_kv":
            for side, half in zip("kv", tensor.chunk(2), strict=True):
                state[f"{match[1]}.attn.to_{side}.weight"] = half
        else:
            state[f"{match[1]}.{names[match[2]]}.{match[3]}"] = tensor
    theirs.load_state_dict(state)
    return theirs.to(resampler.latents.device).eval()


def test_same_tokens_as_diffusers(small: Resampler, randn: Callable[..., Tensor]) -> None:
    features = randn(2, 7, FEATURES)
    tokens = small(features)
    assert tokens.shape == (2, TOKENS, WIDTH)
    torch.testing.assert_close(tokens, as_diffusers(small)(features))


@pytest.mark.parametrize("newer", NEWER, ids=str)
def test_newer_resamplers_are_diffusers_with_another_beginning(
    newer: dict[str, int], device: torch.device, randn: Callable[..., Tensor]
) -> None:
    """diffusers' module has neither positions nor mean-pooled latents, so what it begins with is made here by hand."""
    resampler = filled(replace(SHAPE, **newer)).to(device)
    weights = resampler.state_dict()
    features = randn(2, 7, FEATURES)
    expected = []
    for image in features:
        begin = image + weights["pos_emb.weight"][:7] if "positions" in newer else image
        latents = weights["latents"][0]
        if count := newer.get("mean_pooled"):
            mean = (begin @ weights["proj_in.weight"].T + weights["proj_in.bias"]).mean(0)
            norm, matrix = (f"to_latents_from_mean_pooled_seq.{i}." for i in (0, 1))
            mean = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
            mean = mean * weights[norm + "weight"] + weights[norm + "bias"]
            made = weights[matrix + "weight"] @ mean + weights[matrix + "bias"]
            latents = torch.cat((made.reshape(count, SHAPE.dim), latents))
        theirs = as_diffusers(resampler)
        theirs.latents = nn.Parameter(latents[None])
        expected.append(theirs(begin[None]))
    assert resampler(features).shape == (2, TOKENS, WIDTH)
    torch.testing.assert_close(resampler(features), torch.cat(expected))
    sums = resampler.attention(features).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_no_more_features_than_positions(randn: Callable[..., Tensor]) -> None:
    resampler = filled(replace(SHAPE, positions=6)).to(randn(1).device)
    assert resampler(randn(1, 6, FEATURES)).isfinite().all()
    with pytest.raises(NestedAttentionError, match="knows 6 positions of image features, got 7"):
        resampler(randn(1, 7, FEATURES))


def test_parameter_names_are_those_of_published_weights() -> None:
    names = set(Resampler(**SMALL).state_dict())
    attention = {f"0.{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    attention |= {f"0.{matrix}.weight" for matrix in ("to_q", "to_kv", "to_out")}
    mlp = {"1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"}
    outside = {f"{module}.{part}" for module in ("proj_in", "proj_out", "norm_out") for part in ("weight", "bias")}
    assert names == {"latents"} | outside | {f"layers.{i}.{name}" for i in range(2) for name in attention | mlp}


def test_defaults_are_the_public_release() -> None:
    release = Resampler(device="meta")
    assert release.latents.shape == (1, 1024, 2048)
    assert release.proj_in.weight.shape == (2048, 1280)
    assert release.layers[3][0].to_kv.weight.shape == (2 * 12 * 64, 2048)
    assert release.layers[3][1][1].weight.shape == (4 * 2048, 2048)


def test_images_of_a_batch_do_not_mix(small: Resampler, randn: Callable[..., Tensor]) -> None:
    features = randn(3, 7, FEATURES)
    apart = torch.cat([small(image[None]) for image in features])
    torch.testing.assert_close(small(features), apart)


def test_every_precision_stays_finite_and_close(
    small: Resampler, randn: Callable[..., Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    features = randn(1, 7, FEATURES)
    wanted = copy.deepcopy(small).double()(features.double())
    tokens = small.to(dtype)(features.to(dtype))
    assert (tokens.dtype, tokens.device) == (dtype, features.device)
    assert (tokens.double() - wanted).norm() < tolerance * wanted.norm()


def test_logits_beyond_fp16_do_not_overflow(small: Resampler, randn: Callable[..., Tensor]) -> None:
    with torch.no_grad():
        for layer in small.layers:
            for matrix in (layer[0].to_q, layer[0].to_kv):
                matrix.weight.mul_(300)
            layer[0].to_out.weight.div_(300)
    features = randn(1, 7, FEATURES)
    attention = small.layers[0][0]
    normed = attention.norm2(small.latents)
    assert attention.to_q(normed).abs().amax() ** 2 * SHAPE.dim_head > torch.finfo(torch.float16).max
    assert small.half()(features.half()).isfinite().all()


class Casting:
    """Operations that keep weights in one dtype and compute in the input's, as a host's do."""

    class Linear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(input)
            return nn.functional.linear(input, self.weight.to(input), bias)

    class LayerNorm(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.layer_norm(
                input, self.normalized_shape, self.weight.to(input), self.bias.to(input), self.eps
            )


def test_operations_may_cast_weights_to_the_input(device: torch.device, randn: Callable[..., Tensor]) -> None:
    stored = Resampler(**SMALL, operations=Casting, dtype=torch.bfloat16)  # and stays on the CPU
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    tokens = stored(randn(1, 7, FEATURES))
    assert (tokens.dtype, tokens.device.type) == (torch.float32, device.type)
    assert all(isinstance(m, Casting.Linear) for m in stored.modules() if isinstance(m, nn.Linear))
    assert all(isinstance(m, Casting.LayerNorm) for m in stored.modules() if isinstance(m, nn.LayerNorm))


def test_pooled_projection_is_diffusers(device: torch.device, randn: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    ours = ImageProjection(embedding_dim=24, output_dim=16, tokens=4).to(device)
    theirs = DiffusersImageProjection(image_embed_dim=24, cross_attention_dim=16, num_image_text_embeds=4).to(device)
    theirs.image_embeds.load_state_dict(ours.proj.state_dict())
    theirs.norm.load_state_dict(ours.norm.state_dict())
    pooled = randn(3, 24)
    assert ours(pooled).shape == (3, 4, 16)
    torch.testing.assert_close(ours(pooled), theirs(pooled))
