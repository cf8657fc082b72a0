"""Where things are. This is the one file that tells Python where to look for modules.

A script that is started by its path finds what lies beside it, so also this package, but not the packages of the
repository: these are found once this file has run. An installation into the environment would do the same, but one
environment may serve several clones, and ComfyUI's own is not ours to write into; PYTHONPATH would reach the servers
that scripts start, where the pack must do without.
"""

import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
STATE = REPO / ".comfyui"
VENV = REPO / ".venv"
VENV_OLDEST_TORCH = STATE / "venv-oldest-torch"
PACK = "comfyui-nested-attention"

if str(REPO) not in sys.path:
    sys.path.insert(1, str(REPO))  # behind the script's own folder, in front of whatever is installed


def put_first(host: Path) -> None:
    """Makes ComfyUI's modules importable: in front of ours, whose `nodes` must not hide ComfyUI's."""
    sys.path.insert(0, str(host))
