"""docs/evaluation.md, .json and its plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from demo import world

from ..environment import say
from ..paths import REPO
from . import METHODS, TITLES
from .parts import Rows

#: What stands under a part's table, line by line.
_NOTES = {
    "unconditional": [
        "",
        "Made by `python scripts/evaluate.py --identities 32 --only unconditional`. *gain*: of identity over that with",
        "nothing in the negative prompt, subject by subject. A black picture gains nothing at any of these, and costs",
        "likeness at the higher ones; the class word by itself does next to nothing.",
    ],
}


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
        "Made by `python scripts/evaluate.py`, from pictures sampled in ComfyUI through the nodes. Subjects are held",
        "out of every training, each with three seeds; the figures are shares that an independent probe finds right,",
        "with 95 % intervals over subjects.",
        "",
        "![Identity, alignment and separation of the methods](images/evaluation.png)",
    ]
    for part, entry in known.items():
        counted = f"{entry['subjects']} subjects or pairs."
        if part == "remedies":
            counted += " (*own* and *swapped*: two thirds of that; *edit* and *rest*: half.) One training each."
        text += ["", f"## {TITLES[part]}", "", counted, ""]
        text += _markdown(part, entry["rows"])
        text += _NOTES.get(part, [])
    text += [
        "",
        "*edit*: the share of pictures with the attribute that the prompt gives the subject against its reference,",
        "such as `a wheels below <robot>`; *identity*, or *rest*, is then that of the other five. *exactly it*: all",
        "six attributes are the held-out figure's. *exactly a trained one*: all six are those of a figure in the",
        "training pictures; they cover two fifths of all figures, so a wrong one is one by chance too.",
    ]
    return text


def _markdown(part: str, rows: list[dict[str, Any]]) -> list[str]:
    columns = ["identity", "alignment"]
    if part in ("pairs", "separation", "apart"):
        columns = ["own", "swapped", "neither", "alignment"]
    elif part == "unconditional":
        columns = ["identity", "gain", "alignment"]
    elif part == "edits":
        columns = ["edit", "identity", "alignment"]
    elif part in ("attention", "remedies"):
        columns = [name for name in rows[0] if name != "name"]
    elif part == "table":
        aligned = ["class", "scene", "style"]
        columns = ["identity", "alignment", *world.ATTRIBUTES, *aligned, "exactly it", "exactly a trained one"]
    lines = [f"| | {' | '.join(c.replace('_', ' ') for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            if column not in row:  # a gain over itself
                cells.append("")
                continue
            mean, low, high = row[column]
            if column == "gain":
                mean, low, high = (round(x, 2) + 0.0 for x in (mean, low, high))  # no -0
                cells.append(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})")
                continue
            wide = column in ("identity", "alignment", "own", "swapped", "edit", "rest")
            cells.append(
                f"{mean:.2f} ({low:.2f} to {high:.2f})" if wide else f"{mean:.{3 if part == 'attention' else 2}f}"
            )
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def plot(known: dict[str, Any], path: Path) -> None:
    """Identity against alignment and a changed attribute, over strengths; whose attributes two subjects have."""
    colours = {"nested": "#c2255c", "one_value": "#1971c2", "decoupled": "#e8590c"}
    figure = Figure(figsize=(13, 4), dpi=110, layout="constrained")
    aligned, edited, apart = figure.subplots(1, 3)
    for axes, part, asked in ((aligned, "strength", "alignment"), (edited, "edits", "edit")):
        for method, colour in colours.items():
            rows = [row for row in known.get(part, {}).get("rows", []) if row["name"].startswith(METHODS[method])]
            if not rows:
                continue
            x, y = (np.array([row[q] for row in rows]).T for q in ("identity", asked))
            axes.plot(x[0], y[0], "o-", color=colour, label=METHODS[method], lw=2, ms=5)
            spread = {"xerr": np.abs(x[1:] - x[0]), "yerr": np.abs(y[1:] - y[0])}
            axes.errorbar(x[0], y[0], **spread, fmt="none", ecolor=colour, alpha=0.25, lw=1)
            for i, row in ((0, rows[0]), (-1, rows[-1])):
                axes.annotate(row["name"].split()[-1], (x[0][i], y[0][i]), (0, -13), textcoords="offset points",
                              fontsize=8, color=colour, ha="center")  # fmt: skip
        axes.set(xlim=(0, 1.03), ylim=(0, 1.05))
        axes.grid(alpha=0.25)
    aligned.set(xlabel="identity", ylabel="class, scene and style as prompted", title="over strengths")
    edited.set(xlabel="identity, the other five attributes", ylabel="attribute as prompted")
    edited.set_title("the prompt changes an attribute")
    aligned.legend(frameon=False, loc="lower left")
    rows = known.get("pairs", {}).get("rows", [])[::-1]
    left = np.zeros(len(rows))
    for share, colour in (("own", "#2f9e44"), ("swapped", "#e03131"), ("neither", "#ced4da")):
        width = np.array([row[share][0] for row in rows])
        apart.barh(
            [row["name"].replace(" in the", "\nin the") for row in rows], width, left=left, color=colour, label=share
        )
        left += width
    apart.set(xlim=(0, 1), xlabel="attributes in which the two differ", title="two subjects in one picture")
    apart.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.15))
    for axes in (aligned, edited, apart):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
