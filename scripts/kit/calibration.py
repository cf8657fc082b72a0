"""docs/check_encoder.md: Check Encoder's answers and its certainty, against encoders whose training is known."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from demo import checking
from demo.encoders import ENCODER_NAME
from demo.shipped import ENCODER, WEIGHTS
from nested_core.check.chart import chart
from nested_core.check.search import LEVELS, Found, passes_of, search
from nested_core.check.settings import ALPHAS, Settings, combinations
from nested_core.check.verdict import SURE, headline, open_settings, report, settled, table_text, works
from nested_core.encoder import EncoderConfig
from nested_core.figures import to_image

from .environment import say
from .paths import REPO

DRAWN = 16
"""Photos of one search."""
_PAGE = REPO / "docs" / "check_encoder.md"
_CHART = REPO / "docs" / "images" / "check_encoder.png"


@dataclass(frozen=True)
class Measured:
    """One encoder under all settings. config: what a silent file is taken for. said: what it was trained with.

    losses: by settings, and None for no subject, (n, L).
    """

    config: EncoderConfig
    said: EncoderConfig
    losses: dict[Settings | None, Tensor]

    def truth(self) -> dict[str, Any]:
        """What a search should name: of α the nearest that is tried."""
        said = self.said
        nearest = min(ALPHAS, key=lambda alpha: abs(math.log(alpha / said.alpha)))
        alpha = None if said.value_norm == "none" else nearest
        return {"image_features": said.image_features, "value_norm": said.value_norm, "alpha": alpha}


class Drawn:
    """Some of the measured photos, as a bench for a search."""

    def __init__(self, measured: Measured, chosen: Sequence[int]) -> None:
        self.measured, self.chosen = measured, list(chosen)
        self.config, self.photos = measured.config, len(chosen)

    def losses(self, settings: Settings | None, shown: Sequence[int], level: float) -> Iterable[float]:
        at = LEVELS.index(level)
        # What another photo does was not measured: that the subject matters is no question here.
        seen = settings if list(shown) == list(range(self.photos)) else None
        return [float(loss) for loss in self.measured.losses[seen][self.chosen, at]]


def measure(path: Path, photos: Tensor, kept: Path) -> Measured:
    """Everything there is to measure of an encoder; kept in a file, for the same encoder, photos and levels."""
    encoder, said = checking.silent(path)
    key = f"{said.fingerprint} {len(photos)} {LEVELS} {ALPHAS}"
    if kept.is_file():
        found = torch.load(kept, weights_only=False)
        if found["key"] == key:
            return Measured(encoder.config, said, found["losses"])
    bench = checking.bench(encoder, photos)

    def row(settings: Settings | None) -> Tensor:
        rows = [list(bench.losses(settings, range(len(photos)), level)) for level in LEVELS]
        return torch.tensor(rows, dtype=torch.float64).T

    tried: list[Settings | None] = [None, *combinations(encoder.config)]
    losses = {settings: row(settings) for settings in tqdm(tried, desc=path.parent.name, mininterval=5)}
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"key": key, "losses": losses}, kept)
    return Measured(encoder.config, said, losses)


def calibrate(run: Path, count: int, draws: int) -> None:
    """Writes the page and the chart. run: folder of demo/train.py."""
    photos = checking.portraits(count)
    files = [
        WEIGHTS / ENCODER,
        *(path for path in sorted(run.glob("nested*/encoder.safetensors")) if _otherwise(path)),
    ]
    every = [measure(path, photos, run / "check" / f"{path.parent.name}.pt") for path in files]
    rng = random.Random(0)
    rows, sure = [], []
    for path, measured in zip(files, every, strict=True):
        found = [search(Drawn(measured, rng.sample(range(count), DRAWN))) for _ in range(draws)]
        row, here = _row(_trained(path), measured, found)
        rows.append(row)
        sure += here
        say(row)
    bench = checking.bench(checking.silent()[0], photos[:DRAWN])
    shown = search(bench)
    to_image(chart(shown, ENCODER, headline(shown))).save(_CHART)
    text = report(shown, bench.config, ENCODER, bench.kinship())
    page = _page(rows, sure, draws, count, f"{text}\n\n{table_text(shown)}")
    _PAGE.write_text("\n".join([*page, *_strangers(photos[:DRAWN])]) + "\n", "utf-8")
    say(f"written: {_PAGE}")


def _otherwise(path: Path) -> bool:
    """Whether an encoder was trained in a way of its own: another seed is none."""
    name = ENCODER_NAME.fullmatch(path.parent.name)
    return bool(name and not (name["seed"] or name["tokens"] or name["longer"]))


def _trained(path: Path) -> str:
    if path.parent == WEIGHTS:
        return "shipped"
    steps = re.search(r"_(\d+)_steps", path.parent.name)
    return f"{'pairs' if '_pairs' in path.parent.name else 'crops'}, {steps[1] if steps else 800} steps"


def _row(title: str, measured: Measured, found: Sequence[Found]) -> tuple[str, list[tuple[float, bool]]]:
    """A line of the table that begins with a title; (certainty, whether right) of each setting of each search."""
    truth = measured.truth()
    told, cells = [], []
    for name in ("image_features", "value_norm", "alpha"):
        each = [(f.certainty(name), getattr(f.settings, name) == truth[name]) for f in found]
        right = sum(ok for _, ok in each) / len(each)
        certain = [ok for certainty, ok in each if certainty >= SURE]
        cells.append(f"{right:.0%} | {len(certain) / len(each):.0%}, of these {_share(certain)} right")
        told += [pair for pair, f in zip(each, found, strict=True) if name in open_settings(f)]
    worked = sum(map(works, found)) / len(found)
    said = measured.said
    alpha = "" if truth["alpha"] is None else f", α {said.alpha:.3g}"
    return f"| {said.image_features}, {said.value_norm}{alpha}; {title} | {worked:.0%} | {' | '.join(cells)} |", told


def _share(right: Sequence[bool]) -> str:
    return f"{sum(right) / len(right):.0%}" if right else "none"


def _page(rows: list[str], told: list[tuple[float, bool]], draws: int, count: int, text: str) -> list[str]:
    certain = [ok for certainty, ok in told if certainty >= SURE]
    less = [(certainty, ok) for certainty, ok in told if certainty < SURE]
    alphas = ", ".join(f"{alpha:g}" for alpha in ALPHAS)
    passes = [passes_of(config, DRAWN) for config in (EncoderConfig(), EncoderConfig(family="sd15", token_dim=768))]
    whole = (len(combinations(EncoderConfig())) * 2 + 2) * len(LEVELS) * DRAWN
    less_sure = sum(certainty for certainty, _ in less) / max(1, len(less))
    return [
        "# Check Encoder, measured", "",
        "Made by `python scripts/calibrate.py`, in the small world, with encoders whose training is known. What their",
        "files say of it was not looked at. The public encoder has not been tried: its file could not be had.", "",
        "![The chart of the shipped encoder](images/check_encoder.png)", "",
        f"What the report says of it, for {DRAWN} photos:", "", "```", *text.split("\n"), "```", "",
        "## Does it name the right settings, and is it as sure as it says?", "",
        f"{draws} searches per encoder, each with {DRAWN} photos drawn from {count}. All but the shipped encoder",
        "are those that `python demo/train.py --shipped --stage NAME` left, with names such as `nested` (it learns",
        "from crops of its targets) or `nested_pairs` (from other pictures). *right*: the share of searches that name",
        f"the setting it was trained with (of α the nearest of {alphas}). *sure*: the share that calls the setting",
        "settled, at 95 % or more. *works*: the share that says that the encoder lowers the error.", "",
        "| trained with | works | features, right | sure | norm, right | sure | α, right | sure |",
        "|---|---|---|---|---|---|---|---|", *rows, "",
        f"Over all of them: {len(certain)} settings were called 95 % sure or more, and {_share(certain)} of these are",
        f"right. Of the {len(less)} others {_share([ok for _, ok in less])} are, with {less_sure:.0%} said on average.",
        "",
        "What is named is what the file works best with, and a short training may not have settled into its norm: a",
        "report that says `match` is no proof that it was not `match_per_head`.", "",
        f"One search with {DRAWN} photos takes {passes[0]} forward passes for SDXL, {passes[1]} for SD 1.5. All",
        f"combinations at all levels would be {whole} for SDXL.", "",
        "## Outside of ComfyUI", "",
        "The same on diffusers, for any base model that `python -m nested_core.training` takes:", "",
        "    python -m nested_core.check encoder.safetensors --base stabilityai/stable-diffusion-xl-base-1.0 \\",
        "        --vision CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors --photos folder --remember",
    ]  # fmt: skip


def _strangers(photos: Tensor) -> list[str]:
    """What is said of encoders that have no business here."""
    cases = {
        "An encoder for another base model (the same U-Net in another basis)":
            checking.bench(checking.silent()[0], photos, turned=True),
        "A vision tower of random weights": checking.bench(checking.silent()[0], photos, tower_seed=9),
        "An encoder of random weights": checking.bench(checking.random_encoder(), photos),
    }  # fmt: skip
    lines = ["", "## What does not fit is called so", "", f"The same {len(photos)} photos.", ""]
    for title, bench in cases.items():
        found = search(bench)
        assert not settled(found)
        said = report(found, bench.config, "the file", bench.kinship()).split("\n\n")[1]
        lines += [f"**{title}.**", "", *(f"> {line}" for line in said.split("\n")), ""]
    return lines[:-1]
