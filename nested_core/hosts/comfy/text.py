"""Text that knows whose words are in it: a conditioning tensor that carries marks through whatever nodes do to it.

A `MarkedText` is the conditioning itself, (B, T, C), with a mark for each element and key: "this number belongs to that
subject's word". Operations that move numbers (slicing, cat, repeat, reshape, pad, ...) move the marks along; arithmetic
keeps them where the result has the argument's shape; what makes a text anew (zeros_like, a linear layer, a sum over
rows) gives a plain tensor. So the rows of a subject are known from the conditioning alone, whatever ran before.

Marks live on the CPU whatever the text's device, so following an operation never waits for a device, except where rows
are picked by an index that lies there. A copy that leaves the process (pickle, NumPy) is plain.

Nothing in this module knows the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...prompt import ClassWord

#: what a text is marked with -> a mark for each of its elements, bool, on the CPU
Marks = dict[Hashable, Tensor]


class MarkedText(Tensor):
    """A text (..., T, C) with marks. Make one with `mark`; `plain` takes the marks off.

    As in torchvision's `tv_tensors` the subclass rides through code that knows nothing of it; other than there, results
    of operations stay marked where it is known which element came from where.
    """

    _marks: Marks

    @classmethod
    @torch.compiler.disable  # a compiler that traced this would take the marks of one call for those of all
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            name = getattr(func, "__name__", "")
            if name == "__get__":  # a property
                moves = func.__self__.__name__ in _MOVING_PROPERTIES  # type: ignore[attr-defined]
                return _ONE(func, args, kwargs) if moves else func(*args, **kwargs)
            return _RULES.get(name, _arithmetic)(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            copied = _marked(plain(self).clone(), {key: marks.clone() for key, marks in self._marks.items()})
        memo[id(self)] = copied
        return copied

    def __copy__(self) -> Tensor:
        return _marked(plain(self), self._marks)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))


#: Called with a marked text that a model's layer is about to read as plain numbers: nobody took its marks off before.
on_unread: Callable[[MarkedText], None] | None = None


def mark(text: Tensor, marks: Mapping[Hashable, Tensor]) -> Tensor:
    """A text that shares its numbers with `text` and has these marks besides its own.

    marks: bool, of the text's shape or one that expands to it.
    """
    with torch._C.DisableTorchFunctionSubclass():
        merged = {key: old.clone() for key, old in marks_of(text).items()}
        for key, new in marks.items():
            new = new.to("cpu", torch.bool).expand(text.shape)
            merged[key] = merged[key] | new if key in merged else new.clone()
        return _marked(plain(text), merged)


def plain(text: Tensor) -> Tensor:
    """The text without marks; the same memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return text.as_subclass(Tensor) if isinstance(text, MarkedText) else text


def marks_of(text: Any) -> Marks:
    """The marks of a text; empty for plain tensors and whatever else."""
    return text._marks if isinstance(text, MarkedText) else {}


def rows_of(text: Tensor) -> list[dict[Hashable, tuple[int, ...]]]:
    """For each batch row of a text (B, T, C): what it is marked with, and in which of its T rows, ascending."""
    rows: list[dict[Hashable, tuple[int, ...]]] = [{} for _ in range(text.shape[0])]
    for key, marks in marks_of(text).items():
        for batch_row, row in marks.any(-1).nonzero().tolist():
            rows[batch_row][key] = (*rows[batch_row].get(key, ()), row)
    return rows


def _marked(text: Tensor, marks: Marks) -> Tensor:
    marked: Any = text.as_subclass(MarkedText)
    marked._marks = marks
    return marked


# --- how operations treat marks ---------------------------------------------------------------------------------------
#
# Each rule gets the function and its arguments and returns what the caller gets. Torch functions are switched off here:
# what a function gives for a marked argument is plain, unless it is that argument itself.


