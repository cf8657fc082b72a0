"""Captions by a command of the user's, written beside the pictures that have none."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from ..errors import NestedAttentionError
from ..files import whole
from .catalogue import Catalogue
from .config import DataConfig


def make_captions(config: DataConfig, command: str) -> list[Path]:
    """Runs a command that is given the pictures without a caption and answers with one caption for each.

    The command is started once, by the shell. It reads the pictures' paths from its standard input, one a line, and
    writes as many lines to its standard output, in their order. Each becomes 01.txt beside 01.jpg. Nothing is written
    unless all of them came.

    Returns the files. Raises NestedAttentionError: pictures that lie in a shard; the command failed, or answered with
    another number of lines or an empty one.
    """
    catalogue = Catalogue(config)
    several = {picture.sample.name for picture in catalogue.pictures if picture.several}
    told = {"txt", "caption"}
    silent = [
        sample
        for sample in catalogue.samples.values()
        if sample.picture
        and sample.name not in several
        and not told & set(sample.files)
        and not sample.said.get(config.caption_column)
    ]
    pictures = [_path(config, f"{sample.name}.{sample.picture}") for sample in silent]
    if not pictures:
        return []
    lines = _answers(command, pictures)
    if len(lines) != len(pictures) or not all(lines):
        empty = sum(not line for line in lines)
        raise NestedAttentionError(
            f"The caption command was given {len(pictures)} pictures and answered with {len(lines)} lines, {empty} of "
            "them empty; expected one line for each picture. What else it says belongs on standard error. Nothing was "
            f"written. Command: {command}"
        )
    written = []
    for picture, line in zip(pictures, lines, strict=True):
        path = picture.with_suffix(".txt")
        with whole(path) as part:
            part.write_text(line + "\n", "utf-8")
        written.append(path)
    return written


def _answers(command: str, pictures: list[Path]) -> list[str]:
    # A file, not a pipe: the command may read all of it before it answers, or answer line by line.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as names:
        names.write("".join(f"{picture.resolve()}\n" for picture in pictures))
        names.seek(0)
        done = subprocess.run(command, shell=True, stdin=names, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise NestedAttentionError(
            f"The caption command ended with {done.returncode}; its own message stands above. Nothing was written. "
            f"Command: {command}"
        )
    return [line.strip() for line in done.stdout.splitlines()]


def _path(config: DataConfig, name: str) -> Path:
    for folder in config.folders:
        stem, _, extension = name.rpartition(".")
        for path in Path(folder, stem).parent.glob(f"{Path(stem).name}.*"):  # the extension may be in capitals
            if path.name.lower() == f"{Path(stem).name}.{extension}".lower():
                return path
    raise NestedAttentionError(
        f"{name} is in no folder but in a shard or a data set, where no caption can be written beside it. Use "
        "data.captions, or unpack it."
    )
