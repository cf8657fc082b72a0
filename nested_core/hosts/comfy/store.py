"""What lives as long as a sampling run: K̈ and V̈ of its subjects, their masks, and whatever a layer's device needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ...attention import one_hot_values
from ...errors import NestedAttentionError
from ...layers import CrossAttentionLayer
from ...regions import by_area
from .rows import Group, Sampled
from .values import Application, HostSubject

#: subject -> (layer, type) -> its K̈ and V̈ there, on the CPU. They depend on nothing else: a graph that runs again needs
#: no encoder, which on a small card would push the U-Net out each time. They go when the subject does.
_MADE: WeakKeyDictionary[HostSubject, dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]] = WeakKeyDictionary()


class _Side:
    """What a subject is in a run's texts: K̈ and V̈ per layer, (1, N, C) each, or None where its layer weight is 0; the
    logarithms of its tokens' multiplicities (N,), or None for ones."""

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        layers: Sequence[CrossAttentionLayer],
        application: Application,
        source: HostSubject,
    ) -> None:
        dtype = model.model.get_dtype_inference()
        made = _MADE.setdefault(source, {})
        acting = [layer for layer, weight in zip(layers, application.layer_weights, strict=True) if weight != 0]
        if missing := [layer for layer in acting if (layer.index, dtype) not in made]:
            new = _keys_values(source, missing, dtype)
            made |= {(layer, dtype): pair for layer, pair in new.items()}
        elif model.load_device.type != "cpu":
            comfy.model_management.free_memory(_room(source, acting, dtype), model.load_device)

        def there(layer: CrossAttentionLayer) -> tuple[Tensor, Tensor]:
            key, value = made[layer.index, dtype]
            return key.to(model.load_device), value.to(model.load_device)

        weights_of = zip(layers, application.layer_weights, strict=True)
        self.pairs = [there(layer) if weight != 0 else None for layer, weight in weights_of]
        weights = source.subject.token_weights
        self.log_weights = None if weights is None else weights[weights > 0].log()


def _keys_values(
    source: HostSubject, layers: Sequence[CrossAttentionLayer], dtype: torch.dtype
) -> dict[int, tuple[Tensor, Tensor]]:
    """layer -> K̈ and V̈ of a subject there, on the CPU: in `dtype`, or in fp32 where they do not fit that.

    Raises NestedAttentionError where they are not finite.
    """
    tokens, weights, encoder = source.subject.tokens, source.subject.token_weights, source.encoder
    if weights is not None:
        tokens = tokens[:, weights > 0]
    comfy.model_management.load_models_gpu([encoder.patcher], memory_required=_room(source, layers, dtype))
    tokens = tokens.to(encoder.patcher.load_device, next(encoder.module.parameters()).dtype)

    def pair(layer: CrossAttentionLayer, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        key, value = encoder.module.keys_values(tokens, layer.index)
        return key.to(dtype), value.to(dtype)

    made = {layer.index: pair(layer, tokens, dtype) for layer in layers}
    if broken := _not_finite(made):  # an encoder may leave the range of fp16 that was trained in another type
        wider = {layer.index: pair(layer, tokens.float(), torch.float32) for layer in layers if layer.index in broken}
        if _not_finite(wider):
            raise NestedAttentionError(
                f"{encoder.name} makes numbers that are not finite in {len(broken)} of {len(layers)} layers. Encode "
                "the subject anew; if that does not help, the encoder's file is damaged: download it again, or train "
                "it again."
            )
        made |= wider
    return {layer: (key.cpu(), value.cpu()) for layer, (key, value) in made.items()}


def _room(source: HostSubject, layers: Sequence[CrossAttentionLayer], dtype: torch.dtype) -> int:
    """Bytes that K̈ and V̈ of a subject take."""
    return 2 * source.subject.tokens.shape[1] * sum(layer.width for layer in layers) * dtype.itemsize


def _not_finite(pairs: Mapping[int, tuple[Tensor, Tensor]]) -> set[int]:
    """The layers whose K̈ or V̈ has infinities or worse. Waits for the device."""
    if not pairs:
        return set()
    finite = torch.stack([t.isfinite().all() for t in itertools.chain(*pairs.values())]).view(-1, 2).all(1)
    return {layer for layer, ok in zip(pairs, finite.tolist(), strict=True) if not ok}


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
            self._sides.append(_Side(model, layers, application, application.source))
            if application.unconditional is not None:
                self._negative[i] = _Side(model, layers, application, application.unconditional)

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
        """K̈ and V̈ of application i, (1, N, C) each, on the device of a layer's tensor and in its type, or in fp32 where
        they do not fit fp16.

        negative: in a text that is steered away from.
        """
        side = self._side(i, negative)
        pair = side.pairs[layer]
        assert pair is not None
        dtype = pair[0].dtype if like.dtype == torch.float16 and pair[0].dtype == torch.float32 else like.dtype
        if pair[0].device == like.device and pair[0].dtype == dtype:
            return pair
        return self.kept(("kv", side, layer, like.device, dtype), lambda: tuple(t.to(like.device, dtype) for t in pair))

    def log_weights(self, i: int, device: torch.device, negative: bool) -> Tensor | None:
        """Logarithms of the multiplicities of application i's tokens, (N,), or None for ones."""
        side = self._side(i, negative)
        weights = side.log_weights
        return None if weights is None else self.kept(("weights", side, device), partial(weights.to, device))

    def places(self, places: tuple[int, ...], device: torch.device) -> Tensor:
        """Rows of a text as an index, (P,)."""
        index: Tensor = self.kept(("places", places, device), partial(torch.tensor, places, device=device))
        return index

    def one_hot(self, places: tuple[int, ...], key: Tensor, heads: int) -> Tensor | None:
        """`one_hot_values` of the places of all subjects of a layer, (B, T, C), where they fit a head's width.

        key: the layer's text keys (B, T, C).
        """
        rows, tokens, channels = key.shape
        if len(places) > channels // heads:
            return None

        def made() -> Tensor:
            index = self.places(places, key.device)
            return one_hot_values(index, tokens, heads, channels // heads, key.dtype).repeat(rows, 1, 1)

        return self.kept(("one hot", places, key.shape, heads, key.dtype, key.device), made)

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
                whole = by_area(whole, sampled.grid)
            else:
                if len(whole) > 1:
                    whole = comfy.utils.repeat_to_batch_size(whole, self.latent[0])
                whole = by_area(whole, self.latent[-2:])
                axis, indexes = sampled.window.axis, torch.tensor(sampled.window.indexes, device=whole.device)
                if axis != 0 or len(whole) > 1:
                    whole = whole.index_select(axis, indexes)
            if group.area is not None:
                h, w, y, x = group.area
                whole = whole[:, :, y : y + h, x : x + w]
            small = by_area(whole, grid).flatten(1)
            return comfy.utils.repeat_to_batch_size(small, sampled.images).to(q.device)

        images: Tensor = self.kept(("mask", i, group.area, sampled, grid, q.device), resized)
        first = group.image or 0
        return images[first : first + len(q)] if len(mask) > 1 else images[:1].expand(len(q), -1)
