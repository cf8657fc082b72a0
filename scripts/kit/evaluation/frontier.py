"""Methods compared where they are equal: lines over strengths, read at the same identity or at the same alignment."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import METHODS
from .cases import AXES, Scores

HELD = {"identity": "alignment", "alignment": "identity"}
"""What is held equal, and what is then compared."""
LOSSES = (0.02, 0.05, 0.1)
"""Of alignment, against no subject: how much a method may cost."""
DRAWS = 1000
Place = tuple[int, float]
"""On a line: the point before, and the share of the way to the next one."""


@dataclass
class Line:
    """A method over strengths, from no subject on. values: (trainings, points, cases) by question."""

    strengths: list[float]
    values: dict[str, np.ndarray]

    def first(self, trainings: int) -> Line:
        """Of the first trainings alone."""
        return Line(self.strengths, {question: values[:trainings] for question, values in self.values.items()})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values["identity"].shape

    def curve(self, question: str, trainings: Sequence[int] = (), cases: Sequence[int] = ()) -> np.ndarray:
        """Means (points,) over chosen trainings and cases, or over all."""
        values = self.values[question]
        values = values[list(trainings)] if len(trainings) else values
        return np.nanmean(values[:, :, list(cases)] if len(cases) else values, (0, 2))

    def place(self, held: str, value: float, *chosen: Sequence[int]) -> Place | None:
        """Where the line has at least `value` of what is held equal, and of the other the most; None: nowhere."""
        one, other = self.curve(held, *chosen), self.curve(HELD[held], *chosen)
        found: list[Place] = [(i, 0.0) for i in range(len(one)) if one[i] >= value - 1e-9]
        for i, (a, b) in enumerate(itertools.pairwise(one)):
            if (a - value) * (b - value) < 0:
                found.append((i, float((value - a) / (b - a))))
        return max(found, key=lambda place: _between(other, place), default=None)

    def read(self, question: str, place: Place, *chosen: Sequence[int]) -> float:
        return _between(self.curve(question, *chosen), place)

    def best(self, held: str, value: float, *chosen: Sequence[int]) -> float:
        """What is compared, where `held` is at least `value`; NaN where the line does not get there."""
        place = self.place(held, value, *chosen)
        return float("nan") if place is None else self.read(HELD[held], place, *chosen)


def _between(curve: np.ndarray, place: Place) -> float:
    i, share = place
    return float(curve[i] + share * (curve[min(i + 1, len(curve) - 1)] - curve[i]))


def lines_of(rows: Sequence[tuple[str, Scores]]) -> dict[str, Line]:
    """Lines by title, from rows named "<title>, strength <x>"; the row of no subject begins each."""
    without = dict(rows)[METHODS["none"]]
    points: dict[str, list[tuple[float, Scores]]] = {}
    for name, scores in rows:
        title, _, strength = name.rpartition(", strength ")
        if title:
            points.setdefault(title, [(0.0, without)]).append((float(strength), scores))
    lines = {}
    for title, of_it in points.items():
        trainings = len(of_it[-1][1].of or [0])
        every = [(scores.of or [scores])[:trainings] for _, scores in of_it]
        questions = of_it[-1][1].right
        values = {q: np.array([[one.right[q] for one in of] for of in every]).swapaxes(0, 1) for q in questions}
        lines[title] = Line([strength for strength, _ in of_it], values)
    return lines


def common_identity(lines: Sequence[Line]) -> float:
    """The most identity that every line reaches, in steps of 0.05."""
    return float(np.floor(min(line.curve("identity").max() for line in lines) * 20 + 1e-9) / 20)


def compared(lines: dict[str, Line], regime: str, pairs: Sequence[tuple[str, str, str]]) -> list[str]:
    """Markdown of the methods of a regime at equal identity and at equal alignment.

    pairs: (what is held equal, a method, another): their difference is told with its interval.
    """
    of_it = {name.removesuffix(f", {regime}"): line for name, line in lines.items() if name.endswith(regime)}
    if len(of_it) < 2:
        return []
    without = next(iter(of_it.values()))
    base = {q: without.read(q, (0, 0.0)) for q in without.values}
    most = common_identity([*of_it.values()])
    text = [
        "",
        f"**{regime[0].upper()}{regime[1:]}.** At identity {most:g}, the most that all reach, read off the lines:",
    ]
    questions = ("alignment", "on the figure", "around it", "edited", "copied")
    text += ["", *_at_identity(of_it, base, most, questions)]
    text += ["", "Axis by axis, and after the slash how much of it is the reference's:", ""]
    text += _axes_at_identity(of_it, base, most)
    losses = [(f"{loss:g} less than without", base["alignment"] - loss) for loss in LOSSES]
    text += ["", "Identity where alignment is no more than that below what it is without a subject:", ""]
    text += [f"| | {' | '.join(title for title, _ in losses)} |", "|---" * (len(losses) + 1) + "|"]
    for name, line in of_it.items():
        cells = [_estimate(line, functools.partial(line.best, "alignment", value)) for _, value in losses]
        text.append(f"| {name} | {' | '.join(cells)} |")
    text += ["", *_differences(of_it, base, most, pairs)]
    return text


def strengths_costing(lines: dict[str, Line], loss: float) -> dict[str, float]:
    """{line's title: strength} at which each has the most identity for so much alignment, against no subject."""
    found = {}
    for name, line in lines.items():
        place = line.place("alignment", float(line.curve("alignment")[0]) - loss)
        assert place is not None, "no subject loses nothing"
        found[name] = _between(np.array(line.strengths), place)
    return found


def _at_identity(of_it: dict[str, Line], base: dict[str, float], most: float, questions: Sequence[str]) -> list[str]:
    text = [f"| | strength | {' | '.join(questions)} |", "|---" * (len(questions) + 2) + "|"]
    text.append(f"| {METHODS['none']} | | {' | '.join(f'{base[q]:.2f}' for q in questions)} |")
    for name, line in of_it.items():
        place = line.place("identity", most)
        assert place is not None
        cells = [_estimate(line, functools.partial(_read_at, line, q, most)) for q in questions]
        text.append(f"| {name} | {_between(np.array(line.strengths), place):.2f} | {' | '.join(cells)} |")
    return text


def _read_at(line: Line, question: str, identity: float, *chosen: Sequence[int]) -> float:
    place = line.place("identity", identity, *chosen)
    return float("nan") if place is None else line.read(question, place, *chosen)


def _shown_at(line: Line, identity: float, question: str) -> float:
    return _read_at(line, question, identity)


def _axes_at_identity(of_it: dict[str, Line], base: dict[str, float], most: float) -> list[str]:
    names = ("class", *AXES)
    text = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]

    def row(title: str, value: Callable[[str], float]) -> str:
        copied = [f" / {value(f'copied {axis}'):.2f}" if axis in AXES else "" for axis in names]
        return f"| {title} | {' | '.join(f'{value(a):.2f}{c}' for a, c in zip(names, copied, strict=True))} |"

    text.append(row(METHODS["none"], lambda q: base[q]))
    return text + [row(name, functools.partial(_shown_at, line, most)) for name, line in of_it.items()]


