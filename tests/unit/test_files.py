"""Files of tensors: read into memory of our own, told by their content, written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nested_core.errors import NestedAttentionError
from nested_core.files import open_weights, save_tensors, whole

REPO = Path(__file__).parents[2]
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, with the repository importable."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)


def message(path: Path, pickled: bool = True) -> str:
    with pytest.raises(NestedAttentionError) as caught:
        open_weights(path, pickled)
    return str(caught.value)


# --- reading ---


def test_every_type_comes_back_bit_for_bit(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool, *FP8)  # fmt: skip
    made: dict[str, Tensor] = {str(kind): (torch.randn(3, 5) * 9).to(kind) for kind in kinds}
    made |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "row": torch.randn(7)}
    save_file(made, tmp_path / "a.safetensors", {"who": "me"})
    weights = open_weights(tmp_path / "a.safetensors")
    assert weights.metadata == {"who": "me"} and all(tensor.is_meta for tensor in weights.tensors.values())
    content = weights.read()
    assert content.keys() == made.keys()
    for name, tensor in made.items():
        assert content[name].dtype == tensor.dtype and content[name].shape == tensor.shape
        assert content[name].contiguous().view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8)), name
    assert open_weights(tmp_path / "a.safetensors").read(["row"]).keys() == {"row"}


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
@pytest.mark.parametrize("shorter", [False, True])
def test_weights_stay_when_their_file_is_written_over(tmp_path: Path, kind: str, shorter: bool) -> None:
    """In a process of its own: a mapped file that gets shorter ends the process that looks at it (SIGBUS)."""
    path, made = tmp_path / "a.safetensors", {"x": torch.arange(300_000.0)}
    if kind == "safetensors":
        save_file(made, path)
    else:
        torch.save(made, path, _use_new_zipfile_serialization=kind == "zip")
    code = """
import subprocess, sys
from nested_core.files import open_weights
path, content = sys.argv[1], open_weights(sys.argv[1]).read()
write = "import sys, os; f = open(sys.argv[1], 'r+b'); f.write(bytes(1_000_000)); f.truncate(int(sys.argv[2]))"
subprocess.run([sys.executable, "-c", write, path, sys.argv[2]], check=True)
print(content["x"].double().sum().item())
"""
    ran = run(code, path, 0 if shorter else path.stat().st_size)
    assert (ran.returncode, ran.stdout.strip()) == (0, str(made["x"].double().sum().item())), ran.stderr


@pytest.mark.parametrize("how", ["same size", "shorter"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(10_000), "y": torch.zeros(10_000)}, path)
    weights = open_weights(path)
    size = path.stat().st_size
    write = "import sys; f = open(sys.argv[1], 'r+b'); f.seek(1000); f.write(bytes(8)); f.truncate(int(sys.argv[2]))"
    assert run(write, path, size - (how == "shorter")).returncode == 0
    with pytest.raises(NestedAttentionError, match="changed while it was read: something writes to it"):
        weights.read()


def test_a_file_that_changes_between_two_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a download that goes on: here the writing comes with the memory for the second tensor."""
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(10_000), "y": torch.zeros(10_000)}, path)
    weights = open_weights(path)
    empty, asked = torch.empty, []

    def and_write(*arguments: object, **options: object) -> Tensor:
        asked.append(arguments)
        if len(asked) == 2:
            with path.open("r+b") as file:
                file.truncate(1000)
        return empty(*arguments, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", and_write)
    with pytest.raises(NestedAttentionError, match="got shorter while it was read"):
        weights.read()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux counts")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_a_file_is_held_once(tmp_path: Path, kind: str) -> None:
    path, megabytes, count = tmp_path / "a.safetensors", 200, 10
    made = {str(i): torch.ones(megabytes // count * 262_144) for i in range(count)}
    if kind == "safetensors":
        save_file(made, path)
    else:
        torch.save(made, path, _use_new_zipfile_serialization=kind == "zip")
    code = """
import re, sys
from nested_core.checkpoint import cast_weights
from nested_core.files import open_weights, torch
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
content = open_weights(sys.argv[1]).read()
read = peak()
cast_weights(content, torch.float16, None, "")
print(read - before, peak() - before)
"""
    ran = run(code, path)
    read, then_cast = map(float, ran.stdout.split())
    assert 0.9 * megabytes < read < 1.15 * megabytes
    assert then_cast < 1.3 * megabytes, "one tensor at a time"


# --- what a file is ---


def test_a_dead_link_says_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "disk" / "b.safetensors")
    said = message(tmp_path / "a.safetensors")
    assert f"This is a link to {tmp_path / 'disk' / 'b.safetensors'}, and nothing is there" in said


@pytest.mark.parametrize("cut", [0, 30])
@pytest.mark.parametrize("pickled", [True, False])
def test_a_zip_archive_is_called_one(tmp_path: Path, cut: int, pickled: bool) -> None:
    path = tmp_path / "encoder.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("encoder/model.safetensors", "encoder/readme.txt"):
            archive.writestr(name, "x" * 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    said = message(path, pickled)
    assert "The file is a zip archive, not weights: it holds encoder/model.safetensors" in said
    assert "Unpack it, and use the weights inside" in said


def test_a_pytorch_file_that_is_cut_short_is_still_one(tmp_path: Path) -> None:
    path = tmp_path / "encoder.bin"
    torch.save({"x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    assert "The PyTorch file is damaged or cut short" in message(path)
    assert "The file is a PyTorch file (.bin, .pt, .ckpt), not a safetensors file." in message(path, pickled=False)


# --- writing ---


def test_an_error_or_interrupt_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), whole(path) as part:
            part.write_text("half")
            raise error
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with whole(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.zeros(4)}, None, "test")
    before = path.read_bytes()
    code = """
import os, sys
from nested_core.files import whole
with whole(sys.argv[1]) as part:
    part.write_text("half")
    os._exit(1)
"""
    assert run(code, path).returncode == 1
    assert path.read_bytes() == before
    assert [p.suffix for p in tmp_path.iterdir() if p != path] == [".part"], "no name that a model list shows"


def test_a_file_in_place_of_a_dead_link_and_of_a_long_name(tmp_path: Path) -> None:
    link, long = tmp_path / "a.safetensors", tmp_path / f"{'n' * 240}.safetensors"
    link.symlink_to(tmp_path / "gone" / "a.safetensors")
    for path in (link, long):
        save_tensors(path, {"x": torch.ones(4)}, {"a": "b"}, "test")
        assert open_weights(path).read()["x"].equal(torch.ones(4))
