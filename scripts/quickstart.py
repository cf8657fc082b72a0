"""From a clone to pictures, with one command: a real ComfyUI, this pack in it, and a subject put into new scenes.

    python scripts/quickstart.py              makes a contact sheet and says where it is
    python scripts/quickstart.py --serve      and leaves ComfyUI up, with the graph ready to open

Sets up what it needs first: a virtual environment `.venv` unless one is active, and a ComfyUI under `.comfyui` unless
COMFYUI_PATH names one, whose Python environment must then be the active one.

The models are the small ones of `demo/`: trained on drawn robots and creatures, they run in seconds on a
CPU, and know nothing else. The graph is the same with SDXL and the public encoder.
"""

from __future__ import annotations

import argparse

from kit.environment import run_main
from kit.hosts import HOSTS, NEWEST, prepared_hosts
from kit.server import USUAL_PORT


def main() -> int:
    """Returns the exit code: 0 where the pictures were made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--serve", action="store_true", help="leave the server up afterwards; Ctrl-C stops it")
    parser.add_argument("--port", type=int, default=0, help=f"default: {USUAL_PORT} with --serve, or any")
    parser.add_argument("--host", choices=list(HOSTS), help=f"which ComfyUI to fetch (default: {NEWEST})")
    parser.add_argument("--seed", type=int, default=1, help="other figures, other pictures")
    arguments = parser.parse_args()

    chosen = [arguments.host] if arguments.host else []
    (host,) = prepared_hosts(chosen or [NEWEST], chosen, tests=False).values()
    from kit.first_pictures import show  # needs packages that are there only now

    show(host, arguments.serve, arguments.port, arguments.seed)
    return 0


if __name__ == "__main__":
    run_main(main)
