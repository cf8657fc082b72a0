"""What lives as long as a sampling run: K̈ and V̈ of its subjects, their masks, and whatever a layer's device needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import one_hot_values
from ...errors import NestedAttentionError
from ...layers import CrossAttentionLayer
from ...subject import Subject
from .rows import Group, Sampled
from .values import Application


class _Side:
    """What a subject is in a run's texts: K̈ and V̈ per layer, (1, N, C) each, or None where its layer weight is 0; the
    logarithms of its tokens' multiplicities (N,), or None for ones."""

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        layers: Sequence[CrossAttentionLayer],
        application: Application,
        subject: Subject,
    ) -> None:
        dtype = model.model.get_dtype_inference()
        encoder = application.source.encoder
        tokens, weights = subject.tokens, subject.token_weights
        if weights is not None:
            tokens, weights = tokens[:, weights > 0], weights[weights > 0]
        room = 2 * tokens.shape[1] * sum(layer.width for layer in layers) * dtype.itemsize
        comfy.model_management.load_models_gpu([encoder.patcher], memory_required=room)
        module, device = encoder.module, encoder.patcher.load_device
        tokens = tokens.to(device, next(module.parameters()).dtype)
        self.pairs: list[tuple[Tensor, Tensor] | None] = []
        for layer, weight in zip(layers, application.layer_weights, strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if weight == 0:
                self.pairs.append(None)
                continue
            key, value = module.keys_values(tokens, layer.index)
            self.pairs.append((key.to(model.load_device, dtype), value.to(model.load_device, dtype)))
        self.log_weights = None if weights is None else weights.log()


class Store:
    """Tensors of one run, made when they are first asked for, on the device and in the type of whoever asks."""

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        applications: tuple[Application, ...],
        layers: Sequence[CrossAttentionLayer],
        latent: Sequence[int],
    ) -> None:
        """latent: shape of all that the run samples, (images, channels, rows, columns)."""
        self.applications = applications
        self.latent = latent
        self._sides: list[_Side] = []  # by application
        self._negative: dict[int, _Side] = {}  # where it is another one in texts that are steered away from
        self._kept: dict[Any, Any] = {}
        self._load(model, layers)

    def _load(self, model: comfy.model_patcher.ModelPatcher, layers: Sequence[CrossAttentionLayer]) -> None:
        """Compute K̈ and V̈ of every subject, once for the run.

        Before the host loads the model: it may then put the encoder aside for it, and sees the room that K̈ and V̈
        take. So the encoder is none of the model's additional models, which stay as long as the model.
        """
        for i, application in enumerate(self.applications):
            self._sides.append(_Side(model, layers, application, application.source.subject))
            if application.unconditional is not None:
                self._negative[i] = _Side(model, layers, application, application.unconditional.subject)

    def close(self) -> None:
        """Give back everything."""
        self._sides.clear()
        self._negative.clear()
        self._kept.clear()

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made under a key, made now if it was not."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def acts_in(self, i: int, layer: int) -> bool:
        """Whether application i has anything to add in a layer; not where its layer weight is 0."""
        return self._sides[i].pairs[layer] is not None

    def _side(self, i: int, negative: bool) -> _Side:
        return self._negative.get(i, self._sides[i]) if negative else self._sides[i]

    def keys_values(self, i: int, layer: int, like: Tensor, negative: bool) -> tuple[Tensor, Tensor]:
        """K̈ and V̈ of application i, (1, N, C) each, on the device and in the type of a layer's tensor.

        negative: in a text that is steered away from.
        """
        side = self._side(i, negative)
        pair = side.pairs[layer]
        assert pair is not None
        if pair[0].device == like.device and pair[0].dtype == like.dtype:
            return pair
        moved = ("kv", side, layer, like.device, like.dtype)
        return self.kept(moved, lambda: tuple(t.to(like.device, like.dtype) for t in pair))

    def log_weights(self, i: int, device: torch.device, negative: bool) -> Tensor | None:
        """Logarithms of the multiplicities of application i's tokens, (N,), or None for ones."""
        side = self._side(i, negative)
        weights = side.log_weights
        return None if weights is None else self.kept(("weights", side, device), partial(weights.to, device))

    def places(self, places: tuple[int, ...], device: torch.device) -> Tensor:
        """Rows of a text as an index, (P,)."""
        index: Tensor = self.kept(("places", places, device), partial(torch.tensor, places, device=device))
        return index

    def one_hot(self, places: tuple[int, ...], key: Tensor, width: int) -> Tensor | None:
        """`one_hot_values` of the places of all subjects of a layer, where they fit a head's width.

        key: the layer's text keys (B, T, C).
        """
        if len(places) > width:
            return None
        made = ("one hot", places, key.shape[1], width, key.dtype, key.device)
        return self.kept(made, lambda: one_hot_values(self.places(places, key.device), key.shape[1], width, key.dtype))

    def mask(self, i: int, group: Group, sampled: Sampled, q: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """The mask of application i for a group's rows on a layer's grid, (rows, Q); None where it has none.

        q: the group's queries (rows, Q, C).
        Raises NestedAttentionError where the mask's place in these rows can't be known.
        """
        mask = self.applications[i].mask
        if mask is None:
            return None
        name = self.applications[i].placeholder.text
        if group.tile or grid[0] * grid[1] != q.shape[1]:
            raise NestedAttentionError(
                f"The mask of {name} can't be placed: another node samples the picture in tiles or on another grid "
                f"(here {grid[0]} x {grid[1]}, {q.shape[1]} queries). Apply the subject without a mask, or take that "
                "node out."
            )
        if group.image is None and len(mask) > 1:
            raise NestedAttentionError(
                f"{name} has a mask for each of several pictures, and another node samples the pictures in an order "
                "of its own. Give it one mask for all pictures, or take that node out."
            )

        def resized() -> Tensor:
            whole = mask[:, None].float()
            if sampled.window is None:
                whole = F.interpolate(whole, size=sampled.grid, mode="area")
            else:
                if len(whole) > 1:
                    whole = comfy.utils.repeat_to_batch_size(whole, self.latent[0])
                whole = F.interpolate(whole, size=self.latent[-2:], mode="area")
                axis, indexes = sampled.window.axis, torch.tensor(sampled.window.indexes, device=whole.device)
                if axis != 0 or len(whole) > 1:
                    whole = whole.index_select(axis, indexes)
            if group.area is not None:
                h, w, y, x = group.area
                whole = whole[:, :, y : y + h, x : x + w]
            small = F.interpolate(whole, size=grid, mode="area").flatten(1)
            return comfy.utils.repeat_to_batch_size(small, sampled.images).to(q.device)

        images: Tensor = self.kept(("mask", i, group.area, sampled, grid, q.device), resized)
        first = group.image or 0
        return images[first : first + len(q)] if len(mask) > 1 else images[:1].expand(len(q), -1)
