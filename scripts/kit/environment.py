"""A Python environment with what ComfyUI and the tests need. Standard library only: it runs before anything is there.

Everything that is made lies in two git-ignored folders, `.venv` and `.comfyui`. What was installed has a stamp, keyed
by a hash of what it was and written last: a second run does nothing, and one after a broken one does what is missing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from .paths import REPO, VENV, VENV_OLDEST_TORCH

# Versions that fit each other; ComfyUI's own requirements leave all three open.
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]
# The oldest PyTorch that ComfyUI starts with (comfy-kitchen wants 2.4), and the newest that go with it.
OLDEST_TORCH = ["torch==2.4.1", "torchvision==0.19.1", "torchaudio==2.4.1", "comfy-kitchen==0.2.27", "transformers<5"]
PYTHONS = "Python 3.10 to 3.14"
IMPORTS = "torch, torchvision, torchaudio, transformers, safetensors, aiohttp, av, PIL, tqdm, yaml, sqlalchemy"

STAMPS = ".nested-attention"
_started = time.monotonic()


class SetupError(Exception):
    """Something a user can put right: the message says what happened and what to do."""


def say(text: str) -> None:
    """Prints a line of progress with the seconds since the start."""
    print(f"[{time.monotonic() - _started:4.0f} s] {text}", flush=True)


def run_main(main: Callable[[], int]) -> NoReturn:
    """Runs a script's main: readable errors, exit codes, and a chance to tidy up when the script is told to stop."""
    if sys.version_info < (3, 10):  # noqa: UP036 - who runs a script may well have an older one
        sys.exit(f"error: this needs {PYTHONS}; {sys.executable} is Python {sys.version.split()[0]}.")
    # Turned into an exception, so that a server that was started is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code = main()
    except SetupError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        code = 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


def own_comfyui() -> Path | None:
    """The ComfyUI that COMFYUI_PATH names, or None. Raises SetupError if there is none at that place."""
    named = os.environ.get("COMFYUI_PATH")
    if not named:
        return None
    host = Path(named).expanduser().resolve()
    if not (host / "main.py").is_file() or not (host / "comfy").is_dir():
        raise SetupError(
            f"COMFYUI_PATH is {named}, but there is no ComfyUI at {host}.\n"
            "Set it to the folder with ComfyUI's main.py in it, or unset it to have a ComfyUI fetched."
        )
    return host


def enter_environment() -> None:
    """Goes on inside a virtual environment: the active one, else `.venv` in the repository, made if need be.

    Starts the script anew with that environment's Python, so it does not return where the environment changes. With
    COMFYUI_PATH the running Python is kept: it is the one that ComfyUI runs in.
    """
    if own_comfyui() or _in_environment():
        return
    python = make_environment(VENV)
    sys.stdout.flush()
    sys.stderr.flush()
    command = [str(python), *sys.argv]
    if os.name != "nt":
        os.execv(command[0], command)
    # exec on Windows starts another process and gives the console back at once.
    process = subprocess.Popen(command)
    while True:
        try:
            sys.exit(process.wait())
        except KeyboardInterrupt:
            continue  # the child has had its own Ctrl-C


def _in_environment() -> bool:
    conda = os.environ.get("CONDA_PREFIX")
    in_conda = conda and os.environ.get("CONDA_DEFAULT_ENV") != "base" and Path(conda) == Path(sys.prefix)
    return sys.prefix != sys.base_prefix or bool(in_conda)


