"""Writes docs/compatibility.md from what the last run of `python scripts/test.py` saw.

    python scripts/test.py && python scripts/compatibility.py

Rows are tests with the mark `works_with`; `scripts/test.py` fails where the page is not what its run saw.
"""

from __future__ import annotations

import json
from pathlib import Path

from kit.environment import SetupError, run_main, say
from kit.hosts import HOSTS
from kit.paths import REPO, STATE

PAGE = REPO / "docs" / "compatibility.md"
_SIGNS = {"passed": "yes", "skipped": "no such node", "failed": "**fails**"}
_ORDER = ("Other packs", "Prompt", "Conditioning", "Weights", "Guidance", "Picture", "Speed", "Sampling", "Host")


#: Other packs' own code, tried by hand: (repository, its state, what was tried, how it went).
TRIED_ON = "2026-11-25, in ComfyUI 0.30.0 with models of random weights"
TRIED = [
    ("BlenderNeko/ComfyUI_ADV_CLIP_emb", "2024-04-09", "five weightings, SDXL and SD 1.5, two texts", "right rows"),
    (
        "shiimizu/ComfyUI_smZNodes",
        "2025-06-04",
        "six parsers, old and new emphasis, SDXL and SD 1.5",
        "right rows; *full* eats the `<` of `(<person>:1.2)`: refused with a message; `(a <person>:1.2)` passes",
    ),
    (
        "asagi4/comfyui-prompt-control",
        "2026-08-22",
        "AVG, BREAK, CAT, SHIFT, NOISE, AND, TE, MASK, CUT, five styles",
        "right rows",
    ),
    (
        "pamparamm/ComfyUI-ppm",
        "2026-05-03",
        "CLIP NegPip before and after, CADS, Attention Couple, with masks and with NegPip",
        "right rows. One import that 0.30.0 no longer has was made optional",
    ),
    ("SeaArtLab/ComfyUI-Long-CLIP", "2024-09-04", "its SDXL merge, random weights, before and after", "right rows"),
    (
        "badjeff/comfyui_lora_tag_loader",
        "2024-02-12",
        "in front of the text encode node",
        "`<person>` is eaten: refused with the cause; `[person]`, `@anna` pass",
    ),
    (
        "Extraltodeus/ComfyUI-AutomaticCFG",
        "2024-09-10",
        "all presets but one, which fails by itself on a small latent",
        "behind Apply Subject: acts. In front: acts, or a message says to swap them",
    ),
    ("styler00dollar/ComfyUI-deepcache", "2023-12-26", "interval 1 and 2, before and after", "acts; at 1 bit for bit"),
    ("JettHu/ComfyUI_TGate", "2026-01", "Apply Simple, Apply Advanced", "acts until the gate, whose cache has it"),
    (
        "Kosinkadink/ComfyUI-AnimateDiff-Evolved",
        "2026-03-29",
        "context windows without a motion model (three kinds), a mask per frame, prompt scheduling, recording",
        "right frames; Separate Subjects is refused with a message",
    ),
    (
        "ssitu/ComfyUI_UltimateSDUpscale, ltdrdata/ComfyUI-Impact-Pack",
        "2026-02-27, 2024-10-24",
        "read, not run: crops sampled by themselves",
        "subjects act; a mask is stretched over each crop, since nothing says where it lies",
    ),
]


def results_file(version: str) -> Path:
    """Where the host tests of a ComfyUI version leave what they saw of the marked tests."""
    return STATE / "compatibility" / f"{version}.json"


def page() -> str:
    """docs/compatibility.md as the last runs saw it. Raises SetupError where a host's are missing."""
    seen: dict[str, list[dict[str, str]]] = {}
    for version in HOSTS:
        if not results_file(version).is_file():
            raise SetupError(f"There are no results for ComfyUI {version}: run python scripts/test.py first.")
        seen[version] = json.loads(results_file(version).read_text("utf-8"))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    how: dict[tuple[str, str], str] = {}
    for version, found in seen.items():
        for entry in found:
            key = (entry["group"], entry["what"])
            how[key] = entry["how"]
            before = rows.setdefault(key, {}).get(version, "passed")
            # A row of several tests is as good as the worst of them.
            rows[key][version] = max(before, entry["outcome"], key=list(_SIGNS).index)
    lines = [
        "# What works with what",
        "",
        "Every row is one or more tests that run inside a real ComfyUI of each version, with models of random weights;",
        "`python scripts/test.py` runs them, and `python scripts/compatibility.py` writes this page from what it saw.",
        "",
        "*Before or after*: with the other node in front of Apply Subject or behind it, the picture is the same, bit",
        "for bit, and with the subject at strength 0 it is that of the other node alone, bit for bit. Packs are stood",
        "in for by patches of their kind, written for these tests.",
    ]
    for group in sorted({group for group, _ in rows}, key=lambda g: (_ORDER.index(g) if g in _ORDER else 99, g)):
        lines += ["", f"## {group}", "", f"| | {' | '.join(HOSTS)} | how |", "|---" * (len(HOSTS) + 2) + "|"]
        for (own, what), outcomes in sorted(rows.items()):
            if own == group:
                cells = [_SIGNS[outcomes[version]] if version in outcomes else "not run" for version in HOSTS]
                lines.append(f"| {what} | {' | '.join(cells)} | {how[own, what]} |")
    lines += ["", "## Packs by name", "", f"Their own code, tried by hand on {TRIED_ON}.", ""]
    lines += ["| pack | its state of | tried | |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in TRIED]
    return "\n".join(lines) + "\n"


def main() -> int:
    PAGE.write_text(page(), "utf-8")
    say(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    run_main(main)
