"""Check Encoder, measured in the small world: does it name the settings that encoders were trained with, and is it as
sure as it says?

    python scripts/calibrate.py                 every encoder in demo/run_shipped, and the shipped one
    python scripts/calibrate.py --photos 24     quicker

Encoders are those that `demo/train.py --shipped --stage NAME` left there; what they say of themselves is not looked at.
Each is measured once on all photos under all settings; then the search is run on many draws of sixteen of them. Writes
docs/check_encoder.md and docs/images/check_encoder.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kit.environment import run_main
from kit.hosts import prepared_host
from kit.paths import REPO


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--photos", type=int, default=40, help="held-out figures that are drawn from")
    parser.add_argument("--draws", type=int, default=200, help="searches per encoder")
    parser.add_argument("--run", type=Path, default=REPO / "demo" / "run_shipped", help="folder of demo/train.py")
    arguments = parser.parse_args()
    prepared_host()
    from kit.calibration import calibrate  # needs packages that are there only now

    calibrate(arguments.run, arguments.photos, arguments.draws)
    return 0


if __name__ == "__main__":
    run_main(main)
