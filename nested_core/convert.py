"""Any encoder file this pack reads -> this pack's own safetensors file: `python -m nested_core.convert IN OUT`.

The result opens faster, says in its metadata what it is, and at fp16 has half the size of the public release. Subjects
saved with the original fit the converted file too: it carries the original's fingerprint.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from .attention import VALUE_NORMS
from .checkpoint import cast_weights, read_encoder, write_state
from .encoder import IMAGE_FEATURES, POOLED, Overrides
from .errors import NestedAttentionError
from .files import PRECISIONS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nested_core.convert",
        description="Convert a nested attention encoder (safetensors, or a .bin of tensors only) to this pack's own.",
        epilog="Options that are not given keep what the input file says, or the default of its kind.",
    )
    parser.add_argument("input", type=Path, metavar="IN", help="encoder file to read")
    parser.add_argument("output", type=Path, metavar="OUT", help="file to write, ending in .safetensors")
    parser.add_argument("--dtype", choices=list(PRECISIONS), help="precision of the weights")
    parser.add_argument("--image-features", choices=IMAGE_FEATURES, help="which vision tower features it reads")
    parser.add_argument("--value-norm", choices=VALUE_NORMS, help="how nested values are rescaled")
    parser.add_argument("--alpha", type=float, help="factor of that rescaling (the release: 2.0)")
    parser.add_argument("--pooled", choices=POOLED, help="where SDXL's pooled text vector is taken")
    parser.add_argument("--base-model", help="the model it was trained on, in words")
    parser.add_argument("--licence", help="licence of the weights, in words")
    parser.add_argument("--force", action="store_true", help="replace OUT when it exists")
    return parser


def convert(arguments: argparse.Namespace) -> None:
    """Does what the parsed command line says, and prints what the file was taken for.

    Raises NestedAttentionError when IN can't be read or OUT not be written, and when the weights overflow the dtype.
    """
    source, target = arguments.input, arguments.output
    if target.suffix != ".safetensors":
        raise NestedAttentionError(f"{target.name}: the output is a safetensors file, so end its name in .safetensors.")
    if target.exists() and not arguments.force:
        raise NestedAttentionError(f"{target} exists. Choose another name, or add --force to replace it.")
    said = vars(arguments)
    config, state = read_encoder(source, **cast(Overrides, {name: said[name] for name in Overrides.__annotations__}))
    words = {name: said[name] for name in ("base_model", "licence") if said[name] is not None}
    config = replace(config, **words)
    if arguments.dtype:
        cast_weights(state, PRECISIONS[arguments.dtype], None, "Use --dtype bf16 or fp32.")
    write_state(target, config, state, keep_fingerprint=True)
    print(f"{source.name}: {config.title}")
    print(
        f"image features {config.image_features}, value norm {config.value_norm}, alpha {config.alpha:g}, "
        f"pooled {config.pooled}, base model {config.base_model}, licence {config.licence}"
    )
    print(f"written to {target}: {target.stat().st_size / 1e6:,.1f} MB, fingerprint {config.fingerprint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry point: 0, or 1 with the reason on standard error."""
    logging.basicConfig(format="%(message)s")
    try:
        convert(_parser().parse_args(argv))
    except NestedAttentionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