def make_environment(folder: Path) -> Path:
    """The Python of a virtual environment of ours, which is made if need be. Raises SetupError."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def works() -> bool:
        asked = [str(python), "-m", "pip", "--version"]
        return python.exists() and subprocess.run(asked, capture_output=True).returncode == 0

    if works():
        return python
    if folder.exists():
        if not (folder / STAMPS).exists():
            raise SetupError(
                f"{folder} was not made by this script, and there is no working pip in it. "
                "Delete or repair it, or activate another environment."
            )
        say(f"{folder} is unfinished: making it anew")
        shutil.rmtree(folder)
    say(f"making a virtual environment in {folder}")
    (folder / STAMPS).mkdir(parents=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True)
    if made.returncode or not works():
        raise SetupError(
            f"No virtual environment could be made with {sys.executable}:\n{made.stdout}{made.stderr}\n"
            "On Debian and Ubuntu, install the package python3-venv. Or activate an environment of your own."
        )
    return python


def pip(*arguments: str | Path, why: str) -> None:
    """Runs pip in this environment, its output as progress. Raises SetupError with what to look at if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    if subprocess.call(command):
        free = shutil.disk_usage(REPO).free / 2**30
        raise SetupError(
            f"{why} failed; pip's message is above. The command was:\n    {' '.join(command)}\n"
            f"Look at: the network, or the proxy and index in pip's configuration; the disk ({free:.0f} GB free, "
            f"torch alone may want 8); the Python version ({sys.version.split()[0]}, torch needs {PYTHONS}).\n"
            "Then run this again: it goes on from here."
        )


def requirements(*sources: Path | Iterable[str]) -> dict[str, str]:
    """{normalised name: line} of requirement files and lines; of several with one name the first.

    Comments, blank lines and files that are not there are left out.
    """
    named: dict[str, str] = {}
    for source in sources:
        if isinstance(source, Path):
            source = source.read_text("utf-8").splitlines() if source.is_file() else ()
        for line in source:
            line = line.split("#")[0].strip()
            if found := re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line):
                named.setdefault(re.sub(r"[-_.]+", "-", found[0]).lower(), line)
    return named


def missing(wanted: Iterable[str]) -> list[str]:
    """Those requirements that this environment does not have, or has in another version than pinned with ==."""
    lacking = []
    for name, line in requirements(wanted).items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(line)
            continue
        if "==" in line and version.split("+")[0] != line.split("==")[1].split(";")[0].strip():
            lacking.append(line)
    return lacking


def install(wanted: Iterable[str], what: str, torch: list[str] = TORCH) -> None:
    """Installs requirements into this environment, once, with a torch that fits its companions.

    Somebody's own environment keeps the torch it has (another accelerator's build, say), if it is complete.
    Raises SetupError where the installation or what came of it does not work.
    """
    ours = Path(sys.prefix).resolve() in (VENV, VENV_OLDEST_TORCH)
    wanted = list(wanted)
    content = "\n".join([*torch, *wanted, str(sys.version_info[:2])])
    stamp = Path(sys.prefix) / STAMPS / hashlib.sha256(content.encode()).hexdigest()[:16]
    if ours or missing(requirements(torch)):
        wanted = [*torch, *wanted]
    lacking = missing(wanted)
    if stamp.exists() and not lacking:
        return
    # Cut short while it copied, pip would take a package for installed. Not in others' environments: they may have
    # other reasons for what is there.
    unfinished = stamp.with_name("unfinished")
    again = ["--force-reinstall"] if ours and unfinished.exists() else []
    stamp.parent.mkdir(exist_ok=True)
    unfinished.touch()
    say(f"installing {what} into {sys.prefix}: a few minutes the first time" if lacking else f"checking {what}")
    pip("install", *([] if lacking else ["--quiet"]), *again, *wanted, why=f"Installing {what}")
    check = subprocess.run([sys.executable, "-c", f"import {IMPORTS}"], capture_output=True, text=True, cwd=REPO)
    if check.returncode:
        delete = f"delete {sys.prefix} and run this again" if ours else "try a fresh environment"
        raise SetupError(
            f"The packages in {sys.prefix} do not work together:\n{check.stderr.strip()[-1500:]}\n"
            f"If in doubt, {delete}."
        )
    unfinished.unlink()
    stamp.write_text(content, "utf-8")
