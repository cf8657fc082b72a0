"""Encoder files: what is recognised, what is refused and how, and what comes back after writing."""

import json
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nested_core import files
from nested_core.checkpoint import fingerprint, identify, load_encoder, read_encoder, write_encoder, write_state
from nested_core.convert import main as convert
from nested_core.encoder import EncoderConfig, NestedEncoder
from nested_core.errors import NestedAttentionError
from nested_core.layers import DIFFUSERS_ORDER, EXECUTION_ORDER, PUBLISHED, SD15, SDXL, Family, family_of
from nested_core.metadata import describe_training
from nested_core.resampler import ResamplerShape

State = dict[str, Tensor]

TINY = EncoderConfig(
    tokens=5,
    token_dim=16,
    feature_dim=24,
    widths=SDXL.widths((8, 8, 16)),
    resampler=ResamplerShape(dim=32, depth=2, heads=2, dim_head=64, ff_mult=2),
)
TINY_SD15 = replace(TINY, family="sd15", base_model="SD 1.5", widths=SD15.widths((8, 16, 24, 24)))
TINY_POOLED = EncoderConfig(
    kind="nested-sd15-pooled",
    family="sd15",
    base_model="SD 1.5",
    tokens=4,
    token_dim=16,
    feature_dim=24,
    image_features="pooled",
    value_norm="none",
    widths=SD15.widths((8, 16, 24, 24)),
)
RELEASE = EncoderConfig()
PLUS_SDXL = replace(RELEASE, tokens=16, resampler=ResamplerShape(dim=1280, heads=20))
PLUS_SD15 = EncoderConfig(
    family="sd15", tokens=16, token_dim=768, resampler=ResamplerShape(dim=768, heads=12), base_model="SD 1.5"
)


def weights(config: EncoderConfig, seed: int = 0) -> State:
    """Random weights under the module's names, every tensor of another content."""
    shapes = NestedEncoder(config, device="meta").state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(meta.shape, generator=generator) for name, meta in shapes.items()}


def meta_weights(config: EncoderConfig) -> State:
    return NestedEncoder(config, device="meta").state_dict()


def numbered(index: int) -> str:
    """How IP-Adapter's training numbers layers: self-attention takes the even numbers."""
    return f"adapter_modules.{2 * index + 1}."


def foreign(
    state: State,
    projection: str = "image_proj_model.",
    layer: Callable[[int], str] = numbered,
    k: str = "to_k_nest.weight",
    v: str = "to_v_nest.weight",
    order: tuple[int, ...] | None = None,
) -> State:
    """A state dict of ours as another trainer would name it; `order`: diffusers index of each numbered layer."""
    count = sum(bool(re.fullmatch(r"to_k\.\d+\.weight", name)) for name in state)
    renamed = {
        name.replace("resampler.", projection, 1): tensor for name, tensor in state.items() if "resampler." in name
    }
    for number, index in enumerate(order or range(count)):
        renamed[layer(number) + k] = state[f"to_k.{index}.weight"]
        renamed[layer(number) + v] = state[f"to_v.{index}.weight"]
        if f"to_k.{index}.bias" in state:
            renamed[layer(number) + k.replace("weight", "bias")] = state[f"to_k.{index}.bias"]
            renamed[layer(number) + v.replace("weight", "bias")] = state[f"to_v.{index}.bias"]
    return renamed


def nest(flat: State, depth: int = 1) -> dict[str, object]:
    """The first `depth` parts of each name as dictionaries, as old .bin files have them."""
    nested: dict[str, object] = {}
    for name, tensor in flat.items():
        *outer, last = name.split(".", depth)
        place = nested
        for part in outer:
            place = place.setdefault(part, {})  # type: ignore[assignment]
        place[last] = tensor
    return nested


def assert_same(state: State, wanted: State) -> None:
    assert set(state) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name


def message(state: dict[str, object] | State, metadata: dict[str, str] | None = None, **options: object) -> str:
    with pytest.raises(NestedAttentionError) as caught:
        identify(state, metadata, **options)  # type: ignore[arg-type]
    return str(caught.value)


def read_message(path: Path) -> str:
    with pytest.raises(NestedAttentionError) as caught:
        read_encoder(path)
    assert str(caught.value).startswith(f"{path.name}: ")
    return str(caught.value)


# --- the public release ---


def test_public_release_at_full_size() -> None:
    file = foreign(meta_weights(RELEASE))
    assert sum(tensor.numel() * 4 for tensor in file.values()) == pytest.approx(2.037e9, rel=5e-4)
    config, state = identify(file)
    assert (config.kind, config.family, config.tokens, config.token_dim) == ("nested", "sdxl", 1024, 2048)
    assert (config.image_features, config.value_norm, config.alpha, config.pooled) == (
        "penultimate",
        "match",
        2.0,
        "placeholder",
    )
    assert config.resampler == ResamplerShape(dim=2048, depth=4, heads=12, dim_head=64, ff_mult=4)
    assert config.licence == "CC BY-NC-SA 4.0"
    assert config.kind == "nested"
    assert config.widths == SDXL.widths()
    assert config.fingerprint == ""  # no content on the meta device
    assert config.title == (
        "nested attention encoder (sizes of the public release) for SDXL, 1024 tokens; layer order down, up, mid"
    )
    encoder = NestedEncoder(config, device="meta")
    encoder.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("k", ["to_k_ip.weight", "to_k_nest.weight", "nested_to_k.weight", "to_k.weight", "k_proj"])
def test_public_release_under_any_layer_name(k: str) -> None:
    file = foreign(meta_weights(RELEASE), projection="image_proj.", k=k, v=k.replace("k_", "v_").replace("_k", "_v"))
    config, _ = identify(file)
    assert (config.kind, config.licence) == ("nested", "CC BY-NC-SA 4.0")


# --- names ---


@pytest.mark.parametrize("projection", ["", "image_proj.", "image_proj_model.", "qformer.", "module.net.resampler."])
def test_resampler_under_any_prefix(projection: str) -> None:
    wanted = weights(TINY)
    _, state = identify(foreign(wanted, projection))
    assert_same(state, wanted)


