"""The small world: drawn figures whose truth is known, and models of the real structure that were trained on them."""

import json
from pathlib import Path

from nested_core.layers import described_family, register

FAMILY = register(described_family(json.loads(Path(__file__).with_name("family.json").read_text("utf-8"))))
"""The small world's U-Net, in nested_core's terms."""
