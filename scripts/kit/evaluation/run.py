"""Runs parts of the evaluation, in diffusers or in a server, and writes their report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from demo import export, shipped
from demo.encoders import COMPARED, SHIPPED, finished

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
from .parts import BATCHED, COMPARING, NODES, touching
from .report import write_report
from .sheet import COST, write_sheet

WORK = STATE / "evaluation"
KNOWN = WORK / "answers"


def evaluate(host: Path, run: Path, identities: int, only: Sequence[str] | None, partial: bool = False) -> None:
    """host: a ComfyUI, for the parts that need one. run: folder of demo/train.py, whose encoders are compared.
    identities: held-out subjects. only: parts. partial: whether encoders may be missing.

    Raises SetupError where they are.
    """
    for part in only or list(TITLES):
        if part in NODES:
            _through_the_nodes(host, identities, part)
            continue
        compared = trained_encoders(run, partial) if part in COMPARING else {}
        bench = Batched({SHIPPED: shipped.WEIGHTS / shipped.ENCODER, **compared}, identities, KNOWN)
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
    """The encoders of COMPARED that a run trained to their end on the shipped base model, by their names.

    Raises SetupError where one is missing and not `partial`.
    """
    base = export.fingerprint(export.load_checkpoint(shipped.WEIGHTS / shipped.CHECKPOINT)[0])
    found, left = {}, []
    for name in COMPARED:
        folder = run / name
        if not (folder / "base.txt").is_file():
            left.append(f"there is no {name}")
        elif (folder / "base.txt").read_text("utf-8") != base:
            left.append(f"{name} was trained on another base model than the shipped one")
        elif not finished(folder):
            left.append(f"{name} is not trained to its end")
        else:
            found[name] = folder / "encoder.safetensors"
    if left:
        say(f"in {run}:\n" + "\n".join(left))
    if left and not partial:
        raise SetupError(
            f"Encoders are missing in {run}. Train them with python demo/train.py --shipped --stage compared, or "
            "measure those that are there with --partial."
        )
    return found
