"""The pictures of docs/images/frontend and of the help pages, taken in the host's frontend."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page

from demo import shipped

from . import small_world
from .browser import browser, frontend, lay_out, load, load_and_run, open_help, shoot
from .environment import say
from .hosts import newest_frontend
from .paths import REPO, STATE
from .server import Server
from .upright import upright_faces
from .workflows.making import WORKFLOWS, made
from .workflows.template import CLIP, ENCODER, MODEL, VISION, Template

HELP = REPO / "web" / "docs" / "images"
FRONTEND = REPO / "docs" / "images" / "frontend"

#: Help page: (workflow or graph of this file, titles or types of the nodes in the picture).
SHOWN: dict[str, tuple[str, list[str]]] = {
    "NestedEncoderLoader": ("first_portrait", ["Load Checkpoint", "Load Nested Encoder", "Load CLIP Vision"]),
    "NestedEncodeSubject": ("encode", ["Photo of your subject", "Encode Subject", "What the encoder sees"]),
    "NestedApplySubject": ("two_subjects", ["Apply <anna>", "Apply <ben>"]),
    "NestedMergeSubjects": ("several_views", ["Encode view 1", "Encode view 2", "Encode view 3", "Merge Subjects"]),
    "NestedSaveSubject": ("save_subject", ["Encode Subject", "Save Subject"]),
    "NestedLoadSubject": ("reuse_subject", ["Load Nested Encoder", "Load Subject", "Apply Subject"]),
    "NestedSeparateSubjects": ("regional_masks", ["Apply <anna>", "Apply <ben>", "Separate Subjects"]),
    "NestedRecordAttention": ("who_is_where", ["Apply <ben>", "Record Attention"]),
    "NestedAttentionMaps": ("who_is_where", ["Attention Maps", "Where each word was looked at"]),
    "NestedExplain": ("who_is_where", ["Explain Point", "What the subject is there"]),
    "NestedGridValues": ("strength_identity_grid", ["Grid Values", "Apply Subject (Advanced)"]),
    "NestedApplySubjectAdvanced": ("strength_identity_grid", ["Apply Subject (Advanced)"]),
    "NestedPictureGrid": ("strength_identity_grid", ["Picture Grid", "Save Image"]),
    "NestedAdjustSubject": ("adjust", ["Apply Subject", "Adjust Subject"]),
    "NestedShowBinding": ("binding", ["Prompt with <person>", "Show Binding"]),
    "NestedCheckEncoder": ("check_encoder", ["Check Encoder", "How far above the best each setting is"]),
}


def encode(t: Template) -> None:
    t.column(300)
    t.photo("photo", "Photo of your subject")
    t.column(330)
    t.node("encoder", "NestedEncoderLoader", widgets={"encoder_name": ENCODER})
    t.node("tower", "CLIPVisionLoader", widgets={"clip_name": VISION})
    t.encode("subject", ("photo", "IMAGE"), "<person>", "person")
    t.column(260)
    t.node("seen", "PreviewImage", "What the encoder sees", height=290, images=("subject", "seen"))


def _applied(t: Template) -> None:
    t.column(330)
    t.loaders()
    t.photo("photo", "Photo of your subject")
    t.column(330)
    t.encode("subject", ("photo", "IMAGE"), "<person>", "person")
    t.apply("apply", ("subject", "subject"), MODEL, CLIP)


def adjust(t: Template) -> None:
    _applied(t)
    t.node("adjust", "NestedAdjustSubject", model=("apply", "model"), widgets={"schedule": "ease out"})
    t.column(330)
    t.prompts(("apply", "clip"), "a photo of <person> in a garden, soft light", "Prompt with <person>")
    t.size()
    t.column(300)
    t.sampler(("adjust", "model"))
    t.decode()
    t.save()


def binding(t: Template) -> None:
    _applied(t)
    t.column(360)
    t.prompts(("apply", "clip"), "a photo of <person> in a garden, soft light", "Prompt with <person>")
    t.column(360)
    t.node("binding", "NestedShowBinding", height=190, conditioning=("positive", "CONDITIONING"))


def all_nodes(t: Template) -> None:
    for column in (
        ["NestedEncoderLoader", "NestedCropSubject", "NestedMergeSubjects", "NestedSaveSubject"],
        ["NestedEncodeSubject", "NestedLoadSubject", "NestedSeparateSubjects", "NestedPictureGrid"],
        ["NestedApplySubject", "NestedAdjustSubject", "NestedGridValues"],
        ["NestedApplySubjectAdvanced", "NestedRecordAttention", "NestedShowBinding"],
        ["NestedAttentionMaps", "NestedExplain", "NestedCheckEncoder"],
    ):
        t.column(300)
        for kind in column:
            files = {"NestedEncoderLoader": {"encoder_name": shipped.ENCODER}}  # one that is there
            t.node(kind, kind, widgets=files.get(kind))


_OWN = {f.__name__: f for f in (encode, adjust, binding)}


def help_pictures(page: Page, server: Server) -> None:
    """A picture for each help page, from one run of each graph."""
    HELP.mkdir(exist_ok=True)
    for name in dict.fromkeys(name for name, _ in SHOWN.values()):
        if name in _OWN:
            template = Template(name)
            _OWN[name](template)
            graph, _ = made(page, template)
        else:
            graph = json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))
        load_and_run(page, server, small_world.with_models(graph, server.input), name)
        for node, (source, shown) in SHOWN.items():
            if source == name:
                shoot(page, HELP / f"{node}.jpg", shown, margin=14)
                say(f"{node}: {HELP / node}.jpg")


def take(host: Path) -> None:
    """All of them, in the newest frontend's newer nodes."""
    FRONTEND.mkdir(parents=True, exist_ok=True)
    for picture in (HELP / "NestedCropSubject.jpg", REPO / "docs" / "images" / "upright_faces.jpg"):
        upright_faces(picture)
    packs = small_world.link_packs(host)
    small_world.provide_models(STATE / "models")
    first = json.loads((WORKFLOWS / "first_portrait.json").read_text("utf-8"))
    newest, newer_nodes = newest_frontend(), {"Comfy.VueNodes.Enabled": True}
    with browser() as chromium:
        with Server(host, STATE / "frontend", models=STATE / "models", only=packs, options=newest) as server:
            page = frontend(chromium, server, 2600, 1500, newer_nodes)
            help_pictures(page, server)
            template = Template("nodes")
            all_nodes(template)
            lay_out(page, template.built)
            shoot(page, REPO / "docs" / "images" / "nodes.png")
            here = small_world.with_models(copy.deepcopy(first), server.input)
            load_and_run(page, server, here, "first_portrait")
            shoot(page, REPO / "docs" / "images" / "first_portrait_graph.png")
            page.close()

            page = frontend(chromium, server, 1500, 900, newer_nodes)
            load(page, here, "first_portrait")
            page.evaluate("() => nested.show(['Apply Subject'])")
            open_help(page, "NestedApplySubject")
            page.wait_for_timeout(1500)
            page.screenshot(path=FRONTEND / "help.jpg", type="jpeg", quality=82)
            page.close()

        # As a stranger has it: the pack, and none of the files yet.
        with tempfile.TemporaryDirectory() as empty:
            (Path(empty) / "models" / "checkpoints").mkdir(parents=True)
            work = Path(empty) / "work"
            (work / "input").mkdir(parents=True)
            shutil.copy(host / "input" / "example.png", work / "input")
            with Server(host, work, models=Path(empty) / "models", only=packs[:1], options=newest) as server:
                page = frontend(chromium, server, 1500, 1000, newer_nodes)
                _templates(page)
                load(page, first, "first_portrait")
                page.get_by_text("View details").click()
                page.wait_for_timeout(1500)
                # The list alone: on the canvas beside it every loader is framed, and so it should be.
                box: Any = page.get_by_text("Workflow Overview").first.bounding_box()
                clip: Any = {"x": box["x"] - 18, "y": box["y"] - 22, "width": 1518 - box["x"], "height": 640}
                page.screenshot(path=FRONTEND / "missing_models.jpg", type="jpeg", quality=85, clip=clip)


def _templates(page: Page) -> None:
    """The template browser, the pack's templates by name."""
    page.evaluate("() => { app.graph.clear(); app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("comfyui-nested-att").click()
    page.wait_for_timeout(4000)
    dialog.screenshot(path=FRONTEND / "templates.jpg", type="jpeg", quality=82)
    page.keyboard.press("Escape")
