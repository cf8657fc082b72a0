"""What a subject costs: time and memory of sampling, inside a real ComfyUI, with models of random weights.

    python scripts/benchmark.py            SDXL and SD 1.5 at full size on a GPU, a narrow SDXL on a CPU
    python scripts/benchmark.py --quick    a few steps at one small size, to see that it runs
    python scripts/benchmark.py --size 1024x1024
    python scripts/benchmark.py --counted  what a step at full size would do on a GPU, counted without one

Each condition is run between two runs of the plain model and compared with those. Prints tables and
writes docs/benchmark.md, where the section of a machine without a GPU and that of one with a GPU stand side by side.
"""

from __future__ import annotations

import argparse

from kit.environment import run_main
from kit.hosts import prepared_host, version_of
from kit.paths import STATE


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps at 256 x 256; docs stay as they are")
    parser.add_argument("--counted", action="store_true", help="count kernels, arithmetic and memory; needs no GPU")
    parser.add_argument("--rounds", type=int, help="how often conditions take turns (default: 10 on a GPU, else 3)")
    parser.add_argument(
        "--size",
        type=_size,
        action="append",
        help="of the picture (repeatable; default: 512x512, 1024x1024 and 1536x1024 on a GPU, else 256x256)",
    )
    arguments = parser.parse_args()
    host = prepared_host()
    from kit.inside import import_host  # needs packages that are there only now

    import_host(host, STATE / "benchmark")
    from kit import cost, counted

    if arguments.counted:
        cost.write(counted.measure(version_of(host)))
        return 0
    cost.run(version_of(host), arguments.quick, arguments.rounds, arguments.size)
    return 0


def _size(text: str) -> tuple[int, int]:
    width, height = (int(part) for part in text.split("x"))
    if width % 64 or height % 64 or min(width, height) < 64:
        raise argparse.ArgumentTypeError(f"{text}: both sides must be multiples of 64")
    return width, height


if __name__ == "__main__":
    run_main(main)
