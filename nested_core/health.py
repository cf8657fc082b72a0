"""What a bug report needs to say, in one text: `python -m nested_core.health [ADDRESS]`.

ADDRESS is a running ComfyUI's (http://127.0.0.1:8188 unless said): it is asked for its own account, which has the
devices, the encoder, other packs and the last run in it (`hosts.comfy.health`). Where none answers, there are the
versions. No names of files or people are in it, and no prompts. Standard library only: it says something where nothing
else starts.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROUTE = "/nested_attention/health"
TITLE = "ComfyUI Nested Attention: health check"
_PACKAGES = ("torch", "torchvision", "transformers", "safetensors", "comfyui-frontend-package", "comfyui-manager")


def pack_version() -> str:
    """This pack's version, as its pyproject.toml says it; empty where that is not there."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    found = re.search(r'^version = "(.+)"', project.read_text("utf-8"), re.MULTILINE) if project.is_file() else None
    return found[1] if found else ""


def versions() -> list[str]:
    """What runs here, one "name: version" each."""
    return [
        f"Nested Attention: {pack_version() or 'unknown'}",
        f"Python: {platform.python_version()} on {platform.system()} {platform.machine()}",
        *(f"{name}: {_installed(name)}" for name in _PACKAGES),
    ]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def section(title: str, lines: Iterable[str]) -> str:
    """Lines under a title; "nothing" where there are none."""
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines or ["nothing"])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the account of a running ComfyUI, or what can be said without. Returns the exit code: 1 without."""
    parser = argparse.ArgumentParser(prog="python -m nested_core.health", description="What a bug report needs to say.")
    parser.add_argument("address", nargs="?", default="http://127.0.0.1:8188", help="of a running ComfyUI")
    address = parser.parse_args(arguments).address.rstrip("/")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever a Windows console is set to
    try:
        with urllib.request.urlopen(address + ROUTE, timeout=30) as answer:
            print(answer.read().decode())
        return 0
    except urllib.error.HTTPError as error:
        why = f"ComfyUI runs at {address}, but does not know this check ({error.code}): did the pack load? See its log."
    except (OSError, ValueError) as error:
        why = f"No ComfyUI answers at {address} ({error}). Start it, or give its address."
    print(f"{TITLE}\n\n{section('versions', versions())}\n\n{why}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
