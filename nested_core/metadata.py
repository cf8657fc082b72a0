"""The metadata of this pack's own encoder files."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .encoder import EncoderConfig
from .errors import NestedAttentionError
from .layers import DIFFUSERS_ORDER

FORMAT = "nested_attention.encoder"
BASELINE = "nested_attention.decoupled_baseline"
"""What the training code marks encoders of its decoupled baseline with."""
VERSION = 1
OWN = " (this pack's format)"
"""What a file's title ends in where this pack wrote the file."""


def own_metadata(metadata: Mapping[str, str], baseline: bool) -> dict[str, str]:
    """The metadata of a file this pack wrote; empty for others, whose metadata has no meaning here.

    Raises NestedAttentionError for our other kinds of file, and for versions this code does not know.
    """
    kind = metadata.get("format", "")
    if not kind.startswith("nested_attention."):
        return {}
    if kind == "nested_attention.subject":
        raise NestedAttentionError(
            "This is a saved subject, not an encoder. Open it with Load Subject, which takes the encoder beside it."
        )
    if kind == BASELINE and not baseline:
        raise NestedAttentionError(
            "This is an encoder that was trained for decoupled attention, to compare with. It is bound to no word, and "
            'the nodes do not run it. Load one that was trained with the method "nested".'
        )
    if kind not in (FORMAT, BASELINE):
        raise NestedAttentionError(f'Expected a file of format "{FORMAT}", got "{kind}".')
    version = metadata.get("version", "")
    if not version.isdecimal() or int(version) < 1:
        raise NestedAttentionError(f'The file\'s format version is "{version}"; expected a number from 1 to {VERSION}.')
    if int(version) > VERSION:
        raise NestedAttentionError(
            f"The file is of format version {version}, this pack reads up to version {VERSION}: update the pack."
        )
    return dict(metadata)


def with_metadata(config: EncoderConfig, order: str, said: Mapping[str, str]) -> EncoderConfig:
    """The config of a file's weights with what our metadata says of them; `order` is that of the layers.

    Raises NestedAttentionError when metadata and weights contradict each other, or a value is none.
    """
    kinds = ("nested-sd15-pooled",) if config.kind == "nested-sd15-pooled" else ("nested", "ip-adapter-plus")
    for name, possible in (("kind", kinds), ("family", (config.family,)), ("tokens", (str(config.tokens),))):
        if said.get(name, possible[0]) not in possible:
            raise NestedAttentionError(
                f'The file\'s metadata says {name} "{said[name]}", its weights are of {name} '
                f"{' or '.join(possible)}. The file is damaged, or a newer version of the pack wrote it."
            )
    if not order.startswith(DIFFUSERS_ORDER):
        raise NestedAttentionError(
            f"The file's layers are in the order {order}; this pack writes them in the order {DIFFUSERS_ORDER}. "
            f"The file is damaged or was edited: get it again."
        )
    known = ("kind", "base_model", "image_features", "value_norm", "pooled", "licence", "training")
    changes: dict[str, Any] = {name: said[name] for name in known if name in said}
    if "alpha" in said:
        try:
            changes["alpha"] = float(said["alpha"])
        except ValueError as error:
            raise NestedAttentionError(
                f'The file\'s metadata says alpha "{said["alpha"]}"; expected a number such as 2.0.'
            ) from error
    return replace(config, **changes)


def number(said: Mapping[str, str], name: str, default: int) -> int:
    """A whole number of the metadata. Raises NestedAttentionError for anything else."""
    text = said.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise NestedAttentionError(f'The file\'s metadata says {name} "{text}"; expected a whole number above 0.')
    return int(text)


def metadata_of(config: EncoderConfig) -> dict[str, str]:
    """What an encoder file of ours says about itself."""
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "kind": config.kind,
        "family": config.family,
        "base_model": config.base_model,
        "tokens": str(config.tokens),
        "image_features": config.image_features,
        "value_norm": config.value_norm,
        "alpha": repr(float(config.alpha)),
        "pooled": config.pooled,
        "licence": config.licence,
        "fingerprint": config.fingerprint,
        "dim_head": str(config.resampler.dim_head),
        "title": config.title.removesuffix(OWN),
        **({"training": config.training} if config.training else {}),
    }


def describe_training(training: str) -> str:
    """What an encoder was trained on, in one line for the log; empty where its file does not say.

    training: as in `EncoderConfig`. A file is from anywhere: what is not as this pack writes it is left out, and what
    is long is cut.
    """
    try:
        said = json.loads(training)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(said, dict):
        return ""

    def part(form: str, *names: str) -> str:
        values = [said.get(name) for name in names]
        return form.format(*map(_short, values)) if all(isinstance(value, str | int) for value in values) else ""

    words = said.get("class_words")
    kinds = ", ".join(map(_short, list(words)[:5])) if isinstance(words, dict) else ""
    data = part("{} pictures of {} subjects", "pictures", "subjects") or part("{} pictures", "pictures")
    where = part(" on {}", "base_model") + part(" at {} pixels", "resolution")
    how = ", ".join(filter(None, (f"{data} ({kinds})" if data and kinds else data, part("{} steps", "step"))))
    return f"trained{where}{': ' if how else ''}{how}" if where or how else ""


def _short(value: Any) -> str:
    """A value of somebody else's file on one line."""
    return (f"{value:,}" if isinstance(value, int) else " ".join(str(value).split()))[:80]
