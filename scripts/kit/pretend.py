"""A GPU that is not there: CUDA tensors that have shapes, types and a device, and no numbers.

PyTorch's FakeTensorMode computes what an operation would return, and raises where it mixes devices. Tensors of the CPU
stay real beside them, as on a machine with a GPU. What runs on the pretended one is counted.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_WHOLE = {_ATTENTION, torch.ops.aten.rms_norm.default}  # that are one kernel on CUDA
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.item.default}


class DeviceWait(AssertionError):
    """The host waits for the device."""


@dataclass
class Counts:
    """What ran on the pretended GPU: names of operations, in order, and sums over them."""

    kernels: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)  # copies between the host and the device, and values read
    flops: int = 0
    moved: int = 0  # bytes read and written
    peak: int = 0  # bytes allocated at once

    def named(self) -> Counter[str]:
        return Counter(self.kernels)


class PretendedGpu(TorchDispatchMode):
    """While it is entered, there is a CUDA device. `counts` says what ran there.

    A value that is read from it is 1. Inside of `counted`, where nobody must wait for it, that raises DeviceWait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.counts, self.strict = Counts(), False
        self._live: dict[int, int] = {}
        self._allocated = 0

    def __enter__(self) -> PretendedGpu:
        FakeTensor.as_subclass, FakeTensor.__setattr__ = _as_subclass, _set  # type: ignore[method-assign, assignment]
        self.fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.fake.__exit__(*exception)
        del FakeTensor.as_subclass, FakeTensor.__setattr__

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = tree_flatten((args, kwargs))[0]
        given = [x for x in arguments if isinstance(x, Tensor)]
        asked = any(isinstance(x, torch.device) and x.type == "cuda" for x in arguments)
        if not asked and not any(isinstance(x, FakeTensor) for x in given):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func in _READS:
            self.counts.waits.append(f"{func} of {_said(given)}")
            if self.strict:
                raise DeviceWait(f"{func} reads {_said(given)} from the device.")
            with _disable_current_modes():
                return torch.ones((), dtype=given[0].dtype).item()
        if func.namespace == "prim":  # a tensor is asked what it is
            return func(*args, **kwargs)
        if func not in _WHOLE:  # in inference mode, what is made of other operations comes whole
            with self._again():
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        out = self._attention(*args[:3]) if func is _ATTENTION else func(*args, **kwargs)
        self._count(func, given, [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)], args, kwargs, out)
        return out

    @contextmanager
    def _again(self) -> Iterator[None]:
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    @staticmethod
    def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """CUDA's kernels write (B, Q, H, d): to merge the heads then costs nothing."""
        if not q.device == k.device == v.device:
            raise RuntimeError(f"attention between {q.device}, {k.device} and {v.device}")
        if not q.dtype == k.dtype == v.dtype:
            raise RuntimeError(f"attention between {q.dtype}, {k.dtype} and {v.dtype}")
        if any(size > 1 and step == 0 for x in (q, k, v) for size, step in zip(x.shape, x.stride(), strict=True)):
            raise RuntimeError("attention over an expanded tensor: not every kernel is right about strides of 0")
        shape = (*q.shape[:2], q.shape[2], v.shape[3])
        return q.new_empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)

    def _faked(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

    def _count(self, func: Any, given: list[Tensor], made: list[Tensor], args: Any, kwargs: Any, out: Any) -> None:
        counts = self.counts
        to_host = func in _COPIES and any(x.device.type == "cpu" for x in made) and any(x.is_cuda for x in given)
        from_host = any(x.device.type == "cpu" and x.ndim for x in given) and any(x.is_cuda for x in made)
        if to_host or (from_host and not kwargs.get("non_blocking")):
            counts.waits.append(f"{func} of {_said(given)}")
        if func.is_view:
            return
        if not made:  # an operation that writes into what it is given, and returns nothing
            schema = zip(func._schema.arguments, args, strict=False)
            made = [x for said, x in schema if said.alias_info is not None and said.alias_info.is_write]
        if "empty" not in func.name():
            counts.kernels.append(func.name().removeprefix("aten::"))
        counts.moved += sum(x.numel() * x.element_size() for x in (*given, *made))
        if func is _ATTENTION:
            counts.flops += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif (cost := flop_registry.get(func.overloadpacket)) is not None:
            counts.flops += cost(*args, **kwargs, out_val=out)
        for x in made:
            self._allocate(x)

    def _allocate(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._live or not x.is_cuda:
            return
        self._live[key] = storage.nbytes()
        self._allocated += storage.nbytes()
        self.counts.peak = max(self.counts.peak, self._allocated)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._allocated -= self._live.pop(key, 0)

    @contextmanager
    def counted(self, waiting: bool = False) -> Iterator[Counts]:
        """Counts of what runs inside alone; `peak` is above what is allocated before. waiting: whether it may wait."""
        outer, before = self.counts, self._allocated
        self.counts, self.strict = Counts(peak=before), not waiting
        try:
            yield self.counts
        finally:
            self.counts.peak -= before
            self.counts, self.strict = outer, False


@functools.cache
def _both(kind: type[Tensor]) -> type[Tensor]:
    return type(f"Pretended{kind.__name__}", (kind, FakeTensor), {})


def _as_subclass(self: Tensor, kind: type[Tensor]) -> Tensor:
    """Tensor.as_subclass, which does not know tensors that have a dispatch of their own."""
    with torch._C.DisableTorchFunctionSubclass():
        alias = torch.ops.aten.alias.default(self)
    alias.__class__ = FakeTensor if kind is Tensor else _both(kind)
    return alias


def _set(self: Tensor, name: str, value: Any) -> None:
    """A tensor that is told to be of another class stays a pretended one."""
    if name == "__class__" and not issubclass(value, FakeTensor):
        value = _both(value)
    object.__setattr__(self, name, value)


def _said(tensors: list[Tensor]) -> str:
    return ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in tensors)