@pytest.mark.parametrize(
    ("k", "v"),
    [
        ("to_k_ip.weight", "to_v_ip.weight"),
        ("to_k_nest.weight", "to_v_nest.weight"),
        ("nested_to_k.weight", "nested_to_v.weight"),
        ("to_k.weight", "to_v.weight"),
        ("k_proj.weight", "v_proj.weight"),
        ("nested.key.weight", "nested.value.weight"),
        ("W_K", "W_V"),
        ("wk", "wv"),
        ("keys.to_k", "values.to_v"),
    ],
)
def test_layers_whose_names_differ_in_k_and_v(k: str, v: str) -> None:
    wanted = weights(TINY)
    _, state = identify(foreign(wanted, k=k, v=v))
    assert_same(state, wanted)


@pytest.mark.parametrize("side_first", ["to_k_layers.{}.weight", "nested.key.{}.weight"])
def test_number_after_the_side(side_first: str) -> None:
    wanted = weights(TINY)
    file = foreign(wanted, layer=lambda n: f"{n}/", k="k", v="v")
    other = side_first.replace("_k_", "_v_").replace("key", "value")
    names = {f"{n}/{side}": form.format(n) for n in range(70) for side, form in (("k", side_first), ("v", other))}
    _, state = identify({names.get(name, name): tensor for name, tensor in file.items()})
    assert_same(state, wanted)


@pytest.mark.parametrize("config", [TINY, TINY_SD15], ids=["sdxl", "sd15"])
@pytest.mark.parametrize("form", ["diffusers", "processor", "underscores", "no attn2", "original", "original flat"])
def test_layers_named_by_their_place_in_the_unet(config: EncoderConfig, form: str) -> None:
    layers = family_of(config.family).layers()

    def name(index: int) -> str:
        layer = layers[index]
        return {
            "diffusers": f"unet.{layer.diffusers}.",
            "processor": f"{layer.diffusers}.processor.",
            "underscores": f"adapters.{layer.diffusers.replace('.', '_')}.",
            "no attn2": f"{layer.diffusers.removesuffix('.attn2')}.nested.",
            "original": f"diffusion_model.{layer.original}.",
            "original flat": f"{layer.original.replace('.', '_')}.",
        }[form]

    wanted = weights(config)
    file = foreign(wanted, layer=name)
    shuffled = list(file)
    random.Random(0).shuffle(shuffled)
    found, state = identify({key: file[key] for key in shuffled})
    assert_same(state, wanted)
    assert found.family == config.family
    assert found.title.endswith("layer order down, up, mid, by name")


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    shuffle=st.randoms(use_true_random=False),
    prefix=st.from_regex(r"([a-z]{1,8}\.){0,2}", fullmatch=True),
    start=st.integers(0, 120),
    step=st.integers(1, 3),
)
def test_numbers_are_read_as_numbers_whatever_the_keys_order(
    shuffle: random.Random, prefix: str, start: int, step: int
) -> None:
    wanted = weights(TINY_SD15)
    file = foreign(wanted, layer=lambda n: f"{prefix}adapters.{start + step * n}.")
    keys = list(file)
    shuffle.shuffle(keys)
    _, state = identify({key: file[key] for key in keys})
    assert_same(state, wanted)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nested_dictionaries(depth: int) -> None:
    wanted = weights(TINY)
    config, state = identify({"epoch": 3, "model": nest(foreign(wanted), depth)})
    assert_same(state, wanted)
    assert config.kind == "nested"


def test_queries_without_a_batch_dimension() -> None:
    wanted = weights(TINY)
    _, state = identify(foreign(wanted | {"resampler.latents": wanted["resampler.latents"][0]}))
    assert_same(state, wanted)


def test_feed_forward_under_other_names() -> None:
    wanted = weights(TINY)
    places = {".1.0.weight": ".1.norm.weight", ".1.0.bias": ".1.norm.bias"}
    places |= {".1.1.weight": ".1.net.0.weight", ".1.3.weight": ".1.net.2.weight"}
    file = {}
    for name, tensor in foreign(wanted).items():
        for ours, theirs in places.items():
            if "layers." in name and name.endswith(ours):
                name = name.removesuffix(ours) + theirs
        file[name] = tensor
    _, state = identify(file)
    assert_same(state, wanted)


def test_head_count_follows_the_size_of_the_queries() -> None:
    assert identify(foreign(weights(TINY)))[0].resampler == TINY.resampler


# --- order ---


@pytest.mark.parametrize("config", [RELEASE, PLUS_SD15], ids=["sdxl", "sd15"])
def test_order_of_numbered_layers_is_settled_by_their_widths(config: EncoderConfig) -> None:
    family = family_of(config.family)
    state = meta_weights(config)
    found, read = identify(foreign(state, order=family.execution_order()))
    assert found.widths == config.widths
    assert found.title.endswith(f"layer order {EXECUTION_ORDER}")
    assert {name: tensor.shape for name, tensor in read.items()} == {n: tensor.shape for n, tensor in state.items()}


@pytest.mark.parametrize("config", [TINY, TINY_SD15], ids=["sdxl", "sd15"])
def test_layers_in_execution_order_end_up_where_they_belong(config: EncoderConfig) -> None:
    wanted = weights(config)
    _, state = identify(foreign(wanted, order=family_of(config.family).execution_order()))
    assert_same(state, wanted)


@pytest.mark.parametrize("family", PUBLISHED.values(), ids=list(PUBLISHED))
def test_equal_widths_are_taken_in_diffusers_order_and_said_so(family: Family) -> None:
    wanted = weights(replace(TINY, family=family.name, widths=(8,) * len(family.layers())))
    config, state = identify(foreign(wanted))
    assert_same(state, wanted)
    assert config.title.endswith(f"{DIFFUSERS_ORDER} (their widths would fit {EXECUTION_ORDER} as well)")
    assert f"narrow layers 8x{len(family.layers())}" in config.title


def test_unknown_sequence_is_refused_with_both_known_ones() -> None:
    order = tuple(reversed(range(70)))
    assert message(foreign(meta_weights(RELEASE), order=order)) == (
        "The output widths of the 70 key / value layers fit no known order of an SDXL U-Net. "
        "Found 1280x10, 640x6, 1280x50, 640x4; "
        "expected 640x4, 1280x50, 640x6, 1280x10 (down, up, mid) or 640x4, 1280x60, 640x6 (down, mid, up)."
    )


def test_names_of_a_place_with_another_width_are_refused() -> None:
    layers = SDXL.layers()
    order = SDXL.execution_order()
    file = foreign(weights(TINY), layer=lambda n: f"{layers[n].diffusers}.", order=order)
    assert "fit no known order of an SDXL U-Net. Found 8x4, 16x60, 8x6;" in message(file)


