"""The layer-weight grammar of Apply Subject (Advanced)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.errors import NestedAttentionError
from nested_core.layer_weights import parse_layer_weights
from nested_core.layers import SD15, SDXL

LAYERS = SDXL.layers()


def weights_by_block(text):
    return {layer.block: w for layer, w in zip(LAYERS, parse_layer_weights(text, LAYERS), strict=True)}


def test_empty_text_is_one_everywhere():
    assert parse_layer_weights(" \n,; ", LAYERS) == (1.0,) * 70
    assert parse_layer_weights("", SD15.layers()) == (1.0,) * 16


def test_selectors_from_wide_to_narrow_and_later_entries_win():
    got = weights_by_block("all=0; output = 0.5, OUTPUT.0-1=1.25\noutput.0.3-4=-1, middle.0.9=2, input.4.1=.1")
    for (kind, number, transformer), weight in got.items():
        expected = {"input": 0.0, "middle": 0.0, "output": 1.25 if number <= 1 else 0.5}[kind]
        if (kind, number) == ("output", 0) and transformer in (3, 4):
            expected = -1.0
        if (kind, transformer) == ("middle", 9):
            expected = 2.0
        if (kind, number, transformer) == ("input", 4, 1):
            expected = 0.1
        assert weight == expected


@pytest.mark.parametrize(
    "text", ["output", "output=", "=1", "outputs=1", "output=x", "input.4.0.1=1", "input.-1=1", "all=9", "all=nan"]
)
def test_what_is_no_entry_is_named(text):
    with pytest.raises(NestedAttentionError, match="is not an entry. Expected SELECTOR=WEIGHT such as"):
        parse_layer_weights(f"middle=1, {text}", LAYERS)


@pytest.mark.parametrize("text", ["input.3=1", "middle.1=1", "output.6-9=0", "input.4.2=1", "output.5-3=1"])
def test_what_selects_nothing_lists_the_blocks(text):
    with pytest.raises(NestedAttentionError) as error:
        parse_layer_weights(text, LAYERS)
    assert f'"{text.split("=")[0]}" selects no layer of this model.' in str(error.value)
    assert "input.4 (0-1), input.5 (0-1), input.7 (0-9)" in str(error.value)


@given(st.text(alphabet="alinputmdeo.=-,0123456789 ;\n", max_size=40) | st.text(max_size=40))
def test_any_text_gives_weights_or_a_message(text):
    try:
        weights = parse_layer_weights(text, LAYERS)
    except NestedAttentionError:
        return
    assert len(weights) == 70 and all(abs(w) <= 5 for w in weights)
