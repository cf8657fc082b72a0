"""The cross-attention layers of the U-Nets: their order in encoder files, and where the host calls them.

A nested attention encoder has one pair (W_K̈, W_V̈) per cross-attention layer (arXiv 2501.01407, section 3). Files
list the layers in the order of diffusers' attention processors: down blocks, up blocks, middle block. ComfyUI reports
the same layers as ("input" | "middle" | "output", block number, transformer block). This table is the only place
where the two are matched; everything else looks layers up in it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, NamedTuple

from .errors import NestedAttentionError

DIFFUSERS_ORDER = "down, up, mid"
"""Order of `UNet2DConditionModel.attn_processors`, and so of every numbered file that was trained with it."""
EXECUTION_ORDER = "down, mid, up"
"""Order in which the layers run: what a file numbered by a forward pass, or by sorted names, would have."""

Block = tuple[str, int, int]


@dataclass(frozen=True)
class CrossAttentionLayer:
    """One cross-attention ("attn2") of the U-Net.

    `index` is its place in diffusers' processor order, `diffusers` its module there, `block` the address ComfyUI
    gives to patches as (block kind, block number, transformer block), `width` its channels (K̈ and V̈ are this wide).
    """

    index: int
    diffusers: str
    block: Block
    width: int

    @property
    def original(self) -> str:
        """Module name in the original (LDM) layout, which single-file checkpoints and ComfyUI use."""
        kind, number, transformer = self.block
        # The host numbers the middle block 0, but in the module list the transformer comes second: resnet, it, resnet.
        place = "middle_block.1" if kind == "middle" else f"{kind}_blocks.{number}.1"
        return f"{place}.transformer_blocks.{transformer}.attn2"


class _Slot(NamedTuple):
    """A layer before its width is known: `level` 0 is the U-Net's full resolution."""

    diffusers: str
    block: Block
    level: int


def _slots(depth_down: Sequence[int], depth_up: Sequence[int], depth_middle: int, res_blocks: int) -> list[_Slot]:
    levels = len(depth_down)
    slots = []
    for level, depth in enumerate(depth_down):
        for i in range(res_blocks):
            # input_blocks.0 is the first convolution; each level then has its resnets and one downsampler.
            number = 1 + (res_blocks + 1) * level + i
            slots += [
                _Slot(f"down_blocks.{level}.attentions.{i}.transformer_blocks.{t}.attn2", ("input", number, t), level)
                for t in range(depth)
            ]
    for step, level in enumerate(reversed(range(levels))):
        for i in range(res_blocks + 1):
            number = (res_blocks + 1) * step + i
            slots += [
                _Slot(f"up_blocks.{step}.attentions.{i}.transformer_blocks.{t}.attn2", ("output", number, t), level)
                for t in range(depth_up[level])
            ]
    slots += [
        _Slot(f"mid_block.attentions.0.transformer_blocks.{t}.attn2", ("middle", 0, t), levels - 1)
        for t in range(depth_middle)
    ]
    return slots


def unet_layers(
    channels: Sequence[int],
    depth_down: Sequence[int],
    depth_up: Sequence[int],
    depth_middle: int,
    res_blocks: int = 2,
) -> tuple[CrossAttentionLayer, ...]:
    """The cross-attention layers of a U-Net of the Stable Diffusion kind, in diffusers' processor order.

    `channels`, `depth_down` and `depth_up` have one entry per level, level 0 being the full resolution: the channels
    of the level and the transformer blocks of each of its attentions on the way down and up (0: no attention there).
    `depth_middle` is the transformer blocks of the middle block, `res_blocks` the resnets per level (one more on the
    way up).

    Raises NestedAttentionError when the three sequences differ in length.
    """
    if not len(channels) == len(depth_down) == len(depth_up):
        raise NestedAttentionError(
            f"A U-Net needs one entry per level in each of channels, depth_down and depth_up; "
            f"got {len(channels)}, {len(depth_down)} and {len(depth_up)} entries."
        )
    return tuple(
        CrossAttentionLayer(index, slot.diffusers, slot.block, channels[slot.level])
        for index, slot in enumerate(_slots(depth_down, depth_up, depth_middle, res_blocks))
    )


