"""From a clone to pictures, with one command: a real ComfyUI, this pack in it, and a subject put into new scenes.

    python scripts/quickstart.py              makes a contact sheet and says where it is
    python scripts/quickstart.py --serve      and leaves ComfyUI up, with the graph ready to open

Sets up what it needs first (see _setup.py): a virtual environment `.venv` unless one is active, and a ComfyUI under
`.comfyui` unless COMFYUI_PATH names one, whose Python environment must then be the active one.

The models are the small ones of `demo/` (see small_world.py): trained from nothing on drawn robots and creatures, they
run in seconds on a CPU, and know nothing else. The graph is the same with SDXL and the public encoder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _setup
from _graphs import Shown, check_nodes, run_graph, saved_pictures, subject_graph
from _setup import HOSTS, NEWEST, REPO, STATE, Server, SetupError, say

if TYPE_CHECKING:
    from PIL import Image

WORKFLOWS = REPO / "workflows"
USUAL_PORT = 8188  # ComfyUI's own default
SHEET = "contact_sheet.png"
SCENES = (("forest", "flat"), ("space", "comic"), ("beach", "watercolour"))
PAIR_SCENES = (("city", "flat"), ("snow", "comic"))


def main() -> int:
    """Returns the exit code: 0 where the pictures were made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--serve", action="store_true", help="leave the server up afterwards; Ctrl-C stops it")
    parser.add_argument("--port", type=int, default=0, help=f"default: {USUAL_PORT} with --serve, or any")
    parser.add_argument("--host", choices=list(HOSTS), help=f"which ComfyUI to fetch (default: {NEWEST})")
    parser.add_argument("--seed", type=int, default=1, help="other figures, other pictures")
    arguments = parser.parse_args()

    own = _setup.own_comfyui()
    if own and arguments.host:
        raise SetupError("COMFYUI_PATH already says which ComfyUI to use: unset it, or leave out --host.")
    _setup.enter_environment()
    if own:
        _setup.check_own_environment(own)
        host = own
    else:
        newest = _setup.fetch_host(NEWEST)
        host = _setup.fetch_host(arguments.host or NEWEST)
        _setup.install(_setup.host_requirements([newest, host]), "ComfyUI's packages")

    import small_world  # needs packages that are there only now

    packs = small_world.link_packs(host)
    names = small_world.provide_models(STATE / "models")
    usual = USUAL_PORT if arguments.serve and _setup.is_free(USUAL_PORT) else 0
    server = Server(host, models=STATE / "models", port=arguments.port or usual, only=packs)
    say(f"starting ComfyUI {_setup.version_of(host)} at {server.url}, log in {server.log}")
    with server:
        sheet = contact_sheet(server, names, arguments.seed)
        say(f"the pictures are at {sheet}")
        say(
            "These models know drawn robots and creatures only. With SDXL and the public encoder the graph is the same."
        )
        if arguments.serve:
            _serve(server, packs[0])
        else:
            say("With --serve, ComfyUI stays up with this graph ready to open.")
    return 0


def contact_sheet(server: Server, names: dict[str, str], seed: int) -> Path:
    """Subjects that no training saw, in scenes that the prompt names, beside the same graph without our nodes.

    Returns the sheet's file; the single pictures are in the server's output folder too.
    """
    import small_world
    from nested_core.files import whole

    figures = small_world.held_out_figures(seed, 2, "robot") + small_world.held_out_figures(seed, 2, "creature")
    robots, creatures = (small_world.write_portraits(part, server.input) for part in (figures[:2], figures[2:]))
    rows: list[tuple[list[Shown], Sequence[tuple[str, str]]]] = [
        ([robots[0]], SCENES), ([creatures[0]], SCENES), ([robots[1], creatures[1]], PAIR_SCENES),
    ]  # fmt: skip
    check_nodes(server, subject_graph(names, "", robots))

    def picture(subjects: list[Shown], scene: tuple[str, str], bound: bool) -> Image.Image:
        from PIL import Image

        prompt = small_world.prompt(subjects, *scene, bound)
        graph = subject_graph(names, prompt, subjects if bound else (), seed=seed, prefix="nested_attention/quickstart")
        say(prompt if bound else f"{prompt}, without the node")
        (file,) = saved_pictures(server, asyncio.run(run_graph(server, graph, quiet=True)))
        return Image.open(file).convert("RGB")

    drawn = []
    for subjects, scenes in rows:
        cells = [_open(server.input / subject.images[0], f"your {subject.class_word}") for subject in subjects]
        cells.append((picture(subjects, scenes[0], bound=False), f"{', '.join(scenes[0])}: without the node"))
        cells += [(picture(subjects, scene, bound=True), f"{', '.join(scene)}: with it") for scene in scenes]
        drawn.append(cells)
    path = server.output / SHEET
    with whole(path) as part:
        _lay_out(drawn).save(part, "PNG")
    return path


def _open(path: Path, title: str) -> tuple[Image.Image, str]:
    from PIL import Image

    return Image.open(path).convert("RGB"), title


def _lay_out(rows: Sequence[Sequence[tuple[Image.Image, str]]], scale: int = 2) -> Image.Image:
    """Rows of pictures with a title under each, on white."""
    from PIL import Image, ImageDraw, ImageFont

    side, gap, line = rows[0][0][0].width * scale, 12, 26
    columns = max(map(len, rows))
    page = Image.new("RGB", (columns * (side + gap) + gap, len(rows) * (side + gap + line) + gap), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for r, row in enumerate(rows):
        for c, (picture, title) in enumerate(row):
            x, y = gap + c * (side + gap), gap + r * (side + gap + line)
            page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y))
            draw.text((x + side / 2, y + side + 4), title, fill=(40, 40, 50), font=font, anchor="ma")
    return page


def _serve(server: Server, pack: str) -> None:
    """Says how to open the graph in the browser and waits until the server ends or Ctrl-C."""
    import small_world

    template, saved = "first_portrait", server.user / "default" / "workflows" / "small_world"
    saved.mkdir(parents=True, exist_ok=True)
    for path in sorted(WORKFLOWS.glob("*.json")):
        workflow = small_world.with_models(json.loads(path.read_text("utf-8")), server.input)
        (saved / path.name).write_text(json.dumps(workflow, indent=1), "utf-8")
    print(
        f"\nComfyUI is up at {server.url}\n"
        f"  with the small world's models: Workflows in the sidebar (key w), small_world/{template}, then Run\n"
        f"  as others get it, for your own models: {server.url}/?template={template}&source={pack}\n"
        f"    (the same by hand: Templates in the sidebar, Extensions, {pack}, {template})\n"
        "Ctrl-C stops it.",
        flush=True,
    )
    try:
        if server.process:
            server.process.wait()
    except KeyboardInterrupt:
        say("stopping")
        return
    server.check_alive("by itself")


if __name__ == "__main__":
    _setup.run_main(main)
