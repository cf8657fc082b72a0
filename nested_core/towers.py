"""The published CLIP vision towers: what the width of their features gives away, and what their files don't say."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tower:
    """A vision tower. width: of its hidden states; pooled: of its image embedding; heads, activation: as transformers
    names them."""

    title: str
    width: int
    pooled: int
    heads: int
    activation: str


TOWERS = (
    Tower("CLIP ViT-B", 768, 512, 12, "quick_gelu"),
    Tower("CLIP ViT-L/14", 1024, 768, 16, "quick_gelu"),
    Tower("CLIP ViT-H/14", 1280, 1024, 16, "gelu"),
    Tower("CLIP ViT-bigG/14", 1664, 1280, 16, "gelu"),
)
BY_WIDTH = {tower.width: tower for tower in TOWERS}
_BY_POOLED = {tower.pooled: tower for tower in TOWERS}


def of_width(width: int, pooled: bool = False) -> str:
    """The tower whose hidden states, or pooled embeddings, are this wide; empty where none is known."""
    found = (_BY_POOLED if pooled else BY_WIDTH).get(width)
    return found.title if found else ""
