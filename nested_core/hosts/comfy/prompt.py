"""Prompt placeholders in ComfyUI: CLIPs under which a placeholder such as `<person>` is its class word, and is known.

`bind_clip` returns a CLIP whose conditionings say themselves which rows are whose (`text.MarkedText`):

1. The tokenizers inside the CLIP are wrapped where they meet plain text, below the host's handling of weights,
   escapes, embeddings and long prompts. The tokens of a placeholder have ids that say whose they are. They pass through
   every node that cuts, joins or reweights token lists. So do those of a class word where it stands as itself, if the
   placeholder seeks it: it is bound in negative prompts alone.
2. The text encoders get a forward hook: what they make of token lists with bound tokens in them is marked. It does
   nothing for other tokens, and only these tokenizers make such; so it may stay on an encoder that other CLIPs share. A
   hook sees the encoder called from anywhere: by the host, by packs that call the encoders one by one, through methods
   that packs have put in the place of the host's.
3. From there on the conditioning's own marks tell, until a layer of the U-Net reads it.

The conditioning's dictionary has an entry as well (`CONDITIONING_KEY`): `{"length": rows, "places": {placeholder:
[row, ...]}, "reads": [[text, placeholder], ...]}`, where "reads" is what the text encoder reads, in pieces. It is there
to be shown, and to find out what became of a text; nothing is bound by it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ...errors import NestedAttentionError
from ...prompt import ClassWord, Placeholder, PromptReader, Reading, locate
from ...words import fold
from .text import mark, rows_of

CONDITIONING_KEY = "nested_attention"

#: Larger than any id of a text encoder. The id of a placeholder's token is its own plus a multiple of this: so it says
#: whose it is after whatever lists, arrays and tensors it went through.
_STRIDE = 1 << 20
_placeholders: list[Placeholder | ClassWord] = []  # what the multiples mean


class PlaceholderToken(int):
    """A token id as a text encoder has it, that knows the placeholder, or the class word, it came from."""

    placeholder: Placeholder | ClassWord


def _number_of(token: int, placeholder: Placeholder | ClassWord) -> int:
    """The id of a placeholder's token outside of the text encoder."""
    if placeholder not in _placeholders:
        _placeholders.append(placeholder)
    return token + _STRIDE * (1 + _placeholders.index(placeholder))


def _is_bound(token: Any) -> bool:
    return isinstance(token, int) and token >= _STRIDE


def _token_of(number: int) -> PlaceholderToken:
    """Such an id as the text encoder has it."""
    token = PlaceholderToken(number % _STRIDE)
    token.placeholder = _placeholders[number // _STRIDE - 1]
    return token


# --- tokenizers -------------------------------------------------------------------------------------------------------


class _BindingTokenizer:
    """Stands in for a Hugging Face tokenizer inside a tokenizer of the host: ids of placeholders come out bound."""

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
        encoded = self.inner(text)
        ids = list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded[0])
        return ids[self.lead : len(ids) - self.trail]

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        several = isinstance(text, (list, tuple))
        given = text if several else [text]
        if not all(isinstance(t, str) for t in given) or not any(map(self.reader.concerns, given)):
            return self.inner(text, *args, **kwargs)
        readings = [self.reader.read(t) for t in given]
        read = [reading.text for reading in readings]
        encoded = self.inner(read if several else read[0], *args, **kwargs)
        ids = encoded["input_ids"] if hasattr(encoded, "keys") else encoded
        nested = several or not hasattr(encoded, "keys")
        lead = self.lead if kwargs.get("add_special_tokens", True) else 0
        for reading, row in zip(readings, ids if nested else [ids], strict=True):
            for i, placeholder in self._located(reading).items():
                if lead + i < len(row):  # else it was cut off, as asked
                    row[lead + i] = _number_of(int(row[lead + i]), placeholder)
        return encoded

    def _located(self, reading: Reading) -> dict[int, Placeholder | ClassWord]:
        """Which of a read text's tokens are whose. A token of both is the placeholder's."""
        ids = self._ids(reading.text)
        words = locate(self.reader.class_words(reading), ids, self._ids)
        by_text = {p.text: p for p in self.reader.placeholders}
        return {
            **{i: ClassWord(text) for i, text in words.items()},
            **{i: by_text[text] for i, text in locate(reading, ids, self._ids).items()},
        }


