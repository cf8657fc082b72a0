"""Command line of the training: `python -m nested_core.training --config file.yaml [--data.resolution 512 ...]`."""

from __future__ import annotations

import logging
import sys
from dataclasses import fields

from jsonargparse import ArgumentParser

from ..errors import NestedAttentionError
from .captions import make_captions
from .config import TrainingConfig
from .look import look
from .loop import train
from .report import dry_run


def make_parser() -> ArgumentParser:
    """Every field of `TrainingConfig` as an option, and YAML files of them."""
    parser = ArgumentParser(
        prog="python -m nested_core.training", description="Trains a nested attention encoder. See docs/training.md."
    )
    parser.add_argument("--config", action="config", help="a YAML file of the options below")
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


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1, with a message, where something does not fit."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    try:
        made = parser.instantiate(parsed)
        config = TrainingConfig(**{field.name: made[field.name] for field in fields(TrainingConfig)})
        if made["caption"]:
            print(f"Captions written: {len(make_captions(config.data, made['caption']))}")
        elif made["look"]:
            return 0 if look(config)[1] else 1
        elif made["dry_run"]:
            dry_run(config)
        else:
            print(f"The encoder: {train(config)}")
    except NestedAttentionError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
