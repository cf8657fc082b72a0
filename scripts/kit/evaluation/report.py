"""docs/evaluation.md, .json and its plot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from demo import drawing, world

from ..environment import say
from ..paths import REPO
from . import METHODS, TITLES
from .cases import AXES
from .parts import Rows

#: What stands under a part's table, line by line.
_NOTES: dict[str, list[str]] = {}


def write_report(part: str, rows: Rows) -> None:
    """Tables, raw figures and the plot under docs/, with a part measured anew; the others stay as the JSON has them."""
    docs = REPO / "docs"
    path = docs / "evaluation.json"
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    known[part] = {
        "subjects": len(next(iter(rows[0][1].right.values()))) if rows else 0,
        "rows": [{"name": name, **{q: scores.interval(q) for q in scores.right}} for name, scores in rows],
    }
    known = {name: known[name] for name in TITLES if name in known}
    path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    plot(known, docs / "images" / "evaluation.png")
    (docs / "evaluation.md").write_text("\n".join(_page(known)) + "\n", "utf-8")
    say(f"written: {docs / 'evaluation.md'}")


def _page(known: dict[str, Any]) -> list[str]:
    """docs/evaluation.md, line by line."""
    text = [
        "# The method, measured in the small world",
        "",
        "Made by `python scripts/evaluate.py`. Figures and looks are held out of every training; shares are what an",
        "independent probe finds right, with 95 % intervals over subjects. Trained encoders are compared in diffusers;",
        "one table shows that the nodes in ComfyUI come to the same. *identity*: of the six attributes that no prompt",
        "names. *alignment*: of what the prompt asks for: class, expression, material, pose, view, what is held,",
        "scene, style. The reference differs from the prompt in all of these but the class: *copied* is how often the",
        "picture shows what the reference has instead.",
        "",
        "![Identity against alignment, what is copied, and two subjects](images/evaluation.png)",
        "",
        "One photo, five prompts, the same noise, and what each method makes of them:",
        "",
        "![The methods side by side](images/methods.png)",
    ]
    for part, entry in known.items():
        text += ["", f"## {TITLES[part]}", "", f"{entry['subjects']} subjects or pairs.", ""]
        text += _markdown(COLUMNS[part], entry["rows"])
        if part == "table":
            text += ["", "What the prompt asks for, axis by axis:", "", *_markdown(("class", *AXES), entry["rows"], 2)]
            text += ["", "What is the reference's where the prompt asks for something else:", ""]
            text += _markdown(tuple(f"copied {axis}" for axis in AXES), entry["rows"], 2)
        if part in ("frontier", "budget"):
            text += ["", "At equal identity and at equal alignment, read off the lines between the strengths:", ""]
            text += _crossings(entry["rows"])
        text += _NOTES.get(part, [])
    text += [
        "",
        "*exactly it*: all six attributes are the held-out figure's. *exactly a trained one*: all six are those of a",
        "figure in the training pictures; they cover two fifths of all figures, so a wrong one is one by chance too.",
    ]
    return text


_SWEEP = ("identity", "alignment", "copied")
_TWO = ("own", "swapped", "neither", "alignment")
#: Of each part's table.
COLUMNS: dict[str, tuple[str, ...]] = {
    "table": (*_SWEEP, *world.ATTRIBUTES, "exactly it", "exactly a trained one"),
    "nodes": _SWEEP, "frontier": _SWEEP, "budget": _SWEEP,
    "pairs": _TWO, "separation": _TWO, "apart": _TWO, "identity": _SWEEP, "focus": _SWEEP,
    "unconditional": ("identity", "gain", "alignment"), "tokens": _SWEEP, "views": _SWEEP,
    "attention": (*drawing.PARTS, "background"),
}  # fmt: skip
_WIDE = ("identity", "alignment", "copied", "own", "swapped")


def _markdown(columns: Sequence[str], rows: list[dict[str, Any]], digits: int = 0) -> list[str]:
    """digits: of figures without their interval; 0: the important ones have one."""
    lines = [f"| | {' | '.join(c.replace('_', ' ') for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            if column not in row:  # a gain over itself
                cells.append("")
                continue
            mean, low, high = (round(x, 3) + 0.0 for x in row[column])  # no -0
            if column == "gain":
                cells.append(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})")
            elif column in _WIDE and not digits:
                cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
            else:
                cells.append(f"{mean:.2f}")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def _lines_of(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """{method and regime: (strengths, 2)}, identity and alignment."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = row["name"].rsplit(", strength", 1)[0]
        lines.setdefault(name, []).append((row["identity"][0], row["alignment"][0]))
    return {name: np.array(points) for name, points in lines.items()}


