"""The help pages of the nodes (web/docs) against the nodes' sources: read, not imported, so no host is needed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "web" / "docs"
NODE_SOURCES = sorted((REPO / "nodes").glob("*.py"))
MESSAGE_SOURCES = [*NODE_SOURCES, *sorted((REPO / "nested_core").rglob("*.py"))]

Inputs = dict[str, str | None]  # input id -> default as a page shows it, None where the node gives none

_VALUE = "\0"  # in a message's text: a value that the code puts in
_EMPTY = "empty"  # how pages write the default ""


# --- the nodes, as their schemas say ---------------------------------------------------------------------------------


def _called(call: ast.Call) -> str:
    """The name of what is called: `Schema` of `io.Schema(...)`."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _named(module: ast.Module) -> dict[str, ast.AST]:
    """Functions and constants of a module by name: parts of schemas are kept in them."""
    named: dict[str, ast.AST] = {}
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef):
            named[statement.name] = statement
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            named[statement.targets[0].id] = statement.value
    return named


def _input_calls(part: ast.AST, named: dict[str, ast.AST]) -> Iterator[ast.Call]:
    """`X.Input("id", ...)` calls in a schema's inputs, through helper functions; not the template of an Autogrow."""
    if isinstance(part, ast.Call):
        if _called(part) == "Input":
            yield part
            return
        helper = named.get(_called(part))
        if isinstance(helper, ast.FunctionDef):
            yield from _input_calls(helper, named)
    for child in ast.iter_child_nodes(part):
        yield from _input_calls(child, named)


def _default(call: ast.Call, named: dict[str, ast.AST]) -> str | None:
    value: ast.AST | None = _keyword(call, "default")
    if isinstance(value, ast.Name):
        value = named[value.id]
    if value is None:
        return None
    assert isinstance(value, ast.Constant), f"line {value.lineno}: a default that can't be read off"
    return str(value.value) or _EMPTY


SHARED = _named(ast.parse((REPO / "nodes" / "types.py").read_text(encoding="utf-8")))


def _nodes() -> dict[str, Inputs]:
    nodes: dict[str, Inputs] = {}
    for source in NODE_SOURCES:
        module = ast.parse(source.read_text(encoding="utf-8"))
        named = {**SHARED, **_named(module)}
        for schema in (n for n in ast.walk(module) if isinstance(n, ast.Call) and _called(n) == "Schema"):
            node_id, inputs = _keyword(schema, "node_id"), _keyword(schema, "inputs")
            assert isinstance(node_id, ast.Constant) and inputs is not None, f"{source.name}, line {schema.lineno}"
            found: Inputs = {}
            for call in _input_calls(inputs, named):
                assert isinstance(call.args[0], ast.Constant)
                found[str(call.args[0].value)] = _default(call, named)
            nodes[str(node_id.value)] = found
    return nodes


NODES = _nodes()


# --- the pages -------------------------------------------------------------------------------------------------------


def _section(node_id: str, title: str) -> str:
    """What stands under a heading of a node's page."""
    text = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
    match = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"{node_id}.md has no section {title}"
    return match[1]


def _table(node_id: str) -> dict[str, str]:
    """Rows of a page's table of inputs: what stands in backticks in the first column -> the second column."""
    rows = re.findall(r"^\| *`([^`|]+)` *\|([^|]+)\|[^|]+\|$", _section(node_id, "Inputs"), re.MULTILINE)
    return {name: default.strip().strip("`") for name, default in rows}


# --- the messages that the code has ----------------------------------------------------------------------------------


def _texts() -> Iterator[str]:
    """Every text of the sources, values that the code puts in as `_VALUE`."""
    for source in MESSAGE_SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else _VALUE for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(".+".join(re.escape(piece) for piece in text.split(_VALUE)))


def _messages() -> list[re.Pattern[str]]:
    """Patterns of every text with a sentence in it: whole, and up to the end of each sentence."""
    patterns = []
    for text in _texts():
        ends = [match.end() for match in re.finditer(r"\.(?= |$)", text)]
        patterns += [_pattern(text[:end]) for end in ends if len(text[:end].replace(_VALUE, "")) >= 10]
    return patterns


# --- tests -----------------------------------------------------------------------------------------------------------


def test_the_nodes_are_found():
    assert len(NODES) >= 8
    assert NODES["NestedApplySubject"]["strength"] == "1.0", "through a helper function"
    assert NODES["NestedEncoderLoader"]["pooled"] == "auto", "through a constant"
    assert list(NODES["NestedMergeSubjects"]) == ["subjects", "weights"], "an Autogrow is one input"


def test_every_page_is_of_a_node():
    assert {page.stem for page in DOCS.glob("*.md")} == set(NODES)


@pytest.mark.parametrize("node_id", NODES)
def test_a_page_has_every_input_and_its_default(node_id):
    table = _table(node_id)
    assert list(table) == list(NODES[node_id]), "every input, in the node's order, and no other"
    for name, default in NODES[node_id].items():
        if default is not None:
            shown = table[name]
            assert shown == default or _is_number(shown, default), f"{name}: the node's default is {default}"


def _is_number(shown: str, default: str) -> bool:
    try:
        return float(shown) == float(default)
    except ValueError:
        return False


@pytest.mark.parametrize("node_id", NODES)
def test_a_page_has_a_picture_of_its_own(node_id):
    """Relative to the page, as the host's help panel and GitHub both find it."""
    text = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
    ((described, picture),) = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text)
    assert len(described) > 10 and picture == f"images/{node_id}.jpg"
    assert (DOCS / picture).stat().st_size > 2000


@pytest.mark.parametrize("node_id", NODES)
def test_messages_on_a_page_are_those_of_the_code(node_id):
    known = _messages()
    quoted = re.findall(r"^- `([^`]+)`", _section(node_id, "Common mistakes"), re.MULTILINE)
    assert quoted, "a page names the messages one may meet"
    for message in quoted:
        assert any(pattern.fullmatch(message) for pattern in known), message


@pytest.mark.parametrize("node_id", NODES)
def test_placeholders_are_not_taken_for_markup(node_id):
    """`<person>` outside of backticks would be an HTML tag, and vanish."""
    text = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
    assert "<" not in re.sub(r"`[^`]*`", "", text)
    assert text.count("`") % 2 == 0
