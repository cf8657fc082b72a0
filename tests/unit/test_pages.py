"""README and docs: links that lead somewhere, commands that are there."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", REPO / "CHANGELOG.md", REPO / "demo" / "README.md", *sorted((REPO / "docs").glob("*.md"))]
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page in addresses."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_links_lead_somewhere(page):
    for found in _LINK.findall(_FENCED.sub("", page.read_text("utf-8"))):
        link = unquote(found[0] or found[1])
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_shows_a_picture_before_it_explains():
    first, second = re.findall(r"\n\n(.+)", (REPO / "README.md").read_text("utf-8"))[:2]
    assert len(first) < 120
    assert second.startswith("![")


def test_the_readmes_two_commands_are_there():
    commands = re.findall(r"^```\n(.+?)\n```", (REPO / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert commands == ["python scripts/quickstart.py", "python scripts/test.py"]
    assert all((REPO / command.split()[1]).is_file() for command in commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_scripts_that_pages_name_are_there(page):
    named = set(re.findall(r"python3? ((?:scripts|demo)/\w+\.py)", page.read_text("utf-8")))
    assert not [script for script in named if not (REPO / script).is_file()]
