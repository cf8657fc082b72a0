"""docs/evaluation.md, .json and its plot."""

from __future__ import annotations

import hashlib
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
from .cases import AXES, Bench
from .frontier import compared, lines_of
from .parts import AS_SHIPPED, BUDGETS, REGIMES, Rows, budget_title
from .why import why

#: The parts that are lines over strengths, and whose lines are compared with each other.
_LINES = {"frontier": tuple(REGIMES.values()), "budget": tuple(map(budget_title, BUDGETS))}
#: What is compared where methods are equal, and what the difference is read as.
_PAIRS = (
    ("identity", METHODS["nested"], METHODS["decoupled"]), ("identity", METHODS["nested"], METHODS["one_value"]),
    ("alignment", METHODS["nested"], METHODS["one_value"]), ("alignment", METHODS["nested"], METHODS["decoupled"]),
)  # fmt: skip


def write_report(bench: Bench, part: str, rows: Rows, notes: Sequence[str] = ()) -> None:
    """Tables, raw figures and plots under docs/, with a part measured anew.

    Other parts stay as the JSON has them, if they were made of the same. notes: stand under the part's table.
    """
    if not rows:
        return
    made: dict[str, Any] = {"way": type(bench).__name__, "stamp": bench.stamp, "weights": bench.weights}
    made["encoders"] = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in bench.encoders.items()
    }
    docs = REPO / "docs"
    path = docs / "evaluation.json"
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    known = {name: entry for name, entry in known.items() if _fits(entry, made)}
    lines = lines_of(rows) if part in _LINES else {}
    known[part] = {
        **made,
        "subjects": len(next(iter(rows[0][1].right.values()))),
        "rows": [
            {"name": name, "trainings": len(scores.of) or 1, **{q: scores.interval(q) for q in scores.right}}
            for name, scores in rows
        ],
        "notes": [*notes, *(line for regime in _LINES.get(part, ()) for line in compared(lines, regime, _PAIRS))],
    }
    known = {name: known[name] for name in TITLES if name in known}
    path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    plot(known, docs / "images" / "evaluation.png")
    plot_axes(known, docs / "images" / "evaluation_axes.png")
    (docs / "evaluation.md").write_text("\n".join(_page(known)) + "\n", "utf-8")
    say(f"written: {docs / 'evaluation.md'}")


def _fits(entry: dict[str, Any], made: dict[str, Any]) -> bool:
    """Whether a part was made with the same weights and encoders, and if in the same way, by the same code."""
    if any(made["encoders"].get(name, digest) != digest for name, digest in entry.get("encoders", {}).items()):
        return False
    return entry.get("weights") == made["weights"] and (entry["way"] != made["way"] or entry["stamp"] == made["stamp"])


def _page(known: dict[str, Any]) -> list[str]:
    """docs/evaluation.md, line by line."""
    text = _INTRODUCTION.splitlines()
    for part, entry in known.items():
        text += ["", f"## {TITLES[part]}", "", f"{entry['subjects']} subjects or pairs.", ""]
        text += _markdown(COLUMNS[part], entry["rows"])
        if part == "table":
            text += ["", "What the prompt asks for, axis by axis:", "", *_markdown(("class", *AXES), entry["rows"], 2)]
            text += ["", "What is the reference's where the prompt asks for something else:", ""]
            text += _markdown(tuple(f"copied {axis}" for axis in AXES), entry["rows"], 2)
        text += entry["notes"]
    return text + why(known)


_INTRODUCTION = """\
# The method, measured in the small world

Made by `python scripts/evaluate.py`. Figures are held out of every training, and so are their looks but those of pairs
that reach out; shares are what an independent probe finds right, with 95 % intervals over figures. Encoders are
compared in diffusers; one table shows that the nodes in ComfyUI come to the same. A method is trained three times in
each regime, from the same Q-Former, with other batches and noises; its row is the mean of the three, each
with a noise of its own.

* *identity*: of the six attributes that no prompt names.
* *alignment*: of what the prompt asks for: class, expression, material, pose, view, what is held, scene, style. *On the
  figure* are five of them, *around it* scene and style.
* *copied*: of what the reference shows and the prompt asks otherwise (all of these but the class). Without a subject it
  is what chance and the base model make.
* *edited*: pictures with all five looks that were asked for and at least five of the six attributes.
* *exactly it*: all six attributes are the held-out figure's. *exactly a trained one*: all six are those of a figure in
  the training pictures; they cover two fifths of all figures, so a wrong one is one by chance too.

Three subjects can't be measured here: there are two class words, and the probe is asked by class. Decoupled attention
has no image tokens on the negative side, as all methods here, where IP-Adapter has those of an empty image.

![Identity against alignment, what is copied, and two subjects](images/evaluation.png)

![Axis by axis](images/evaluation_axes.png)

One photo, five prompts, the same noise, and what each method makes of them, as strong as it can be for 0.05 of
alignment. All but the shipped encoder had the same short training, on other pictures of the figures:

![The methods side by side](images/methods.png)
"""

