"""Makes the small world's U-Net listen to a figure's class word where the figure is, and not elsewhere.

In SDXL the word "person" has attention all over a person: it is the only word for what a face looks like. Here a class
word of two says next to nothing, and a U-Net that learns by denoising alone reads the padding instead: 0.02 of the
attention on a figure is its word's, 0.5 the padding's. So this one's training asks for `WANTED` on every part of
the figure, and for no more than `ELSEWHERE` beside it; more or less than that costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import data, drawing, models, world

WANTED, ELSEWHERE = 0.15, 0.05
WEIGHT = 0.05
SIDES = (models.LATENT_SIZE, models.LATENT_SIZE // 2, models.LATENT_SIZE // 4)
"""Of the grids of the U-Net's attention, for pictures of the whole size and of half of it."""


class Listening:
    """An attention processor as diffusers' `AttnProcessor`, which can also say what the loss of listening is.

    With `cross_attention_kwargs={"asked": ..., "heard": []}` each cross-attention appends its loss to `heard`.
    """

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None,
                 asked: dict[int, Tensor] | None = None, heard: list[Tensor] | None = None) -> Tensor:  # fmt: skip
        """asked: `asked_of`, by number of queries."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(made) for made in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        shares = attn.get_attention_scores(query, key, attention_mask)
        if encoder_hidden_states is not None and asked is not None and heard is not None:
            heard.append(_loss(shares.unflatten(0, (-1, attn.heads)).mean(1), asked[shares.shape[1]]))
        out = attn.batch_to_head_dim(shares @ value)
        return attn.to_out[1](attn.to_out[0](out))


def _loss(shares: Tensor, asked: Tensor) -> Tensor:
    """shares, asked (B, queries, text): asked is 1 where a word is to be heard, -1 where it is not."""
    on, off = (asked > 0).to(shares.dtype), (asked < 0).to(shares.dtype)
    missing = (F.relu(WANTED - shares) * on).sum() / on.sum().clamp(min=1)
    return missing + (F.relu(shares - ELSEWHERE) * off).sum() / off.sum().clamp(min=1)


def cells_of(regions: Tensor) -> Tensor:
    """Maps of parts (B, H, W) -> int8 (B, 2, cells): where each figure is (1), is not (-1), or has its edge (0).

    The cells are those of the U-Net's grids, one after the other.
    """
    figures = []
    for i in range(2):
        shown = ((regions > 0) & (regions // drawing.NEXT_FIGURE == i)).float()
        cells = torch.cat([F.avg_pool2d(shown, shown.shape[-1] // side).flatten(1) for side in SIDES], 1)
        figures.append((cells > 0.3).to(torch.int8) - (cells == 0).to(torch.int8))
    return torch.stack(figures, 1)


def class_words(entries: Sequence[data.Entry]) -> Tensor:
    """Ids of figures' class words, from left to right, (B, 2); -1 where there is no second."""
    ids = {kind: models.tokenizer().convert_tokens_to_ids(f"{kind}</w>") for kind in world.KINDS}
    rows = [[ids[figure.kind] for figure in entry.figures] for entry in entries]
    return torch.tensor([[*row, -1][:2] for row in rows])


def asked_of(cells: Tensor, words: Tensor, tokens: Tensor) -> dict[int, Tensor]:
    """{queries: (B, queries, 77)}: what is asked of a caption's words at each grid.

    cells, words: `cells_of` and `class_words` of the pictures. tokens: of their captions, (B, 77).
    """
    said = (tokens[:, None] == words[:, :, None]).float()  # (B, 2, 77)
    asked = cells.float().transpose(1, 2) @ said
    return {part.shape[1]: part for part in asked.split([side * side for side in SIDES], 1)}
