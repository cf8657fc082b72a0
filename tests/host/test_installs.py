"""The pack as it comes to others: the registry's archive, ComfyUI Manager, a folder of any name, without extras."""

from __future__ import annotations

import asyncio
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from kit import graphs, small_world
from kit.hosts import NEWER, NEWEST, fetch_newer, version_of
from kit.paths import PACK, REPO, STATE
from kit.server import Server

HOST = Path(os.environ["COMFYUI_PATH"]).resolve()
pytestmark = pytest.mark.skipif(
    version_of(HOST) != NEWEST, reason="ComfyUI Manager and the frontend are those of the newest ComfyUI"
)
COMFY_CLI = "comfy-cli==1.23.0"
EXTRAS = ("accelerate", "diffusers", "jsonargparse", "matplotlib", "peft", "skimage", "webdataset")

#: Python finds none of the extras where this is on its path.
WITHOUT_EXTRAS = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_all_but(name, path=None, target=None):
    return None if name.split(".")[0] in {EXTRAS!r} else find(name, path, target)

PathFinder.find_spec = staticmethod(find_all_but)
"""


def git(folder, *arguments):
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run([*command, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The repository as it stands, uncommitted work too, as a git repository of its own."""
    folder = tmp_path_factory.mktemp("source") / PACK
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO, check=True, capture_output=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, folder / name)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=first")
    return folder