def test_names_of_another_unet_are_refused() -> None:
    layers = SDXL.layers()
    file = foreign(weights(TINY), layer=lambda n: f"{layers[n].diffusers.replace('down_blocks.1', 'down_blocks.0')}.")
    said = message(file)
    assert "not those of SDXL: no down_blocks.1.attentions.0.transformer_blocks.0.attn2" in said
    assert "instead down_blocks.0.attentions.0.transformer_blocks.0.attn2" in said


# --- IP-Adapter Plus ---


@pytest.mark.parametrize("config", [PLUS_SDXL, PLUS_SD15], ids=["sdxl", "sd15"])
def test_ip_adapter_plus(config: EncoderConfig) -> None:
    state = meta_weights(config)
    file = foreign(state, "image_proj.", lambda n: f"ip_adapter.{2 * n + 1}.", "to_k_ip.weight", "to_v_ip.weight")
    found, _ = identify(nest(file))
    assert (found.kind, found.family, found.tokens) == ("ip-adapter-plus", config.family, 16)
    assert found.resampler == config.resampler
    assert found.kind == "ip-adapter-plus"
    assert found.licence == "Apache-2.0"
    assert found.title.startswith(
        f"IP-Adapter Plus, experimental as a nested attention encoder for {family_of(config.family).title}, 16 tokens"
    )


# --- 4-token SD 1.5 ---


def pooled_file(state: State) -> State:
    return foreign(state, "image_proj.", lambda n: f"ip_adapter.{2 * n + 1}.")


def test_sd15_pooled_nested_dictionaries() -> None:
    wanted = weights(TINY_POOLED)
    config, state = identify(nest(pooled_file(wanted)))
    assert_same(state, wanted)
    assert (config.kind, config.family, config.tokens) == ("nested-sd15-pooled", "sd15", 4)
    assert (config.image_features, config.value_norm, config.feature_dim) == ("pooled", "none", 24)
    assert "reading the pooled image embedding for SD 1.5" in config.title
    encoder = NestedEncoder(config)
    encoder.load_state_dict(state)
    assert encoder.encode(torch.randn(1, 24)).shape == (1, 4, 16)


def test_training_checkpoint_with_the_unet_inside(caplog: pytest.LogCaptureFixture) -> None:
    wanted = weights(TINY_POOLED)
    file = foreign(wanted)
    for layer in SD15.layers():
        place = f"unet.{layer.diffusers}."
        for own in ("to_q", "to_k", "to_v"):
            file[f"{place}{own}.weight"] = torch.randn(layer.width, 16)
            file[f"{place.replace('attn2', 'attn1')}{own}.weight"] = torch.randn(layer.width, layer.width)
        # The processors are modules of the U-Net as well as of the adapter list: the same tensors twice.
        for side in "kv":
            file[f"{place}processor.to_{side}_nest.weight"] = wanted[f"to_{side}.{layer.index}.weight"]
    file["unet.down_blocks.0.resnets.0.conv1.weight"] = torch.randn(8, 8, 3, 3)
    config, state = identify(file)
    assert_same(state, wanted)
    assert config.kind == "nested-sd15-pooled"
    assert "tensors of the file are not the encoder's and were left out" in caplog.text


# --- options and metadata ---


def test_option_beats_metadata_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_file(foreign(weights(TINY)), path)
    assert read_encoder(path)[0].alpha == 2.0
    encoder = NestedEncoder(replace(TINY, image_features="last", value_norm="unit", alpha=1.5, pooled="placeholder"))
    write_encoder(path, encoder)
    config, _ = read_encoder(path)
    assert (config.image_features, config.value_norm, config.alpha, config.pooled) == (
        "last",
        "unit",
        1.5,
        "placeholder",
    )
    config, _ = read_encoder(path, image_features="penultimate", alpha=3)
    assert (config.image_features, config.value_norm, config.alpha, config.pooled) == (
        "penultimate",
        "unit",
        3,
        "placeholder",
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"value_norm": "l2"}, 'Unknown value_norm "l2". Known: match, match_per_head, unit, none.'),
        ({"alpha": -1.0}, "alpha must be a number above 0"),
        ({"image_features": "pooled"}, 'reads "penultimate" or "last"'),
        ({"pooled": "end"}, 'Unknown pooled "end". Known: eos, placeholder.'),
    ],
)
def test_unknown_option_is_refused(options: dict[str, object], said: str) -> None:
    assert said in message(foreign(weights(TINY)), **options)


OWN = {"format": "nested_attention.encoder", "version": "1"}


def own_layout(state: State) -> State:
    return foreign(state, "resampler.", lambda n: f"layers.{n}.", "to_k.weight", "to_v.weight")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "2"}, "format version 2, this pack reads up to version 1: update the pack"),
        ({"version": "beta"}, 'format version is "beta"; expected a number from 1 to 1'),
        ({"version": ""}, 'format version is ""'),
        ({"format": "nested_attention.subject"}, "a saved subject, not an encoder. Open it with Load Subject"),
        (
            {"format": "nested_attention.map"},
            'Expected a file of format "nested_attention.encoder", got "nested_attention.map"',
        ),
        ({"kind": "hyper"}, 'metadata says kind "hyper", its weights are of kind nested or ip-adapter-plus'),
        ({"kind": "nested-sd15-pooled"}, 'says kind "nested-sd15-pooled", its weights are of kind nested'),
        ({"family": "sd15"}, 'metadata says family "sd15", its weights are of family sdxl'),
        ({"tokens": "6"}, 'metadata says tokens "6", its weights are of tokens 5'),
        ({"alpha": "two"}, 'metadata says alpha "two"; expected a number such as 2.0'),
        ({"alpha": "0"}, "alpha must be a number above 0"),
        ({"dim_head": "x"}, 'metadata says dim_head "x"; expected a whole number above 0'),
        ({"dim_head": "60"}, "has 128 outputs, which is not a whole number of attention heads of 60 channels"),
        ({"value_norm": "l2"}, 'Unknown value_norm "l2"'),
        ({"image_features": "first"}, 'Unknown image_features "first"'),
        ({"pooled": "end"}, 'Unknown pooled "end"'),
    ],
)
def test_metadata_that_does_not_fit_is_refused(change: dict[str, str], said: str) -> None:
    assert said in message(own_layout(weights(TINY)), OWN | change)


def test_own_file_in_another_order_is_refused() -> None:
    assert "this pack writes them in the order down, up, mid" in message(
        foreign(weights(TINY), "resampler.", lambda n: f"layers.{n}.", "to_k", "to_v", SDXL.execution_order()), OWN
    )


