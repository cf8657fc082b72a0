"""The health check in the real host: what it says of the last run, and what it leaves out."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import comfy.sd
import folder_paths
import pytest

PROMPT = "a portrait of <zoe> beside a lighthouse"


@pytest.fixture(scope="module")
def health(pack):
    return importlib.import_module(f"{pack.layer.__package__}.health")


@pytest.fixture
def scene(sd15):
    model, clip = sd15.apply(sd15.subject("<zoe>", "dancer"), strength=0.75, end_percent=0.9)
    return model, sd15.encode(clip, PROMPT), sd15.encode(clip, "blurry")


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """strangers(source) -> a module of another pack, among the host's custom nodes."""
    paths = folder_paths.folder_names_and_paths["custom_nodes"][0]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(tmp_path), *paths], set()))
    file = tmp_path / "Other-Pack" / "patches.py"
    file.parent.mkdir()

    def imported(source):
        file.write_text(source, "utf-8")
        spec = importlib.util.spec_from_file_location("strangers_patches", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return imported


def test_it_says_what_was_bound_and_with_which_encoder(scene, health, sd15):
    model, positive, negative = scene
    sd15.sample(model, positive, negative)
    said = health.account()
    assert "ended; 1 of 1 subjects acted" in said
    assert "1: <...>, 8 tokens, strength 0.75, from 0 to 0.9, identity 2, match; bound in positive rows 4" in said
    config = sd15.encoder.config
    assert f"{config.title}; image_features penultimate, value_norm match, alpha 2, pooled eos" in said
    assert "BaseModel, float32, on cpu" in said


def test_nothing_of_the_users_is_in_it(scene, health, sd15):
    model, positive, negative = scene
    sd15.sample(model, positive, negative)
    said = health.account().lower()
    for private in ("zoe", "dancer", "portrait", "lighthouse", "blurry", str(Path.home()), os.getcwd(), "/", "\\"):
        assert private.lower() not in said.replace("custom_nodes/", "").replace("-linux", ""), private


def test_it_names_who_else_is_on_the_model(scene, health, sd15, strangers):
    model, positive, negative = scene
    patch = strangers("def patch(q, k, v, extra):\n    return q, k, v\n").patch
    model = model.clone()
    model.set_model_attn2_patch(patch)
    sd15.sample(model, positive, negative)
    assert "  custom_nodes/Other-Pack: attn2_patch\n" in f"{health.account()}\n"


def test_it_names_who_replaced_functions_of_the_host(health, strangers, monkeypatch):
    assert "text encoding" not in health.account()
    wrapped = strangers(
        "import functools\n"
        "def around(function):\n"
        "    @functools.wraps(function)\n"
        "    def called(*args, **kwargs):\n"
        "        return function(*args, **kwargs)\n"
        "    return called\n"
    ).around(comfy.sd.CLIP.tokenize)
    monkeypatch.setattr(comfy.sd.CLIP, "tokenize", wrapped)
    assert "custom_nodes/Other-Pack: text encoding, CLIP.tokenize" in health.account()


def test_every_function_it_watches_is_there(health):
    """So that a newer host that renames one is noticed."""
    watched = [place for places in health._WATCHED.values() for place in places]
    assert [name for owner, name in watched if not hasattr(owner, name)] == []


def test_it_says_how_a_run_stopped(scene, health, sd15):
    model, _, negative = scene
    with pytest.raises(ValueError, match="No positive prompt mentions"):
        sd15.sample(model, sd15.encode(sd15.clip, "a garden"), negative)
    assert "stopped by NestedAttentionError; 0 of 1 subjects acted" in health.account()