def _differences(
    of_it: dict[str, Line], base: dict[str, float], most: float, pairs: Sequence[tuple[str, str, str]]
) -> list[str]:
    text = ["| | difference | training by training |", "|---|---|---|"]
    for held, one, other in pairs:
        if one not in of_it or other not in of_it:
            continue
        levels = [most, most - 0.1] if held == "identity" else [base["alignment"] - loss for loss in LOSSES]
        trainings, _, cases = min(of_it[one].shape, of_it[other].shape)
        lines = [of_it[name].first(trainings) for name in (one, other)]
        for value in levels:
            less = functools.partial(_less, lines[0], lines[1], held, value)
            single = [less([i], range(cases)) for i in range(trainings)]
            told = _interval(lines[0], less)
            each = ", ".join("not reached" if np.isnan(x) else f"{x:+.2f}" for x in single)
            text.append(f"| {one} less {other}: {HELD[held]} at {held} {value:.2f} | {_signed(told)} | {each} |")
    return text


def _less(one: Line, other: Line, held: str, value: float, *chosen: Sequence[int]) -> float:
    return one.best(held, value, *chosen) - other.best(held, value, *chosen)


def _interval(line: Line, of: Callable[..., float]) -> tuple[float, float, float, float]:
    """Estimate, 95 % interval by resampling trainings and cases, and the share of draws where it was not reached."""
    rng, (trainings, _, cases) = np.random.default_rng(0), line.shape
    draws = np.array([
        of(rng.integers(trainings, size=trainings), rng.integers(cases, size=cases)) for _ in range(DRAWS)
    ])  # fmt: skip
    reached = draws[~np.isnan(draws)]
    low, high = np.quantile(reached, (0.025, 0.975)) if len(reached) else (float("nan"),) * 2
    return of(), float(low), float(high), float(np.isnan(draws).mean())


def _estimate(line: Line, of: Callable[..., float]) -> str:
    value, low, high, missed = _interval(line, of)
    return "not reached" if np.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f}){_missed(missed)}"


def _signed(told: tuple[float, float, float, float]) -> str:
    value, low, high, missed = told
    return "not reached" if np.isnan(value) else f"**{value:+.2f}** ({low:+.2f} to {high:+.2f}){_missed(missed)}"


def _missed(share: float) -> str:
    return f", {share:.0%} of draws do not get there" if share > 0.01 else ""
