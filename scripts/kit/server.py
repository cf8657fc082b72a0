"""A running ComfyUI server, driven through its HTTP API."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .environment import SetupError, say
from .hosts import version_of
from .paths import PACK, STATE

USUAL_PORT = 8188  # ComfyUI's own default


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
        return json.loads(self.fetch(path, body, timeout, "application/json") or "null")

    def fetch(self, path: str, body: bytes | None = None, timeout: float = 30.0, kind: str = "text/plain") -> bytes:
        """GET, or POST of `body`; the answer as it is. Raises OSError (HTTPError among them) when it fails."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
        # No proxy stands between a machine and itself, whatever the environment says.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
            return bytes(answer.read())

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
