"""Layer weights as artists write them: `output=0.5, middle=0, input.4-5=1.2`.

    entry     selector = weight          entries separated by commas, semicolons or new lines; later ones win
    selector  all | input | middle | output, then optionally a block (`input.4`) or blocks (`input.4-8`),
              then optionally a transformer block or several in it (`input.8.0`, `input.8.0-4`)
    weight    a number from -5 to 5; layers that nothing selects keep 1

Blocks are numbered as the host numbers them: SDXL's cross-attention is in input 4, 5, 7, 8, middle 0, output 0 to 5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from .errors import NestedAttentionError
from .layers import CrossAttentionLayer

_RANGE = r"(\d{1,4})(?:-(\d{1,4}))?"
_SELECTOR = re.compile(rf"(all|input|middle|output)(?:\.{_RANGE}(?:\.{_RANGE})?)?")
_LIMIT = 5.0


def _span(low: str | None, high: str | None) -> range | None:
    if low is None:
        return None
    return range(int(low), int(high if high is not None else low) + 1)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_layer_weights(text: str, layers: Sequence[CrossAttentionLayer]) -> tuple[float, ...]:
    """The weight of each layer, in the order of `layers`. Empty text: 1 everywhere.

    Raises NestedAttentionError naming the entry, what was expected, and the blocks that this U-Net has.
    """
    weights = [1.0] * len(layers)
    for entry in re.split(r"[,;\n]", text):
        entry = entry.strip()
        if not entry:
            continue
        selector, equals, value = entry.partition("=")
        match = _SELECTOR.fullmatch(selector.strip().lower())
        number = _number(value.strip())
        if not equals or match is None or number is None or not math.isfinite(number) or abs(number) > _LIMIT:
            raise NestedAttentionError(
                f'layer_weights: "{entry}" is not an entry. Expected SELECTOR=WEIGHT such as "output=0.5", "input.4=0" '
                f'or "output.0-2=1.2", with a weight from {-_LIMIT:g} to {_LIMIT:g}, entries separated by commas.'
            )
        kind, blocks, inner = match[1], _span(match[2], match[3]), _span(match[4], match[5])
        selected = [
            i
            for i, layer in enumerate(layers)
            if kind in ("all", layer.block[0])
            and (blocks is None or layer.block[1] in blocks)
            and (inner is None or layer.block[2] in inner)
        ]
        if not selected:
            raise NestedAttentionError(
                f'layer_weights: "{selector.strip()}" selects no layer of this model. It has {_available(layers)}.'
            )
        for i in selected:
            weights[i] = number
    return tuple(weights)


def _available(layers: Sequence[CrossAttentionLayer]) -> str:
    """ "input.4 (0-1), ..., middle.0 (0-9)": the blocks there are, and the transformer blocks in each."""
    last: dict[tuple[str, int], int] = {}
    for layer in layers:
        kind, number, transformer = layer.block
        last[kind, number] = max(transformer, last.get((kind, number), 0))
    rank = {"input": 0, "middle": 1, "output": 2}
    ordered = sorted(last, key=lambda block: (rank[block[0]], block[1]))
    return ", ".join(f"{kind}.{number} (0-{last[kind, number]})" for kind, number in ordered)
