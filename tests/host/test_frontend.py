"""workflows/ and subgraphs/ in the host's real frontend, in a browser, on the small world's models."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kit import browser, small_world
from kit.graphs import picture_file
from kit.hosts import NEWEST, newest_frontend, version_of
from kit.paths import REPO
from kit.server import Server
from kit.workflows.templates import TEMPLATES
from nested_core import health

HOST = Path(os.environ["COMFYUI_PATH"]).resolve()
pytestmark = pytest.mark.skipif(version_of(HOST) != NEWEST, reason="the frontend is that of the newest ComfyUI")
# What it loads is what another one saves.
NAMES = sorted((path.stem for path in (REPO / "workflows").glob("*.json")), key=lambda name: name != "save_subject")
BLUEPRINTS = sorted(path.stem for path in (REPO / "subgraphs").glob("*.json"))

#: What people look at: nodes on the canvas in the frontend that the host asks for, and the newer nodes in the newest.
NEWER_NODES = {"pinned": False, "newest": True}
# What a frontend asks of the host is the same in both.
in_the_pinned = pytest.mark.parametrize("view", ["pinned"], indirect=True)


def workflow(name):
    return json.loads((REPO / "workflows" / f"{name}.json").read_text("utf-8"))


def in_a_few_steps(graph):
    # What Check Encoder finds is looked at in test_check.
    quicker = {"KSampler": ("steps", 6), "NestedCheckEncoder": ("size", 64)}
    for node in graph["nodes"]:
        if node["type"] in quicker:
            name, value = quicker[node["type"]]
            node["widgets_values"][small_world.widget_place(node, name)] = value
    return graph


@pytest.fixture(scope="module", params=NEWER_NODES)
def view(request):
    """A name of `NEWER_NODES`: which frontend it is."""
    return request.param


@pytest.fixture(scope="module")
def server(tmp_path_factory, view):
    work, models = tmp_path_factory.mktemp("frontend"), tmp_path_factory.mktemp("models")
    (work / "input").mkdir()
    # The host brings a picture of this name, which the workflows show until there is another.
    Image.radial_gradient("L").save(work / "input" / "example.png")
    small_world.provide_models(models)
    options = newest_frontend() if view == "newest" else []
    with Server(HOST, work, models=models, only=small_world.link_packs(HOST), options=options) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(chromium, server, view):
    page = browser.frontend(chromium, server, 1800, 1000, {"Comfy.VueNodes.Enabled": NEWER_NODES[view]})
    yield page
    page.close()


def content(page, graph=None):
    """What a graph is made of; of the one on the canvas without one."""
    return page.evaluate("(graph) => nested.content(graph ?? app.graph.serialize())", graph)


def missing(page):
    return page.evaluate("() => nested.missing()")


def in_error(page):
    return page.evaluate("() => nested.inError()")


def pictures(server, entry):
    """The pictures of a run, as (H, W, 3) from 0 to 1."""
    found = []
    for output in entry["outputs"].values():
        for image in output.get("images", []):
            picture = Image.open(picture_file(server, image)).convert("RGB")
            found.append(np.asarray(picture, dtype=np.float32) / 255)
    return found


def test_what_a_graph_needs_of_the_host_is_seen(page):
    """So that the tests below can fail: another node, another widget's value, a cut link."""

    def applied(graph):
        return next(node for node in graph["nodes"] if node["type"] == "NestedApplySubject")

    graph = workflow("first_portrait")
    whole = content(page, graph)
    for change in (
        lambda g: applied(g).update(type="NestedNotThere"),
        lambda g: applied(g)["widgets_values"].__setitem__(0, 0.5),
        lambda g: g["links"].pop(),
        lambda g: g["nodes"].pop(),
    ):
        changed = copy.deepcopy(graph)
        change(changed)
        assert content(page, changed) != whole
    strange = copy.deepcopy(graph)
    applied(strange)["type"] = "NestedNotThere"
    browser.load(page, strange, "strange")
    assert missing(page) == ["NestedNotThere"]
    assert {node.split()[1] for node in in_error(page)} >= {"CheckpointLoaderSimple"}, "files that are not there"


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens_and_stays_as_it_was(page, view, name):
    """And its twin for scripts is what the frontend would send; and no node lies on another."""
    shared = workflow(name)
    browser.load(page, shared, name)
    assert missing(page) == []
    assert content(page) == content(page, shared), "opened and saved"

    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    twin = json.loads((REPO / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
    if view == "pinned":  # which does not say yet where a node is from
        twin = {number: {**node, "_meta": {"title": node["_meta"]["title"]}} for number, node in twin.items()}
    assert sent == twin

    page.evaluate("() => nested.fit()")
    page.wait_for_timeout(700)
    elements = page.locator("[data-node-id]").count()
    assert elements == (len(shared["nodes"]) if NEWER_NODES[view] else 0), "drawn as they should be"
    assert page.evaluate("() => nested.overlapping()") == []

    page.evaluate("async () => { await app.loadGraphData(app.graph.serialize()) }")
    assert content(page) == content(page, shared), "saved, opened and saved again"


@in_the_pinned
@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs(page, server, name):
    here = in_a_few_steps(small_world.with_models(workflow(name), server.input))
    browser.load(page, here, name)
    assert in_error(page) == []
    entry = browser.queue(page, server)
    made = pictures(server, entry)
    assert made and all(picture.std() > 0.05 for picture in made), "pictures, none of them of one colour"
    assert in_error(page) == []
    assert content(page) == content(page, here), "a run changes nothing"


def test_every_workflow_has_a_twin_and_no_other_is_there():
    assert sorted(path.stem for path in (REPO / "workflows" / "api").glob("*.json")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_models_can_be_downloaded_from_where_they_are_missing(name):
    """Each file that a loader names, with its folder and address, as the frontend's missing-models list wants it."""
    for node in workflow(name)["nodes"]:
        files = [value for value in node.get("widgets_values") or [] if str(value).endswith(".safetensors")]
        if node["type"] == "NestedLoadSubject":
            assert not node["properties"].get("models"), "that file is the user's own"
            continue
        offered = {model["name"]: model for model in node["properties"].get("models", [])}
        assert sorted(files) == sorted(offered)
        for model in offered.values():
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(".safetensors")
            assert model["directory"] in {
                "checkpoints", "nested_attention", "clip_vision", "controlnet", "detection", "loras",
            }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_notes_are_short_and_in_the_largest_letters(name):
    """A template opens whole, at half its size or less: of a note's letters only those of headings can be read then."""
    notes = [node["widgets_values"][0] for node in workflow(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) > 1
    for lines in (note.split("\n") for note in notes):
        assert len(lines) <= 7 and all(line.startswith("# ") for line in lines)
        assert max(len(re.sub(r"\]\(.*?\)", "", line)) for line in lines) < 90


def test_the_missing_models_are_offered(page, server):
    browser.load(page, workflow("first_portrait"), "first_portrait")
    page.get_by_text("View details").click()
    for name in (
        "sd_xl_base_1.0.safetensors",
        "CLIP-ViT-H-14",
        "NestedAttentionEncoder.safetensors",
        "mediapipe_face_fp32",
    ):
        page.get_by_text(name).first.wait_for()
    assert page.get_by_role("button", name="Download").count() >= 4


@in_the_pinned
def test_the_host_lists_the_templates_with_their_pictures(server):
    listed = server.request("/workflow_templates")[small_world.link_packs(HOST)[0]]
    assert listed == list(TEMPLATES)
    for name in NAMES:
        card = Image.open(REPO / "workflows" / f"{name}.jpg")
        assert card.size == (768, 768)
        assert np.asarray(card, dtype=np.float32).std() > 10


def test_the_template_browser_begins_with_the_first_portrait(page):
    """The host lists files as its file system does."""
    page.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("comfyui-nested-att").first.click()
    dialog.get_by_text("first_portrait", exact=True).wait_for()
    shown = [line for line in dialog.inner_text().split("\n") if line in TEMPLATES]
    page.keyboard.press("Escape")
    assert shown[:6] == list(TEMPLATES)[:6]


@pytest.mark.parametrize("title", BLUEPRINTS)
def test_a_blueprint_opens_as_one_node_and_runs(page, server, title):
    known = {entry["name"] for entry in server.request("/global_subgraphs").values()}
    assert title in known
    blueprint = json.loads((REPO / "subgraphs" / f"{title}.json").read_text("utf-8"))
    small_world.with_models(blueprint, server.input)
    browser.load(page, blueprint, title)
    assert missing(page) == []
    # A graph around it, as a user would wire it.
    page.evaluate(
        """([checkpoint, images, prompt]) => {
          const [subject] = app.graph._nodes, { link } = nested
          const make = (type, widgets) => nested.make({ type, widgets })
          const loader = make('CheckpointLoaderSimple', { ckpt_name: checkpoint })
          const photos = subject.inputs.filter((i) => i.type === 'IMAGE').map((i) => i.name)
          photos.forEach((name, i) => link(make('LoadImage', { image: images[i] }), 'IMAGE', subject, name))
          const positive = make('CLIPTextEncode', { text: prompt }), negative = make('CLIPTextEncode', { text: '' })
          const sampler = make('KSampler', { steps: 4, cfg: 4, sampler_name: 'euler', scheduler: 'normal' })
          const decode = make('VAEDecode', {}), save = make('SaveImage', {})
          link(loader, 'MODEL', subject, 'model'); link(loader, 'CLIP', subject, 'clip')
          link(subject, 'clip', positive, 'clip'); link(subject, 'clip', negative, 'clip')
          link(subject, 'model', sampler, 'model'); link(positive, 'CONDITIONING', sampler, 'positive')
          link(negative, 'CONDITIONING', sampler, 'negative')
          link(make('EmptyLatentImage', { width: 128, height: 128 }), 'LATENT', sampler, 'latent_image')
          link(sampler, 'LATENT', decode, 'samples'); link(loader, 'VAE', decode, 'vae')
          link(decode, 'IMAGE', save, 'images')
        }""",
        [small_world.CHECKPOINT, ["example.png", "example.png"], _prompt_for(title)],
    )
    assert pictures(server, browser.queue(page, server))


def _prompt_for(title):
    return "a <anna> and a <ben> in the snow" if "Two" in title else "a <person> in the snow"


@in_the_pinned
def test_controlnet_and_lora_change_the_picture(page, server):
    """So does each of them alone; and the host finds a place for every weight of theirs."""

    def made(controlled, styled):
        graph = in_a_few_steps(small_world.with_models(workflow("controlnet_and_lora"), server.input))
        for node in graph["nodes"]:
            if node["type"] == "ControlNetApplyAdvanced":
                node["widgets_values"][0] = float(controlled)
            elif node["type"] == "LoraLoader":
                node["widgets_values"][1] = float(styled)
        return pictures(server, browser.load_and_run(page, server, graph, "controlnet_and_lora"))[-1]

    plain, controlled, styled = made(False, False), made(True, False), made(False, True)
    assert abs(controlled - plain).mean() > 0.02
    assert styled.mean() < plain.mean() - 0.1, "at night"
    log = "\n".join(server.log_lines())
    assert "lora key not loaded" not in log and "missing controlnet keys" not in log


def test_words_in_angle_brackets_are_shown(page, server):
    """And stay: of what a frontend shows while a node works, older ones make HTML, and newer ones take it away."""
    graph = in_a_few_steps(small_world.with_models(workflow("first_portrait"), server.input))
    browser.load(page, graph, "binding")
    page.evaluate(
        """() => {
          const shown = LiteGraph.createNode('NestedShowBinding')
          app.graph.add(shown)
          app.graph._nodes.find((n) => n.title === 'Prompt with <person>').connect(0, shown, 0)
        }"""
    )
    assert in_error(page) == []
    entry = browser.queue(page, server)
    assert all(picture.std() > 0.05 for picture in pictures(server, entry))
    assert in_error(page) == []
    page.evaluate("() => nested.show(['NestedShowBinding'])")
    shown = page.get_by_text("[<person>: robot]").first
    shown.wait_for()
    page.wait_for_timeout(1500)
    assert shown.is_visible()
    said = {text for output in entry["outputs"].values() for text in output.get("text", [])}
    assert shown.evaluate("(element) => element.textContent") in said


# --- help ------------------------------------------------------------------------------------------------------------


def test_the_health_check_opens_from_the_menu(page):
    said = page.evaluate(
        """async () => {
          const open = window.open, opened = []
          window.open = (address) => { opened.push(address) }
          await app.extensionManager.command.execute('NestedAttention.HealthCheck')
          window.open = open
          return await (await fetch(opened[0])).text()
        }"""
    )
    assert said.startswith(health.TITLE)


def test_the_help_panel_shows_a_nodes_page_with_its_picture(page):
    browser.load(page, workflow("first_portrait"), "first_portrait")
    browser.open_help(page, "NestedApplySubject")
    page.get_by_text("Common mistakes").wait_for()
    picture = page.locator("img[src*='NestedApplySubject']").first
    picture.wait_for()
    page.wait_for_timeout(500)
    assert picture.evaluate("(image) => image.complete && image.naturalWidth") > 100
