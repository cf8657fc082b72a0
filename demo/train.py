"""Trains the small world from nothing: codec, vision tower, probe, base model, nested encoder.

python demo/train.py                  everything; stop it whenever you like, the same command goes on
python demo/train.py --compile        the same, the U-Net compiled: on a CPU in half the time
python demo/train.py --stage codec    only this stage and what it needs
python demo/train.py --quick          every stage for a few steps, to see that it runs
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts" / "kit" / "paths.py"))
    from demo.command import main  # found only now

    main()
