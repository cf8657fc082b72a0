"""Command line of the training: `python -m nested_core.training --config file.yaml [--data.resolution 512 ...]`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

from jsonargparse import ArgumentParser

from ..errors import NestedAttentionError
from .captions import make_captions
from .checkpoints import going_on
from .config import TrainingConfig
from .look import look
from .loop import train
from .report import dry_run

RECIPES = {path.stem: path for path in sorted((Path(__file__).parent / "configs" / "recipes").glob("*.yaml"))}
"""Named settings: what a run begins with, before its own config."""


def make_parser(recipe: str | None = None) -> ArgumentParser:
    """Every field of `TrainingConfig` as an option, and YAML files of them; the defaults are a recipe's."""
    parser = ArgumentParser(
        prog="python -m nested_core.training",
        description="Trains a nested attention encoder. See docs/training.md.",
        default_config_files=[RECIPES[recipe]] if recipe else None,
    )
    parser.add_argument("--config", action="config", help="a YAML file of the options below")
    parser.add_argument(
        "--recipe", choices=list(RECIPES), help="settings that belong together; what the config and options say wins"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="say what would be trained and what it needs, check the data, and stop"
    )
    parser.add_argument(
        "--look",
        action="store_true",
        help="look at the data before any model is loaded, write a contact sheet, and stop",
    )
    parser.add_argument(
        "--caption",
        metavar="COMMAND",
        help="write captions for pictures without one: a command that reads paths, one a line, and answers each with a "
        "line; and stop",
    )
    parser.add_class_arguments(TrainingConfig)
    return parser


def parse(arguments: list[str] | None = None) -> Any:
    """What the command line says, with the recipe that it or its config names below it."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if parsed.recipe:
        parser = make_parser(parsed.recipe)
        parsed = parser.parse_args(arguments)
    return parser.instantiate(parsed)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1, with a message, where something does not fit."""
    first = int(os.environ.get("RANK", "0")) == 0  # the launcher says it before anything is set up
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    try:
        made = parse(arguments)
        config = TrainingConfig(**{field.name: made[field.name] for field in fields(TrainingConfig)})
        if made["caption"]:
            print(f"Captions written: {len(make_captions(config.data, made['caption']))}")
            return 0
        if made["look"]:
            return 0 if look(config)[1] else 1
        if made["dry_run"]:
            dry_run(config)
            return 0
        with termination_told(config):
            path = train(config)
        if first:
            print(f"The encoder: {path}")
    except NestedAttentionError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def termination_told(config: TrainingConfig) -> Iterator[None]:
    """A SIGTERM ends the run with a message: a launcher sends it to the processes that are left when one has failed.

    Raises SystemExit.
    """

    def ended(number: int, frame: FrameType | None) -> None:
        # No Exception: whatever code is being run at the moment may catch those.
        raise SystemExit(f"Error: The run was ended from outside (SIGTERM). {going_on(config)}")

    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