def test_metadata_of_other_programs_means_nothing() -> None:
    config, _ = identify(foreign(weights(TINY)), {"format": "pt", "alpha": "9", "version": "77"})
    assert config.alpha == 2.0


# --- writing ---


@pytest.mark.parametrize("config", [TINY, TINY_SD15, TINY_POOLED], ids=["sdxl", "sd15", "pooled"])
def test_written_encoder_comes_back(tmp_path: Path, config: EncoderConfig) -> None:
    config = replace(config, licence="CC0", base_model="my base", title="pets", alpha=0.1)
    encoder = NestedEncoder(config)
    write_encoder(tmp_path / "pets.safetensors", encoder)
    again = load_encoder(tmp_path / "pets.safetensors")
    assert_same(again.state_dict(), encoder.state_dict())
    expected = replace(config, fingerprint=fingerprint(encoder.state_dict()), title="pets (this pack's format)")
    assert again.config == expected
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())
    write_encoder(tmp_path / "again.safetensors", again)
    assert load_encoder(tmp_path / "again.safetensors").config == expected


def test_unusual_heads_come_back(tmp_path: Path) -> None:
    config = replace(TINY, resampler=ResamplerShape(dim=32, depth=1, heads=3, dim_head=24, ff_mult=1))
    write_encoder(tmp_path / "e.safetensors", NestedEncoder(config))
    assert load_encoder(tmp_path / "e.safetensors").config.resampler == config.resampler


