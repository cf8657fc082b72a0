"""What the quickstart shows: a sheet of pictures from a running ComfyUI, which then stays up if asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from demo import data
from demo.world import Look
from nested_core.files import whole

from . import first_look, small_world
from .environment import say
from .graphs import Shown, check_nodes, run_graph, saved_pictures, subject_graph
from .hosts import version_of
from .paths import REPO, STATE
from .server import USUAL_PORT, Server, is_free

SHEET = "contact_sheet.png"
#: What prompts say of looks: short is easy to read.
NAMED = ("expression", "pose")
#: What a photo shows besides the figure: nothing that a prompt here asks for.
_PHOTO = data.Entry([], [Look("sad", "plush", "standing", "front", "nothing")], "desert", "comic")
#: What the prompts of a row ask for: looks of each subject, scene, style.
Asked = tuple[tuple[Look, ...], str, str]
_ONE: tuple[Asked, ...] = (
    ((Look("smiling", "plush", "waving", "front", "balloon"),), "forest", "flat"),
    ((Look("angry", "metal", "jumping", "left", "flag"),), "space", "comic"),
    ((Look("surprised", "wooden", "sitting", "right", "umbrella"),), "beach", "watercolour"),
    ((Look("surprised", "glass", "dancing", "front", "lantern"),), "city", "neon"),
    ((Look("smiling", "wooden", "standing", "right", "nothing"),), "room", "pencil"),
)
_CALM = Look("smiling", "plush", "standing", "front", "nothing")
_TWO: tuple[Asked, ...] = (
    ((_CALM, Look("surprised", "metal", "waving", "front", "flag")), "city", "flat"),
    ((Look("angry", "wooden", "standing", "right", "nothing"), Look("sad", "plush", "sitting", "left", "balloon")),
     "snow", "comic"),
    ((Look("smiling", "metal", "dancing", "front", "umbrella"), _CALM), "sea", "pencil"),
)  # fmt: skip


def show(host: Path, serve: bool, port: int, seed: int) -> None:
    """Makes the sheet in that ComfyUI; with `serve`, leaves it up until it ends or Ctrl-C."""
    packs = small_world.link_packs(host)
    names = small_world.provide_models(STATE / "models")
    usual = USUAL_PORT if serve and is_free(USUAL_PORT) else 0
    server = Server(host, models=STATE / "models", port=port or usual, only=packs)
    say(f"starting ComfyUI {version_of(host)} at {server.url}, log in {server.log}")
    with server:
        sheet = contact_sheet(server, names, seed)
        say(f"the pictures are at {sheet}")
        say(
            "These models know drawn robots and creatures only. With SDXL and the public encoder the graph is the same."
        )
        if serve:
            _serve(server, packs[0])
        else:
            say("With --serve, ComfyUI stays up with this graph ready to open.")


def contact_sheet(server: Server, names: dict[str, str], seed: int) -> Path:
    """Subjects that no training saw, in scenes that the prompt names, beside the same graph without our nodes.

    Returns the sheet's file. Beside it are the single pictures, and the README's figure, which is made of some of them.
    """
    figures = small_world.held_out_figures(seed, 2, "robot") + small_world.held_out_figures(seed, 2, "creature")
    photos_of = [replace(_PHOTO, figures=[figure]) for figure in figures]
    shown = small_world.write_portraits(figures, server.input, 1, photos_of)
    robots, creatures = shown[:2], shown[2:]
    rows = [([robots[0]], _ONE), ([creatures[0]], _ONE), ([robots[1], creatures[1]], _TWO)]
    check_nodes(server, subject_graph(names, "", robots))

    def picture(subjects: list[Shown], asked: Asked, bound: bool) -> Image.Image:
        prompt = small_world.prompt(subjects, asked[1], asked[2], asked[0], bound, NAMED)
        graph = subject_graph(names, prompt, subjects if bound else (), seed=seed, prefix="nested_attention/quickstart")
        say(prompt if bound else f"{prompt}, without the node")
        (file,) = saved_pictures(server, asyncio.run(run_graph(server, graph, quiet=True)))
        return Image.open(file).convert("RGB")

    drawn, looks = [], []
    for subjects, every in rows:
        photos = [_open(server.input / subject.images[0], f"your {subject.class_word}") for subject in subjects]
        made = {bound: [picture(subjects, asked, bound) for asked in every] for bound in (True, False)}
        for bound, title in ((True, "with the subject"), (False, "without the node")):
            cells = [
                (image, f"{asked[1]}, {asked[2]}: {title}") for image, asked in zip(made[bound], every, strict=True)
            ]
            drawn.append([*photos, *cells])
        _, scene, style = every[0]
        prompt = small_world.prompt(subjects, scene, style, every[0][0], named=NAMED)
        images = [image for image, _ in photos]
        looks.append(first_look.Row(subjects, images, prompt, made[True][0], made[False][0]))
    path = server.output / SHEET
    for file, page in ((path, _lay_out(drawn)), (path.with_name(first_look.FILE), first_look.first_look(looks[::2]))):
        with whole(file) as part:
            page.save(part, "PNG")
    return path


def _open(path: Path, title: str) -> tuple[Image.Image, str]:
    return Image.open(path).convert("RGB"), title


def _lay_out(rows: Sequence[Sequence[tuple[Image.Image, str]]], scale: int = 2) -> Image.Image:
    """Rows of pictures with a title under each, on white."""
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
    template, saved = "first_portrait", server.user / "default" / "workflows" / "small_world"
    saved.mkdir(parents=True, exist_ok=True)
    for path in sorted((REPO / "workflows").glob("*.json")):
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
