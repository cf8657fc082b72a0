"""Prompt placeholders in ComfyUI: which rows of a conditioning belong to which subject.

`bind_clip` returns a CLIP under which a placeholder such as `<person>` is its class word for the text encoder.
Three things make the binding survive what graphs do to prompts:

1. The tokenizers inside the CLIP are wrapped where they meet plain text, below the host's handling of weights,
   escapes, embeddings and long prompts. The tokens of a placeholder are `BoundToken`s: integers that remember it.
   They pass through every node that cuts, joins or reweights token lists.
2. The encode methods read off where those tokens stand and say so in the conditioning's dictionary
   (`CONDITIONING_KEY`): `{"length": rows, "places": {placeholder: [row, ...]}, "reads": [[text, placeholder], ...]}`,
   where "reads" is what the text encoder reads, in pieces, for `describe_binding` to show.
3. Nodes that rebuild the dictionary, or concatenate conditionings, lose or outdate that entry. Every bound encode is
   therefore also kept as a sketch in `LEDGER`; the rows of a conditioning are compared with it when its entry is
   missing or does not fit.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import comfy.sd
import comfy.sd1_clip
import torch
from torch import Tensor

from ..errors import NestedAttentionError
from ..prompt import Placeholder, PromptReader, locate

CONDITIONING_KEY = "nested_attention"

#: placeholder -> rows of the conditioning, ascending
Places = dict[str, tuple[int, ...]]

log = logging.getLogger(__name__)


class BoundToken(int):
    """A token id that knows the placeholder it came from."""

    placeholder: str

    def __new__(cls, token: int, placeholder: str) -> BoundToken:
        self = super().__new__(cls, token)
        self.placeholder = placeholder
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return BoundToken, (int(self), self.placeholder)


class _BindingTokenizer:
    """Stands in for a Hugging Face tokenizer inside the host's SDTokenizer: ids of placeholders come out bound."""

    def __init__(self, inner: Any, placeholders: tuple[Placeholder, ...], lead: int, trail: int) -> None:
        self.inner = inner
        self.reader = PromptReader(placeholders)
        self.lead = lead  # special tokens the inner tokenizer puts before the text
        self.trail = trail  # and after it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _ids(self, text: str) -> list[int]:
        ids = list(self.inner(text)["input_ids"])
        return ids[self.lead : len(ids) - self.trail]

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(text, str) or not self.reader.mentions_any(text):
            return self.inner(text, *args, **kwargs)

        reading = self.reader.read(text)
        encoded = self.inner(reading.text, *args, **kwargs)
        ids = list(encoded["input_ids"])
        body = ids[self.lead : len(ids) - self.trail]
        for i, placeholder in locate(reading, body, self._ids).items():
            body[i] = BoundToken(body[i], placeholder)
        encoded["input_ids"] = ids[: self.lead] + body + ids[len(ids) - self.trail :]
        return encoded


def _sd_tokenizers(tokenizer: Any) -> dict[str, comfy.sd1_clip.SDTokenizer]:
    """The host's tokenizers inside a CLIP's, by attribute name: clip_l and clip_g for SDXL, clip_l for SD 1.5."""
    return {k: v for k, v in vars(tokenizer).items() if isinstance(v, comfy.sd1_clip.SDTokenizer)}


def _bind_tokenizer(tokenizer: Any, placeholders: tuple[Placeholder, ...]) -> Any:
    """A shallow copy of a CLIP's tokenizer whose text tokenizers bind `placeholders`; the original is untouched."""
    bound = copy.copy(tokenizer)
    for name, part in _sd_tokenizers(tokenizer).items():
        part = copy.copy(part)
        inner = part.tokenizer.inner if isinstance(part.tokenizer, _BindingTokenizer) else part.tokenizer
        part.tokenizer = _BindingTokenizer(inner, placeholders, part.tokens_start, int(part.tokenizer_adds_end_token))
        setattr(bound, name, part)
    return bound


def _rows_taken(token: Any, width: int) -> tuple[int, int]:
    """Rows of the text encoder that a token takes: (where it stands, as padding at the end).

    An embedding takes as many rows as it has vectors; one of another width is dropped by the host, which pads.
    """
    if isinstance(token, dict):
        token = token.get("data")
    if not torch.is_tensor(token):
        return 1, 0
    rows = token.numel() // token.shape[-1]
    return (rows, 0) if token.shape[-1] == width else (0, rows)


