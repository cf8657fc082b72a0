"""A subject: what the encoder made of someone's photos, and the word it is bound to. Check, merge, save, load."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import regex
import torch
from torch import Tensor

from .errors import NestedAttentionError
from .files import PRECISIONS, Weights, few, looks_like, open_weights, save_tensors
from .words import fold, letters

if TYPE_CHECKING:
    from .encoder import EncoderConfig

FORMAT = "nested_attention.subject"
VERSION = 1
SUFFIX = ".safetensors"

_ADVICE = "Choose a file that Save Subject wrote."
_MAX_LENGTH = 64
_WEIGHTS = (1e-6, 1e6)
_OF_AN_ENCODER = re.compile(
    r"(^|\.)(image_proj|image_proj_model|ip_adapter|adapter_modules|resampler|qformer|to_k|to_v)(\.|$)"
)


@dataclass(frozen=True, eq=False)
class Subject:
    """One subject, as the encoder with the given fingerprint sees it. Immutable; checked when made.

    Attributes:
        tokens: x of equations 1 and 2, (1, N, C), fp32, fp16 or bf16: encoder tokens of all views, one after another.
        placeholder: the word in the prompt it is bound to, "<person>".
        class_word: the word the text encoder reads in its place, "person".
        encoder: fingerprint of the encoder that made the tokens; no other encoder understands them.
        encoder_title: the encoder's name, for messages.
        family: "sdxl" or "sd15".
        views: how many images went in.
        token_weights: (N,), positive and finite, or None for all ones: multiplicities in the nested softmax. A token
            of weight 2 counts as if it stood there twice; only ratios matter. In logits, log(weight) is added.
        provenance: where it came from (version that made it, content hashes of the images, how they were cropped...).

    Raises:
        NestedAttentionError: a field does not fit.
    """

    tokens: Tensor
    placeholder: str
    class_word: str
    encoder: str
    encoder_title: str
    family: str
    views: int = 1
    token_weights: Tensor | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        object.__setattr__(self, "tokens", self.tokens.detach())
        object.__setattr__(self, "placeholder", validate_placeholder(self.placeholder))
        object.__setattr__(self, "class_word", validate_class_word(self.class_word))
        for name in ("encoder", "encoder_title", "family"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise NestedAttentionError(f"A subject's {name} must be a text that is not empty; got {value!r}.")
        if isinstance(self.views, bool) or not isinstance(self.views, int) or self.views < 1:
            raise NestedAttentionError(f"A subject's number of views must be 1 or more; got {self.views!r}.")
        if self.token_weights is not None:
            _check_token_weights(self.token_weights, self.tokens.shape[1])
            object.__setattr__(self, "token_weights", self.token_weights.detach())
        if not all(isinstance(text, str) for item in self.provenance.items() for text in item):
            raise NestedAttentionError(f"A subject's provenance must map texts to texts; got {self.provenance!r}.")
        object.__setattr__(self, "provenance", dict(self.provenance))

    def __repr__(self) -> str:
        weighted = "" if self.token_weights is None else ", weighted"
        return (
            f"Subject({self.placeholder!r} as {self.class_word!r}, {self.views} view(s), {self.tokens.shape[1]} tokens "
            f"of width {self.tokens.shape[2]}{weighted}, {self.family}, "
            f"encoder {_encoder_name(self.encoder_title, self.encoder)})"
        )


# --- words -----------------------------------------------------------------------------------------------------------


def validate_placeholder(text: str) -> str:
    """The word a subject is bound to, without surrounding spaces.

    Angle brackets are customary ("<person>"): such a word stands in no other text by accident. A plain word ("man") is
    allowed too, see `is_plain_word`.

    Raises:
        NestedAttentionError: empty; longer than 64 characters; without any letter or digit; with characters that a
            prompt gives a meaning to: ( ) \\ : { } |, line breaks, comment signs, a leading "embedding"; with half a
            letter at an end, such as an accent without its letter.
    """
    word = _checked_word(text, "placeholder", "Write a word such as <person>.")
    taken = sorted(set("()\\:{}|") & set(word))
    if taken:
        raise NestedAttentionError(
            f"The placeholder {word!r} holds {' '.join(taken)}, which prompts use for weights, embeddings and "
            "wildcards. Write a word without them, such as <person>."
        )
    comment = next((sign for sign in ("//", "/*") if sign in word), None)
    if comment:
        raise NestedAttentionError(
            f"The placeholder {word!r} holds {comment}, which starts a comment in a prompt: it would be cut out. "
            "Write a word without it, such as <person>."
        )
    if word.casefold().startswith("embedding"):
        raise NestedAttentionError(
            f"The placeholder {word!r} starts with 'embedding', which prompts use for textual inversion embeddings. "
            "Write another word, such as <person>."
        )
    parts = letters(f" {word} ")
    if parts[0] != " " or parts[-1] != " ":
        raise NestedAttentionError(
            f"The placeholder {word!r} begins or ends with half a letter, such as an accent without the letter that it "
            "stands on: in a prompt it would melt with what is next to it. Write whole letters, such as <person>."
        )
    return word


def validate_class_word(text: str) -> str:
    """The word the text encoder reads instead of the placeholder ("person", "golden retriever"), stripped.

    Raises:
        NestedAttentionError: empty; longer than 64 characters; not printable; without any letter or digit; with
            ( ) \\ { } |, which would act as weights and wildcards where it is put into the prompt.
    """
    word = _checked_word(text, "class word", "Write what the subject is, such as person, dog or golden retriever.")
    taken = sorted(set("()\\{}|") & set(word))
    if taken:
        raise NestedAttentionError(
            f"The class word {word!r} holds {' '.join(taken)}, which prompts use for weights and wildcards. Write the "
            "plain word; a weight goes around the placeholder in the prompt: (<person>:1.2)."
        )
    return word


def is_plain_word(placeholder: str) -> bool:
    """True for a placeholder of letters, digits, underscores and spaces only, such as "man".

    Letters of every script, with their marks. A plain word is bound where it stands in the prompt and is read as
    itself; it is not replaced by the class word.
    """
    return regex.fullmatch(r"[\p{L}\p{N}\p{M}_ ]+", fold(placeholder)) is not None


def _checked_word(text: str, what: str, advice: str) -> str:
    if not isinstance(text, str):
        raise NestedAttentionError(f"The {what} must be a text, got a {type(text).__name__}. {advice}")
    word = text.strip()
    if not word:
        raise NestedAttentionError(f"The {what} is empty. {advice}")
    if len(word) > _MAX_LENGTH:
        raise NestedAttentionError(
            f"The {what} {word[:24]!r}... has {len(word)} characters; at most {_MAX_LENGTH} are possible. {advice}"
        )
    unprintable = next((character for character in word if not character.isprintable()), None)
    if unprintable is not None:
        raise NestedAttentionError(
            f"The {what} {word!r} holds a line break or another character that cannot be seen "
            f"(U+{ord(unprintable):04X}). {advice}"
        )
    if not any(character.isalnum() for character in word):
        raise NestedAttentionError(f"The {what} {word!r} has no letter and no digit. {advice}")
    return word


# --- tensors ---------------------------------------------------------------------------------------------------------


def _check_tokens(tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor):
        raise NestedAttentionError(f"A subject's tokens must be a tensor (1, N, C); got a {type(tokens).__name__}.")
    if tokens.dim() != 3 or tokens.shape[0] != 1 or 0 in tokens.shape:
        raise NestedAttentionError(
            f"A subject's tokens must have the shape (1, N, C); got {tuple(tokens.shape)}. Tokens of several views "
            "stand one after another in N."
        )
    if tokens.dtype not in PRECISIONS.values():
        raise NestedAttentionError(f"A subject's tokens must be fp32, fp16 or bf16; got {tokens.dtype}.")
    if not torch.isfinite(tokens).all():
        raise NestedAttentionError(
            "The subject's tokens hold values that are not numbers (NaN or infinite). The encoder overflowed, or the "
            "image held such values: check the image, and run CLIP vision in fp32 or bf16."
        )


def _check_token_weights(weights: Tensor, tokens: int) -> None:
    if not isinstance(weights, Tensor) or tuple(weights.shape) != (tokens,) or weights.dtype not in PRECISIONS.values():
        came = f"{tuple(weights.shape)}, {weights.dtype}" if isinstance(weights, Tensor) else type(weights).__name__
        raise NestedAttentionError(
            f"A subject's token weights must be floats of shape ({tokens},), one per token; got {came}."
        )
    if not torch.isfinite(weights).all() or not (weights > 0).all():
        raise NestedAttentionError("A subject's token weights must all be finite and above 0. Drop tokens of weight 0.")


# --- merging ---------------------------------------------------------------------------------------------------------


def merge_subjects(subjects: Sequence[Subject], weights: Sequence[float] | None = None) -> Subject:
    """Several views of ONE subject become one subject: their tokens are concatenated (arXiv 2501.01407).

    A weight is a multiplicity in the nested softmax: a subject of weight 2 counts as if its tokens stood there twice;
    only ratios matter, and equal weights are no weights. Weight 0 drops the subject. Token weights of a subject that
    was merged before are kept in proportion, scaled to a mean of 1: two views, however they were weighed against each
    other, go into the next merge as two views.

    Args:
        subjects: one or more, all of one encoder. Placeholder and class word come from the first.
        weights: one per subject, 0 or more and at least one above 0; all ones if None.

    Raises:
        NestedAttentionError: no subject; subjects of different encoders; weights that do not fit.
    """
    subjects = list(subjects)
    if not subjects:
        raise NestedAttentionError("There is no subject to merge. Connect one subject per view, two or more.")
    first = subjects[0]
    for i, subject in enumerate(subjects):
        if not isinstance(subject, Subject):
            raise NestedAttentionError(
                f"Subject {i + 1} of {len(subjects)} is a {type(subject).__name__}. Connect the output of Encode "
                "Subject, Load Subject or Merge Subjects."
            )
        if subject.encoder != first.encoder or subject.tokens.shape[2] != first.tokens.shape[2]:
            raise NestedAttentionError(
                "Only subjects of one encoder can be merged: subject 1 was made with "
                f"{_encoder_name(first.encoder_title, first.encoder)}, width {first.tokens.shape[2]}; subject {i + 1} "
                f"with {_encoder_name(subject.encoder_title, subject.encoder)}, width {subject.tokens.shape[2]}. "
                "Encode them with the same encoder."
            )
    factors = _checked_weights(weights, len(subjects))
    kept = [(subject, factor) for subject, factor in zip(subjects, factors, strict=True) if factor > 0]

    dtype = kept[0][0].tokens.dtype
    for subject, _ in kept[1:]:
        dtype = torch.promote_types(dtype, subject.tokens.dtype)
    device = kept[0][0].tokens.device
    per_token = torch.cat([_relative_weights(subject).to(device) * factor for subject, factor in kept])
    return Subject(
        tokens=torch.cat([subject.tokens.to(device=device, dtype=dtype) for subject, _ in kept], dim=1),
        placeholder=first.placeholder,
        class_word=first.class_word,
        encoder=first.encoder,
        encoder_title=first.encoder_title,
        family=first.family,
        views=sum(subject.views for subject, _ in kept),
        token_weights=None if bool((per_token == per_token[0]).all()) else per_token,
        provenance=_merged_provenance([subject.provenance for subject, _ in kept], [factor for _, factor in kept]),
    )


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise NestedAttentionError(f"There are {count} subject(s) and {len(weights)} weights. Give one per subject.")
    factors = []
    for i, weight in enumerate(weights):
        # The bounds keep every ratio within fp32. A comparison with NaN is false.
        if not isinstance(weight, (int, float)) or not (weight == 0 or _WEIGHTS[0] <= weight <= _WEIGHTS[1]):
            raise NestedAttentionError(
                f"Weight {i + 1} must be 0, or a number from {_WEIGHTS[0]:g} to {_WEIGHTS[1]:g}; got {weight!r}. "
                "0 leaves the view out, 2 counts it twice."
            )
        factors.append(float(weight))
    if not any(factors):
        raise NestedAttentionError("All weights are 0, so no view is left. Give at least one view a weight above 0.")
    return factors


def _relative_weights(subject: Subject) -> Tensor:
    """(N,) fp32 with a mean of 1."""
    if subject.token_weights is None:
        return torch.ones(subject.tokens.shape[1], device=subject.tokens.device)
    weights = subject.token_weights.float()
    return weights / weights.mean()


def _merged_provenance(sources: Sequence[Mapping[str, str]], factors: Sequence[float]) -> dict[str, str]:
    """Values that agree stay; values that differ are listed in order; the merged subject was not created yet."""
    if len(sources) == 1:
        return dict(sources[0])
    merged = {}
    for key in dict.fromkeys(key for source in sources for key in source if key != "created"):
        values = [source[key] for source in sources if key in source]
        merged[key] = values[0] if len(set(values)) == 1 else "; ".join(values)
    merged["merge_weights"] = ", ".join(f"{factor:g}" for factor in factors)
    return merged


def check_same_encoder(subject: Subject, unconditional: Subject) -> None:
    """Raises NestedAttentionError where what a subject is in negative prompts was made by another encoder."""
    if (subject.encoder, subject.tokens.shape[2]) != (unconditional.encoder, unconditional.tokens.shape[2]):
        raise NestedAttentionError(
            f"{subject.placeholder} was made with the encoder {_encoder_name(subject.encoder_title, subject.encoder)}, "
            f"its unconditional subject with {_encoder_name(unconditional.encoder_title, unconditional.encoder)}. "
            "Encode both with the same encoder."
        )


def _encoder_name(title: str, fingerprint: str) -> str:
    return f"{title!r} [{fingerprint[:16]}]"


# --- files -----------------------------------------------------------------------------------------------------------


def save_subject(path: str | os.PathLike[str], subject: Subject) -> Path:
    """Writes a subject as safetensors: the tensors as they are, everything else as metadata.

    The file appears whole or not at all; an existing one is replaced. The time of the first save is kept under
    "created" in the provenance.

    Args:
        path: ends in ".safetensors"; its folder exists.

    Returns:
        The path.

    Raises:
        NestedAttentionError: another suffix; the folder is missing, read-only or full.
    """
    path = Path(path)
    if path.suffix.lower() != SUFFIX:
        raise NestedAttentionError(f"A subject is saved as {SUFFIX}; got the name {path.name!r}.")
    provenance = {"created": datetime.now(timezone.utc).isoformat(timespec="seconds"), **subject.provenance}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "placeholder": subject.placeholder,
        "class_word": subject.class_word,
        "encoder": subject.encoder,
        "encoder_title": subject.encoder_title,
        "family": subject.family,
        "views": str(subject.views),
        "provenance": json.dumps(provenance, ensure_ascii=False, sort_keys=True),
    }
    tensors = {"tokens": subject.tokens}
    if subject.token_weights is not None:
        tensors["token_weights"] = subject.token_weights
    save_tensors(path, tensors, metadata, "subject")
    return path


def load_subject(
    path: str | os.PathLike[str],
    encoder_config: EncoderConfig | None = None,
    placeholder: str | None = None,
    class_word: str | None = None,
) -> Subject:
    """Reads a subject that `save_subject` wrote; on the CPU, in the dtype it was saved in.

    Args:
        path: the file.
        encoder_config: of the encoder it will be used with; a subject of another encoder is refused. None: any.
        placeholder, class_word: used instead of the file's unless None or empty.

    Raises:
        NestedAttentionError: no such file; not a subject (says what it looks like); damaged; of a newer version; of
            another encoder; overrides that do not fit.
    """
    path = Path(path)
    # Checked before the file is opened: their faults are not the file's.
    placeholder = validate_placeholder(placeholder) if placeholder is not None and placeholder.strip() else None
    class_word = validate_class_word(class_word) if class_word is not None and class_word.strip() else None
    if not os.path.lexists(path) or path.is_dir():
        here = sorted(file.name for file in path.parent.glob(f"*{SUFFIX}")) if path.parent.is_dir() else []
        there = f"The folder holds {few(here)}." if here else f"There is no {SUFFIX} file in that folder."
        raise NestedAttentionError(f"There is no saved subject {path.name} in {path.parent}. {there}")
    try:
        weights = open_weights(path, pickled=False)
        tensors = weights.read({"tokens", "token_weights"} & weights.tensors.keys())
    except NestedAttentionError as error:
        raise NestedAttentionError(f"{path.name}: {error} {_ADVICE}") from error.__cause__
    metadata = weights.metadata
    if metadata.get("format") != FORMAT:
        raise NestedAttentionError(f"{path.name} is not a saved subject: {_looks_like(weights)}. {_ADVICE}")
    _check_version(path, metadata.get("version"))
    try:
        views = int(metadata["views"])
        provenance = json.loads(metadata.get("provenance", "{}"))
        subject = Subject(
            tokens=tensors["tokens"],
            placeholder=placeholder or metadata["placeholder"],
            class_word=class_word or metadata["class_word"],
            encoder=metadata["encoder"],
            encoder_title=metadata.get("encoder_title") or "unnamed encoder",
            family=metadata["family"],
            views=views,
            token_weights=tensors.get("token_weights"),
            provenance={str(key): str(value) for key, value in provenance.items()},
        )
    except (KeyError, AttributeError, ValueError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise NestedAttentionError(
            f"{path.name} is a saved subject, but damaged: {reason.rstrip('.')}. Save the subject again."
        ) from error
    if encoder_config is not None:
        _check_encoder(path, subject, encoder_config)
    return subject


def _check_version(path: Path, version: object) -> None:
    number = int(version) if isinstance(version, str) and version.isdecimal() else 0
    if number > VERSION:
        raise NestedAttentionError(
            f"{path.name} is a saved subject of version {number}; this pack reads up to version {VERSION}. Update the "
            "pack (ComfyUI Manager: update Nested Attention)."
        )
    if number < 1:
        raise NestedAttentionError(
            f"{path.name} is a saved subject, but damaged: its version is {version!r}. Save the subject again."
        )


def _check_encoder(path: Path, subject: Subject, config: EncoderConfig) -> None:
    if subject.encoder != config.fingerprint:
        raise NestedAttentionError(
            f"The subject in {path.name} was made with the encoder "
            f"{_encoder_name(subject.encoder_title, subject.encoder)} for {subject.family}; the encoder that is "
            f"connected is {_encoder_name(config.title, config.fingerprint)} for {config.family}. Load the encoder it "
            "was made with, or make the subject again from its photos with Encode Subject."
        )
    if subject.tokens.shape[2] != config.token_dim:
        raise NestedAttentionError(
            f"{path.name} is a saved subject, but damaged: its tokens have width {subject.tokens.shape[2]}, those of "
            f"its encoder {_encoder_name(config.title, config.fingerprint)} have {config.token_dim}. Make the subject "
            "again from its photos with Encode Subject."
        )


def _looks_like(weights: Weights) -> str:
    kind = weights.metadata.get("format", "")
    if kind.startswith("nested_attention."):
        kind = kind.removeprefix("nested_attention.")
        hint = "; open it with Load Nested Encoder" if kind == "encoder" else ""
        return f"it is a Nested Attention {kind} file{hint}"
    names = list(weights.tensors)
    other = looks_like(weights.tensors)
    if other:
        return f"it looks like {other[0]}"
    if any(_OF_AN_ENCODER.search(name) for name in names):
        return "it looks like an encoder or an IP-Adapter file; encoders are opened with Load Nested Encoder"
    return f"it holds {len(names)} other tensor(s): {few(names)}" if names else "it holds no tensors"