_SWEEP = ("identity", "alignment", "on the figure", "around it", "edited", "copied")
_TWO = ("own", "swapped", "neither", "alignment")
#: Of each part's table.
COLUMNS: dict[str, tuple[str, ...]] = {
    "table": ("trainings", *_SWEEP, *world.ATTRIBUTES, "exactly it", "exactly a trained one"),
    "nodes": _SWEEP, "frontier": _SWEEP, "budget": _SWEEP,
    "order": ("alignment", *AXES[2:], "identity"),
    "pairs": _TWO, "separation": _TWO, "apart": _TWO, "identity": _SWEEP, "focus": _SWEEP,
    "unconditional": ("identity", "gain", "alignment"), "tokens": _SWEEP, "views": _SWEEP,
    "attention": (*drawing.PARTS, "background"),
}  # fmt: skip
_WIDE = ("identity", "alignment", "on the figure", "copied", "own", "swapped")


def _markdown(columns: Sequence[str], rows: list[dict[str, Any]], digits: int = 0) -> list[str]:
    """digits: of figures without their interval; 0: the important ones have one."""
    lines = [f"| | {' | '.join(c.replace('_', ' ') for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            if column not in row:  # a gain over itself
                cells.append("")
                continue
            if column == "trainings":
                cells.append(str(row[column]))
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


def plot(known: dict[str, Any], path: Path) -> None:
    """Identity against alignment over strengths; what is copied by axis; whose attributes two subjects have."""
    figure = Figure(figsize=(15, 5), dpi=110, layout="constrained")
    front, copied, two = figure.subplots(1, 3)
    rows = known.get("frontier", {}).get("rows", [])
    _plot_lines(front, rows, "alignment")
    front.set(xlabel="identity", ylabel="alignment", title="over strengths, from no subject on")
    if rows:
        front.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    shown = [r for r in known.get("table", {}).get("rows", []) if "crop" in r["name"] or r["name"] == METHODS["none"]]
    for i, row in enumerate(shown):
        places, heights = np.arange(len(AXES)) + i * 0.2, [row[f"copied {axis}"][0] for axis in AXES]
        copied.bar(places, heights, 0.2, color=_colour(row["name"]), label=row["name"].split(",")[0])
    copied.set_xticks(np.arange(len(AXES)) + 0.3, AXES, rotation=35, ha="right")
    copied.set(title="copied, at strength 1, the reference being a crop", ylim=(0, 1))
    if shown:
        copied.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    _plot_two(two, known.get("pairs", {}).get("rows", [])[::-1])
    for axes in (front, copied, two):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_axes(known: dict[str, Any], path: Path) -> None:
    """The frontier of each thing that a prompt asks for."""
    figure = Figure(figsize=(15, 6.4), dpi=110, layout="constrained")
    every = figure.subplots(2, 4, sharex=True).flat
    for axes, axis in zip(every, ("class", *AXES), strict=True):
        _plot_lines(axes, known.get("frontier", {}).get("rows", []), axis)
        axes.set_title(axis)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for axes in figure.axes[4:]:
        axes.set_xlabel("identity")
    figure.savefig(path)


def _short(title: str) -> str:
    return title.replace("the reference is a crop of the target", "crop").replace(
        "the reference is another picture", "pairs"
    )


def _plot_two(axes: Any, rows: list[dict[str, Any]]) -> None:
    left = np.zeros(len(rows))
    for share, colour in (("own", "#2f9e44"), ("swapped", "#e03131"), ("neither", "#ced4da")):
        width = np.array([row[share][0] for row in rows])
        axes.barh([_short(row["name"]) for row in rows], width, left=left, color=colour, label=share)
        left += width
    axes.set(xlim=(0, 1), xlabel="attributes in which the two differ", title="two subjects in one picture")
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.15))


_COLOURS = {"nested": "#c2255c", "one_value": "#1971c2", "decoupled": "#e8590c", "none": "#868e96"}


def _colour(name: str) -> str:
    return next(colour for method, colour in _COLOURS.items() if name.startswith(METHODS[method]))


def _plot_lines(axes: Any, rows: list[dict[str, Any]], question: str) -> None:
    """Lines over strengths of rows as `frontier.lines_of` reads them, with their intervals."""
    without = [row for row in rows if ", strength" not in row["name"]]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        title, _, strength = row["name"].rpartition(", strength ")
        if strength and title:
            lines.setdefault(title, [*without]).append(row)
    for title, of_it in lines.items():
        points = np.array([[row["identity"], row[question]] for row in of_it])  # (points, 2, mean and interval)
        spread = np.abs(points[:, :, 1:] - points[:, :, :1])
        dashed, colour = "crop" not in title, _colour(title)
        style = "s:" if title.endswith(AS_SHIPPED) else "o--" if dashed else "o-"
        axes.plot(*points[:, :, 0].T, style, color=colour, label=_short(title), lw=1.5 if dashed else 2, ms=4)
        axes.errorbar(
            *points[:, :, 0].T, xerr=spread[:, 0].T, yerr=spread[:, 1].T, fmt="none", ecolor=colour, alpha=0.25, lw=1
        )
    if lines:
        lowest = min(row[question][1] for row in rows)
        axes.set(xlim=(0, 1.03), ylim=(max(0, lowest - 0.05), 1.02))
    axes.grid(alpha=0.25)