def places_of(tokens: Mapping[str, Any], widths: Mapping[str, int], rows: int) -> tuple[Places, int]:
    """Where the bound tokens of a tokenized prompt stand in its conditioning.

    Args:
        tokens: the host's token lists per text encoder: {"g": [[(token, weight, ...), ...], ...], "l": ...}.
        widths: embedding width of each encoder, to know which textual-inversion vectors the host drops.
        rows: length of the conditioning. SDXL cuts the longer of its two encoders' texts to the shorter; packs of the
            NegPip kind give every token two rows, for K and for V.

    Returns:
        placeholder -> ascending rows, and how many rows a token has. With two texts (SDXL) a row is bound where either
        of them mentions it.
    """
    found: dict[str, set[int]] = {}
    lengths = []
    for name, sections in tokens.items():
        start = 0
        for section in sections:
            at, dropped = start, 0
            for token, *_ in section:
                here, padding = _rows_taken(token, widths.get(name, -1))
                if isinstance(token, BoundToken):
                    found.setdefault(token.placeholder, set()).add(at)
                at += here
                dropped += padding
            start = at + dropped
        lengths.append(start)
    length = min(lengths, default=0)
    each = rows // length if length and rows % length == 0 else 1  # rows per token
    kept = {name: sorted(row for at in places for row in range(at * each, (at + 1) * each) if row < rows)
            for name, places in found.items()}  # fmt: skip
    return {placeholder: tuple(places) for placeholder, places in kept.items() if places}, each