def _keys(*values: Any) -> dict[Hashable, None]:
    """The keys of all marked texts in some arguments, nested ones too, in order."""
    found: dict[Hashable, None] = {}
    for value in values:
        if isinstance(value, MarkedText):
            found.update(dict.fromkeys(value._marks))
        elif isinstance(value, (tuple, list)):
            found.update(_keys(*value))
        elif isinstance(value, dict):
            found.update(_keys(*value.values()))
    return found


def _with_marks(value: Any, key: Hashable) -> Any:
    """Marks in the place of texts, unmarked ones for plain tensors; a plain number written into a text is nobody's."""
    if isinstance(value, Tensor):
        marks = marks_of(value).get(key)
        return torch.zeros(value.shape, dtype=torch.bool) if marks is None else marks
    if isinstance(value, (tuple, list)):
        return type(value)(_with_marks(v, key) for v in value)
    return False if isinstance(value, (int, float)) else value


def _on_cpu(value: Any) -> Any:
    """Indexes and masks, where marks are."""
    if isinstance(value, Tensor):
        return plain(value).cpu()
    if isinstance(value, (tuple, list)):
        return type(value)(_on_cpu(v) for v in value)
    return value


def _moved(
    func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], out: Any, texts: tuple[int | str, ...]
) -> Any:
    """Marks for the results `out` of a function that only moves numbers: the same function, run on the marks.

    texts: which arguments are texts, by place or name; the others are sizes, indexes and masks.
    """
    if any(out is arg for arg in args):  # nothing moved: .contiguous() of what is so already
        return out
    results: dict[Hashable, Any] = {}
    for key in _keys(args, kwargs):
        moved = [_with_marks(a, key) if i in texts else _on_cpu(a) for i, a in enumerate(args)]
        named = {k: _with_marks(v, key) if k in texts else _on_cpu(v) for k, v in kwargs.items()}
        results[key] = func(*moved, **named)
    if isinstance(out, Tensor):
        return _marked(out, results)
    kind = tuple if isinstance(out, tuple) else list
    return kind(_marked(part, {key: result[i] for key, result in results.items()}) for i, part in enumerate(out))


