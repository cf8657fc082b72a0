"""Has the host's frontend lay out, save and run the templates; makes blueprints and previews."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from playwright.sync_api import Browser, Page

from .. import small_world
from ..browser import browser, frontend, lay_out, load_and_run, shoot
from ..environment import say
from ..graphs import picture_file
from ..hosts import newest_frontend
from ..paths import PACK, REPO, STATE
from ..server import Server
from .blueprints import ENCLOSED
from .template import Template
from .templates import TEMPLATES

WORKFLOWS = REPO / "workflows"
BLUEPRINTS = REPO / "subgraphs"
PICTURES = REPO / "docs" / "images" / "workflows"


def make(host: Path, names: Sequence[str]) -> None:
    """names: of templates, and "blueprints"."""
    packs = small_world.link_packs(host)
    small_world.provide_models(STATE / "models")
    for folder in (WORKFLOWS / "api", PICTURES, BLUEPRINTS):
        folder.mkdir(parents=True, exist_ok=True)
    templates = [name for name in names if name in TEMPLATES]
    with browser() as chromium:
        # What the oldest frontend saves, the newer ones read.
        with Server(host, STATE / "frontend", models=STATE / "models", only=packs) as server:
            page = frontend(chromium, server, 2600, 1300)
            if "blueprints" in names:
                for title in ENCLOSED:
                    _write(BLUEPRINTS / f"{title}.json", enclosed(page, title))
                    say(f"{title}: a blueprint")
            for name in templates:
                template = Template(name)
                TEMPLATES[name](template)
                graph, prompt = made(page, template)
                _write(WORKFLOWS / f"{name}.json", graph)
                _write(WORKFLOWS / "api" / f"{name}.json", prompt)
                say(f"{name}: {len(graph['nodes'])} nodes")
            page.close()
        if templates:
            _run_and_shoot(host, chromium, packs, templates)


def _run_and_shoot(host: Path, chromium: Browser, packs: Sequence[str], names: Sequence[str]) -> None:
    """Runs templates in the newest frontend: their pictures there, and what they make as their previews."""
    work = STATE / "frontend"
    shutil.rmtree(work / "output" / "nested_subjects", ignore_errors=True)  # perhaps of another encoder
    with Server(host, work, models=STATE / "models", only=packs, options=newest_frontend()) as server:
        page = frontend(chromium, server, 2600, 1300, {"Comfy.VueNodes.Enabled": True})
        for name in names:
            here = small_world.with_models(json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8")), server.input)
            entry = load_and_run(page, server, here, name)
            shoot(page, PICTURES / f"{name}.jpg")
            template = Template(name)
            TEMPLATES[name](template)
            made_by = str(template.keys.index(_SHOWN.get(name, "save")) + 1)
            result = picture_file(server, entry["outputs"][made_by]["images"][0])
            photos = [node["widgets_values"][0] for node in here["nodes"] if node["type"] == "LoadImage"]
            references = [] if name in _SHOWN else [server.input / photo for photo in photos]
            preview(result, references).save(WORKFLOWS / f"{name}.jpg", quality=88)
            say(f"{name}: run; see {PICTURES / f'{name}.jpg'}")


def enclosed(page: Page, title: str) -> dict[str, Any]:
    """A blueprint as the frontend saves it."""
    build, keys = ENCLOSED[title]
    template = Template(title)
    widgets = build(template)
    lay_out(page, template.built)
    chosen = {"keys": keys, "all": template.keys, "title": title, "widgets": widgets}
    page.evaluate("(chosen) => nested.enclose(chosen)", chosen)
    graph = page.evaluate("() => app.graph.serialize()")
    return _with_steady_ids(_clean(graph, title))


def _with_steady_ids(graph: dict[str, Any]) -> dict[str, Any]:
    """The same with identifiers that do not differ from one making to the next."""
    text = json.dumps(graph)
    found = dict.fromkeys(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", text))
    for number, identifier in enumerate(found):
        text = text.replace(identifier, str(uuid.uuid5(uuid.UUID(graph["id"]), str(number))))
    return dict(json.loads(text))


def made(page: Page, template: Template) -> tuple[dict[str, Any], dict[str, Any]]:
    """A template as the frontend saves it, and as its API takes it."""
    graph = lay_out(page, template.built)
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in graph["nodes"]:  # newer frontends say where a node is from, so that whoever lacks the pack finds it
        if str(node["id"]) in prompt:
            said = {key: node["properties"][key] for key in ("cnr_id", "ver") if key in node["properties"]}
            prompt[str(node["id"])]["_meta"] |= said
    return _clean(graph, template.name), prompt


def _clean(graph: dict[str, Any], name: str) -> dict[str, Any]:
    """Without what depends on the browser that saved it: its language, its view."""
    graph = _without_none(graph)
    for part in [graph, *graph.get("definitions", {}).get("subgraphs", [])]:
        for node in part["nodes"]:
            for slot in [*node.get("inputs", []), *node.get("outputs", [])]:
                slot.pop("localized_name", None)
            node.pop("showAdvanced", None)
            node["pos"], node["size"] = ([round(n) for n in node[key]] for key in ("pos", "size"))
    kept = dict(graph)
    kept["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{name}"))
    kept["extra"] = {}
    return kept


def _without_none(value: Any) -> Any:
    """What the frontend leaves undefined is no part of a file; a free input (link) and an empty widget are."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None or k in ("link", "links")}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def preview(result: Path, references: list[Path]) -> Image.Image:
    """A card of 768 x 768 for the template browser: what came out, and in its corner what went in."""
    card = ImageOps.pad(Image.open(result).convert("RGB"), (768, 768), Image.Resampling.LANCZOS, color=(22, 24, 29))
    for number, reference in enumerate(references):
        inset = ImageOps.fit(Image.open(reference).convert("RGB"), (150, 150), Image.Resampling.LANCZOS)
        card.paste(ImageOps.expand(inset, 5, (245, 245, 245)), (16 + 172 * number, 768 - 160 - 16))
    return card


#: Whose picture is the preview where it is not the saved one; these say by themselves what went in.
_SHOWN = {
    "who_is_where": "maps_seen",
    "save_subject": "seen",
    "strength_identity_grid": "save",
    "check_encoder": "chart",
}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
