"""Where samples come from: folders of pictures, webdataset shards, metadata.jsonl, data sets of `datasets` on disk.

A sample is a picture and the files that share its name:

    rex/class.txt             what the subject is: "golden retriever"
    rex/01.jpg                a picture
    rex/01.txt                its captions, one per line (or 01.caption, as kohya's tools write them)
    rex/01.mask.png           where the subject is, in white (optional)
    rex/01.reference.png      what the encoder is shown for this picture (optional)
    rex/01.json               {"box": [left, top, right, bottom]} or {"landmarks": [[x, y], ...]} (optional), or
                              {"subjects": {"<anna>": "anna", "<rex>": "rex"}}: a picture of several subjects
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from webdataset.cache import FileCache, islocal
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from ..errors import NestedAttentionError
from .config import DataConfig
from .pictures import EXTENSIONS

LAYOUT = (
    "Expected one folder per subject with pictures and captions: <subject>/01.jpg, <subject>/01.txt. (data.layout has "
    "other ways; data.captions is for pictures without captions.)"
)
_METADATA = ("metadata.jsonl", "metadata.csv")  # the names that Hugging Face's imagefolder knows
_COMPANIONS = (".mask", ".reference")  # what a picture is that belongs to another: 01.mask.png
Reader = Callable[[], bytes]


@dataclass
class Sample:
    """A picture and what is said of it.

    files: what reads a file, by what follows the name that they share. said: by 01.json and by the picture's row in a
    table.
    """

    name: str
    files: dict[str, Reader] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def pictures(self) -> list[str]:
        """The extensions of its pictures; the first is the one that counts."""
        return [extension for extension in EXTENSIONS if extension in self.files]

    @property
    def picture(self) -> str | None:
        return next(iter(self.pictures), None)

    @property
    def reference(self) -> str | None:
        """The extension of the picture that is said to be its reference, if there is one."""
        return next((f"reference.{e}" for e in EXTENSIONS if f"reference.{e}" in self.files), None)

    def text(self, extension: str) -> str:
        """A text file's content, stripped; empty where there is none. Raises NestedAttentionError if it is no text."""
        if extension not in self.files:
            return ""
        try:
            return self.files[extension]().decode("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise NestedAttentionError(f"Could not read {self.name}.{extension} as UTF-8 text: {error}.") from error


def read_samples(config: DataConfig) -> dict[str, Sample]:
    """All samples of the folders and shards, by name, with what 01.json and tables say of them.

    Raises NestedAttentionError: a folder, shard or table can't be read; two samples of one name; a table names files
    that are not there.
    """
    files: dict[str, Reader] = {}
    saved: dict[str, Sample] = {}
    for folder in config.folders:
        if saved_data_set(Path(folder)):
            saved.update({sample.name: sample for sample in _rows_of_data_set(Path(folder))})
        else:
            _add(files, folder_files(folder))
    for shards in config.shards:
        for shard in expand_urls(shards):
            _add(files, shard_files(shard, config.shard_cache))
    samples = {**_by_name(files), **saved}
    for sample in samples.values():
        if sample.picture and "json" in sample.files:
            sample.said = _json_of(sample)
    for path in [path for path in files if PurePosixPath(path).name in _METADATA]:
        _read_table(path, files[path], samples)
    return samples


def _add(files: dict[str, Reader], source: Iterator[tuple[str, Reader]]) -> None:
    for path, read in source:
        if any(part.startswith(".") or part == "__MACOSX" for part in path.split("/")):
            continue  # what systems and archives leave behind
        if path in files:
            raise NestedAttentionError(
                f"There are two files {path}, in different folders or shards. Rename one of the folders that they lie "
                "in: data.folders names the folder above them, and what is below it must differ."
            )
        files[path] = read


def _by_name(files: dict[str, Reader]) -> dict[str, Sample]:
    """Files -> samples. The name ends at its first dot, as in webdataset, unless the picture's own has dots."""
    stems = set()
    for path in files:
        stem, _, extension = path.rpartition(".")
        if extension.lower() in EXTENSIONS and not stem.lower().endswith(_COMPANIONS):
            stems.add(stem)
    samples: dict[str, Sample] = {}
    for path, read in files.items():
        folder, _, file = path.rpartition("/")
        parts = file.split(".")
        names = (f"{folder}/{'.'.join(parts[:i])}".lstrip("/") for i in range(1, len(parts)))
        name = next((name for name in names if name in stems), None)
        name, extension = (name, path[len(name) + 1 :]) if name else base_plus_ext(path)
        if name and extension:
            samples.setdefault(name, Sample(name)).files[extension.lower()] = read
    return samples


def folder_files(folder: str | Path) -> Iterator[tuple[str, Reader]]:
    """(path below the folder, reader) of each file. Raises NestedAttentionError when there is no such folder."""
    root = Path(folder)
    if not root.is_dir():
        raise NestedAttentionError(f"There is no data folder {root.resolve()}. {LAYOUT}")
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield path.relative_to(root).as_posix(), path.read_bytes


def shard_files(shard: str, cache: str) -> Iterator[tuple[str, Reader]]:
    """(path in the shard, reader) of each file. A shard with an address is copied to `cache` first.

    Shards are read by position, not as streams: so a subject's pictures may lie anywhere in any of them, and a
    resumed run finds its place at once.
    """
    try:
        if not Path(shard).exists() and not islocal(shard):
            # A folder for each address: the cache itself goes by file names.
            folder = Path(cache, hashlib.sha256(shard.encode()).hexdigest()[:16])
            folder.mkdir(parents=True, exist_ok=True)
            shard = FileCache(str(folder)).get_file(shard)
        path = Path(shard.removeprefix("file:"))
        with tarfile.open(path, "r:") as archive:  # not compressed, so that it can be read by position
            members = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    except (OSError, tarfile.TarError, ValueError) as error:
        raise NestedAttentionError(f"Could not read the shard {shard} as a plain .tar file: {error}.") from error
    for name, offset, size in members:
        yield name.removeprefix("./"), _Range(path, offset, size)


@dataclass(frozen=True)
class _Range:
    """Reads a part of a file; a class, so that workers can be sent it."""

    path: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


# --- what is said of samples ------------------------------------------------------------------------------------------


def _json_of(sample: Sample) -> dict[str, Any]:
    try:
        said = json.loads(sample.text("json") or "{}")
    except json.JSONDecodeError as error:
        raise NestedAttentionError(f"{sample.name}.json is no JSON: {error}.") from error
    return said if isinstance(said, dict) else {}


def _read_table(path: str, read: Reader, samples: dict[str, Sample]) -> None:
    """Adds the rows of a metadata.jsonl or metadata.csv to the samples that they name, relative to its folder."""
    folder = PurePosixPath(path).parent
    missing = []
    for number, row in _table(path, read):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise NestedAttentionError(
                f'{path}, line {number}: expected a row with "file_name", as in {{"file_name": "0001.png", "text": "a '
                f'dog on grass"}}; got {json.dumps(row)[:200]}.'
            )
        file = (folder / row["file_name"]).as_posix()
        sample = samples.get(file.rpartition(".")[0])
        if sample is None or file.rpartition(".")[2].lower() not in sample.files:
            missing.append(row["file_name"])
        else:
            sample.said = {**row, **sample.said}
    if missing:
        raise NestedAttentionError(
            f"{path} names {len(missing)} files that are not beside it: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. Put them there, or remove their lines."
        )


def _table(path: str, read: Reader) -> Iterator[tuple[int, Any]]:
    """(line, row) of each row."""
    try:
        text = read().decode("utf-8-sig")
        if path.endswith(".csv"):
            yield from enumerate(csv.DictReader(io.StringIO(text, newline="")), 2)
            return
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, json.loads(line)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise NestedAttentionError(f"Could not read {path}: {error}.") from error


# --- `datasets` on disk -----------------------------------------------------------------------------------------------


def saved_data_set(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` of Hugging Face's `datasets` wrote."""
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


@functools.cache
def _opened(folder: str) -> Any:
    """The data set, its pictures as they were stored. One for each process: only what is read is in memory."""
    try:
        import datasets  # optional: only this kind of folder needs it
    except ModuleNotFoundError:
        raise NestedAttentionError(
            f"{folder} is a data set of Hugging Face's datasets, which is not installed: pip install datasets."
        ) from None
    try:
        opened = datasets.load_from_disk(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise NestedAttentionError(f"Could not read {folder} as a data set of `datasets`: {error}") from error
    if isinstance(opened, datasets.DatasetDict):
        raise NestedAttentionError(
            f"{folder} has several splits: name one of them in data.folders, as in {Path(folder, next(iter(opened)))}. "
            f"There are {', '.join(opened)}."
        )
    pictures = [name for name, kind in opened.features.items() if isinstance(kind, datasets.Image)]
    if not pictures:
        columns = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in opened.features.items())
        raise NestedAttentionError(f"{folder} has no column of pictures (datasets.Image). Its columns: {columns}.")
    return opened.cast_column(pictures[0], datasets.Image(decode=False)), pictures[0]


@dataclass(frozen=True)
class _Row:
    """Reads the picture of a row; a class, so that workers can be sent it."""

    folder: str
    number: int

    def __call__(self) -> bytes:
        table, column = _opened(self.folder)
        picture = table[self.number][column]
        if picture is None:
            raise OSError("the row has no picture")
        return picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()


def _rows_of_data_set(folder: Path) -> Iterator[Sample]:
    table, column = _opened(str(folder))
    names = {name: kind.int2str for name, kind in table.features.items() if hasattr(kind, "int2str")}
    kept = [name for name in table.column_names if name != column]
    for number, row in enumerate(table.select_columns(kept)):
        said = {name: names[name](value) if name in names and value is not None else value
                for name, value in row.items()}  # fmt: skip
        # What the bytes are, Pillow sees; the extension is only a name.
        yield Sample(f"{folder.name}#{number:07}", {"png": _Row(str(folder), number)}, said)
