"""Damaged and invented files against the readers of encoders and subjects, led by what code they reach (atheris).

    pip install atheris
    python scripts/fuzz_files.py -max_total_time=600 -len_control=0 -max_len=512

A reader gives a file back or raises NestedAttentionError; anything else is a fault, and atheris leaves the input.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("error: atheris is not installed: pip install atheris (Linux and macOS)")

import torch

import kit  # noqa: F401 - nested_core is found from here on

READERS = [f"nested_core.{name}" for name in ("files", "checkpoint", "subject", "encoder")]
with atheris.instrument_imports(include=READERS):
    from nested_core.checkpoint import identify, read_encoder, write_encoder
    from nested_core.encoder import EncoderConfig, NestedEncoder
    from nested_core.errors import NestedAttentionError
    from nested_core.layers import SD15
    from nested_core.resampler import ResamplerShape
    from nested_core.subject import Subject, load_subject, save_subject

WORK = Path(tempfile.mkdtemp(prefix="nested-attention-fuzz-"))
TINY = EncoderConfig(
    family="sd15",
    base_model="SD 1.5",
    tokens=2,
    token_dim=8,
    feature_dim=8,
    widths=SD15.widths((8, 8, 8, 8)),
    resampler=ResamplerShape(dim=8, depth=1, heads=1, dim_head=8, ff_mult=1),
)
NAMES = [
    "", ".", "image_proj", "image_proj_model.", "resampler.", "latents", "proj_in.weight", "proj_out.bias",
    "norm_out.weight", "layers.0.0.to_q.weight", "layers.0.0.to_kv.weight", "layers.0.1.1.weight", "ip_adapter.",
    "adapter_modules.1.", "to_k_ip.weight", "to_v_ip.weight", "to_k_nest.weight", "to_k.0.weight", "to_v.0.weight",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.", "nested_to_k", "nested_to_v", "proj.weight", "norm.bias",
]  # fmt: skip


def _seeds() -> list[bytes]:
    """One file of each kind."""
    encoder, subject, old = WORK / "encoder.safetensors", WORK / "subject.safetensors", WORK / "old.bin"
    module = NestedEncoder(TINY)
    write_encoder(encoder, module)
    torch.save({"image_proj": module.resampler.state_dict(), "ip_adapter": {"1.to_k_ip.weight": torch.ones(8, 8)}}, old)
    save_subject(
        subject,
        Subject(
            tokens=torch.zeros(1, 2, 8), placeholder="<anna>", class_word="woman", encoder="x", encoder_title="tiny",
            family="sd15", views=1, provenance={"created": "now"},
        ),
    )  # fmt: skip
    return [file.read_bytes() for file in (encoder, subject, old)]


SEEDS = _seeds()
METADATA = [json.loads(seed[8 : 8 + struct.unpack("<Q", seed[:8])[0]])["__metadata__"] for seed in SEEDS[:2]]


def _read(content: bytes) -> None:
    path = WORK / "input.safetensors"
    path.write_bytes(content)
    for reader in (read_encoder, load_subject):
        try:
            reader(path)
        except NestedAttentionError as error:
            assert len(str(error)) > 20, error


def _edited(data: atheris.FuzzedDataProvider) -> bytes:
    """A file of a known kind with bytes changed, cut or put in; mostly in its header."""
    content = bytearray(data.PickValueInList(SEEDS))
    for _ in range(data.ConsumeIntInRange(1, 6)):
        at = data.ConsumeIntInRange(0, min(len(content), 4096) - 1)
        piece = data.ConsumeBytes(data.ConsumeIntInRange(0, 12))
        content[at : at + data.ConsumeIntInRange(0, 12)] = piece
        if not content:
            content = bytearray(b"\0")
    return bytes(content)


def _invented(data: atheris.FuzzedDataProvider) -> bytes:
    """Safetensors with a header of the fuzzer's making: names that readers look for, any shape, any metadata."""
    header: dict[str, object] = {}
    offset = 0
    for _ in range(data.ConsumeIntInRange(0, 12)):
        name = "".join(data.PickValueInList(NAMES) for _ in range(data.ConsumeIntInRange(1, 3)))
        shape = [data.ConsumeIntInRange(0, 9) for _ in range(data.ConsumeIntInRange(0, 3))]
        size = 4 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    metadata = dict(data.PickValueInList(METADATA))
    for _ in range(data.ConsumeIntInRange(0, 4)):
        key = data.PickValueInList([*metadata, "x"] if metadata else ["x"])
        if data.ConsumeBool():
            metadata.pop(key, None)
        else:
            metadata[key] = data.PickValueInList(
                ["", "0", "-1", "1e999", "nan", "[]", "{}", "null", "9" * 30, "[" * 5000, data.ConsumeUnicode(8)]
            )
    header["__metadata__"] = metadata
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(offset)


def _nested(data: atheris.FuzzedDataProvider) -> dict[str, object]:
    """A dictionary as an old .bin may hold it: not only tensors, not only texts as keys."""
    made: dict[object, object] = {}
    for _ in range(data.ConsumeIntInRange(0, 8)):
        key = data.PickValueInList([*NAMES, 1, None, ("a",)])
        kind = data.ConsumeIntInRange(0, 4)
        made[key] = (
            torch.zeros([data.ConsumeIntInRange(0, 5) for _ in range(data.ConsumeIntInRange(0, 3))]) if kind < 3
            else data.PickValueInList([None, 1, "x", [1], torch.zeros(2, dtype=torch.int64)]) if kind == 3
            else {"proj.weight": torch.zeros(8, 2), "1": {"to_k_ip.weight": torch.zeros(2, 2)}}
        )  # fmt: skip
    return made  # type: ignore[return-value]


def once(content: bytes) -> None:
    """One input of the fuzzer."""
    data = atheris.FuzzedDataProvider(content)
    kind = data.ConsumeIntInRange(0, 2)
    if kind == 0:
        _read(_edited(data))
    elif kind == 1:
        _read(_invented(data))
    else:
        try:
            identify(_nested(data))
        except NestedAttentionError as error:
            assert len(str(error)) > 20, error


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
    atheris.Setup(sys.argv, once)
    atheris.Fuzz()
