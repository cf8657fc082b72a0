"""A real server, driven through its HTTP API as the quickstart does it: the main job, re-queues, errors."""

from __future__ import annotations

import asyncio
import copy
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from kit import graphs, random_models
from kit.environment import SetupError
from kit.hosts import link_pack
from kit.paths import STATE
from kit.server import Server
from nested_core import health

HOST = Path(os.environ["COMFYUI_PATH"]).resolve()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def names(work):
    # Before the server starts: it is told the model folders that are there.
    made = random_models.provide_models(STATE / "models", work / "input")
    # As a user's own picture: the graph gets it by its name in the input folder.
    shutil.copy(work / "input" / made["image"], work / "input" / "me.png")
    return {**made, "image": "me.png"}


@pytest.fixture(scope="module")
def server(work, names):
    pack = link_pack(HOST)
    # With models of full size: not two of them at a time, where the tests of several hosts run side by side.
    with FileLock(STATE / "server.lock"):
        with Server(HOST, work, models=STATE / "models", only=[pack]) as running:
            yield running


def portrait(names, prompt):
    person = graphs.Shown((names["image"],), "<person>", "person")
    return graphs.subject_graph(names, prompt, [person], negative="bad anatomy", size=128, steps=2)


@pytest.fixture
def graph(names):
    return portrait(names, "a photo of <person> in a garden")


def run(server, graph):
    return asyncio.run(graphs.run_graph(server, graph))


def test_object_info_has_our_nodes_with_tooltips(server, pack):
    info = server.request("/object_info", timeout=120)
    ours = {name for name in info if name.startswith("Nested")}
    assert ours == set(pack.nodes)
    for name in ours:
        for section in ("required", "optional"):
            for input_name, spec in info[name]["input"].get(section, {}).items():
                assert spec[1].get("tooltip"), f"{name}.{input_name} has no tooltip"


def test_translations_are_served(server):
    served = server.request("/i18n")
    names = {language: served[language]["nodeDefs"]["NestedApplySubject"]["display_name"] for language in served}
    assert names["en"] == "Apply Subject"
    assert len({names[language] for language in ("de", "en", "ja", "ko", "zh")}) == 5


def test_the_main_job_and_a_requeue_with_another_seed(server, graph):
    first = graphs.saved_pictures(server, run(server, graph))
    begun = len(server.log_lines())
    again = copy.deepcopy(graph)
    again["sampler"]["inputs"]["seed"] += 1
    second = graphs.saved_pictures(server, run(server, again))
    assert first[0].read_bytes() != second[0].read_bytes()
    # Nothing but the sampler and what follows ran: no file was read, nothing encoded again.
    history = server.request("/history")
    messages = list(history.values())[-1]["status"]["messages"]
    cached = next(set(data["nodes"]) for kind, data in messages if kind == "execution_cached")
    assert set(graph) - cached <= {"sampler", "decode", "save"}
    assert not [line for line in server.log_lines()[begun:] if "nested encoder" in line.lower()]


def test_the_health_check_tells_of_the_last_run(server, graph, names, capsys):
    run(server, graph)
    capsys.readouterr()
    assert health.main([server.url]) == 0
    said = capsys.readouterr().out
    assert said.startswith(health.TITLE) and "ended; 1 of 1 subjects acted" in said and "bound in positive rows" in said
    for private in ("<person>", names["image"], "garden", str(HOST), str(server.work), str(Path.home())):
        assert private not in said


def test_a_prompt_that_forgets_the_subject_ends_in_a_message(server, names):
    graph = portrait(names, "a photo of a garden")
    with pytest.raises(SetupError, match=r"KSampler \(sampler\) failed") as error:
        run(server, graph)
    assert "No positive prompt mentions <person>. Write <person> in the prompt" in str(error.value)
    # And the server goes on as before.
    run(server, portrait(names, "a photo of <person> in a garden"))


def test_a_missing_encoder_is_refused_before_anything_runs(server, graph):
    graph["encoder"]["inputs"]["encoder_name"] = "not_there.safetensors"
    with pytest.raises(SetupError, match="No encoder named 'not_there.safetensors'") as error:
        run(server, graph)
    assert "random_narrow_nested_encoder.safetensors" in str(error.value)
