"""The health check without a ComfyUI: it says what it can."""

from __future__ import annotations

import http.server
import threading
from importlib.metadata import version

import pytest

from nested_core import health


class _Host(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/nested_attention/health"
        self.send_response(200 if known and self.server.knows else 404)  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write("läuft".encode())

    def log_message(self, *said: object) -> None:
        pass


@pytest.fixture
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Host)
    server.knows = True  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_running_comfyui_is_asked(host, capsys):
    assert health.main([f"http://127.0.0.1:{host.server_port}/"]) == 0
    assert capsys.readouterr().out.strip() == "läuft"


def test_one_that_did_not_load_the_pack_is_told_from_none(host, capsys):
    host.knows = False
    address = f"http://127.0.0.1:{host.server_port}"
    assert health.main([address]) == 1
    said = capsys.readouterr().out
    assert "did the pack load?" in said and f"Nested Attention: {health.pack_version()}" in said
    host.shutdown()
    host.server_close()
    assert health.main([address]) == 1
    assert f"No ComfyUI answers at {address}" in capsys.readouterr().out


def test_versions_are_those_that_are_installed():
    said = dict(line.split(": ", 1) for line in health.versions())
    assert said["torch"] == version("torch")
    assert said["Nested Attention"][0].isdigit()