def _without_doubles(cond: Tensor, places: Places) -> tuple[Tensor, Places]:
    """A conditioning whose tokens may have a row for K and one for V: the first of each, and where it stands.

    That is what an attention layer gets to see of it.
    """
    return cond[:, ::2], {name: tuple(sorted({row // 2 for row in rows})) for name, rows in places.items()}


class Ledger:
    """The bound encodes of this process, found again by what their rows look like.

    An entry is a sketch: 64 channels of every row, normalised, so that it also fits copies that were cast or scaled
    as a whole. All rows of an encode must fit, one after another. Texts that differ only in a placeholder and its
    class word are the same rows; then both names are reported, and the caller knows which subjects it has.
    """

    CHANNELS = 64
    SIMILAR = 0.9999

    def __init__(self, size: int = 2048) -> None:  # of 20 kB each, for a prompt of 77 tokens
        self.size = size
        self.entries: OrderedDict[bytes, tuple[Tensor, dict[str, tuple[int, ...]]]] = OrderedDict()

    @classmethod
    def _sketch(cls, cond: Tensor) -> Tensor:
        """(T, D) -> unit rows (T, CHANNELS), fp32 on the CPU."""
        step = max(1, cond.shape[-1] // cls.CHANNELS)
        return torch.nn.functional.normalize(cond[:, ::step][:, : cls.CHANNELS].float().cpu(), dim=-1)

    def add(self, cond: Tensor, places: Places) -> None:
        """Remember an encode: cond (1, T, D) and where its placeholders stand."""
        sketch = self._sketch(cond[0])
        key = (sketch * 4096).round().to(torch.int16).numpy().tobytes()
        known = self.entries.pop(key, (sketch, {}))[1]
        self.entries[key] = (sketch, {**known, **places})
        while len(self.entries) > self.size:
            self.entries.popitem(last=False)

    def find(self, cond: Tensor) -> Places:
        """Places in a conditioning's rows (T, D), for every remembered encode that stands in them, at any offset."""
        sketch = self._sketch(cond)
        found: dict[str, set[int]] = {}
        for key, (known, places) in list(self.entries.items()):
            length = len(known)
            if length > len(sketch) or known.shape[1] != sketch.shape[1]:
                continue
            similar = sketch @ known.T  # (T, length)
            for offset in range(len(sketch) - length + 1):
                if similar[offset, 0] > self.SIMILAR and bool(
                    (similar.diagonal(-offset)[:length] > self.SIMILAR).all()
                ):
                    self.entries.move_to_end(key)  # in use: the last to be forgotten
                    for placeholder, rows in places.items():
                        found.setdefault(placeholder, set()).update(row + offset for row in rows)
        return {placeholder: tuple(sorted(rows)) for placeholder, rows in found.items()}


LEDGER = Ledger()


class _BoundCLIP:
    """Mixed into the class of a CLIP object: clones stay bound, encodes say where placeholders landed."""

    nested_attention: tuple[Placeholder, ...]

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return _adopt(super().clone(*args, **kwargs), self.nested_attention)  # type: ignore[misc]

    def encode_from_tokens(
        self, tokens: Any, return_pooled: Any = False, return_dict: bool = False, **kwargs: Any
    ) -> Any:
        out = super().encode_from_tokens(  # type: ignore[misc]
            tokens, return_pooled=return_pooled, return_dict=return_dict, **kwargs
        )
        unprojected = return_pooled == "unprojected"
        if return_dict:
            self._describe(tokens, out["cond"], out, unprojected)
            return out
        if return_pooled:
            cond, pooled = out
            values = {"pooled_output": pooled}
            self._describe(tokens, cond, values, unprojected)
            return cond, values["pooled_output"]
        self._describe(tokens, out, {}, unprojected)
        return out

    def encode_from_tokens_scheduled(self, tokens: Any, unprojected: bool = False, *args: Any, **kwargs: Any) -> Any:
        out = super().encode_from_tokens_scheduled(tokens, unprojected, *args, **kwargs)  # type: ignore[misc]
        for cond, values in out:
            if CONDITIONING_KEY not in values:  # encoded under CLIP hooks, past encode_from_tokens
                # The pooled vector would need the same hooks once more; it stays at the end of the text.
                self._describe(tokens, cond, values, unprojected=True)
        return out

    def _describe(self, tokens: Any, cond: Tensor, values: dict[str, Any], unprojected: bool) -> None:
        """Write where `tokens` bind into the conditioning's dictionary and into the ledger."""
        places, each = places_of(tokens, self._widths(tokens), cond.shape[1])
        values[CONDITIONING_KEY] = {
            "length": cond.shape[1],
            "places": {placeholder: list(rows) for placeholder, rows in places.items()},
            "reads": self._reads(tokens),
        }
        if places:
            LEDGER.add(cond, places)
            if each == 2:
                LEDGER.add(*_without_doubles(cond, places))
        if values.get("pooled_output") is not None and not unprojected:
            at_placeholder = self._pooled_at_placeholder(tokens)
            if at_placeholder is not None:
                values["pooled_output"] = at_placeholder.to(values["pooled_output"])

    def _reads(self, tokens: Mapping[str, Any]) -> list[list[str]]:
        """What a text encoder reads, in pieces: [text, placeholder, or "" for what is no subject's].

        Of SDXL's two texts the one that binds, or the first.
        """
        read: list[list[str]] = []
        for name, part in _sd_tokenizers(self.tokenizer).items():  # type: ignore[attr-defined]
            sections = tokens.get(name.removeprefix("clip_"), ())
            pieces: list[tuple[str, list[int]]] = []
            ends = {part.start_token, part.end_token, part.pad_token}
            for token, *_ in (entry for section in sections for entry in section):
                owner = getattr(token, "placeholder", "")
                if not isinstance(token, int) or (token in ends and not owner):
                    continue  # an embedding, or what begins, ends and fills up a section
                if not pieces or pieces[-1][0] != owner:
                    pieces.append((owner, []))
                pieces[-1][1].append(int(token))
            here = [[part.tokenizer.decode(ids).strip(), owner] for owner, ids in pieces]
            if not read or any(owner for _, owner in here):
                read = here
            if any(owner for _, owner in here):
                break
        return read

    def _encoder(self, name: str) -> Any:
        return getattr(self.cond_stage_model, f"clip_{name}", None)  # type: ignore[attr-defined]

    def _widths(self, tokens: Mapping[str, Any]) -> dict[str, int]:
        encoders = {name: self._encoder(name) for name in tokens}
        return {
            name: encoder.transformer.get_input_embeddings().weight.shape[1]
            for name, encoder in encoders.items()
            if encoder is not None
        }

    def _pooled_at_placeholder(self, tokens: Mapping[str, Any]) -> Tensor | None:
        """CLIP-G's projected last state at the first bound token, where a subject asks for that; (1, 1280) or None.

        The text encoder is causal, so this is what a tokenizer that ends the text at the placeholder would give.
        """
        wanted = {p.text for p in self.nested_attention if p.pooled}
        encoder = self._encoder("g")
        if not wanted or encoder is None or not tokens.get("g"):
            return None
        section = tokens["g"][0]  # the host takes the pooled vector from the first section
        width, row = encoder.transformer.get_input_embeddings().weight.shape[1], 0
        for token, *_ in section:
            if isinstance(token, BoundToken) and token.placeholder in wanted:
                break
            row += _rows_taken(token, width)[0]
        else:
            return None
        device = self.load_model(tokens).load_device  # type: ignore[attr-defined]
        encoder.reset_clip_options()
        encoder.set_clip_options({"layer": None, "execution_device": device})  # None: the last layer, normalised
        try:
            last = encoder.encode([[token for token, *_ in section]])[0]
            return encoder.transformer.text_projection(last[:, row].to(device))
        finally:
            encoder.reset_clip_options()


_bound_classes: dict[type, type] = {}  # one per class, so that clones and their originals are of one kind


def _bound_class(base: type) -> type:
    """A CLIP class with the binding mixed in."""
    if issubclass(base, _BoundCLIP):
        return base
    return _bound_classes.setdefault(base, type(base.__name__, (_BoundCLIP, base), {}))


def _adopt(clip: Any, placeholders: tuple[Placeholder, ...]) -> Any:
    clip.__class__ = _bound_class(type(clip))
    clip.nested_attention = placeholders
    return clip


def bound_placeholders(clip: Any) -> tuple[Placeholder, ...]:
    """The placeholders that a CLIP binds; empty for a stock CLIP."""
    return clip.nested_attention if isinstance(clip, _BoundCLIP) else ()


def bind_clip(clip: Any, placeholder: Placeholder) -> Any:
    """A clone of `clip` under which `placeholder` is read as its class word and bound; `clip` is untouched.

    Raises NestedAttentionError: the CLIP is of an unsupported kind; the placeholder is already bound; its class word
    has no tokens.
    """
    tokenizers = _sd_tokenizers(clip.tokenizer)
    if not tokenizers or not set(tokenizers) <= {"clip_l", "clip_g"}:
        raise NestedAttentionError(
            f"This CLIP ({type(clip.tokenizer).__name__}) is not of SDXL or SD 1.5. Apply Subject works with those "
            "two: connect the CLIP of the checkpoint that the model comes from."
        )
    placeholders = bound_placeholders(clip)
    if placeholder.key in {p.key for p in placeholders}:
        raise NestedAttentionError(
            f"Two subjects use the placeholder {placeholder.text}. Give each subject its own in Encode Subject or "
            "Load Subject, for example <anna> and <ben>, and use both in the prompt."
        )
    placeholders += (placeholder,)
    bound = _adopt(clip.clone(), placeholders)
    bound.tokenizer = _bind_tokenizer(clip.tokenizer, placeholders)
    for sections in bound.tokenize(placeholder.text).values():
        if not any(isinstance(token, BoundToken) for section in sections for token, *_ in section):
            raise NestedAttentionError(
                f"The class word {placeholder.class_word!r} of {placeholder.text} has no tokens in this text encoder. "
                'Use a plain English word for what the subject is, such as "person" or "dog".'
            )
    return bound


def places_in_conditioning(cond: Tensor, values: Mapping[str, Any], by_likeness: bool = True) -> Places:
    """Where placeholders stand in a conditioning (1, T, D): by its dictionary where that fits, else by the ledger.

    by_likeness: whether the ledger may decide about a conditioning without our entry. A text from the stock CLIP that
    reads like one with a placeholder has the same rows; where a subject must not appear by accident, say False.

    Zeroed conditionings (ConditioningZeroOut) carry no subject: there is no text left to bind to.
    """
    entry = values.get(CONDITIONING_KEY)
    if entry is not None and entry["length"] == cond.shape[1]:
        places = {placeholder: tuple(rows) for placeholder, rows in entry["places"].items()}
    elif entry is not None or by_likeness:
        places = LEDGER.find(cond[0])
    else:
        places = {}
    if places:
        rows = sorted({row for at in places.values() for row in at})
        if not cond[0, rows].any():
            return {}
    return places


def describe_binding(conditioning: Any) -> str:
    """Which words the subjects took in each text of a CONDITIONING, for people to read."""
    lines = []
    for number, (cond, values) in enumerate(conditioning):
        head = f"Text {number + 1} of {len(conditioning)}: " if len(conditioning) > 1 else ""
        places = places_in_conditioning(cond[:1], values)
        entry = values.get(CONDITIONING_KEY) or {}
        reads = entry.get("reads") if entry.get("length") == cond.shape[1] else None
        if reads:
            shown = " ".join(f"[{owner}: {text}]" if owner and owner in places else text for text, owner in reads)
            lines.append(f"{head}{shown}")
        elif not places:
            lines.append(f"{head}no subject, as far as can be seen")
        else:
            lines.append(f"{head}rebuilt by another node; found again by its rows")
        lines += [
            f"    {placeholder} is bound to {'rows' if len(rows) > 1 else 'row'} {', '.join(map(str, rows))} of "
            f"{cond.shape[1]}"
            for placeholder, rows in sorted(places.items())
        ]
        if not places and reads:
            lines.append("    no subject")
    return "\n".join(lines)