@pytest.fixture(scope="module")
def comfy():
    """comfy-cli's command, in an environment of its own: it has needs that are not the host's."""
    home = STATE / "comfy-cli"
    folder = home / ("Scripts" if os.name == "nt" else "bin")
    stamp = home / "installed.txt"
    with FileLock(f"{home}.lock"):
        if not stamp.is_file() or stamp.read_text("utf-8") != COMFY_CLI:
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", COMFY_CLI]
            subprocess.run([folder / "python", *install], check=True)
            stamp.write_text(COMFY_CLI, "utf-8")

    def run(*arguments, cwd):
        command = [str(folder / "comfy"), "--skip-prompt", *arguments]
        # It looks for its companions (ruff) on the path, and sends no figures from here.
        path = os.pathsep.join([str(folder), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "DO_NOT_TRACK": "1"}
        # Its settings lie in the user's folder: not in that of whoever runs the tests.
        environment |= dict.fromkeys(("HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA", "XDG_CONFIG_HOME"), str(home))
        ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    run("tracking", "disable", cwd=home)
    return run


@pytest.fixture(scope="module")
def archive(comfy, source):
    """What the registry would hand out."""
    comfy("node", "pack", cwd=source)
    return source / "node.zip"


def test_the_registrys_validation_passes(comfy, source):
    assert "All validation checks passed" in comfy("node", "validate", cwd=source)


def test_the_archive_has_what_users_need_and_nothing_of_the_developers(archive):
    names = zipfile.ZipFile(archive).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {
        "LICENSE", "README.md", "__init__.py", "locales", "nested_core", "nodes", "pyproject.toml",
        "requirements-training.txt", "requirements.txt", "subgraphs", "web", "workflows",
    }  # fmt: skip
    for needed in ("web/docs/NestedApplySubject.md", "web/docs/images/NestedApplySubject.jpg",
                   "workflows/first_portrait.json", "workflows/first_portrait.jpg",
                   "workflows/api/first_portrait.json", "locales/ja/nodeDefs.json",
                   "nested_core/training/configs/sdxl.yaml"):  # fmt: skip
        assert needed in names
    assert archive.stat().st_size < 3e6


def test_it_runs_from_a_folder_of_another_name_without_any_extra(archive, tmp_path):
    """A path with a space and letters beyond ASCII; no diffusers, scikit-image, matplotlib; no CUDA here anyway."""
    root = tmp_path / "Bilder von Änne 画室"
    models = root / "models"
    names = small_world.provide_models(models)
    pack = models / "custom_nodes" / "my_portraits"  # of a name that is no URL's, the host shows no help pages
    zipfile.ZipFile(archive).extractall(pack)
    blocker = root / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(WITHOUT_EXTRAS, "utf-8")
    loader = small_world.link_packs(HOST)[1]
    environment = {"PYTHONPATH": str(blocker)}
    subject = small_world.write_portraits(small_world.held_out_figures(1, 1, "robot"), root / "work" / "input")
    graph = graphs.subject_graph(names, "a <robot> in the snow", subject, steps=2)
    with Server(
        HOST, root / "work", models=models, only=[pack.name, loader], environment=environment
    ) as server:  # fmt: skip
        assert any(str(pack) in line and "seconds:" in line for line in server.log_lines()), "from there"
        shipped = {page.stem for page in (REPO / "web" / "docs").glob("*.md")}
        assert {name for name in server.request("/object_info", timeout=120) if name.startswith("Nested")} == shipped
        assert asyncio.run(graphs.run_graph(server, graph, quiet=True))
        assert pack.name in server.request("/workflow_templates")
        page = server.fetch(f"/extensions/{pack.name}/docs/NestedApplySubject.md")
        assert page.startswith(b"# Apply")


def test_training_says_what_it_needs(archive, tmp_path):
    zipfile.ZipFile(archive).extractall(tmp_path / "pack")
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_EXTRAS, "utf-8")
    ran = subprocess.run(
        [sys.executable, "-m", "nested_core.training", "--help"], cwd=tmp_path / "pack", capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode
    assert "pip install -r requirements-training.txt" in ran.stderr.splitlines()[-1]


# --- ComfyUI Manager -------------------------------------------------------------------------------------------------


@pytest.fixture
def published(source, tmp_path):
    """(address, publish): a git server's address of the repository, and what brings its newest commit there."""
    bare = tmp_path / "served" / PACK
    git(tmp_path, "clone", "--quiet", "--bare", str(source), str(bare))

    def publish():
        git(source, "push", "--quiet", str(bare), "main")
        git(bare, "update-server-info")

    publish()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(bare.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{PACK}", publish
    server.shutdown()


@pytest.mark.parametrize("manager", ["pinned", "newest"])
def test_comfyui_manager_installs_updates_disables_and_uninstalls_it(source, published, manager, tmp_path):
    address, publish = published
    base, work = tmp_path / "base", tmp_path / "work"
    settings = work / "user" / "__manager"
    settings.mkdir(parents=True)
    # Its own default refuses addresses of git repositories; without a network it asks no registry.
    (settings / "config.ini").write_text("[default]\nallow_git_url_install = true\nnetwork_mode = offline\n", "utf-8")
    (base / "custom_nodes").mkdir(parents=True)
    installed, disabled = base / "custom_nodes" / PACK, base / "custom_nodes" / ".disabled" / PACK
    options = ["--base-directory", str(base), "--enable-manager", "--enable-manager-legacy-ui"]
    environment = {"PYTHONPATH": str(fetch_newer("manager"))} if manager == "newest" else {}

    def start():
        return Server(HOST, work, only=None, options=options, environment=environment)

    with start() as server:
        server.fetch("/v2/customnode/install/git_url", address.encode(), timeout=120)
        assert (installed / "__init__.py").is_file()
        used = server.fetch("/v2/manager/version").decode()
        assert (used == f"V{NEWER['manager'][0].split('==')[1]}") == (manager == "newest"), used

    with start() as server:
        assert "NestedApplySubject" in server.request("/object_info", timeout=120)
        assert server.request("/v2/customnode/installed")[PACK]["enabled"]
        queued = {"id": PACK, "version": "unknown", "files": [address], "ui_id": "1", "channel": "default"}

        def ask(what, done):
            assert server.request("/v2/manager/queue/batch", {what: [{**queued, "mode": "cache"}]}) == {"failed": []}
            begun = time.monotonic()
            while not done() and time.monotonic() - begun < 60:
                time.sleep(0.3)
            assert done(), f"{what}\n{server.log_tail()}"

        marker = source / "nodes" / f"{manager}.txt"
        marker.write_text("a newer version", "utf-8")
        git(source, "add", "--all")
        git(source, "commit", "--quiet", "--message=newer")
        publish()
        ask("update", (installed / "nodes" / marker.name).is_file)
        ask("disable", lambda: disabled.is_dir() and not installed.exists())
        ask("uninstall", lambda: not disabled.exists() and not installed.exists())
