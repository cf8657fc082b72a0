"""What an encoder was trained on and how: in its file's metadata, and as a model card beside it.

Neither has the names of folders, files of data or subjects: both are handed on.
"""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCardData

from ..encoder import EncoderConfig
from ..health import pack_version
from ..metadata import describe_training
from .validation import Part, from_files

if TYPE_CHECKING:
    from .loop import Run

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
_PRIVATE = {
    "": ("output", "resume"), "data": ("folders", "shards", "shard_cache"), "base": ("model", "family"),
    "validation": ("subjects",),
}  # fmt: skip
_WORDS = 20  # class words that are listed, the most frequent


def trained_on(run: Run, step: int, examples: int) -> dict[str, Any]:
    """What a run's encoder was trained on so far: `step` steps, with `examples` examples seen.

    Of data sets that are given from Python only the length is known.
    """
    config, data = run.config, run.draws.data
    said: dict[str, Any] = {
        "base_model": run.model.encoder.config.base_model,
        "step": step,
        "examples_seen": examples,
        "settings": _settings(asdict(config)),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }
    if own := pack_version():
        said["versions"]["comfyui-nested-attention"] = own
    if not from_files(data):
        return {**said, "pictures": len(data)}
    whole, indexes = (data.data, data.indexes) if isinstance(data, Part) else (data, range(len(data)))
    pictures = {id(picture): picture for picture in (whole.pictures[i] for i in indexes)}.values()
    subjects = set(whole.views) - set(run.held_out)
    words = Counter(whole.catalogue.classes[subject] for subject in sorted(subjects))
    return {
        **said,
        "resolution": config.data.resolution,
        "pictures": len(pictures),
        "subjects": len(subjects),
        "captions": sum(len(picture.captions) for picture in pictures),
        "class_words": dict(words.most_common(_WORDS)),
        **({"held_out_subjects": len(run.held_out)} if run.held_out else {}),
    }


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the places of this machine; of models the file's name stays."""
    settings = {name: value for name, value in config.items() if name not in _PRIVATE[""]}
    for section in ("data", "base", "validation"):
        settings[section] = {n: v for n, v in config[section].items() if n not in _PRIVATE[section]}
    settings["base"]["vision"] = Path(config["base"]["vision"]).name
    if config["init"]["encoder"]:
        settings["init"] = {**config["init"], "encoder": Path(config["init"]["encoder"]).name}
    return settings


def as_text(said: Mapping[str, Any]) -> str:
    """What `EncoderConfig.training` holds."""
    return json.dumps(said, ensure_ascii=False)


def model_card(name: str, config: EncoderConfig, said: Mapping[str, Any]) -> str:
    """A model card in Markdown, as model hubs show it.

    name: of the encoder's file. config: of the encoder. said: as `trained_on` returns it.
    """
    title = config.title or f"Nested attention encoder for {config.base_model}"
    licence = config.licence.lower() if re.fullmatch(r"[\w.-]+", config.licence) else "other"
    head = ModelCardData(
        license=licence,
        license_name=config.licence if licence == "other" else None,
        tags=["comfyui", "nested-attention", "personalization", "image-to-image"],
    )
    kinds = ", ".join(f"{word} ({count} subjects)" for word, count in said.get("class_words", {}).items())
    size = said.get("resolution")
    rows = {
        "base model": said["base_model"],
        "vision tower": f"{said['settings']['base']['vision'] or 'not named'}, {config.image_features} features",
        "data": f"{said['pictures']:,} pictures" + (f" of {said['subjects']:,} subjects" if "subjects" in said else ""),
        "held out, not trained on": f"{said['held_out_subjects']:,} subjects" if "held_out_subjects" in said else "",
        "class words": kinds,
        "captions": f"{said['captions']:,}" if "captions" in said else "",
        "resolution": f"{size} x {size}" if size else "",
        "steps": f"{said['step']:,}, {said['examples_seen']:,} examples seen",
        "tokens": f"{config.tokens} per picture",
        "equation (4)": f"value_norm {config.value_norm}, alpha {config.alpha:g}",
        "licence of the weights": config.licence,
        "fingerprint": config.fingerprint,
        "versions": ", ".join(f"{package} {number}" for package, number in said["versions"].items()),
    }
    table = "\n".join(f"| {row} | {value} |" for row, value in rows.items() if value)
    first = next(iter(said.get("class_words", {})), "")
    word = f' Its class words are those that it was trained with, such as "{first}".' if first else ""
    settings = yaml.safe_dump(said["settings"], sort_keys=False, allow_unicode=True)
    return f"""---
{head.to_yaml()}
---

# {title}

An encoder for nested attention (arXiv 2501.01407): it binds a subject from photos to one word of the prompt.

It was {describe_training(as_text(said))}.

To use it in ComfyUI with the nodes of ComfyUI Nested Attention: put `{name}` into `models/nested_attention` and choose
it in Load Nested Encoder.{word}

| | |
|---|---|
{table}

## Settings of the training

```yaml
{settings.strip()}
```
"""
