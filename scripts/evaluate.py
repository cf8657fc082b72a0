"""The method measured in the small world: pictures of held-out subjects, scored by the probe.

    python scripts/evaluate.py                  everything; goes on where it stopped
    python scripts/evaluate.py --identities 8   quicker, wider intervals
    python scripts/evaluate.py --only table     one part; the others' names: --help

    python scripts/evaluate.py --partial        with the encoders that are there

Subjects are held out of every training. Trained encoders are compared in diffusers, which opens the baselines as well
and makes many pictures at a time, on a GPU where there is one; that the nodes come to the same, and what only nodes can
do, is measured in a real ComfyUI. Writes docs/evaluation.md and .json, and docs/images/evaluation*.png and methods.png.
Compared are the encoders that `demo/train.py --shipped --stage compared` left in its folder: `nested`, and `one_value`
and `decoupled` (the baselines), each also with `_pairs` (references are other pictures) and with `_seed<S>` for other
trainings, `_<N>_steps` for shorter ones, `nested_<N>_tokens`. Parts about the shipped encoder alone need none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kit.environment import run_main
from kit.evaluation import TITLES
from kit.hosts import prepared_host
from kit.paths import REPO


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--identities", type=int, default=48, help="held-out subjects; two thirds as many pairs")
    parser.add_argument("--only", action="append", choices=list(TITLES), help="only this part (repeatable)")
    parser.add_argument("--run", type=Path, default=REPO / "demo" / "run_shipped", help="folder of demo/train.py")
    parser.add_argument("--partial", action="store_true", help="measure the encoders that are there")
    arguments = parser.parse_args()
    host = prepared_host()
    from kit.evaluation.run import evaluate  # needs packages that are there only now

    evaluate(host, arguments.run, arguments.identities, arguments.only, arguments.partial)
    return 0


if __name__ == "__main__":
    run_main(main)
