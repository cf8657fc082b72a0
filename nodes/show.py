"""Text shown on a node."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io, ui
from server import PromptServer


def show_text(node: type[io.ComfyNode], text: str) -> Any:
    """Shows `text` on a node that has Hidden.unique_id, and returns it as the node's `ui` for API clients."""
    if node.hidden is not None:  # run by a server
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)
    return ui.PreviewText(text)
