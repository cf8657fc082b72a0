"""Everything that must pass, with one command: linters, types, unit tests, and the tests inside each ComfyUI.

    python scripts/test.py                        everything
    python scripts/test.py --host 0.30.0          the host tests with that ComfyUI only
    python scripts/test.py -k prompt -x           arguments it does not know go to pytest
    python scripts/test.py tests/unit/test_x.py   only these tests, no linters

Sets up what it needs first. With COMFYUI_PATH the host tests run inside that ComfyUI, with the Python that this is
started with. A few of them run a second time, in the oldest ComfyUI with the oldest PyTorch, for which there is an
environment of its own. Stages run side by side, as many as there are cores (at most three); every line says whose it
is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import compatibility
from kit.environment import make_environment, own_comfyui, run_main, say
from kit.hosts import HOSTS, NEWER, NEWEST, OLDEST, fetch_newer, make_link, prepared_hosts, unlink
from kit.paths import REPO, STATE, VENV_OLDEST_TORCH

NOTHING_COLLECTED = 5  # pytest's exit code
# Long, and not about the host's version: these run in the newest ComfyUI alone, unless they are asked for.
ONCE = [
    f"tests/host/test_{name}.py"
    for name in (
        "frontend",
        "fuzz",
        "installs",
        "parity",
        "pretended_gpu",
        "shipped_world",
        "small_world",
        "training",
        "training_guide",
    )  # fmt: skip
]
# With models of full size: in the newest and the oldest ComfyUI, not in those between.
AT_BOTH_ENDS = ["tests/host/test_server.py"]
# Sampling with subjects, for which an old PyTorch may lack something: these run with the oldest one too.
WITH_OLDEST_TORCH = [f"tests/host/test_{name}.py" for name in ("apply", "compatibility", "prompt")]
PACKAGE = STATE / "nested_attention_pack"


def main() -> int:
    """Returns the exit code: 0 where everything passed."""
    parser = argparse.ArgumentParser(description="Runs the linters and all tests. Other arguments go to pytest.")
    parser.add_argument("--host", action="append", choices=list(HOSTS), help="only this ComfyUI version (repeatable)")
    arguments, extra = parser.parse_known_args()
    paths = [word for word in extra if word.startswith("tests") and (REPO / word.split("::")[0]).exists()]
    options = [word for word in extra if word not in paths]

    own = own_comfyui()
    hosts = prepared_hosts(HOSTS, arguments.host or (), manager=True)
    for name in NEWER:  # so that tests need no network
        fetch_newer(name)

    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "--durations=10", "--durations-min=5"]  # where the time goes
    # Stage: (command, environment). The linters have no say over a run of chosen tests.
    stages: dict[str, tuple[list[str], dict[str, str]]] = {}
    if not extra:
        stages["ruff"] = ([*python, "ruff", "check", "."], {})
        stages["mypy"] = ([*python, "mypy"], {})
        stages["mypy, nodes"] = (
            [*python, "mypy", "--cache-dir", str(STATE / "mypy"), "-p", f"{_as_package()}.nodes"],
            {"MYPYPATH": str(STATE)},
        )
    if chosen := _within(paths, "tests/unit"):
        stages["unit tests"] = ([*pytest, *chosen, *options], {})
    if chosen := _within(paths, "tests/host"):
        for version, host in hosts.items():
            command = [*pytest, *chosen, *options]
            environment = {"COMFYUI_PATH": str(host)}
            if not extra:
                between = not own and version not in (NEWEST, OLDEST)
                command += [f"--ignore={path}" for path in [*ONCE, *(AT_BOTH_ENDS if between else [])]]
            if not extra and not own:
                environment["NESTED_ATTENTION_COMPATIBILITY"] = str(compatibility.results_file(version))
            stages[f"host tests, ComfyUI {version}"] = (command, environment)
            if not extra and (own or version == NEWEST):
                stages[f"once, ComfyUI {version}"] = ([*pytest, *ONCE], {"COMFYUI_PATH": str(host)})
        again = [path for path in chosen if path.startswith(tuple(WITH_OLDEST_TORCH))]
        if "tests/host" in chosen:
            again = WITH_OLDEST_TORCH
        if again and not own and OLDEST in hosts and sys.version_info < (3, 13):  # PyTorch 2.4 has no builds for newer
            old = make_environment(VENV_OLDEST_TORCH)
            command = [str(old), "scripts/_oldest_torch.py", *again, *options]
            stages["host tests, oldest PyTorch"] = (command, {"COMFYUI_PATH": str(hosts[OLDEST])})

    try:
        results = _run(stages)
    finally:
        if os.path.lexists(PACKAGE):
            unlink(PACKAGE)  # a link of the repository in itself is a trap for whatever walks folders
    code = _report(results, chosen=bool(extra))
    if code or extra or list(hosts) != list(HOSTS):
        return code
    if not compatibility.PAGE.is_file() or compatibility.PAGE.read_text("utf-8") != compatibility.page():
        say("docs/compatibility.md is not what this run saw: run python scripts/compatibility.py")
        return 1
    return 0


def _run(stages: dict[str, tuple[list[str], dict[str, str]]]) -> dict[str, tuple[int, float]]:
    """Runs the stages, some at a time; (exit code, seconds) of each."""
    running: set[subprocess.Popen[str]] = set()
    cores = os.cpu_count() or 1
    jobs = max(1, min(cores, len(stages), 3))
    # One test process does not make good use of several cores: its operations are small.
    shared = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(max(1, cores // jobs))}

    def run(title: str) -> tuple[int, float]:
        command, environment = stages[title]
        say(f"{title}: {' '.join(command[2:])}")
        begun = time.monotonic()
        process = subprocess.Popen(
            command, cwd=REPO, env={**shared, **os.environ, **environment}, text=True, encoding="utf-8",
            errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        running.add(process)
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{title} | {line}", end="", flush=True)
        code = process.wait()
        running.discard(process)
        return code, time.monotonic() - begun

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return dict(zip(stages, pool.map(run, stages), strict=True))
        except BaseException as error:  # told to stop: what waits is left out, what runs is stopped and tidies up
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                if not isinstance(error, KeyboardInterrupt):  # which they have had themselves
                    process.terminate()
            raise


def _as_package() -> str:
    """The name under which the repository can be imported whole, as ComfyUI does it: the nodes import relatively."""
    STATE.mkdir(exist_ok=True)
    if not os.path.lexists(PACKAGE):
        make_link(PACKAGE)
    return PACKAGE.name


def _within(paths: list[str], folder: str) -> list[str]:
    """Those of the chosen tests that lie in a folder: the whole folder where none were chosen."""
    if not paths:
        return [folder]
    inside = []
    for path in paths:
        file = (REPO / path.split("::")[0]).resolve()
        if file.is_relative_to(REPO / folder):
            inside.append(path)
        elif (REPO / folder).is_relative_to(file):
            inside.append(folder)
    return inside


def _report(results: dict[str, tuple[int, float]], chosen: bool) -> int:
    """Prints a line per stage. With chosen tests, a stage without any of them is no failure, unless all are."""
    failed = [title for title, (code, _) in results.items() if code not in (0, NOTHING_COLLECTED if chosen else 0)]
    none_ran = all(code == NOTHING_COLLECTED for code, _ in results.values())
    print()
    for title, (code, seconds) in results.items():
        empty = code == NOTHING_COLLECTED and "tests" in title
        verdict = "no tests" if empty else "passed" if code == 0 else f"FAILED (exit code {code})"
        say(f"{title}: {verdict}, {seconds:.0f} s")
    if none_ran:
        say("no test fits these arguments")
    return 1 if failed or none_ran else 0


if __name__ == "__main__":
    run_main(main)
