"""The method measured in the small world: pictures of held-out subjects, scored by the probe.

    python scripts/evaluate.py                  everything; goes on where it stopped
    python scripts/evaluate.py --identities 8   quicker, wider intervals
    python scripts/evaluate.py --only table     one part; the others' names: --help

Subjects are held out of every training; each is sampled with three seeds. Trained encoders are compared in diffusers,
which opens the baselines as well and makes many pictures at a time, on a GPU where there is one; that the nodes come to
the same, and what only nodes can do, is measured in a real ComfyUI. Writes docs/evaluation.md and .json, and
docs/images/evaluation.png. Encoders: the shipped one, and those that `demo/train.py` left in its folder: `one_value`
and `decoupled` (the baselines, trained with the same budget), each also with `_pairs` (references are other pictures),
`nested_<N>_tokens` for the sweep of tokens, and any of them with `_seed<S>` for other training seeds. What is missing
is left out, and said.
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
    parser.add_argument("--identities", type=int, default=48, help="held-out subjects in the table; half in sweeps")
    parser.add_argument("--only", action="append", choices=list(TITLES), help="only this part (repeatable)")
    parser.add_argument("--run", type=Path, default=REPO / "demo" / "run_shipped", help="folder of demo/train.py")
    arguments = parser.parse_args()
    host = prepared_host()
    from kit.evaluation.run import evaluate  # needs packages that are there only now

    evaluate(lambda: host, arguments.run, arguments.identities, arguments.only)
    return 0


if __name__ == "__main__":
    run_main(main)
