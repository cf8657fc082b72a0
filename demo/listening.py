"""Makes the small world's U-Net listen to a figure's class word where the figure is, and not elsewhere.

In SDXL the word "person" has attention all over a person: it is the only word for what a face looks like. Here a class
word of two says next to nothing, and a U-Net that learns by denoising alone reads the padding instead: 0.02 of the
attention on a figure is its word's, 0.5 the padding's. So this one's training asks for `WANTED` on every part of
the figure, and for no more than `ELSEWHERE` beside it; more or less than that costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import data, drawing, models

WANTED, ELSEWHERE = 0.15, 0.05
WEIGHT = 0.05


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


def asked_of(entries: Sequence[data.Entry], regions: np.ndarray, captions: Sequence[str],
             sides: Sequence[int]) -> dict[int, Tensor]:  # fmt: skip
    """{queries: (B, queries, 77)} for pictures with maps of parts (B, H, W) and captions, at grids of each side."""
    tokenizer = models.tokenizer()
    tokens = np.asarray(tokenizer([*captions], padding="max_length", max_length=models.TEXT_LENGTH).input_ids)
    asked = {side * side: torch.zeros(len(entries), side * side, models.TEXT_LENGTH) for side in sides}
    for row, entry in enumerate(entries):
        for i, figure in enumerate(entry.figures):
            shown = (regions[row] > 0) & (regions[row] // drawing.NEXT_FIGURE == i)
            word = tokens[row] == tokenizer.convert_tokens_to_ids(f"{figure.kind}</w>")
            for side in sides:
                cells = shown.reshape(side, -1, side, shown.shape[1] // side).mean((1, 3)).reshape(-1)
                said = np.where(cells > 0.3, 1.0, np.where(cells == 0, -1.0, 0.0))[:, None] * word
                asked[side * side][row] += torch.from_numpy(said.astype(np.float32))
    return asked
