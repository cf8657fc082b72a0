"""Files of tensors: what a file is, what it holds, and writing one whole or not at all.

Nothing is memory-mapped. A mapped file that is overwritten changes the weights of whoever has it open, and one that
gets shorter ends the process (SIGBUS); so content is read into memory of our own, tensor by tensor.
"""

from __future__ import annotations

import json
import operator
import os
import pickle
import re
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import NestedAttentionError

_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format itself
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What weights, tokens and computations are in, by the names that users know."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Weights:
    """An opened file of tensors.

    tensors: by name, their shapes and types; those of a safetensors file are on the meta device until `read`. Nested
    dictionaries of a PyTorch file stand under dotted names.
    metadata: a safetensors file's; empty for others.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    places: dict[str, int]  # where the bytes of a tensor on the meta device begin
    stamp: tuple[int, int]

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors of these names (None: all), on the CPU, in the file's types.

        Raises NestedAttentionError when the file is not as it was when it was opened, or changes meanwhile.
        """
        wanted = list(self.tensors if names is None else names)
        content = {name: self.tensors[name] for name in wanted}
        on_disk = sorted((name for name in wanted if name in self.places), key=self.places.__getitem__)
        if on_disk:
            with _opened(self.path) as file:
                _check_stamp(file, self.stamp)
                for name in on_disk:
                    content[name] = _read_tensor(file, self.places[name], content[name])
                _check_stamp(file, self.stamp)
        return content


def open_weights(path: str | os.PathLike[str], pickled: bool = True) -> Weights:
    """A file of tensors, told by its content: downloads are often named wrongly, or are an error page.

    Of safetensors only the header is read. A PyTorch file is read whole, with `weights_only`; not if `pickled` is
    False.

    Raises NestedAttentionError, in sentences without the file's name: it can't be read, holds no tensors, is damaged
    or cut short, changes while it is read, or holds Python objects besides tensors.
    """
    path = Path(path)
    with _opened(path) as file:
        stamp = _stamp(file)
        start = file.read(256)
        # First, and by more than one byte: the header length it begins with can look like the start of anything else.
        if start[5:9] == b"\0\0\0{":
            tensors, places, metadata = _read_header(file, stamp[0])
        elif start.startswith((b"PK\x03\x04", b"\x80")):
            tensors, places, metadata = _read_pickled(file, start, pickled), {}, {}
        else:
            raise NestedAttentionError(_what_was_saved(start))
        _check_stamp(file, stamp)
    return Weights(path, tensors, metadata, places, stamp)


