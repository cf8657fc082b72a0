"""The command line of the small world's training; `train.py` starts it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from .encoders import ENCODER_NAME
from .training import SHIPPED, STAGES, Run

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the small world from nothing. Rerun it to go on.")
    parser.add_argument("--out", type=Path, help="folder for pictures, checkpoints and the log (default: demo/run)")
    parser.add_argument(
        "--stage",
        type=_stage,
        help=f"only this stage and those it needs: one of {', '.join(STAGES)}, compared (the encoders that the "
        "evaluation compares), pipeline (files for the training's command line), or an encoder trained otherwise "
        "(tokens, value_norm, alpha, features, steps, seed, longer), such as nested_4_tokens_seed1 or "
        "nested_none_norm_3000_steps",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shipped", nargs="*", choices=SHIPPED, help="take these (default: all of them) from demo/weights"
    )
    parser.add_argument("--warm", action="store_true", help="start the base model from that in demo/weights")
    parser.add_argument(
        "--compile", action="store_true", help="compile the U-Net: half the time on a CPU; needs a C++ compiler"
    )
    parser.add_argument("--quick", action="store_true", help="a thousandth of all steps and pictures, to see it run")
    arguments = parser.parse_args()
    shipped = None if arguments.shipped is None else arguments.shipped or SHIPPED
    kind = "_quick" * arguments.quick + "_shipped" * (shipped is not None)
    run = Run(
        arguments.out or HERE / f"run{kind}",
        arguments.seed,
        0.001 if arguments.quick else 1.0,
        frozenset(shipped or ()),
        arguments.warm,
        arguments.compile,
    )
    for stage in [arguments.stage] if arguments.stage else STAGES:
        begun = time.monotonic()
        if ENCODER_NAME.fullmatch(stage):
            run.encoder(stage)
        else:
            getattr(run, stage)()
        run.log(f"{stage}: done, {(time.monotonic() - begun) / 60:.1f} min in this session")


def _stage(text: str) -> str:
    if text not in (*STAGES, "compared", "pipeline") and not ENCODER_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"there is no stage {text}")
    return text
