"""What goes stale between releases: versions that must agree, addresses of pictures, what the archive leaves out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import release
import yaml
from PIL import Image

from kit.environment import SetupError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

REPO = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))
FORMS = REPO / ".github" / "ISSUE_TEMPLATE"
#: What the host reads of an installed pack, and what people need to go with it.
SHIPPED = [
    "LICENSE", "README.md", "__init__.py", "locales", "nested_core", "nodes", "pyproject.toml",
    "requirements-training.txt", "requirements.txt", "subgraphs", "web", "workflows",
]  # fmt: skip


def git(*arguments: str) -> list[str]:
    ran = subprocess.run(["git", *arguments, "-z"], cwd=REPO, check=True, capture_output=True)
    return [name for name in ran.stdout.decode().split("\0") if name]


# --- versions ---------------------------------------------------------------------------------------------------------


def test_the_newest_entry_of_the_changelog_is_this_version_and_speaks_of_saved_workflows():
    assert release.version() == PROJECT["project"]["version"]
    notes = release.notes()
    assert notes.startswith("### Saved workflows\n")
    assert "## " + release.version() not in notes and "\n## " not in notes


def test_a_changelog_without_this_version_is_told(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n', "utf-8")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.2\n\n* Old.\n", "utf-8")
    monkeypatch.setattr(release, "REPO", tmp_path)
    with pytest.raises(SetupError, match=r'is "1\.2\.2", the version in pyproject\.toml is 1\.2\.3'):
        release.notes()
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3\n\n* New.\n\n## 1.2.2\n\n* Old.\n", "utf-8")
    assert release.notes() == "* New."


def test_a_missing_publisher_is_told_and_a_name_is_enough(tmp_path, monkeypatch):
    text = (REPO / "pyproject.toml").read_text("utf-8")
    monkeypatch.setattr(release, "REPO", tmp_path)
    unnamed = re.sub(r'PublisherId = ".*"', 'PublisherId = "PUBLISHER"', text)
    (tmp_path / "pyproject.toml").write_text(unnamed, "utf-8")
    with pytest.raises(SetupError, match="PublisherId"):
        release.check_publisher()
    (tmp_path / "pyproject.toml").write_text(text.replace("PUBLISHER", "somebody"), "utf-8")
    release.check_publisher()


@pytest.mark.parametrize("folder", ["workflows", "subgraphs"])
def test_templates_name_this_version(folder):
    versions = set()
    for path in (REPO / folder).glob("*.json"):
        graph = json.loads(path.read_text("utf-8"))
        for part in (graph, *graph.get("definitions", {}).get("subgraphs", [])):
            ours = [node["properties"] for node in part["nodes"] if node["type"].startswith("Nested")]
            versions |= {(properties["cnr_id"], properties["ver"]) for properties in ours}
    assert versions == {(PROJECT["project"]["name"], PROJECT["project"]["version"])}


# --- the registry -----------------------------------------------------------------------------------------------------


def test_the_registrys_fields_are_filled_in():
    comfy, urls = PROJECT["tool"]["comfy"], PROJECT["project"]["urls"]
    assert {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"} <= comfy.keys()
    assert all(comfy.values())
    home = urls["Repository"]
    assert re.fullmatch(r"https://github\.com/[\w.-]+/" + PROJECT["project"]["name"], home)
    assert all(address.startswith(home) for address in urls.values())
    assert len(PROJECT["project"]["name"]) < 100


@pytest.mark.parametrize(("name", "fits"), [
    ("Icon", lambda width, height: width == height <= 400),
    ("Banner", lambda width, height: width * 9 == height * 21),
])  # fmt: skip
def test_its_pictures_are_there_in_the_sizes_it_takes(name, fits):
    home = PROJECT["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com")
    address = PROJECT["tool"]["comfy"][name]
    assert address.startswith(f"{home}/main/")
    with Image.open(REPO / address.removeprefix(f"{home}/main/")) as picture:
        assert picture.format == "PNG"
        assert fits(*picture.size)


# --- the archive ------------------------------------------------------------------------------------------------------


def test_the_archive_leaves_out_nothing_that_the_pack_needs():
    left_out = git("ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore")
    assert not [name for name in left_out if name.split("/")[0] in SHIPPED]
    assert {name.split("/")[0] for name in git("ls-files")} - {name.split("/")[0] for name in left_out} == set(SHIPPED)


def test_no_file_of_the_pack_is_hidden_from_git():
    """A file that .gitignore matches would work here and be missing for everybody else."""
    hidden = git("ls-files", "--others", "--ignored", "--exclude-standard", "--", *SHIPPED)
    assert not [name for name in hidden if "__pycache__" not in name and not Path(name).name.startswith(".")]


# --- issues -----------------------------------------------------------------------------------------------------------


def test_the_form_for_bugs_asks_for_what_a_first_reply_would():
    form = yaml.safe_load((FORMS / "bug.yml").read_text("utf-8"))
    required = {f["id"] for f in form["body"] if f.get("validations", {}).get("required")}
    assert required == {"what", "comfyui", "pack", "loader", "workflow"}


@pytest.mark.parametrize("form", ["bug", "encoder"])
def test_a_form_names_nodes_templates_and_pages_that_are_there(form):
    text = (FORMS / f"{form}.yml").read_text("utf-8")
    titles = {page.read_text("utf-8").split("\n", 1)[0] for page in (REPO / "web" / "docs").glob("*.md")}
    assert {f"# {node}" for node in re.findall("Load Nested Encoder|Check Encoder", text)} <= titles
    files = [f"workflows/{name}.json" for name in re.findall(r"Template (\w+)", text)]
    files += re.findall(r"blob/main/([\w./-]+)", text)
    assert files and not [file for file in files if not (REPO / file).is_file()]


def test_github_runs_what_must_pass():
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "test.yml").read_text("utf-8"))
    assert [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step] == [".ci/run"]
