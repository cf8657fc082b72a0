"""Writes locales/en/nodeDefs.json from the nodes themselves: what the other languages are translated from.

    python scripts/translations.py

Texts of the nodes are written in their schemas; this file only repeats them, so that translators and the frontend find
them. A test compares all languages with the nodes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from kit.environment import run_main, say
from kit.hosts import prepared_host
from kit.paths import REPO

LOCALES = REPO / "locales"


def node_definitions(nodes: dict[str, Any]) -> dict[str, Any]:
    """The texts of nodes as the frontend's locale files have them."""
    texts: dict[str, Any] = {}
    for node_id, node in sorted(nodes.items()):
        schema = node.define_schema()
        texts[node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs},
        }
        outputs = {
            str(number): {"name": output.display_name, **({"tooltip": output.tooltip} if output.tooltip else {})}
            for number, output in enumerate(schema.outputs)
        }
        if outputs:
            texts[node_id]["outputs"] = outputs
    return texts


def main() -> int:
    host = prepared_host()
    from kit.inside import import_host  # needs packages that are there only now

    with tempfile.TemporaryDirectory() as base:
        import_host(host, Path(base))
        from kit import studio

        texts = node_definitions(studio.load_pack().nodes)
    (LOCALES / "en" / "nodeDefs.json").write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    say(f"written: {LOCALES / 'en' / 'nodeDefs.json'}")
    return 0


if __name__ == "__main__":
    run_main(main)
