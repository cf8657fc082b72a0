"""Makes workflows/: every template in the frontend's own format, its twin for scripts (workflows/api), its preview.

    python scripts/make_workflows.py                          all of them
    python scripts/make_workflows.py two_subjects blueprints  these

A template is written down here as columns of nodes; the host's frontend, in a browser, lays it out and saves it. The
preview is what it makes with the small world's models, run from the same page. Blueprints (subgraphs/) are made of the
same pieces.
"""

from __future__ import annotations

import argparse

from kit.environment import run_main
from kit.hosts import prepared_host
from kit.workflows.templates import TEMPLATES


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"default: all of them; {', '.join(TEMPLATES)}, blueprints")
    arguments = parser.parse_args()
    names = arguments.names or [*TEMPLATES, "blueprints"]
    if unknown := [name for name in names if name not in {*TEMPLATES, "blueprints"}]:
        parser.error(f"there is no {', '.join(unknown)}: choose from {', '.join(TEMPLATES)}, blueprints")
    if "reuse_subject" in names:  # it loads what the other saves
        names = ["save_subject", *(name for name in names if name != "save_subject")]
    host = prepared_host()
    from kit.workflows.making import make  # needs packages that are there only now

    make(host, names)
    return 0


if __name__ == "__main__":
    run_main(main)
