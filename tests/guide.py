"""docs/training.md as its tests read it: the commands of its code blocks, and a clone to run them in."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
GUIDE = REPO / "docs" / "training.md"
FIRST_PAGE = "First page: from a folder of photographs to the nodes"
_COMMAND = re.compile(r"^ {4,}((?:python|pip|tar|accelerate|tensorboard) (?:.*\\\n)*.*)$", re.MULTILINE)


def commands() -> dict[str, str]:
    """{command: heading of the section that it stands in}, in the page's order; lines that go on are joined."""
    found = {}
    for section in re.split(r"^##+ ", GUIDE.read_text("utf-8"), flags=re.MULTILINE):
        heading, _, text = section.partition("\n")
        for command in _COMMAND.findall(text):
            found[re.sub(r"\s*\\\n\s*", " ", command).strip()] = heading
    return found


def clone(folder: Path) -> Path:
    """What the guide's commands need of the repository, in a folder that they may write to."""
    kept = shutil.ignore_patterns("run*", "__pycache__")
    for part in ("demo", "nested_core"):
        shutil.copytree(REPO / part, folder / part, ignore=kept)
    shutil.copytree(REPO / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements-training.txt"):
        shutil.copyfile(REPO / name, folder / name)
    return folder