class _Words(dict[int, str]):
    """What the host's `untokenize` looks ids up in: those of placeholders too."""

    def __missing__(self, token: int) -> str:
        if token < _STRIDE:
            raise KeyError(token)
        return self[token % _STRIDE]


def _text_tokenizers(tokenizer: Any) -> dict[str, Any]:
    """The tokenizers of text inside a CLIP's, by attribute name: clip_l and clip_g for SDXL, clip_l for SD 1.5."""
    return {
        name: part
        for name, part in vars(tokenizer).items()
        if hasattr(part, "tokenize_with_weights") and hasattr(part, "tokenizer")
    }


def _bind_tokenizer(tokenizer: Any, placeholders: tuple[Placeholder, ...]) -> Any:
    """A shallow copy of a CLIP's tokenizer whose text tokenizers bind `placeholders`; the original is untouched."""
    bound = copy.copy(tokenizer)
    for name, part in _text_tokenizers(tokenizer).items():
        part = copy.copy(part)
        inner = part.tokenizer.inner if isinstance(part.tokenizer, _BindingTokenizer) else part.tokenizer
        trail = int(getattr(part, "tokenizer_adds_end_token", True))
        part.tokenizer = _BindingTokenizer(inner, placeholders, part.tokens_start, trail)
        if hasattr(part, "inv_vocab"):
            part.inv_vocab = _Words(part.inv_vocab)
        setattr(bound, name, part)
    return bound


def _holds_bound(tokens: Any) -> bool:
    """Whether a tokenized prompt, of whatever nesting, has a bound token in it."""
    if isinstance(tokens, (list, tuple)):
        return any(map(_holds_bound, tokens))
    if torch.is_tensor(tokens):
        return tokens.dtype in (torch.int32, torch.int64) and bool((tokens >= _STRIDE).any())
    return _is_bound(tokens)


def _holds_placeholder(tokens: Any) -> bool:
    """Whether one of them is a placeholder's, and not a class word that stands as itself."""
    if torch.is_tensor(tokens):
        return _holds_placeholder(tokens.tolist())
    if isinstance(tokens, (list, tuple)):
        return any(map(_holds_placeholder, tokens))
    return _is_bound(tokens) and isinstance(_token_of(tokens).placeholder, Placeholder)


# --- text encoders ----------------------------------------------------------------------------------------------------


def _watch(text_model: Any) -> None:
    """Hooks on the text encoders of a CLIP, once each."""
    for name in ("clip_l", "clip_g"):
        encoder: Any = getattr(text_model, name, None)
        if isinstance(encoder, torch.nn.Module) and _mark_words not in encoder._forward_hooks.values():
            encoder.register_forward_pre_hook(_read_numbers)
            encoder.register_forward_hook(_mark_words)
            if name == "clip_g":  # SDXL's pooled vector comes from this one
                encoder.register_forward_hook(_pool_at_word)
            transformer: Any = encoder.transformer
            transformer.get_input_embeddings().register_forward_pre_hook(_own_ids)


