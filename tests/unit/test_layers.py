"""The layer table, against diffusers' U-Net and diffusers' own conversion of original checkpoints."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from demo import FAMILY as SMALL_WORLD
from nested_core.errors import NestedAttentionError
from nested_core.layers import (
    DIFFUSERS_ORDER,
    EXECUTION_ORDER,
    PUBLISHED,
    SD15,
    SDXL,
    Family,
    compress,
    described_family,
    family_of,
    family_with,
    register,
    unet_layers,
)

UNETS = {
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    },
    "sd15": {
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "small_world": {
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 128,
        "use_linear_projection": True,
    },
}
BLOCKS = {"sdxl": (9, 9), "sd15": (12, 12), "small_world": (4, 4)}
KNOWN = [SDXL, SD15, SMALL_WORLD]
every = pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)


@pytest.fixture(scope="module", params=[family.name for family in KNOWN])
def family_and_unet(request: pytest.FixtureRequest) -> tuple[Family, UNet2DConditionModel]:
    with torch.device("meta"):
        return family_of(request.param), UNet2DConditionModel(**UNETS[request.param])


def test_layers_are_diffusers_processors_in_their_order(
    family_and_unet: tuple[Family, UNet2DConditionModel],
) -> None:
    family, unet = family_and_unet
    processors = [name.removesuffix(".processor") for name in unet.attn_processors if ".attn2." in name]
    layers = family.layers()
    assert [layer.diffusers for layer in layers] == processors
    assert [layer.index for layer in layers] == list(range(len(processors)))
    for layer in layers:
        to_k = unet.get_submodule(layer.diffusers).to_k
        assert (to_k.out_features, to_k.in_features) == (layer.width, family.context_dim)


@every
def test_original_names_convert_to_the_diffusers_names(family: Family) -> None:
    layers = family.layers()
    inputs, outputs = BLOCKS[family.name]
    original = {f"{layer.original}.to_k.weight": torch.tensor(layer.index) for layer in layers}
    # The converter counts blocks by their keys, so every block needs one.
    for block in [f"input_blocks.{i}" for i in range(inputs)] + [f"output_blocks.{i}" for i in range(outputs)]:
        original[f"{block}.0.in_layers.0.weight"] = torch.tensor(-1)
    original |= {f"middle_block.{i}.in_layers.0.weight": torch.tensor(-1) for i in (0, 2)}
    checkpoint = {f"model.diffusion_model.{key}": value for key, value in original.items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, {"layers_per_block": family.res_blocks})
    assert {key: value.item() for key, value in converted.items() if "attn2" in key} == {
        f"{layer.diffusers}.to_k.weight": layer.index for layer in layers
    }


def test_host_blocks() -> None:
    def blocks(family: Family) -> set[tuple[str, int]]:
        return {layer.block[:2] for layer in family.layers()}

    assert blocks(SDXL) == {("input", n) for n in (4, 5, 7, 8)} | {("middle", 0)} | {("output", n) for n in range(6)}
    assert blocks(SD15) == {("input", n) for n in (1, 2, 4, 5, 7, 8)} | {("middle", 0)} | {
        ("output", n) for n in range(3, 12)
    }
    by_block = {layer.block: layer for layer in SDXL.layers()}
    assert len(by_block) == 70
    assert by_block["middle", 0, 9].diffusers == "mid_block.attentions.0.transformer_blocks.9.attn2"
    assert by_block["middle", 0, 9].original == "middle_block.1.transformer_blocks.9.attn2"
    assert by_block["output", 5, 1].diffusers == "up_blocks.1.attentions.2.transformer_blocks.1.attn2"


def test_sequences_of_the_published_widths() -> None:
    assert compress(SDXL.widths()) == "640x4, 1280x50, 640x6, 1280x10"
    assert compress([SDXL.widths()[index] for index in SDXL.execution_order()]) == "640x4, 1280x60, 640x6"
    assert compress(SD15.widths()) == "320x2, 640x2, 1280x5, 640x3, 320x3, 1280x1"
    assert SDXL.describe_orders() == (
        "640x4, 1280x50, 640x6, 1280x10 (down, up, mid) or 640x4, 1280x60, 640x6 (down, mid, up)"
    )


@every
def test_order_is_told_by_the_published_widths(family: Family) -> None:
    widths = family.widths()
    count = len(widths)
    assert family.order_of(widths) == (DIFFUSERS_ORDER, tuple(range(count)))
    executed = [widths[index] for index in family.execution_order()]
    assert family.order_of(executed) == (EXECUTION_ORDER, family.execution_order())
    assert not family.is_ambiguous(widths) and not family.is_ambiguous(executed)
    assert sorted(family.execution_order()) == list(range(count))
    kinds = [family.layers()[index].block[0] for index in family.execution_order()]
    assert kinds == sorted(kinds, key=["input", "middle", "output"].index)


@every
def test_equal_widths_fit_both_orders_and_diffusers_is_taken(family: Family) -> None:
    narrow = [32] * len(family.layers())
    assert family.is_ambiguous(narrow)
    assert family.order_of(narrow) == (DIFFUSERS_ORDER, tuple(range(len(narrow))))


@every
def test_no_order_fits_shuffled_or_missing_layers(family: Family) -> None:
    widths = list(family.widths())
    assert family.order_of(widths[:-1]) is None
    assert family.order_of([*widths, widths[-1]]) is None
    assert family.order_of(widths[::-1]) is None
    assert not family.is_ambiguous(widths[:-1])


@every
@given(data=st.data())
def test_levels_are_read_back_from_widths(family: Family, data: st.DataObject) -> None:
    levels = tuple(data.draw(st.sampled_from([8, 16, 320])) for _ in family.channels)
    widths = family.widths(levels)
    found = family.levels_of(widths)
    assert found is not None
    assert family.widths(found) == widths
    assert found[1:] == levels[1:]  # SDXL's first level has no cross-attention to tell it by


def test_levels_of_published_widths_are_the_published_ones() -> None:
    assert SDXL.levels_of(SDXL.widths()) == (320, 640, 1280)
    assert SD15.levels_of(SD15.widths()) == (320, 640, 1280, 1280)
    assert SDXL.levels_of([32] * 70) == (32, 32, 32)


def test_unknown_family_is_refused() -> None:
    with pytest.raises(NestedAttentionError, match=r'Unknown base model family "flux".*"sdxl" \(SDXL\), "sd15"'):
        family_of("flux")


def test_a_family_of_ones_own_is_registered_once_and_by_one() -> None:
    assert register(SMALL_WORLD) is SMALL_WORLD and family_of("small_world") is SMALL_WORLD
    assert "small_world" not in PUBLISHED
    with pytest.raises(NestedAttentionError, match='another base model family of the name "sdxl"'):
        register(replace(SD15, name="sdxl"))
    assert family_of("sdxl") is SDXL


def test_a_described_family_is_checked() -> None:
    said = {**asdict(SMALL_WORLD), "channels": list(SMALL_WORLD.channels)}
    assert described_family(said) == SMALL_WORLD
    for change, words in (
        ({"depth_down": [1]}, "one entry per level"),
        ({"context_dim": "128"}, "should be whole numbers"),
        ({"colour": 1}, "is described by channels, context_dim"),
    ):
        with pytest.raises(NestedAttentionError, match=words):
            described_family({**said, **change})
    with pytest.raises(NestedAttentionError, match=r"is described by .*; got \[\]"):
        described_family([])


@every
def test_a_family_is_known_by_its_layers_and_its_text(family: Family) -> None:
    layers = family.layers()
    for names in ([layer.diffusers for layer in layers], [layer.block for layer in layers]):
        assert family_with(names, family.context_dim) is family
        assert family_with(names[1:], family.context_dim) is None
        assert family_with(names, 1) is None


def test_levels_must_agree() -> None:
    with pytest.raises(NestedAttentionError, match="got 2, 3 and 3 entries"):
        unet_layers((320, 640), (0, 1, 1), (0, 1, 1), 1)
    with pytest.raises(NestedAttentionError, match="got 4, 3 and 3 entries"):
        SDXL.layers((1, 2, 3, 4))


def test_compress() -> None:
    assert compress([]) == ""
    assert compress([1, 1, 2, 1]) == "1x2, 2x1, 1x1"
