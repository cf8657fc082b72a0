"""The host's real frontend in a browser: Chromium, driven by playwright."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from .environment import SetupError, say
from .graphs import failure_of, refusal_of
from .server import Server

_SCRIPT = Path(__file__).with_name("frontend.js")
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_READY = "() => window.app?.graph && window.LiteGraph && 'NestedApplySubject' in LiteGraph.registered_node_types"


def find_chromium() -> str:
    """The path of a Chromium: the system's, or playwright's own, which is downloaded where there is none.

    Raises SetupError where none can be had. Nothing is installed into the system but by root, as in a container.
    """
    if found := _installed():
        return found
    say("getting a Chromium for the tests in the frontend")
    attempts = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        attempts[:0] = [["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]]
    said = []
    for command in attempts:
        try:
            ran = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=600
            )
        except subprocess.TimeoutExpired:
            said.append(f"{' '.join(command)}: no end after ten minutes")
            continue
        said.append(f"{' '.join(command)}: {(ran.stdout + ran.stderr)[-400:].strip()}")
        if found := _installed():
            return found
    raise SetupError(
        "The tests in ComfyUI's frontend need Chromium, and none could be had. Install your system's package chromium, "
        "or run python -m playwright install --with-deps chromium in this environment.\n" + "\n".join(said)
    )


def _installed() -> str | None:
    """A Chromium that starts."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    for path in (*map(shutil.which, _NAMES), own):
        if path and Path(path).is_file():
            # Ubuntu's chromium-browser may be a stub that only says what to install.
            ran = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
            if ran.returncode == 0:
                return path
    return None


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium without a window."""
    path = find_chromium()
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield opened
        finally:
            opened.close()


def frontend(
    chromium: Browser, server: Server, width: int = 1920, height: int = 1080, settings: dict[str, Any] | None = None
) -> Page:
    """A page with the server's frontend, ready: its nodes are registered. `nested` of frontend.js is there.

    settings: of the frontend's own, such as {"Comfy.VueNodes.Enabled": True}; stored on the server before it opens.
    """
    # No tour, no dialog of what is new: they would stand before the graph.
    quiet = {"Comfy.TutorialCompleted": True, "Comfy.Notification.ShowVersionUpdates": False}
    quiet |= {"Comfy.Graph.CanvasInfo": False, "Comfy.Graph.CanvasMenu": False}
    server.request("/settings", {**quiet, "Comfy.VueNodes.Enabled": False, **(settings or {})})
    page = chromium.new_page(viewport={"width": width, "height": height})
    page.goto(server.url, wait_until="load")
    page.wait_for_function(_READY, timeout=120_000)
    page.add_script_tag(path=_SCRIPT)
    page.wait_for_timeout(1500)  # it restores the last graph once it is up
    return page


def lay_out(page: Page, built: dict[str, Any]) -> dict[str, Any]:
    """Builds a graph as `nested.build` of frontend.js takes it; the graph as the frontend would save it."""
    page.evaluate("(built) => nested.build(built)", built)
    page.wait_for_timeout(500)
    return dict(page.evaluate("() => app.graph.serialize()"))


def load(page: Page, workflow: dict[str, Any], name: str) -> None:
    """Opens a UI-format workflow as dropping its file on the canvas does, with lists of files as they are by now."""
    page.evaluate(
        """async ([graph, name]) => {
          await app.refreshComboInNodes()
          await app.loadGraphData(graph, true, true, name)
        }""",
        [workflow, name],
    )
    page.wait_for_timeout(600)


def queue(page: Page, server: Server, patience: float = 900.0) -> dict[str, Any]:
    """Presses Run, so to speak, and waits for the end. The history entry of that run.

    Raises SetupError with the host's message where the run was refused or failed.
    """
    before = set(server.request("/history"))
    page.evaluate("async () => { await app.queuePrompt(0, 1) }")
    message, node_errors = page.evaluate("() => [app.lastPromptError ?? null, app.lastNodeErrors ?? {}]")
    if message or node_errors:
        raise SetupError(refusal_of(message, node_errors))
    begun = time.monotonic()
    while time.monotonic() - begun < patience:
        server.check_alive("while a graph ran")
        history = server.request("/history")
        for entry in (history[key] for key in history.keys() - before):
            status = entry["status"]
            if status["status_str"] != "success":
                failed: dict[str, Any] = next(
                    (data for kind, data in status["messages"] if kind == "execution_error"), {}
                )
                raise SetupError(f"{failure_of(failed, server)}\n{server.log_tail()}")
            return dict(entry)
        page.wait_for_timeout(300)
    raise SetupError(f"The graph did not end within {patience:.0f} s.")


def load_and_run(page: Page, server: Server, workflow: dict[str, Any], name: str) -> dict[str, Any]:
    """Opens a workflow, runs it and waits until its pictures are on the canvas. The history entry of that run."""
    load(page, workflow, name)
    entry = queue(page, server)
    page.wait_for_timeout(1500)
    return entry


def shoot(page: Page, path: Path, names: Sequence[str] = (), margin: int = 24) -> None:
    """A picture of the whole graph, or of the nodes with these titles or types, without what the frontend has around.

    path: .jpg or .png.
    """
    hidden = [".minimap-main-container", ".subgraph-breadcrumb", ".p-toast"]
    hidden += [f"[data-testid={name}]" for name in ("queue-notification-banner", "error-overlay")]
    page.add_style_tag(content=f"{', '.join(hidden)} {{display: none !important}}")
    call = "(names) => names.length ? nested.show(names) : nested.fit()"
    x, y, width, height = page.evaluate(call, list(names))
    page.wait_for_timeout(1200)
    above = margin + 14  # whose a node is stands over its title
    clip: Any = {"x": x - margin, "y": y - above, "width": width + 2 * margin, "height": height + above + margin}
    if path.suffix == ".jpg":
        page.screenshot(path=path, clip=clip, type="jpeg", quality=82)
    else:
        page.screenshot(path=path, clip=clip)


def open_help(page: Page, kind: str) -> None:
    """Selects the first node of a type and opens its help page."""
    page.evaluate("(kind) => app.canvas.selectNode(app.graph._nodes.find((n) => n.type === kind))", kind)
    page.wait_for_timeout(500)
    page.get_by_test_id("info-button").click()
    page.wait_for_timeout(1000)
