"""What was found out about an encoder file that does not say it itself, in a file beside it: NAME.check.json.

The encoder's file is somebody else's and stays as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import NestedAttentionError
from .files import whole

FORMAT = "nested_attention.check"
SUFFIX = ".check.json"


def path_beside(encoder: str | os.PathLike[str]) -> Path:
    """Where the findings about an encoder file are."""
    return Path(f"{os.fspath(encoder)}{SUFFIX}")


def remember(encoder: str | os.PathLike[str], fingerprint: str, settings: Mapping[str, Any], summary: str) -> Path:
    """Writes what was found beside an encoder file, whole or not at all; returns where.

    settings: values by the names of `Overrides`. summary: how it was found, one line.

    Raises NestedAttentionError when it can't be written there.
    """
    path = path_beside(encoder)
    content = {"format": FORMAT, "version": 1, "fingerprint": fingerprint, "settings": dict(settings), "found": summary}
    try:
        with whole(path) as part:
            Path(part).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise NestedAttentionError(
            f"What was found could not be remembered in {path}: {error}. Set the loader's inputs by hand instead."
        ) from error
    return path


def remembered(encoder: str | os.PathLike[str], fingerprint: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings found out about an encoder file; empty where there are none.

    known: the settings that are read, and their types; others are left out.

    Raises NestedAttentionError for a file that can't be read as such, or that is about another encoder.
    """
    path = path_beside(encoder)
    if not path.is_file():
        return {}
    advice = "Delete it, or run Check Encoder again."
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT or content["version"] != 1:
            raise ValueError(f"format {content['format']}, version {content['version']}")
        settings = {
            name: kind(content["settings"][name]) for name, kind in known.items() if name in content["settings"]
        }
        of = str(content["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NestedAttentionError(f"{path.name} is not what Check Encoder writes ({error!r}). {advice}") from error
    if of != fingerprint:
        raise NestedAttentionError(
            f"{path.name} is about another encoder than the one beside it: the file was replaced since. {advice}"
        )
    return settings