def _moves(*texts: int | str) -> Callable[..., Any]:
    def rule(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        return _moved(func, args, kwargs, func(*args, **kwargs), texts)

    return rule


def _writes(source: int, name: str) -> Callable[..., Any]:
    """In-place writes into argument 0: what is written brings its marks, or takes off those that were there."""

    def rule(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        target = args[0]
        out = func(*args, **kwargs)
        for key in _keys(args, kwargs):
            if not isinstance(target, MarkedText):
                target.__class__ = MarkedText  # whoever holds this tensor holds the text now
                target._marks = {}
            if key not in target._marks:
                target._marks[key] = torch.zeros(target.shape, dtype=torch.bool)
            moved = [_with_marks(a, key) if i in (0, source) else _on_cpu(a) for i, a in enumerate(args)]
            named = {k: _with_marks(v, key) if k == name else v for k, v in kwargs.items() if k != "non_blocking"}
            func(*moved, **named)
        return out

    return rule


def _copied(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Casts and moves to a device: the same elements."""
    out = func(*args, **kwargs)
    if out is args[0] or not isinstance(out, Tensor) or not isinstance(args[0], MarkedText):
        return out
    if out.shape != args[0].shape:  # a view as numbers of another size
        return plain(out)
    return _marked(out, {key: marks.clone() for key, marks in args[0]._marks.items()})


def _padded(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    out = func(*args, **kwargs)
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")

    def on_marks(text: Tensor, pad: Any, *_: Any, **__: Any) -> Tensor:
        return func(text.float(), pad, mode) != 0  # with zeros where a number is given

    return _moved(on_marks, args, kwargs, out, (0, "input"))


def _chosen(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """torch.where(condition, a, b) and a.where(condition, b)."""
    out = func(*args, **kwargs)
    if not isinstance(out, Tensor):
        return out
    named = [*args, *kwargs.values()]
    condition = next(i for i, a in enumerate(named) if isinstance(a, Tensor) and a.dtype == torch.bool)
    chosen, other = (value for i, value in enumerate(named) if i != condition)

    def on_marks(condition: Tensor, chosen: Any, other: Any) -> Tensor:
        return torch.where(condition, torch.as_tensor(chosen), torch.as_tensor(other)).expand(out.shape).clone()

    return _moved(on_marks, (named[condition], chosen, other), {}, out, (1, 2))


def _summed(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Sums and means over an axis that is neither the rows nor the channels: over texts that were stacked."""
    out = func(*args, **kwargs)
    text = args[0] if args else kwargs.get("input")
    named = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    axes = [named] if isinstance(named, int) else list(named or ())
    if not isinstance(text, MarkedText) or not axes or any(axis % text.ndim >= text.ndim - 2 for axis in axes):
        return out
    keep = kwargs.get("keepdim", args[2] if len(args) > 2 and isinstance(args[2], bool) else False)
    marks = {}
    for key, of in text._marks.items():
        for axis in sorted((axis % text.ndim for axis in axes), reverse=True):
            of = of.any(axis, keepdim=keep)
        marks[key] = of
    return _marked(out, marks)


def _fitting(text: MarkedText, shape: torch.Size) -> bool:
    """Whether a result has an argument's rows and channels; it may have more texts in front of them."""
    last = min(2, len(shape))
    if len(text.shape) > len(shape) or text.shape[-last:] != shape[-last:]:
        return False
    return all(a in (1, b) for a, b in zip(reversed(text.shape), reversed(shape), strict=False))


def _union(args: Any, kwargs: Mapping[str, Any], shape: torch.Size) -> Marks:
    """The marks of all arguments together, where they fit a result."""
    texts = [a for a in [*args, *kwargs.values()] if isinstance(a, MarkedText)]
    texts += [b for a in args if isinstance(a, (tuple, list)) for b in a if isinstance(b, MarkedText)]
    marks: Marks = {}
    for text in texts:
        if _fitting(text, shape):
            for key, of in text._marks.items():
                of = of.expand(shape)
                marks[key] = marks[key] | of if key in marks else of.clone()
    return marks


def _keep(out: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Arithmetic's results: marked like the arguments that have their shape."""
    if isinstance(out, Tensor):
        marks = _union(args, kwargs, out.shape)
        if any(out is arg for arg in [*args, kwargs.get("out")]):  # in place
            if marks and not isinstance(out, MarkedText):
                out.__class__ = MarkedText
                out._marks = {}  # type: ignore[attr-defined]
            for key, of in marks.items():
                mine = marks_of(out)
                if key in mine:
                    mine[key] |= of  # in place too: a view writes into what it is a view of
                else:
                    mine[key] = of
            return out
        return _marked(out, marks) if marks else out
    if isinstance(out, (tuple, list)) and any(isinstance(part, Tensor) for part in out):
        return type(out)(_keep(part, args, kwargs) for part in out) if type(out) in (tuple, list) else out
    return out


def _arithmetic(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    return _keep(func(*args, **kwargs), args, kwargs)


def _scaled(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Products: what is multiplied by nought is nobody's word any more. An average of two texts at 0 is one of them."""
    out = func(*args, **kwargs)
    result = _keep(out, args, kwargs)
    if not isinstance(result, MarkedText):
        return result
    for factor in [*args, *kwargs.values()]:
        if isinstance(factor, (int, float)) and not isinstance(factor, bool):
            kept = torch.tensor(factor != 0)
        elif isinstance(factor, Tensor) and not isinstance(factor, MarkedText):
            kept = (factor != 0).cpu()
        else:
            continue
        for key, marks in result._marks.items():
            if isinstance(key, (str, ClassWord)):  # a word's; which text of a step a row is, it stays
                marks &= kept
    return result


def _mixed(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """lerp: at weight 0 it is the first text, at 1 the second."""
    weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
    if isinstance(weight, (int, float)) and weight in (0, 1):
        out = func(*args, **kwargs)
        chosen = [args[0], kwargs.get("end", args[1] if len(args) > 1 else None)][int(weight)]
        if out is args[0]:
            _emptied(lambda *_: None, (out,), {})
        return _keep(out, (out, chosen) if out is args[0] else (chosen,), {})
    return _arithmetic(func, args, kwargs)


def _made_anew(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Numbers that are nobody's, whatever their shape was taken from."""
    out = func(*args, **kwargs)
    return plain(out) if isinstance(out, Tensor) else out


def _emptied(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    out = func(*args, **kwargs)
    for marks in marks_of(args[0]).values():
        marks.zero_()
    return out


def _read_by_a_layer(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """A model's own layer reads the text: what comes out is no text."""
    if on_unread is not None:
        for text in [*args[:1], kwargs.get("input")]:
            if isinstance(text, MarkedText):
                on_unread(text)
    return _made_anew(func, args, kwargs)


_ONE = _moves(0, "input", "self")
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            "__getitem__ view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze permute transpose "
            "swapaxes swapdims movedim moveaxis t adjoint expand expand_as broadcast_to repeat tile repeat_interleave "
            "narrow narrow_copy select split split_with_sizes chunk unsafe_chunk unsafe_split tensor_split hsplit "
            "vsplit dsplit unbind index_select gather take_along_dim flip fliplr flipud roll rot90 diagonal unfold "
            "contiguous clone detach alias as_strided masked_select atleast_1d atleast_2d atleast_3d unsqueeze_ "
            "squeeze_ transpose_ t_ swapaxes_ swapdims_"
        ).split(),
        _ONE,
    ),
    **dict.fromkeys(
        "cat concat concatenate stack hstack vstack dstack column_stack row_stack broadcast_tensors".split(),
        _moves(0, "tensors"),
    ),
    **dict.fromkeys(
        (
            "to type type_as float half bfloat16 double cpu cuda xpu mps int long short char byte bool pin_memory "
            "requires_grad_ share_memory_ detach_"
        ).split(),
        _copied,
    ),
    "pad": _padded,
    "where": _chosen,
    **dict.fromkeys("sum nansum mean nanmean amax amin".split(), _summed),
    **dict.fromkeys("masked_fill index_fill".split(), _moves(0, 3, "value")),
    **dict.fromkeys("index_copy scatter".split(), _moves(0, 3, "source", "src")),
    "masked_scatter": _moves(0, 2, "source"),
    "select_scatter": _moves(0, 1, "src"),
    "slice_scatter": _moves(0, 1, "src"),
    "index_put": _moves(0, 2, "values"),
    "copy_": _writes(1, "src"),
    "__setitem__": _writes(2, "value"),
    "index_copy_": _writes(3, "source"),
    "scatter_": _writes(3, "src"),
    "masked_scatter_": _writes(2, "source"),
    "index_put_": _writes(2, "values"),
    "masked_fill_": _writes(2, "value"),
    "index_fill_": _writes(3, "value"),
    **dict.fromkeys("zero_ fill_ normal_ uniform_ bernoulli_ random_ exponential_ cauchy_".split(), _emptied),
    **dict.fromkeys("mul mul_ multiply multiply_ __mul__ __rmul__ __imul__".split(), _scaled),
    **dict.fromkeys("lerp lerp_".split(), _mixed),
    **dict.fromkeys(
        (
            "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty "
            "new_full new_tensor new_empty_strided as_subclass bernoulli sort msort argsort topk kthvalue cumsum "
            "cumsum_ cumprod cumprod_ cummax cummin logcumsumexp bilinear matmul mm bmm addmm addbmm baddbmm "
            "__matmul__ __rmatmul__ einsum tensordot inner outer mv dot conv1d conv2d conv3d "
            "scaled_dot_product_attention multi_head_attention_forward embedding interpolate"
        ).split(),
        _made_anew,
    ),
    "linear": _read_by_a_layer,
}
_MOVING_PROPERTIES = ("T", "mT", "H", "mH", "data")
