"""A real ComfyUI in this process: COMFYUI_PATH names it (`python scripts/test.py` gets one and sets that).

Models have random weights and are small: `scripts/kit/studio.py`.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import skimage.data
import torch

from kit.hosts import version_of
from kit.inside import import_host

HOST = Path(os.environ["COMFYUI_PATH"]).resolve()
BASE = Path(tempfile.mkdtemp(prefix="nested-attention-host-"))
import_host(HOST, BASE)  # before anything that imports ComfyUI's modules, the tests among them

from kit import studio  # noqa: E402

#: What the tests use of the host that came after its oldest version: the first of our hosts that has it
SINCE = {"DualModelGuider": "0.30.0", "ModelPatcher.deepclone_multigpu": "0.30.0"}
_SEEN = pytest.StashKey[list[dict[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "works_with(group, what, how): a row of docs/compatibility.md")
    config.stash[_SEEN] = []
    # Told to stop, as by Ctrl-C: fixtures end, and the servers that they started with them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.add_cleanup(lambda: shutil.rmtree(BASE, ignore_errors=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    mark = item.get_closest_marker("works_with")
    if mark and (report.when == "call" or report.outcome != "passed"):
        group, what, how = mark.args
        row = {"group": group, "what": what, "how": how, "outcome": report.outcome}
        item.config.stash[_SEEN].append(row)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leaves what was seen of the marked tests where `scripts/compatibility.py` looks for it, if it was all of them."""
    if path := os.environ.get("NESTED_ATTENTION_COMPATIBILITY"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(session.config.stash[_SEEN], indent=1), "utf-8")


@pytest.fixture(autouse=True)
def _as_the_host_executes_nodes():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def pack() -> SimpleNamespace:
    return studio.load_pack()


@pytest.fixture(scope="session")
def clip_vision():
    """CLIP_VISION of the kind of ViT-H (hidden 1280) with two layers: the last and the last but one differ."""
    return studio.make_clip_vision(num_hidden_layers=2, intermediate_size=256)


@pytest.fixture(scope="session")
def photo():
    """IMAGE (1, 512, 512, 3): the astronaut."""
    return torch.from_numpy(skimage.data.astronaut()).float()[None] / 255


@pytest.fixture(scope="session")
def sdxl(pack, clip_vision, photo):
    return studio.Studio(pack, "sdxl", clip_vision, photo)


@pytest.fixture(scope="session")
def sd15(pack, clip_vision, photo):
    return studio.Studio(pack, "sd15", clip_vision, photo)


@pytest.fixture(scope="session")
def since() -> Callable[[str], None]:
    """since(name) skips a test in a host that is older than what the test needs of it; see `SINCE`."""
    said = version_of(HOST)

    def check(name: str) -> None:
        first = SINCE[name]
        # A host that does not say its version is somebody's newest.
        if said != "unknown" and _numbers(said) < _numbers(first):
            pytest.skip(f"{name} came with a ComfyUI after {said}, at the latest with {first}")

    return check


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")[:3]]


@pytest.fixture(scope="session")
def node(pack, since):
    """node(id, **inputs) -> the first output of a node of the host, what is not given at its default.

    A node that is not there fails the test, unless it came after this host. where_known: inputs that older hosts do
    not have.
    """

    def run(node_id, all_outputs=False, where_known=None, **inputs):
        if node_id not in pack.host_nodes and node_id in SINCE:
            since(node_id)
        assert node_id in pack.host_nodes, f"ComfyUI {version_of(HOST)} has no node {node_id} (any more)"
        outputs = studio.run_node(pack.host_nodes[node_id], where_known, **inputs)
        return outputs if all_outputs else outputs[0]

    return run


@pytest.fixture
def watch(monkeypatch):
    """watch(owner, name, note) has `note` called with the arguments of every call, by name; then the call goes on.

    Unlike unittest.mock's spies it keeps nothing: some tests count what is alive.
    """

    def start(owner: Any, name: str, note: Callable[[dict[str, Any]], None]) -> None:
        original = getattr(owner, name)
        signature = inspect.signature(original)

        @functools.wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            note(signature.bind(*args, **kwargs).arguments)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    return start


@pytest.fixture
def fired(pack, watch):
    """One entry per layer call in which subjects act: q's and k's shape, the terms, and what they added."""
    calls = []
    original = pack.layer.nested_delta

    def note(said):
        delta = original(**{**said, "into": None})
        calls.append(SimpleNamespace(q=said["q"].shape, k=said["k"].shape, terms=said["terms"], delta=delta))

    watch(pack.layer, "nested_delta", note)
    return calls
