"""Runs parts of the evaluation in a server, and writes their report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from demo import export, shipped
from nested_core.checkpoint import write_encoder
from nested_core.training import load_trained

from .. import small_world
from ..environment import say
from ..graphs import check_nodes, node
from ..hosts import version_of
from ..paths import STATE
from ..server import Server
from . import TITLES
from .bench import Bench
from .parts import PARTS, REGIMES, TOKENS
from .report import write_report

WORK = STATE / "evaluation"


def evaluate(host: Path, run: Path, identities: int, only: Sequence[str] | None) -> None:
    """run: folder of demo/train.py, whose encoders are measured too. identities: held-out subjects. only: parts."""
    packs = small_world.link_packs(host)
    models = WORK / "models"
    names = small_world.provide_models(models)
    encoders = provide_encoders(run, models / "nested_attention")
    methods = [f"{method}{regime}" for method in ("nested", "one_value", "decoupled") for regime in REGIMES]
    seeds = [f"{name}_seed{seed}" for name in methods for seed in (1, 2)]
    for wanted in (*methods[1:], *seeds, *(f"nested_{n}_tokens" for n in TOKENS if n not in (1, 16))):
        if wanted not in encoders:
            say(f"no encoder {wanted} in {run}: left out. python demo/train.py --shipped --stage {wanted}")
    server = Server(host, WORK, models=models, only=packs)
    say(f"starting ComfyUI {version_of(host)}, log in {server.log}")
    with server:
        ours = ("NestedEncodeSubject", "NestedApplySubject", "NestedApplySubjectAdvanced", "DecoupledSubject")
        check_nodes(server, {kind: node(kind) for kind in ours})
        bench = Bench(server, names, encoders, identities)
        for part in only or TITLES:
            write_report(part, PARTS[part](bench))


def provide_encoders(run: Path, folder: Path) -> dict[str, str]:
    """Puts the trained encoders of a run beside the shipped one. Returns file names by name, "nested" the shipped one.

    The decoupled baseline is no file that Load Nested Encoder opens: here it is written as one, for the baseline node.
    """
    base = export.fingerprint(export.load_checkpoint(shipped.WEIGHTS / shipped.CHECKPOINT)[0])
    found = {"nested": shipped.ENCODER}
    for file in sorted(run.glob("*/encoder.safetensors")):
        name = file.parent.name
        if name == "nested":
            continue  # shipped
        if (file.parent / "base.txt").read_text("utf-8") != base:
            say(f"{name} was trained on another base model than the shipped one: left out")
            continue
        steps = json.loads((file.parent / "config.json").read_text("utf-8"))["steps"]
        if not (file.parent / "checkpoints" / f"step-{steps:08}").is_dir():
            say(f"{name} is not trained to its end, step {steps}: left out")
            continue
        _, encoder = load_trained(file)
        write_encoder(folder / f"{name}.safetensors", encoder)
        found[name] = f"{name}.safetensors"
    return found