def flatten(state_dict: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict under dotted names; old .bin files have dictionaries in dictionaries."""
    for key, value in state_dict.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path.is_dir():
        raise NestedAttentionError("This is a folder. Choose the .safetensors file inside.")
    if path.is_symlink() and not path.exists():
        raise NestedAttentionError(
            f"This is a link to {os.readlink(path)}, and nothing is there: put the file back, or make the link anew. "
            f"Full path: {path}"
        )
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise NestedAttentionError(f"The file can't be read ({error.strerror or error}). Full path: {path}") from error


def _stamp(file: BinaryIO) -> tuple[int, int]:
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def _check_stamp(file: BinaryIO, before: tuple[int, int]) -> None:
    if _stamp(file) != before:
        raise NestedAttentionError(
            "The file changed while it was read: something writes to it. Wait until that is done, and run again."
        )


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
    """Of a safetensors file: shapes and types as meta tensors, where each one's bytes begin, the metadata."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    whole = 8 + length
    tensors, places = {}, {}
    try:
        if whole <= size:
            if length > _HEADER_LIMIT:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(file.read(length))
            metadata = dict(header.pop("__metadata__", {}))
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("metadata that is no text")
            for name, entry in header.items():
                begin, end = map(operator.index, entry["data_offsets"])
                if entry["dtype"] not in _DTYPES:
                    raise ValueError(f"{name} is of the type {entry['dtype']}")
                tensors[name] = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
                if begin < 0 or end - begin != tensors[name].nbytes:
                    raise ValueError(f"{name} has {end - begin} bytes for the shape {entry['shape']}")
                places[name] = 8 + length + begin
                whole = max(whole, 8 + length + end)
    # Whatever JSON is no header: no dictionary, missing fields, shapes that are none.
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NestedAttentionError(
            f"The safetensors file is damaged, or of a kind this pack can't read ({reason}). Get it again."
        ) from error
    if whole > size:
        raise NestedAttentionError(
            f"The file is cut short: it has {size:,} of at least {whole:,} bytes. The download stopped early: get it "
            "again."
        )
    return tensors, places, metadata


def _read_tensor(file: BinaryIO, place: int, shape: Tensor) -> Tensor:
    """Bytes into memory that torch owns, shaped and typed as the meta tensor `shape`."""
    memory = torch.empty(shape.nbytes, dtype=torch.uint8)
    view = memoryview(memory.numpy())  # type: ignore[arg-type]
    file.seek(place)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise NestedAttentionError("The file got shorter while it was read. Get it again, and run again.")
        view = view[count:]
    return memory.view(shape.dtype).reshape(shape.shape)


def _read_pickled(file: BinaryIO, start: bytes, wanted: bool) -> dict[str, Tensor]:
    names = _zip_names(file) if start.startswith(b"PK") else []
    if names and not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise NestedAttentionError(
            f"The file is a zip archive, not weights: it holds {few(names)}. Unpack it, and use the weights inside."
        )
    if not wanted:
        raise NestedAttentionError("The file is a PyTorch file (.bin, .pt, .ckpt), not a safetensors file.")
    file.seek(0)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise NestedAttentionError(
            "The file holds Python objects besides tensors, which could run any code when opened, or it is damaged. "
            "It was not opened. Get the encoder as safetensors, or export a .bin that holds tensors only."
        ) from error
    except MemoryError:  # the machine's, not the file's
        raise
    except Exception as error:  # PyTorch's reader ends in many ways on damaged bytes: IndexError, OSError (EINVAL) ...
        raise NestedAttentionError(
            f"The PyTorch file is damaged or cut short ({str(error).splitlines()[0] if str(error) else 'no content'}). "
            f"Get it again."
        ) from error
    if not isinstance(loaded, Mapping):
        raise NestedAttentionError(
            f"Expected a state dict (names and tensors), the file holds one {type(loaded).__name__}."
        )
    return dict(flatten(loaded))


def _zip_names(file: BinaryIO) -> list[str]:
    """The names in a zip archive; of one that is cut short, whose list stood at its end, the first."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        file.seek(26)
        length = int.from_bytes(file.read(2), "little")
        file.seek(30)
        first = file.read(min(length, 255)).decode("utf-8", "replace")
        return [first] if first and first.isprintable() else []


# ---------------------------------------------------------------------------------------------------------------------
# What a file is


def _what_was_saved(start: bytes) -> str:
    """What a file that holds no weights is, from how it begins."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        return "The file is empty: the download failed. Get it again."
    if text.startswith(b"version https://git-lfs"):
        return (
            "This is a Git LFS pointer, a note that stands for the real file. Run `git lfs pull` where it was cloned, "
            "or download the file itself."
        )
    if text.startswith((b"<", b"{")):
        return (
            f"The file is {'a web page' if text.startswith(b'<') else 'a JSON text'}, not weights: the site's answer "
            f"was saved instead of the file. Download it again (some files need a log-in or an accepted licence)."
        )
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")):
        return "The file is a picture, not weights."
    return (
        f"This is neither a safetensors file nor a PyTorch .bin: it begins with {start[:8]!r}. Get it again, or "
        f"convert it to safetensors."
    )


_NO_FACE_ID = "It reads face recognition embeddings, not images."
_KINDS = (
    # Most telling first: a checkpoint holds text encoders too, a LoRA names the layers of a U-Net.
    (r"ip_adapter\..*_lora\.|perceiver_resampler\.", "an IP-Adapter FaceID file", _NO_FACE_ID),
    (r"^pulid_|^id_adapter", "a PuLID file", "Use it with that method's own nodes."),
    (r"^id_encoder\.|^lora_weights\.", "a PhotoMaker file", "Use it with the PhotoMaker nodes."),
    (r"(^|\.)lora_|_lora\.|\.lora\.|\.hada_w|\.lokr_w", "a LoRA", "It belongs in models/loras."),
    (r"^control_model\.|controlnet_|input_hint_block", "a ControlNet", "It belongs in models/controlnet."),
    (r"^model\.diffusion_model\.", "a checkpoint (a whole diffusion model)", "It belongs in models/checkpoints."),
    (
        r"(down|up)_blocks\.\d+\.resnets\.|input_blocks\.\d+\.0\.in_layers|^(double_blocks|transformer_blocks)\.",
        "a diffusion model",
        "It belongs in models/diffusion_models.",
    ),
    (r"vision_model\.|(^|\.)visual\.(conv1|transformer)", "a CLIP vision model", "It belongs in models/clip_vision."),
    (r"text_model\.|(^|\.)transformer\.resblocks", "a text encoder", "It belongs in models/text_encoders."),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|mid|up)", "a VAE", "It belongs in models/vae."),
    (r"^(emb_params|clip_[lg]|string_to_param\..*)$", "a textual inversion", "It belongs in models/embeddings."),
)


def looks_like(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """What another kind of file its names make it ("a LoRA"), and where that belongs; None where they don't tell."""
    face = next((tensors[key] for key in tensors if key.endswith("image_proj.proj.0.weight")), None)
    if face is not None:
        if face.shape[-1] == 512:
            return "an IP-Adapter FaceID file", _NO_FACE_ID
        return "an IP-Adapter Full Face file", "Of the IP-Adapter files only the Plus ones can be used."
    for pattern, what, advice in _KINDS:
        if any(re.search(pattern, key) for key in tensors):
            return what, advice
    return None


def few(items: Sequence[str], most: int = 4) -> str:
    """The first items, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a file beside `path` to write; at the end it takes the place of `path`, flushed to the disk.

    After an error nothing is left of it, and what was at `path` is as it was. Raises what writing there raises.
    """
    path = Path(path)
    # In the same folder, since a file can take another's place in one step only within a file system. Not tempfile, nor
    # safetensors: their files are readable by their owner only, and a model folder may be shared.
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)
        with part.open("r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None, what: str
) -> None:
    """Writes a safetensors file, whole or not at all; `what` is its name in messages.

    Raises NestedAttentionError when it can't be written there.
    """
    path = Path(path)
    content = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        with whole(path) as part:
            save_file(content, part, metadata)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in content.values()) / 1e6
        reason = getattr(error, "strerror", None) or error
        raise NestedAttentionError(
            f"The {what} could not be saved as {path}: {reason}. Check that the folder {path.parent} exists, can be "
            f"written to, and has {size:.1f} MB free, and that no program has that file open."
        ) from error