def test_names_and_metadata_in_the_file(tmp_path: Path) -> None:
    write_encoder(tmp_path / "e.safetensors", NestedEncoder(TINY_POOLED))
    with safe_open(tmp_path / "e.safetensors", framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert names == {f"layers.{i}.to_{side}.weight" for i in range(16) for side in "kv"} | {
        f"resampler.{module}.{part}" for module in ("proj", "norm") for part in ("weight", "bias")
    }
    assert metadata.pop("fingerprint")
    assert metadata == {
        "format": "nested_attention.encoder",
        "version": "1",
        "kind": "nested-sd15-pooled",
        "family": "sd15",
        "base_model": "SD 1.5",
        "tokens": "4",
        "image_features": "pooled",
        "value_norm": "none",
        "alpha": "2.0",
        "pooled": "eos",
        "licence": "unknown",
        "dim_head": "64",
        "title": "",
    }


def test_load_in_another_dtype(tmp_path: Path) -> None:
    write_encoder(tmp_path / "e.safetensors", NestedEncoder(TINY_POOLED))
    assert {p.dtype for p in load_encoder(tmp_path / "e.safetensors").parameters()} == {torch.float32}
    half = load_encoder(tmp_path / "e.safetensors", dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.encode(torch.randn(1, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    encoder = NestedEncoder(TINY_POOLED)
    (tmp_path / "taken").mkdir()
    with pytest.raises(NestedAttentionError, match="The encoder could not be saved as .*taken"):
        write_encoder(tmp_path / "taken", encoder)
    with pytest.raises(NestedAttentionError, match="Check that the folder .*no folder exists"):
        write_encoder(tmp_path / "no folder" / "e.safetensors", encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_write_replaces_the_whole_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    path.write_bytes(b"old")
    write_encoder(path, NestedEncoder(TINY_POOLED))
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]
    assert read_encoder(path)[0].kind == "nested-sd15-pooled"
    plain = tmp_path / "plain"
    plain.touch()
    assert os.stat(path).st_mode == os.stat(plain).st_mode


# --- fingerprint ---


def test_fingerprint_is_of_the_weights_not_of_their_names(tmp_path: Path) -> None:
    state = weights(TINY)
    torch.save(nest(foreign(state)), tmp_path / "a.bin")
    save_file(foreign(state, "qformer.", k="k.weight", v="v.weight"), tmp_path / "b.safetensors")
    prints = {read_encoder(path)[0].fingerprint for path in tmp_path.iterdir()}
    assert prints == {fingerprint(state)}
    assert len(fingerprint(state)) == 32


def test_fingerprint_tells_encoders_apart() -> None:
    state = weights(TINY)
    prints = {fingerprint(state), fingerprint(weights(TINY, seed=1))}
    for name in ("resampler.latents", "to_k.69.weight", "to_v.0.weight", "resampler.norm_out.bias"):
        prints.add(fingerprint(state | {name: state[name] * 1.001}))
    swapped = state | {"to_k.0.weight": state["to_k.1.weight"], "to_k.1.weight": state["to_k.0.weight"]}
    assert len(prints | {fingerprint(swapped)}) == 7


def test_trained_weights_get_a_new_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    write_encoder(path, NestedEncoder(TINY_POOLED))
    encoder = load_encoder(path)
    before = encoder.config.fingerprint
    encoder.to_k[3].weight.mul_(1.1)
    write_encoder(path, encoder, keep_fingerprint=True)
    assert read_encoder(path)[0].fingerprint == before
    write_encoder(path, encoder)
    assert read_encoder(path)[0].fingerprint not in ("", before)


# --- the converter ---


def test_converter_halves_a_file_and_carries_its_fingerprint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = weights(TINY)
    source, target = tmp_path / "ip_adapter.bin", tmp_path / "faces.safetensors"
    torch.save(nest(foreign(state)), source)
    options = [
        "--dtype",
        "fp16",
        "--image-features",
        "last",
        "--alpha",
        "1.5",
        "--licence",
        "CC0",
        "--base-model",
        "mine",
    ]
    assert convert([str(source), str(target), *options]) == 0
    config, converted = read_encoder(target)
    assert_same(converted, {name: tensor.half() for name, tensor in state.items()})
    assert config.fingerprint == read_encoder(source)[0].fingerprint
    assert (config.image_features, config.alpha, config.licence, config.base_model) == ("last", 1.5, "CC0", "mine")
    said = capsys.readouterr().out
    assert (
        "ip_adapter.bin: nested attention encoder for SDXL with narrow layers 8x4, 16x50, 8x6, 16x10, 5 tokens" in said
    )
    assert config.fingerprint in said
    # Once more, from our own format: nothing but the precision changes.
    assert convert([str(target), str(tmp_path / "b.safetensors"), "--dtype", "bf16"]) == 0
    again, twice = read_encoder(tmp_path / "b.safetensors")
    assert again == config
    assert_same(twice, {name: tensor.bfloat16() for name, tensor in converted.items()})


def test_converter_refuses_to_replace_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write_encoder(source, NestedEncoder(TINY_POOLED))
    target.write_bytes(b"mine")
    assert convert([str(source), str(target)]) == 1
    assert "out.safetensors exists. Choose another name, or add --force" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"
    assert convert([str(source), str(target), "--force"]) == 0
    assert read_encoder(target)[0].kind == "nested-sd15-pooled"


def test_converter_refuses_values_the_dtype_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = weights(TINY_POOLED)
    state["to_v.2.weight"][0, 0] = 1e6
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(foreign(state), source)
    assert convert([str(source), str(target), "--dtype", "fp16"]) == 1
    assert "to_v.2.weight has values up to 1e+06, which fp16 can't hold. Use --dtype bf16 or fp32." in (
        capsys.readouterr().err
    )
    assert not target.exists()


def test_converter_wants_a_safetensors_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert([str(tmp_path / "in.bin"), str(tmp_path / "out.bin")]) == 1
    assert "out.bin: the output is a safetensors file, so end its name in .safetensors." in capsys.readouterr().err


def test_converter_as_a_command(tmp_path: Path) -> None:
    missing, target = tmp_path / "no.bin", tmp_path / "out.safetensors"
    ran = subprocess.run(
        [sys.executable, "-m", "nested_core.convert", missing, target],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: no.bin: The file can't be read (No such file or directory).")
    assert "Traceback" not in ran.stderr


# --- files ---


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["encoder.bin", "encoder.safetensors"])
def test_bin_files_of_both_kinds_whatever_their_name(tmp_path: Path, zipped: bool, name: str) -> None:
    wanted = weights(TINY)
    torch.save(nest(foreign(wanted)), tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert_same(read_encoder(tmp_path / name)[1], wanted)


def test_safetensors_named_bin(tmp_path: Path) -> None:
    save_file(foreign(weights(TINY_POOLED)), tmp_path / "encoder.bin")
    assert read_encoder(tmp_path / "encoder.bin")[0].kind == "nested-sd15-pooled"


@pytest.mark.parametrize("length", [0x0080, 0x3C20, 0x7B20, 0x4B50])
def test_header_length_that_looks_like_another_file(tmp_path: Path, length: int) -> None:
    """A safetensors file begins with its header's length, whose bytes can spell a pickle, a web page or a zip."""
    tensor = b"\0" * 4
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "e.safetensors").write_bytes(length.to_bytes(8, "little") + header.ljust(length) + tensor)
    assert "The file has 1 tensors, such as x (1,)" in read_message(tmp_path / "e.safetensors")


class Opinion:
    """Something that is not a tensor."""


def test_bin_with_objects_is_not_opened(tmp_path: Path) -> None:
    torch.save({"image_proj": Opinion()}, tmp_path / "e.bin")
    said = read_message(tmp_path / "e.bin")
    assert "holds Python objects besides tensors, which could run any code when opened" in said
    assert "Get the encoder as safetensors" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "The file is empty: the download failed. Get it again."),
        (b"<!DOCTYPE html><html>Sign in</html>", "The file is a web page, not weights: the site's answer was saved"),
        (b"\n\n  <html lang='en'>", "The file is a web page"),
        (b'{"error": "Repository not found"}', "The file is a JSON text, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"GGUF\x03\0\0\0", "neither a safetensors file nor a PyTorch .bin: it begins with b'GGUF"),
        (b"\x08", "neither a safetensors file nor a PyTorch .bin"),
        (b"\x40\0\0\0\0\0\0\0{", "The file is cut short: it has 9 of at least 72 bytes."),
        (b"\x08\0\0\0\0\0\0\0{nonsens", "The safetensors file is damaged"),
        (b'\x08\0\0\0\0\0\0\0{"x": 3}', "The safetensors file is damaged"),
        (b"\0\0\0\0\xff\0\0\0{", "The file is cut short: it has 9 of at least 1,095,216,660,488 bytes."),
        (b"PK\x03\x04 and then nothing", "The PyTorch file is damaged or cut short"),
        (b"\x80\x02", "The PyTorch file is damaged or cut short"),
        (b"\x80\x02t.", "The PyTorch file is damaged or cut short"),  # an IndexError inside PyTorch
        (struct.pack("<Q", 10_000) + b"{" + b'"a":[' + b"[" * 9_994, "The safetensors file is damaged"),
    ],
)
def test_files_that_hold_no_weights(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "encoder.safetensors").write_bytes(content)
    assert said in read_message(tmp_path / "encoder.safetensors")


@pytest.mark.parametrize("kept", [0.2, 0.9, 0.999])
def test_truncated_downloads(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "e.safetensors"
    save_file(foreign(weights(TINY)), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert f"cut short: it has {int(len(whole) * kept):,} of at least {len(whole):,} bytes" in read_message(path)
    torch.save(foreign(weights(TINY)), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert "The PyTorch file is damaged or cut short" in read_message(path)


def test_missing_file_folder_and_single_tensor(tmp_path: Path) -> None:
    assert "can't be read (No such file or directory). Full path: " in read_message(tmp_path / "none.safetensors")
    (tmp_path / "folder").mkdir()
    assert "This is a folder. Choose the .safetensors file inside." in read_message(tmp_path / "folder")
    torch.save(torch.zeros(3), tmp_path / "one.pt")
    assert "Expected a state dict (names and tensors), the file holds one Tensor." in read_message(tmp_path / "one.pt")


# --- other models ---

T = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("names", "what", "advice"),
    [
        (
            ["ip_adapter.1.to_k_ip.weight", "ip_adapter.0.to_q_lora.down.weight"],
            "an IP-Adapter FaceID file",
            "face recog",
        ),
        (["image_proj.perceiver_resampler.proj_in.weight"], "an IP-Adapter FaceID file", "face recognition embeddings"),
        (["pulid_ca.0.to_q.weight"], "a PuLID file", "own nodes"),
        (["id_encoder.visual_projection_2.weight"], "a PhotoMaker file", "PhotoMaker nodes"),
        (["lora_unet_input_blocks_4_1.lora_up.weight"], "a LoRA", "models/loras"),
        (["unet.down_blocks.1.attentions.0.to_q.lora_A.weight"], "a LoRA", "models/loras"),
        (["unet.down_blocks.0.attn1.processor.to_q_lora.down.weight"], "a LoRA", "models/loras"),
        (["lora_te1_x.hada_w1_a"], "a LoRA", "models/loras"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet", "models/controlnet"),
        (
            ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
            "a ControlNet",
            "controlnet",
        ),
        (
            [
                "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
                "first_stage_model.encoder.conv_in.weight",
                "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
            ],
            "a checkpoint (a whole diffusion model)",
            "models/checkpoints",
        ),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "a diffusion model", "models/diffusion_models"),
        (["vision_model.encoder.layers.0.self_attn.k_proj.weight"], "a CLIP vision model", "models/clip_vision"),
        (["visual.transformer.resblocks.0.attn.in_proj_weight"], "a CLIP vision model", "models/clip_vision"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text encoder", "models/text_encoders"),
        (["decoder.up.0.block.0.conv1.weight", "encoder.conv_in.weight"], "a VAE", "models/vae"),
        (["clip_l", "clip_g"], "a textual inversion", "models/embeddings"),
    ],
)
def test_other_models_are_named(names: list[str], what: str, advice: str) -> None:
    said = message(dict.fromkeys(names, T))
    assert said.startswith(f"This is not a nested attention encoder: it looks like {what}. ")
    assert advice in said


def test_face_adapters_without_lora_are_named() -> None:
    layers = {f"ip_adapter.{2 * i + 1}.to_{side}_ip.weight": T for i in range(16) for side in "kv"}
    portrait = message(layers | {"image_proj.proj.0.weight": torch.zeros(8, 512)})
    assert "looks like an IP-Adapter FaceID file" in portrait
    full_face = message(layers | {"image_proj.proj.0.weight": torch.zeros(8, 1280)})
    assert "looks like an IP-Adapter Full Face file" in full_face


def test_plain_ip_adapter_is_named() -> None:
    file = foreign(weights(TINY_POOLED), "image_proj.", lambda n: f"ip_adapter.{2 * n + 1}.", "to_k_ip", "to_v_ip")
    assert "it is a plain IP-Adapter file" in message(file)


def test_instant_id_is_named() -> None:
    config = replace(PLUS_SDXL, feature_dim=512)
    file = foreign(meta_weights(config), "image_proj.", lambda n: f"ip_adapter.{2 * n + 1}.", "to_k_ip", "to_v_ip")
    assert "it looks like an InstantID file" in message(file)


def test_something_else_is_shown() -> None:
    said = message({f"blocks.{i}.weight": torch.zeros(i, 3) for i in range(1, 8)})
    assert "expected a resampler (latents, proj_in, layers, proj_out, norm_out) or a pooled projection" in said
    assert "The file has 7 tensors, such as blocks.1.weight (1, 3), blocks.2.weight (2, 3)" in said
    assert "and 3 more" in said
    assert "The file has no tensors at all." in message({"epoch": 3})  # type: ignore[dict-item]


# --- encoders with something wrong ---


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_layer_without_partner_is_named() -> None:
    file = foreign(weights(TINY))
    said = message(without(file, "adapter_modules.7.to_v_nest.weight"))
    assert "these have no partner: adapter_modules.7.to_k_nest.weight (8, 16)" in said
    said = message(file | {"adapter_modules.141.to_k_nest.weight": torch.zeros(8, 16)})
    assert "these have no partner: adapter_modules.141.to_k_nest.weight (8, 16)" in said
    said = message({name: tensor for name, tensor in file.items() if "to_v" not in name})
    assert "no partner: adapter_modules.1.to_k_nest.weight (8, 16), adapter_modules.3." in said
    assert "and 66 more" in said


def test_missing_layers_are_counted() -> None:
    file = foreign(weights(TINY))
    said = message(without(file, "adapter_modules.139.to_v_nest.weight", "adapter_modules.139.to_k_nest.weight"))
    assert "Expected 70 (SDXL) or 16 (SD 1.5) pairs of key / value layers, found 69" in said
    assert "from adapter_modules.1.to_k_nest.weight to adapter_modules.137.to_k_nest.weight" in said
    assert (
        "of widths 8x4, 16x50, 8x6, 16x9. Known sequences: SDXL: 640x4, 1280x50, 640x6, 1280x10 (down, up, mid)" in said
    )


def test_resampler_without_layers() -> None:
    file = {name: tensor for name, tensor in foreign(weights(TINY)).items() if "adapter" not in name}
    assert "an image projection but no key / value layers; expected 70 (SDXL) or 16 (SD 1.5) pairs" in message(file)


def test_key_and_value_of_different_shapes() -> None:
    file = foreign(weights(TINY)) | {"adapter_modules.5.to_v_nest.weight": torch.zeros(16, 16)}
    assert message(file).endswith(
        "should have the same shape, got adapter_modules.5.to_k_nest.weight (8, 16), "
        "adapter_modules.5.to_v_nest.weight (16, 16)."
    )


def test_layers_that_read_another_width() -> None:
    file = foreign(weights(TINY))
    file |= {f"adapter_modules.5.to_{side}_nest.weight": torch.zeros(8, 12) for side in "kv"}
    said = message(file)
    assert (
        "should read tokens of width 16, as the image projection gives them (image_proj_model.proj_out.weight (16, 32))"
        in said
    )
    assert "got adapter_modules.5.to_k_nest.weight (8, 12), adapter_modules.5.to_v_nest.weight (8, 12)." in said


@pytest.mark.parametrize(
    "changed",
    [
        replace(TINY, bias=True),
        replace(TINY, resampler=replace(TINY.resampler, positions=9)),
        replace(TINY, resampler=replace(TINY.resampler, mean_pooled=2)),
        replace(TINY_SD15, bias=True, resampler=replace(TINY.resampler, positions=9, mean_pooled=4)),
    ],
    ids=["bias", "positions", "mean-pooled", "all, SD 1.5"],
)
def test_what_newer_trainers_write_is_read_and_written(changed: EncoderConfig, tmp_path: Path) -> None:
    wanted = weights(changed)
    config, state = identify(foreign(wanted))
    assert (config.bias, config.resampler, config.tokens) == (changed.bias, changed.resampler, changed.tokens)
    assert_same(state, wanted)
    write_state(tmp_path / "own.safetensors", config, state)
    again, same = read_encoder(tmp_path / "own.safetensors")
    assert (again.bias, again.resampler) == (changed.bias, changed.resampler)
    assert_same(same, wanted)
    encoder = load_encoder(tmp_path / "own.safetensors")
    tokens = encoder.encode(torch.randn(1, 9, changed.feature_dim))
    k, _ = encoder.keys_values(tokens, 3)
    bias = wanted["to_k.3.bias"] if changed.bias else 0
    torch.testing.assert_close(k, tokens @ wanted["to_k.3.weight"].T + bias)


def test_the_public_release_with_positions_is_still_called_that() -> None:
    config, _ = identify(foreign(meta_weights(replace(RELEASE, bias=True, resampler=ResamplerShape(positions=257)))))
    assert "sizes of the public release" in config.title
    assert (config.pooled, config.licence) == ("placeholder", "CC BY-NC-SA 4.0")


def test_layers_with_bias_in_part() -> None:
    file = foreign(weights(TINY)) | {"adapter_modules.5.to_k_nest.bias": torch.zeros(8)}
    said = message(file)
    assert "Some key / value layers have a bias (adapter_modules.5.to_k_nest.bias (8,)), and others none" in said
    file = foreign(weights(replace(TINY, bias=True))) | {"adapter_modules.5.to_k_nest.bias": torch.zeros(9)}
    assert "a number per output of the layer, got adapter_modules.5.to_k_nest.bias (9,)" in message(file)


@pytest.mark.parametrize(
    ("k", "v", "q"),
    [
        ("to_k_nest.weight", "to_v_nest.weight", "to_q_nest.weight"),
        ("to_k.weight", "to_v.weight", "to_q.weight"),
        ("nested_key.weight", "nested_value.weight", "nested_query.weight"),
    ],
)
def test_layers_with_queries_of_their_own(k: str, v: str, q: str) -> None:
    file = foreign(weights(TINY), k=k, v=v)
    assert identify(file)[0].tokens == TINY.tokens
    file |= {key.replace(k, q): torch.zeros_like(tensor) for key, tensor in file.items() if key.endswith(k)}
    said = message(file)
    assert "have queries of their own: adapter_modules." in said and "the queries are the U-Net's" in said


def test_queries_of_the_unet_beside_nested_layers_are_no_hindrance() -> None:
    wanted = weights(TINY)
    file = foreign(wanted)
    for layer in SDXL.layers():
        for name in ("to_q", "to_k", "to_v"):
            file[f"unet.{layer.diffusers}.{name}.weight"] = torch.zeros(8, 16)
    assert_same(identify(file)[1], wanted)


def test_two_sets_of_layers() -> None:
    state = weights(TINY)
    two = foreign(state, layer=lambda n: f"a.{n}.") | foreign(state, layer=lambda n: f"b.{n}.")
    said = message(two)
    assert "2 complete sets of key / value layers, named a.#.to_{k}_nest.weight and b.#.to_{k}_nest.weight" in said


def test_nested_layers_are_preferred_to_ip_adapter_layers() -> None:
    wanted = weights(TINY)
    file = foreign(weights(TINY, seed=1), k="to_k_ip.weight", v="to_v_ip.weight") | foreign(wanted)
    assert_same(identify(file)[1], wanted)


def test_two_resamplers() -> None:
    state = weights(TINY)
    said = message(foreign(state) | foreign(state, "ema.image_proj_model."))
    assert 'holds 2 image projections, under "image_proj_model.", "ema.image_proj_model."; expected one' in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("proj_in.weight", "no image_proj_model.proj_in.weight"),
        ("layers.0.0.to_q.weight", "no image_proj_model.layers.0.0.to_q.weight"),
        ("norm_out.bias", "The file lacks parts of the encoder: resampler.norm_out.bias."),
        ("layers.1.0.to_kv.weight", "The file lacks parts of the encoder: resampler.layers.1.0.to_kv.weight."),
        (
            "layers.1.1.3.weight",
            "a norm (weight and bias) and two matrices without bias, got image_proj_model.layers.1.1.0",
        ),
    ],
)
def test_incomplete_resampler(name: str, said: str) -> None:
    assert said in message(without(foreign(weights(TINY)), f"image_proj_model.{name}"))


def test_resampler_of_other_sizes() -> None:
    file = foreign(weights(TINY)) | {"image_proj_model.layers.1.0.to_out.weight": torch.zeros(32, 64)}
    assert message(file) == (
        "Parts of the encoder don't fit together: "
        "image_proj_model.layers.1.0.to_out.weight (32, 64), expected (32, 128)."
    )
    file = foreign(weights(TINY)) | {"image_proj_model.latents": torch.zeros(5)}
    assert "queries should have the shape (1, tokens, width), got image_proj_model.latents (5,)" in message(file)


def test_resampler_parts_that_would_change_the_result() -> None:
    file = foreign(weights(TINY)) | {"image_proj_model.pos_emb_2d.weight": torch.zeros(257, 24)}
    said = message(file)
    assert "parts of the encoder that this pack does not know: image_proj_model.pos_emb_2d.weight (257, 24)" in said
    assert "would change the result" in said


def test_quantised_weights() -> None:
    file = {name: tensor.to(torch.int8) for name, tensor in foreign(weights(TINY)).items()}
    said = message(file)
    assert "should be floating-point numbers, but image_proj_model.latents" in said
    assert "are torch.int8. Of quantised encoders, fp8 with one scale a weight can be read" in said


def fp8(state: State, scale: str, dtype: torch.dtype = torch.float8_e4m3fn, rows: bool = False) -> State:
    """Every matrix of a file as scaled fp8, as ComfyUI's "fp8_scaled" files have them."""
    file = dict(state)
    for name, tensor in state.items():
        if tensor.ndim == 2 and name.endswith("weight"):
            peak = tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().max()
            factor = peak / torch.finfo(dtype).max
            file[name] = (tensor / factor).to(dtype)
            file[f"{name.removesuffix('weight')}{scale}"] = factor
    return file


def wanted_of_fp8(state: State, file: State, scale: str) -> State:
    """What `fp8` keeps of the weights, computed apart from the reader; names as `foreign` gives them."""
    return {
        name: file[name].float() * file[f"{name.removesuffix('weight')}{scale}"]
        if file[name].dtype.itemsize == 1
        else file[name]
        for name in state
    }


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
def test_scaled_fp8_is_read_with_its_scales(tmp_path: Path, scale: str, rows: bool, dtype: torch.dtype) -> None:
    """Both generations of ComfyUI's names, with what stands beside them."""
    state = {name: tensor * 3 for name, tensor in foreign(weights(TINY)).items()}
    file = fp8(state, scale, dtype, rows)
    expected = identify(wanted_of_fp8(state, file, scale))[1]
    assert max((expected[n] - w).abs().max() for n, w in identify(state)[1].items()) < 1, "some fp8 is left of them"
    first = "adapter_modules.1.to_k_nest."
    file |= (
        {"scaled_fp8": torch.zeros(2, dtype=dtype), f"{first}scale_input": torch.tensor(2.0)}
        if scale == "scale_weight"
        else {f"{first}comfy_quant": torch.zeros(9, dtype=torch.uint8), f"{first}input_scale": torch.tensor(2.0)}
    )
    save_file(file, tmp_path / "e.safetensors")
    torch.save(nest(file), tmp_path / "e.bin")
    for read in (read_encoder(tmp_path / "e.safetensors"), read_encoder(tmp_path / "e.bin"), identify(file)):
        assert_same(read[1], expected)
        assert read[0].tokens == TINY.tokens and read[0].fingerprint == fingerprint(expected)
    half = load_encoder(tmp_path / "e.safetensors", dtype=torch.float16).state_dict()
    assert_same(half, {name: tensor.half() for name, tensor in expected.items()})


def test_fp8_without_scales_is_read_as_it_is() -> None:
    file = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in foreign(weights(TINY)).items()}
    state = identify(file)[1]
    assert {tensor.dtype for tensor in state.values()} == {torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("name", "made", "said"),
    [
        ("to_k_nest.weight_scale", torch.ones(8, 2), "torch.float32 of the shape (8, 2) for adapter_modules.5.to_k"),
        ("to_k_nest.weight_scale", torch.ones(8, 1, dtype=torch.uint8), "got torch.uint8 of the shape (8, 1)"),
        ("to_k_nest.weight_scale_2", torch.ones(()), "The file has adapter_modules.5.to_k_nest.weight_scale_2, of a"),
        ("to_k_nest.weight_scale_inv", torch.ones(1, 1), "of a quantisation this pack does not know"),
        ("to_k_nest.scale", torch.ones(()), "this pack does not know: adapter_modules.5.to_k_nest.scale ()"),
    ],
)
def test_other_quantisations_are_refused(name: str, made: Tensor, said: str) -> None:
    file = fp8(foreign(weights(TINY)), "weight_scale") | {f"adapter_modules.5.{name}": made}
    text = message(file)
    assert said in text and ("fp16, bf16 or fp32 file" in text or "not loaded" in text)


def test_a_scale_of_weights_that_are_not_fp8_is_refused() -> None:
    file = foreign(weights(TINY)) | {"adapter_modules.5.to_k_nest.scale_weight": torch.tensor(0.5)}
    assert "belongs to an fp8 weight, got torch.float32 of the shape () for adapter_modules.5.to_k_nest.weight" in (
        message(file)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    file = foreign(weights(TINY))
    for name in ("adapter_modules.5.to_v_nest.weight", "image_proj_model.latents"):
        file[name].view(-1)[-1] = value
    save_file({name: tensor.to(dtype) for name, tensor in file.items()}, tmp_path / "e.safetensors")
    said = read_message(tmp_path / "e.safetensors")
    assert "not numbers (NaN or infinite), in image_proj_model.latents, adapter_modules.5.to_v_nest.weight. " in said
    assert "get it again" in said


def test_values_that_the_type_of_the_run_cannot_hold_are_refused(tmp_path: Path) -> None:
    file = foreign(weights(TINY))
    file["adapter_modules.5.to_v_nest.weight"][0, 0] = -1e6
    save_file(file, tmp_path / "e.safetensors")
    with pytest.raises(NestedAttentionError) as caught:
        load_encoder(tmp_path / "e.safetensors", dtype=torch.float16)
    assert str(caught.value) == (
        "e.safetensors: to_v.2.weight has values up to 1e+06, which fp16 can't hold. Load it in bf16 or fp32 (ComfyUI: "
        "start it with --force-fp32)."
    )
    assert load_encoder(tmp_path / "e.safetensors", dtype=torch.bfloat16).to_v[2].weight.isfinite().all()


def test_only_the_encoder_is_read_of_a_larger_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training checkpoint holds the U-Net too."""
    file = foreign(weights(TINY)) | {"unet.down_blocks.0.resnets.0.conv1.weight": torch.randn(8, 8, 3, 3)}
    save_file(file, tmp_path / "e.safetensors")
    read, original = [], files._read_tensor

    def note(file: BinaryIO, place: int, shape: Tensor) -> Tensor:
        read.append(shape.shape)
        return original(file, place, shape)

    monkeypatch.setattr(files, "_read_tensor", note)
    assert_same(read_encoder(tmp_path / "e.safetensors")[1], weights(TINY))
    assert len(read) == len(file) - 1 and (8, 8, 3, 3) not in read


def test_file_name_is_in_every_message_of_the_reader(tmp_path: Path) -> None:
    save_file({"clip_l": T}, tmp_path / "style.safetensors")
    assert "looks like a textual inversion" in read_message(tmp_path / "style.safetensors")
    assert load_file(tmp_path / "style.safetensors").keys() == {"clip_l"}


def test_what_an_encoder_was_trained_on_comes_back_and_is_one_line(tmp_path: Path) -> None:
    said = {"base_model": "SDXL 1.0", "resolution": 1024, "pictures": 1200, "subjects": 34, "step": 5000,
            "class_words": {"dog": 30, "cat": 4}}  # fmt: skip
    config = replace(TINY, training=json.dumps(said))
    write_encoder(tmp_path / "e.safetensors", NestedEncoder(config))
    found = load_encoder(tmp_path / "e.safetensors").config
    assert json.loads(found.training) == said
    expected = "trained on SDXL 1.0 at 1,024 pixels: 1,200 pictures of 34 subjects (dog, cat), 5,000 steps"
    assert describe_training(found.training) == expected
    assert convert([str(tmp_path / "e.safetensors"), str(tmp_path / "half.safetensors"), "--dtype", "fp16"]) == 0
    assert load_encoder(tmp_path / "half.safetensors").config.training == found.training


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ("", ""),
        ("{", ""),
        ("[" * 100_000, ""),
        ("[1]", ""),
        ('{"pictures": [1], "step": {}, "class_words": ["dog"]}', ""),
        ('{"step": 3, "subjects": 4}', "trained: 3 steps"),
        ('{"base_model": "a\\nb\\tc"}', "trained on a b c"),
        (json.dumps({"base_model": "x" * 500}), f"trained on {'x' * 80}"),
    ],
)
def test_what_somebody_elses_file_says_of_its_training_breaks_nothing(training: str, expected: str) -> None:
    assert describe_training(training) == expected