def _crossings(rows: list[dict[str, Any]]) -> list[str]:
    """Each line at the best alignment for an identity, and the other way round; empty where it does not get there."""
    lines = _lines_of(rows)
    asked = [(0, x) for x in (0.5, 0.6, 0.7, 0.8, 0.9)] + [(1, x) for x in (0.95, 0.9, 0.8)]
    titles = [f"{('alignment at identity', 'identity at alignment')[axis]} {value:g}" for axis, value in asked]
    out = [f"| | {' | '.join(titles)} |", "|---" * (len(asked) + 1) + "|"]
    for name, points in lines.items():
        cells = [_best_at(points, axis, value) for axis, value in asked]
        out.append(f"| {name} | {' | '.join('' if cell is None else f'{cell:.2f}' for cell in cells)} |")
    return out


def _best_at(points: np.ndarray, axis: int, value: float) -> float | None:
    """The most of the other axis where the line through the points has at least `value` on this one."""
    found = [point[1 - axis] for point in points if point[axis] >= value]
    for a, b in itertools.pairwise(points):
        if (a[axis] - value) * (b[axis] - value) < 0:
            share = (value - a[axis]) / (b[axis] - a[axis])
            found.append(a[1 - axis] + share * (b[1 - axis] - a[1 - axis]))
    return max(found, default=None)


def plot(known: dict[str, Any], path: Path) -> None:
    """Identity against alignment over strengths; what is copied by axis; whose attributes two subjects have."""
    figure = Figure(figsize=(14, 4.4), dpi=110, layout="constrained")
    front, copied, two = figure.subplots(1, 3)
    _plot_frontier(front, known.get("frontier", {}).get("rows", []))
    for i, row in enumerate(row for row in known.get("table", {}).get("rows", []) if "another" not in row["name"]):
        places, heights = np.arange(len(AXES)) + i * 0.2, [row[f"copied {axis}"][0] for axis in AXES]
        copied.bar(places, heights, 0.2, color=_colour(row["name"]), label=row["name"].split(",")[0])
    copied.set_xticks(np.arange(len(AXES)) + 0.3, AXES, rotation=35, ha="right")
    copied.set(title="shows the reference's, where another was asked for", ylim=(0, 1))
    rows, left = known.get("pairs", {}).get("rows", [])[::-1], np.zeros(len(known.get("pairs", {}).get("rows", [])))
    for share, colour in (("own", "#2f9e44"), ("swapped", "#e03131"), ("neither", "#ced4da")):
        width = np.array([row[share][0] for row in rows])
        two.barh([row["name"].replace(", the", ",\nthe") for row in rows], width, left=left, color=colour, label=share)
        left += width
    two.set(xlim=(0, 1), xlabel="attributes in which the two differ", title="two subjects in one picture")
    two.tick_params(axis="y", labelsize=7)
    two.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.15))
    for axes in (front, copied, two):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


_COLOURS = {"nested": "#c2255c", "one_value": "#1971c2", "decoupled": "#e8590c", "none": "#868e96"}


def _colour(name: str) -> str:
    return next(colour for method, colour in _COLOURS.items() if name.startswith(METHODS[method]))


def _plot_frontier(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name, points in _lines_of(rows).items():
        of_it = [row for row in rows if row["name"].startswith(f"{name}, strength")]
        spread = {
            f"{x}err": np.abs(np.array([row[q][1:] for row in of_it]).T - points[:, i])
            for i, (x, q) in enumerate((("x", "identity"), ("y", "alignment")))
        }
        dashed = "crop" not in name
        axes.plot(*points.T, "o--" if dashed else "o-", color=_colour(name), label=name, lw=1.5 if dashed else 2, ms=4)
        axes.errorbar(*points.T, **spread, fmt="none", ecolor=_colour(name), alpha=0.25, lw=1)
    axes.set(xlim=(0, 1.03), ylim=(0, 1.05), xlabel="identity", ylabel="as prompted", title="over strengths")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower left", fontsize=7)