def _own_ids(embedding: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of an encoder's embedding, for whoever hands it ids past the encoder: they are its own."""
    ids, *others = args
    return ids % _STRIDE, *others


def _read_numbers(encoder: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook: ids of placeholders become bound tokens, which have the encoder's own values."""
    tokens, *others = args
    if not _holds_bound(tokens):
        return None
    sections = tokens.tolist() if torch.is_tensor(tokens) else tokens
    return [[_token_of(t) if _is_bound(t) else t for t in section] for section in sections], *others


def _placeholder_rows(section: Sequence[Any], width: int) -> Iterator[tuple[int, Placeholder | ClassWord]]:
    """Row of the text encoder's output and placeholder, for each bound token of one section of a prompt.

    width: of the encoder's embeddings. A textual inversion takes as many rows as it has vectors; one of another width
    is dropped by the host, which pads at the end instead.
    """
    row = 0
    for token in section:
        if isinstance(token, PlaceholderToken):
            yield row, token.placeholder
        if isinstance(token, dict):
            token = token.get("data")
        if not torch.is_tensor(token):
            row += 1
        elif token.shape[-1] == width:
            row += token.numel() // width


def _width(encoder: Any) -> int:
    return int(encoder.transformer.get_input_embeddings().weight.shape[1])


def _mark_words(encoder: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: the encoder's text, (sections, T, C), marked where the bound tokens of its sections stand."""
    tokens = args[0]
    if torch.is_tensor(tokens) or not any(isinstance(t, PlaceholderToken) for section in tokens for t in section):
        return None
    text, *others = output
    marks: dict[str | ClassWord, Tensor] = {}
    for number, section in enumerate(tokens):
        for row, placeholder in _placeholder_rows(section, _width(encoder)):
            if row >= text.shape[-2]:
                raise NestedAttentionError(
                    f"The text encoder {type(encoder).__name__} made {text.shape[-2]} rows of {len(section)} tokens, "
                    f"so the place of {placeholder.text} in them can't be known. Use the checkpoint's own CLIP."
                )
            of = marks.setdefault(placeholder.key, torch.zeros(text.shape, dtype=torch.bool))
            of[number, ..., row, :] = True
    return type(output)((mark(text, marks), *others))  # type: ignore[arg-type]


def _pool_at_word(encoder: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: the pooled vector is CLIP-G's projected last state at the first bound token that asks for that.

    The text encoder is causal, so this is what a tokenizer that ends the text at the placeholder would give. The host
    takes the pooled vector from the first section.
    """
    tokens = args[0]
    text, pooled, *others = output
    if torch.is_tensor(tokens) or not encoder.return_projected_pooled or pooled is None:
        return None
    row = next((row for row, p in _placeholder_rows(tokens[0], _width(encoder)) if p.pooled), None)
    if row is None:
        return None
    before = (encoder.layer, encoder.layer_idx)
    encoder.set_clip_options({"layer": None})  # the last layer, normalised
    try:
        last = encoder([[int(t) if isinstance(t, int) else t for t in tokens[0]]])[0]
    finally:
        encoder.layer, encoder.layer_idx = before
    pooled = pooled.clone()
    pooled[:1] = encoder.transformer.text_projection(last[:, row]).to(pooled)
    return type(output)((text, pooled, *others))


# --- the CLIP ---------------------------------------------------------------------------------------------------------


class _SubjectCLIP:
    """Mixed into the class of a CLIP object: clones stay bound, also with other tokenizers and encoders inside."""

    nested_attention: tuple[Placeholder, ...]

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return _adopt(super().clone(*args, **kwargs), self.nested_attention)  # type: ignore[misc]

    def tokenize(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """Raises NestedAttentionError where a part of the CLIP, put in by another node, reads placeholders raw."""
        parts: Any = self.tokenizer  # type: ignore[has-type]
        if not all(isinstance(p.tokenizer, _BindingTokenizer) for p in _text_tokenizers(parts).values()):
            self.tokenizer = _bind_tokenizer(parts, self.nested_attention)
        _watch(self.cond_stage_model)  # type: ignore[attr-defined]
        tokens = super().tokenize(text, *args, **kwargs)  # type: ignore[misc]
        given = [t for t in (text if isinstance(text, (list, tuple)) else [text]) if isinstance(t, str)]
        if isinstance(tokens, dict) and any(map(PromptReader(self.nested_attention).mentions_any, given)):
            for name, sections in tokens.items():
                if not _holds_placeholder(sections):
                    raise self._unbound(name)
        return tokens

    def encode_from_tokens(
        self, tokens: Any, return_pooled: Any = False, return_dict: bool = False, **kwargs: Any
    ) -> Any:
        out = super().encode_from_tokens(  # type: ignore[misc]
            tokens, return_pooled=return_pooled, return_dict=return_dict, **kwargs
        )
        if return_dict:
            out[CONDITIONING_KEY] = self._description(tokens, out["cond"])
        return out

    def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().encode_from_tokens_scheduled(tokens, *args, **kwargs)  # type: ignore[misc]
        for cond, values in out:
            values[CONDITIONING_KEY] = self._description(tokens, cond)
        return out

    def _unbound(self, encoder: str) -> NestedAttentionError:
        """The error for a text that mentions a placeholder and has none of its tokens for a text encoder."""
        names = ", ".join(p.text for p in self.nested_attention)
        part = getattr(self.tokenizer, f"clip_{encoder}", self.tokenizer)
        if isinstance(getattr(part, "tokenizer", None), _BindingTokenizer):
            return NestedAttentionError(
                f"The text encode node changes {names} before it is read: some take characters such as < off the "
                "beginning of what they weigh. Put a word in front of it there, as in (a <person>:1.2)."
            )
        return NestedAttentionError(
            f"A node after Apply Subject gave this CLIP another tokenizer ({type(part).__name__}) for its text encoder "
            f"{encoder!r}, which reads {names} as it is written. Put that node in front of Apply Subject."
        )

    def _description(self, tokens: Any, cond: Tensor) -> dict[str, Any]:
        rows = rows_of(cond[:1])[0]
        return {
            "length": cond.shape[1],
            "places": {p.text: list(rows[p.key]) for p in self.nested_attention if p.key in rows},
            "reads": self._reads(tokens),
        }

    def _reads(self, tokens: Any) -> list[list[str]]:
        """What a text encoder reads, in pieces: [text, placeholder, or "" for what is no subject's].

        Of SDXL's two texts the one that binds, or the first. Empty for token lists of another shape than the host's.
        """
        read: list[list[str]] = []
        for name, part in _text_tokenizers(self.tokenizer).items():
            sections = tokens.get(name.removeprefix("clip_"), ()) if isinstance(tokens, Mapping) else ()
            if not all(isinstance(s, list) and all(isinstance(entry, tuple) for entry in s) for s in sections):
                continue
            pieces: list[tuple[str, list[int]]] = []
            ends = {part.start_token, part.end_token, getattr(part, "pad_token", None)}
            for token, *_ in (entry for section in sections for entry in section):
                if not isinstance(token, int) or token in ends:
                    continue  # an embedding, or what begins, ends and fills up a section
                whose = _token_of(token).placeholder if _is_bound(token) else None
                owner = whose.text if isinstance(whose, Placeholder) else ""
                if not pieces or pieces[-1][0] != owner:
                    pieces.append((owner, []))
                pieces[-1][1].append(token % _STRIDE)
            if pieces and not hasattr(part.tokenizer.inner, "decode"):
                continue
            here = [[part.tokenizer.decode(ids).strip(), owner] for owner, ids in pieces]
            if not read or any(owner for _, owner in here):
                read = here
            if any(owner for _, owner in here):
                break
        return read


_subject_classes: dict[type, type] = {}  # one per class, so that clones and their originals are of one kind


def _adopt(clip: Any, placeholders: tuple[Placeholder, ...]) -> Any:
    base = type(clip)
    if not issubclass(base, _SubjectCLIP):
        clip.__class__ = _subject_classes.setdefault(base, type(base.__name__, (_SubjectCLIP, base), {}))
    clip.nested_attention = placeholders
    return clip


def bound_placeholders(clip: Any) -> tuple[Placeholder, ...]:
    """The placeholders that a CLIP binds; empty for a stock CLIP."""
    return clip.nested_attention if isinstance(clip, _SubjectCLIP) else ()


def bind_clip(clip: comfy.sd.CLIP, placeholder: Placeholder) -> Any:
    """A clone of `clip` under which `placeholder` is read as its class word and marked; `clip` is untouched.

    Raises NestedAttentionError: the CLIP is of an unsupported kind; the placeholder is already bound; its class word
    has no tokens.
    """
    tokenizers = _text_tokenizers(clip.tokenizer) if hasattr(clip.tokenizer, "__dict__") else {}
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
    # Past the bound CLIP's own check: what is wrong here is the class word.
    tokens = bound.tokenizer.tokenize_with_weights(placeholder.text)
    if not all(map(_holds_bound, tokens.values())):
        raise NestedAttentionError(
            f"The class word {placeholder.class_word!r} of {placeholder.text} has no tokens in this text encoder. "
            'Use a plain English word for what the subject is, such as "person" or "dog".'
        )
    return bound


# --- what to tell people ----------------------------------------------------------------------------------------------


def describe_binding(conditioning: Any) -> str:
    """Which words the subjects took in each text of a CONDITIONING, for people to read."""
    lines = []
    for number, (cond, values) in enumerate(conditioning):
        head = f"Text {number + 1} of {len(conditioning)}: " if len(conditioning) > 1 else ""
        pictures = rows_of(cond)
        places = {key: rows for picture in pictures for key, rows in picture.items()}
        entry = values.get(CONDITIONING_KEY) or {}
        names = {fold(name): name for name in entry.get("places", {})}
        reads = entry.get("reads") if entry.get("length") == cond.shape[1] else None
        if reads:
            shown = " ".join(f"[{owner}: {text}]" if fold(owner) in places else text for text, owner in reads)
            lines.append(f"{head}{shown}")
        elif places:
            lines.append(f"{head}changed by another node, which kept the subjects' places")
        else:
            lines.append(f"{head}no subject")
        for i, picture in enumerate(pictures):
            of = f"picture {i + 1}: " if len(pictures) > 1 else ""
            lines += [
                f"    {of}{key.text if isinstance(key, ClassWord) else names.get(str(key), key)} is bound to "
                f"{'rows' if len(rows) > 1 else 'row'} {', '.join(map(str, rows))} of {cond.shape[1]}"
                f"{' if this is a negative prompt' if isinstance(key, ClassWord) else ''}"
                for key, rows in sorted(picture.items(), key=str)
            ]
        if reads and not places:
            lines.append("    no subject")
    return "\n".join(lines)


def why_unmentioned(placeholder: Placeholder, texts: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> str:
    """What became of a placeholder that none of these texts (conditioning, its dictionary) is marked with."""
    entries = [(cond, values.get(CONDITIONING_KEY)) for cond, values in texts]
    if any(entry and placeholder.text in entry["places"] and not cond.any() for cond, entry in entries):
        return f"The text that mentions {placeholder.text} was emptied by a node such as Conditioning Zero Out."
    if any(entry and placeholder.text in entry["places"] for _, entry in entries):
        return (
            f"A text did mention {placeholder.text}, but a node behind the text encode node made it anew outside of "
            "PyTorch, or mixed its rows, so that nobody can know where the word is now. Take that node out, or put it "
            "on the texts that mention no subject."
        )
    reads = ["".join(f"{text} " for text, _ in entry["reads"]).strip() for _, entry in entries if entry]
    raw = [read for read in reads if fold(placeholder.text) in fold(read.replace(" ", ""))]
    if raw:
        return (
            f'A text encoder reads "{raw[0]}", the placeholder as it is written: that text encode node has the CLIP of '
            "another Apply Subject. With several of them, take the CLIP from the last one."
        )
    if reads:
        return (
            f'The text encoder reads "{reads[0]}". If you did write {placeholder.text} there, a node in front of the '
            "text encode node takes out what stands between < and >, as loaders of LoRA tags do: choose a placeholder "
            "such as [person] or @anna in Encode Subject."
        )
    return (
        "None of the texts comes from the CLIP of Apply Subject: the text encode nodes have another CLIP (straight "
        "from the checkpoint, or from a loader), or the texts come out of a node that makes them by itself."
    )
