"""Runs parts of the evaluation, in diffusers or in a server, and writes their report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from demo import export, shipped
from demo.encoders import COMPARED, SHIPPED
from nested_core.checkpoint import load_encoder

from .. import small_world
from ..environment import SetupError, say
from ..graphs import check_nodes, node
from ..hosts import version_of
from ..paths import REPO, STATE
from ..server import Server
from . import TITLES
from .batched import Batched
from .frontier import lines_of, strengths_costing
from .nodes import Nodes
from .parts import BATCHED, NODES, touching
from .report import write_report
from .sheet import COST, write_sheet

WORK = STATE / "evaluation"
KNOWN = WORK / "answers"


def evaluate(
    host: Callable[[], Path], run: Path, identities: int, only: Sequence[str] | None, partial: bool = False
) -> None:
    """host: gives a ComfyUI, for the parts that need one. run: folder of demo/train.py, whose encoders are measured.
    identities: held-out subjects. only: parts. partial: whether encoders may be missing.

    Raises SetupError where they are, or where the shipped encoder is not the run's.
    """
    encoders = trained_encoders(run, partial)
    for part in only or list(TITLES):
        if part in NODES:
            _through_the_nodes(host(), identities, part)
            continue
        bench = Batched(encoders, identities, KNOWN)
        rows = BATCHED[part](bench)
        write_report(bench, part, rows)
        if part == "frontier":
            strengths = strengths_costing(lines_of(rows), COST)
            write_sheet(bench, REPO / "docs" / "images" / "methods.png", strengths)


def _through_the_nodes(host: Path, identities: int, part: str) -> None:
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
        encoders = {SHIPPED: models / "nested_attention" / shipped.ENCODER}
        bench = Nodes(server, names, encoders, identities, KNOWN)
        rows = NODES[part](bench)
        notes = []
        if part == "apart":
            notes = ["", f"Drawn as they are asked for, {touching(bench):.2f} of those reaching out touch."]
        write_report(bench, part, rows, notes)


def trained_encoders(run: Path, partial: bool = False) -> dict[str, Path]:
    """The encoders that a run trained to their end on the shipped base model, by their names; SHIPPED is shipped.

    Raises SetupError where one is missing that is compared and not `partial`, or where SHIPPED is another.
    """
    base = export.fingerprint(export.load_checkpoint(shipped.WEIGHTS / shipped.CHECKPOINT)[0])
    found, left = {}, []
    for file in sorted(run.glob("*/encoder.safetensors")):
        name = file.parent.name
        steps = json.loads((file.parent / "config.json").read_text("utf-8"))["steps"]
        done = [json.loads(line)["step"] for line in (file.parent / "metrics.jsonl").read_text("utf-8").splitlines()]
        if (file.parent / "base.txt").read_text("utf-8") != base:
            left.append(f"{name} was trained on another base model than the shipped one")
        elif not done or done[-1] != steps:
            left.append(f"{name} is not trained to its end, step {steps}")
        else:
            found[name] = file
    left += [
        f"there is no {name}" for name in (SHIPPED, *COMPARED) if not (run / name / "encoder.safetensors").is_file()
    ]
    if left:
        say(f"in {run}:\n" + "\n".join(left))
    if SHIPPED not in found or (left and not partial):
        raise SetupError(
            f"Encoders are missing in {run}. Train them with python demo/train.py --stage compared, or measure those "
            f"that are there ({SHIPPED} must be) with --partial."
        )
    ours, theirs = (
        load_encoder(path).half().state_dict() for path in (found[SHIPPED], shipped.WEIGHTS / shipped.ENCODER)
    )
    if ours.keys() != theirs.keys() or any(not torch.equal(ours[name], theirs[name]) for name in ours):
        raise SetupError(f"The shipped encoder is not that of {run}: python demo/train.py --stage export writes it.")
    return found
