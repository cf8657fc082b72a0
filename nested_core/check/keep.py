"""Keeping what a check found, for the loader."""

from __future__ import annotations

import os

from ..encoder import EncoderConfig
from ..errors import NestedAttentionError
from ..metadata import OWN
from ..remembered import remember
from .search import Found
from .verdict import settled, summary


def keep(path: str | os.PathLike[str], config: EncoderConfig, found: Found, model: str) -> str:
    """Remembers beside an encoder file what is sure; says in words what was remembered, or why nothing was.

    model: what the check ran on, in words.
    """
    sure = settled(found)
    if config.title.endswith(OWN):
        return "Nothing was remembered: the file says its settings itself."
    if not sure:
        return "Nothing was remembered: nothing is sure."
    try:
        written = remember(path, config.fingerprint, sure, summary(found, model))
    except NestedAttentionError as error:
        return str(error)
    told = ", ".join(f"{name} {value}" for name, value in sure.items())
    return f"Remembered in {written}: {told}. Load Nested Encoder uses it where its inputs say auto."
