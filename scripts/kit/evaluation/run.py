"""Runs parts of the evaluation, in diffusers or in a server, and writes their report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from demo import export, shipped
from demo.encoders import COMPARED

from .. import small_world
from ..environment import say
from ..graphs import check_nodes, node
from ..hosts import version_of
from ..paths import REPO, STATE
from ..server import Server
from . import TITLES
from .batched import Batched
from .nodes import Nodes
from .parts import BATCHED, NODES
from .report import write_report
from .sheet import write_sheet

WORK = STATE / "evaluation"
KNOWN = WORK / "answers"


def evaluate(host: Callable[[], Path], run: Path, identities: int, only: Sequence[str] | None) -> None:
    """host: gives a ComfyUI, for the parts that need one. run: folder of demo/train.py, whose encoders are measured.
    identities: held-out subjects. only: parts."""
    parts = only or list(TITLES)
    if here := [part for part in parts if part in BATCHED]:
        bench = Batched(trained_encoders(run), identities, KNOWN)
        for part in here:
            write_report(part, BATCHED[part](bench))
        if "table" in here:
            write_sheet(bench, REPO / "docs" / "images" / "methods.png")
    if there := [part for part in parts if part in NODES]:
        _through_the_nodes(host(), identities, there)


def _through_the_nodes(host: Path, identities: int, parts: Sequence[str]) -> None:
    packs = small_world.link_packs(host)
    models = WORK / "models"
    names = small_world.provide_models(models)
    server = Server(host, WORK, models=models, only=packs)
    say(f"starting ComfyUI {version_of(host)}, log in {server.log}")
    with server:
        ours = (
            "NestedEncodeSubject", "NestedApplySubject", "NestedApplySubjectAdvanced", "NestedSeparateSubjects"
        )  # fmt: skip
        check_nodes(server, {kind: node(kind) for kind in ours})
        encoders = {"nested": models / "nested_attention" / shipped.ENCODER}
        bench = Nodes(server, names, encoders, identities, KNOWN)
        for part in parts:
            write_report(part, NODES[part](bench))


def trained_encoders(run: Path) -> dict[str, Path]:
    """The shipped encoder, as "nested", and those that a run trained on the shipped base model, by their names."""
    base = export.fingerprint(export.load_checkpoint(shipped.WEIGHTS / shipped.CHECKPOINT)[0])
    found = {"nested": shipped.WEIGHTS / shipped.ENCODER}
    for file in sorted(run.glob("*/encoder.safetensors")):
        name = file.parent.name
        if name == "nested":
            continue  # shipped
        if (file.parent / "base.txt").read_text("utf-8") != base:
            say(f"{name} was trained on another base model than the shipped one: left out")
            continue
        steps = json.loads((file.parent / "config.json").read_text("utf-8"))["steps"]
        done = [json.loads(line)["step"] for line in (file.parent / "metrics.jsonl").read_text("utf-8").splitlines()]
        if not done or done[-1] != steps:
            say(f"{name} is not trained to its end, step {steps}: left out")
            continue
        found[name] = file
    for wanted in COMPARED:
        if wanted not in found:
            say(f"no encoder {wanted} in {run}: left out. python demo/train.py --shipped --stage {wanted}")
    return found
