"""What the registry shows as this version's changes: the newest entry of CHANGELOG.md.

    python scripts/release.py

Stops where something is still to be done before a release: docs/publishing.md has the whole list.
"""

from __future__ import annotations

import re
import sys

from kit.environment import SetupError, run_main
from kit.paths import REPO

PUBLISHER = "PUBLISHER"  # stands in pyproject.toml until somebody publishes


def version() -> str:
    """The pack's version, from pyproject.toml. Raises SetupError if it is not of three numbers."""
    found = re.search(r'^version = "(\d+\.\d+\.\d+)"', _text("pyproject.toml"), re.MULTILINE)
    if not found:
        raise SetupError('pyproject.toml has no version of three numbers, which the registry wants: version = "1.2.3".')
    return found[1]


def notes() -> str:
    """The newest entry of CHANGELOG.md, without its heading. Raises SetupError if it is not this version's."""
    heading, _, entry = _text("CHANGELOG.md").partition("\n## ")[2].partition("\n")
    if heading.strip() != version():
        raise SetupError(
            f'The newest entry of CHANGELOG.md is "{heading.strip()}", the version in pyproject.toml is {version()}.\n'
            "Give them the same number."
        )
    return entry.partition("\n## ")[0].strip()


def check_publisher() -> None:
    """Raises SetupError while pyproject.toml has no publisher's name."""
    lines = [line for line in _text("pyproject.toml").splitlines() if PUBLISHER in line]
    if lines:
        raise SetupError(
            f"pyproject.toml still says {PUBLISHER}:\n    " + "\n    ".join(lines) + "\n"
            "Put your publisher id of registry.comfy.org there, and in the addresses the repository's owner."
        )


def _text(name: str) -> str:
    return (REPO / name).read_text("utf-8")


def main() -> int:
    check_publisher()
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # Windows: whatever the console has
    print(notes())
    return 0


if __name__ == "__main__":
    run_main(main)
