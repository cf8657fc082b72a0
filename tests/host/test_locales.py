"""Translations: every node, input and output in every language, as the frontend looks them up."""

from __future__ import annotations

import json
import re

import pytest

import translations

LANGUAGES = sorted(path.name for path in translations.LOCALES.iterdir() if path.is_dir())
#: What must come through a translation as it is: placeholders, examples of grammars, names of files.
VERBATIM = re.compile(r"<\w+>|%\w+%|\b\w+=\d+(?:\.\d+)?|\b(?:models|output)/[\w/]+", re.ASCII)


def read(language, file):
    return json.loads((translations.LOCALES / language / file).read_text("utf-8"))


def texts_of(tree, at=()):
    """{path of keys: text}"""
    if isinstance(tree, str):
        return {at: tree}
    return {path: text for key, value in tree.items() for path, text in texts_of(value, (*at, key)).items()}


def test_there_are_the_languages_we_promise():
    assert LANGUAGES == ["de", "en", "ja", "ko", "zh"]


def test_english_is_what_the_nodes_say(pack):
    assert read("en", "nodeDefs.json") == translations.node_definitions(pack.nodes), (
        "run python scripts/translations.py"
    )


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("file", ["nodeDefs.json", "main.json", "commands.json"])
def test_every_text_is_there_and_says_the_same_things(language, file):
    english, own = texts_of(read("en", file)), texts_of(read(language, file))
    assert own.keys() == english.keys()
    for path, text in own.items():
        assert text.strip() == text and text, path
        assert not set(text) & set("{}@|"), f"{path}: the frontend gives these a meaning"
        assert sorted(VERBATIM.findall(text)) == sorted(VERBATIM.findall(english[path])), (path, text)


@pytest.mark.parametrize("language", [name for name in LANGUAGES if name != "en"])
def test_texts_are_translated(language):
    english, own = texts_of(read("en", "nodeDefs.json")), texts_of(read(language, "nodeDefs.json"))
    same = [path for path, text in own.items() if path[-1] in ("description", "tooltip") and text == english[path]]
    assert not same


def test_categories_are_those_of_the_nodes(pack):
    used = {part for node in pack.nodes.values() for part in node.define_schema().category.split("/")}
    assert set(read("en", "main.json")["nodeCategories"]) == used
