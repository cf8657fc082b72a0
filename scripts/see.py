"""What Record Attention, Attention Maps and Explain Point show in the small world, where the truth is known.

    python scripts/see.py               measures, draws, and writes docs/seeing.md with its figures
    python scripts/see.py --cases 8     quicker

Pictures of figures that no training saw are half noised and sampled on from there by the stock sampler, through the
nodes, in a ComfyUI in this process: so it is known which pixel is which part of which figure.
"""

from __future__ import annotations

import argparse

from kit.environment import run_main
from kit.hosts import prepared_host
from kit.paths import STATE


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=24, help="pictures of one figure, and as many of two")
    arguments = parser.parse_args()
    host = prepared_host()
    from kit.inside import import_host  # needs packages that are there only now

    import_host(host, STATE / "see")
    from kit.seeing import Seeing

    Seeing().report(arguments.cases)
    return 0


if __name__ == "__main__":
    run_main(main)