@dataclass(frozen=True)
class Family:
    """A U-Net architecture: which cross-attention layers it has, whatever the width of each level.

    `context_dim` is the width of the text tokens its cross-attention reads; `channels` are the levels' widths in the
    published models, the depths and `res_blocks` as in `unet_layers`. Files say `name`, messages `title`.
    """

    name: str
    title: str
    context_dim: int
    channels: tuple[int, ...]
    depth_down: tuple[int, ...]
    depth_up: tuple[int, ...]
    depth_middle: int
    res_blocks: int = 2

    def layers(self, widths_per_level: Sequence[int] | None = None) -> tuple[CrossAttentionLayer, ...]:
        """The layers in diffusers' order, at the published widths or, for a narrow U-Net, at `widths_per_level`.

        Raises NestedAttentionError when `widths_per_level` has another number of levels than the family.
        """
        channels = widths_per_level or self.channels
        return unet_layers(channels, self.depth_down, self.depth_up, self.depth_middle, self.res_blocks)

    def widths(self, widths_per_level: Sequence[int] | None = None) -> tuple[int, ...]:
        """Channels of each layer, in diffusers' order."""
        return tuple(layer.width for layer in self.layers(widths_per_level))

    def execution_order(self) -> tuple[int, ...]:
        """Indexes (into diffusers' order) of the layers in the order down, mid, up."""
        rank = {"input": 0, "middle": 1, "output": 2}
        layers = self.layers()
        return tuple(sorted(range(len(layers)), key=lambda index: rank[layers[index].block[0]]))

    def levels_of(self, widths: Sequence[int]) -> tuple[int, ...] | None:
        """The levels' channels that give these layer widths (in diffusers' order), or None when no choice does.

        The inverse of `widths`. Levels without cross-attention (SDXL's first) can't be told from the layers and are
        given the published width, or that of the next level in a U-Net narrower than that.
        """
        slots = _slots(self.depth_down, self.depth_up, self.depth_middle, self.res_blocks)
        if len(slots) != len(widths):
            return None
        found: dict[int, int] = {}
        for slot, width in zip(slots, widths, strict=True):
            if found.setdefault(slot.level, width) != width:
                return None
        levels = list(self.channels)
        for level in reversed(range(len(levels))):
            levels[level] = found[level] if level in found else min(levels[level], levels[level + 1])
        return tuple(levels)

    def order_of(self, widths: Sequence[int]) -> tuple[str, tuple[int, ...]] | None:
        """Which order a numbered list of layer widths is in, with the diffusers index of each entry; None if neither.

        Where both orders fit (a narrow U-Net with equal widths), diffusers' is taken: `is_ambiguous` tells.
        """
        if self.levels_of(widths) is not None:
            return DIFFUSERS_ORDER, tuple(range(len(widths)))
        order = self.execution_order()
        return (EXECUTION_ORDER, order) if self._fits(widths, order) else None

    def is_ambiguous(self, widths: Sequence[int]) -> bool:
        """Whether these widths fit diffusers' order as well as the order of execution."""
        return self.levels_of(widths) is not None and self._fits(widths, self.execution_order())

    def _fits(self, widths: Sequence[int], order: Sequence[int]) -> bool:
        if len(widths) != len(order):
            return False
        by_index = dict(zip(order, widths, strict=True))
        return self.levels_of([by_index[index] for index in range(len(order))]) is not None

    def describe_orders(self) -> str:
        """Both known sequences of layer widths at the published channels, shortened, for messages."""
        widths = self.widths()
        executed = [widths[index] for index in self.execution_order()]
        return f"{compress(widths)} ({DIFFUSERS_ORDER}) or {compress(executed)} ({EXECUTION_ORDER})"


SDXL = Family(
    name="sdxl",
    title="SDXL",
    context_dim=2048,
    channels=(320, 640, 1280),
    depth_down=(0, 2, 10),
    depth_up=(0, 2, 10),
    depth_middle=10,
)
SD15 = Family(
    name="sd15",
    title="SD 1.5",
    context_dim=768,
    channels=(320, 640, 1280, 1280),
    depth_down=(1, 1, 1, 0),
    depth_up=(1, 1, 1, 0),
    depth_middle=1,
)
PUBLISHED: dict[str, Family] = {family.name: family for family in (SDXL, SD15)}
"""The families that files of other projects are for."""
FAMILIES: dict[str, Family] = dict(PUBLISHED)
"""The families that are known: the published ones, and what was registered."""


def register(family: Family) -> Family:
    """Makes one more family known, for a base model of one's own; once or often.

    Raises NestedAttentionError when another family has its name.
    """
    if FAMILIES.setdefault(family.name, family) != family:
        raise NestedAttentionError(f'There is another base model family of the name "{family.name}": choose another.')
    return family


def described_family(said: Mapping[str, Any]) -> Family:
    """The family that a description says, as JSON has it: {"name": "...", "channels": [64, 128], ...}.

    Raises NestedAttentionError when it is none, naming the fields.
    """
    wanted = {field.name for field in fields(Family)}
    if not isinstance(said, Mapping) or not wanted - {"res_blocks"} <= set(said) <= wanted:
        raise NestedAttentionError(
            f"A base model family is described by {', '.join(sorted(wanted))}; "
            f"got {', '.join(map(str, said)) if isinstance(said, Mapping) else said!r}."
        )
    values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    family = Family(**values)
    numbers = (family.context_dim, family.depth_middle, family.res_blocks, *family.channels, *family.depth_down)
    if not all(isinstance(number, int) and number >= 0 for number in (*numbers, *family.depth_up)):
        raise NestedAttentionError(f'Widths and depths of the family "{family.name}" should be whole numbers.')
    family.layers()  # as many levels in each
    return family


def family_of(name: str) -> Family:
    """The family of that name: "sdxl", "sd15", or a registered one.

    Raises NestedAttentionError for any other name.
    """
    if name not in FAMILIES:
        known = ", ".join(f'"{known}" ({family.title})' for known, family in FAMILIES.items())
        raise NestedAttentionError(f'Unknown base model family "{name}". This pack knows {known}.')
    return FAMILIES[name]


def family_with(layers: Collection[str] | Collection[Block], text_width: int) -> Family | None:
    """The known family that has these cross-attention layers, named as in diffusers or as ComfyUI's addresses, and
    reads text of this width; None if there is none."""
    for family in FAMILIES.values():
        own = family.layers()
        named = ({layer.diffusers for layer in own}, {layer.block for layer in own})
        if family.context_dim == text_width and set(layers) in named:
            return family
    return None


def compress(widths: Sequence[int]) -> str:
    """Widths as a short run-length text: "640x4, 1280x50, 640x6, 1280x10"."""
    return ", ".join(f"{width}x{len(list(run))}" for width, run in groupby(widths))
