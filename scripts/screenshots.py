"""Takes the pictures of docs/images/frontend and of the help pages (web/docs/images) in the host's frontend.

    python scripts/screenshots.py

The graphs are those of workflows/, run on the small world's models. Look at what it made.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import make_workflows
from make_workflows import CLIP, MODEL, Template

import _setup
from _setup import REPO, STATE, Server, say

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
    "NestedCropSubject": ("crop", ["Crop Subject", "What was cut out", "Picture, with the place painted as its mask"]),
    "NestedAdjustSubject": ("adjust", ["Apply Subject", "Adjust Subject"]),
    "NestedShowBinding": ("binding", ["Prompt with <person>", "Show Binding"]),
}


def encode(t: Template) -> None:
    t.column(300)
    t.photo("photo", "Photo of your subject")
    t.column(330)
    t.node("encoder", "NestedEncoderLoader", widgets={"encoder_name": make_workflows.ENCODER})
    t.node("tower", "CLIPVisionLoader", widgets={"clip_name": make_workflows.VISION})
    t.encode("subject", ("photo", "IMAGE"), "<person>", "person")
    t.column(260)
    t.node("seen", "PreviewImage", "What the encoder sees", height=290, images=("subject", "seen"))


def crop(t: Template) -> None:
    t.column(300)
    t.photo("photo", "Picture, with the place painted as its mask")
    t.column(300)
    t.node("crop", "NestedCropSubject", image=("photo", "IMAGE"), mask=("photo", "MASK"), widgets={"margin": 0.1})
    t.column(260)
    t.node("cropped", "PreviewImage", "What was cut out", height=290, images=("crop", "image"))


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
        ["NestedAttentionMaps", "NestedExplain"],
    ):
        t.column(300)
        for kind in column:
            files = {"NestedEncoderLoader": {"encoder_name": make_workflows.ENCODER}}
            t.node(kind, kind, widgets=files.get(kind))


_OWN = {f.__name__: f for f in (encode, crop, adjust, binding)}


def help_pictures(page: Any, server: Server) -> None:
    """A picture for each help page, from one run of each graph."""
    from _browser import load, queue, shoot

    import small_world

    HELP.mkdir(exist_ok=True)
    for name in dict.fromkeys(name for name, _ in SHOWN.values()):
        if name in _OWN:
            template = Template(name)
            _OWN[name](template)
            graph, _ = make_workflows.made(page, template)
        else:
            graph = json.loads((make_workflows.WORKFLOWS / f"{name}.json").read_text("utf-8"))
        load(page, small_world.with_models(graph, server.input), name)
        queue(page, server)
        page.wait_for_timeout(1500)
        for node, (source, shown) in SHOWN.items():
            if source == name:
                shoot(page, HELP / f"{node}.jpg", shown, margin=14)
                say(f"{node}: {HELP / node}.jpg")


def main() -> int:
    host = _setup.prepared_host()

    from _browser import browser, frontend, load, open_help, queue, shoot

    import small_world

    FRONTEND.mkdir(parents=True, exist_ok=True)
    packs = small_world.link_packs(host)
    small_world.provide_models(STATE / "models")
    first = json.loads((make_workflows.WORKFLOWS / "first_portrait.json").read_text("utf-8"))
    with browser() as chromium:
        with Server(host, STATE / "frontend", models=STATE / "models", only=packs) as server:
            page = frontend(chromium, server, 2600, 1500)
            help_pictures(page, server)
            template = Template("nodes")
            all_nodes(template)
            page.evaluate("(template) => nested.build(template)", template.built)
            page.wait_for_timeout(500)
            shoot(page, REPO / "docs" / "images" / "nodes.png")
            load(page, small_world.with_models(json.loads(json.dumps(first)), server.input), "first_portrait")
            queue(page, server)
            page.wait_for_timeout(1500)
            shoot(page, REPO / "docs" / "images" / "first_portrait_graph.png")
            page.close()

            page = frontend(chromium, server, 2600, 1500, {"Comfy.VueNodes.Enabled": True})
            load(page, small_world.with_models(json.loads(json.dumps(first)), server.input), "first_portrait")
            queue(page, server)
            page.wait_for_timeout(1500)
            shoot(page, FRONTEND / "first_portrait_vue_nodes.jpg")
            page.close()

        # As a stranger has it: the pack, and none of the files yet.
        with tempfile.TemporaryDirectory() as empty:
            (Path(empty) / "models" / "checkpoints").mkdir(parents=True)
            work = Path(empty) / "work"
            (work / "input").mkdir(parents=True)
            shutil.copy(host / "input" / "example.png", work / "input")
            with Server(host, work, models=Path(empty) / "models", only=packs[:1]) as server:
                page = frontend(chromium, server, 1900, 1080)
                page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
                page.wait_for_timeout(4000)
                page.screenshot(path=FRONTEND / "templates.jpg", type="jpeg", quality=80)
                page.keyboard.press("Escape")
                load(page, first, "first_portrait")
                page.evaluate("() => { app.canvas.ds.scale = 0.75; app.canvas.ds.offset = [110, 370] }")
                page.get_by_text("View details").click()
                page.wait_for_timeout(1500)
                page.screenshot(path=FRONTEND / "missing_models.jpg", type="jpeg", quality=80)
                open_help(page, "NestedApplySubject")
                page.wait_for_timeout(1500)
                page.screenshot(path=FRONTEND / "help.jpg", type="jpeg", quality=80)
    return 0


if __name__ == "__main__":
    _setup.run_main(main)
