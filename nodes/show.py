"""Text shown on a node."""

from __future__ import annotations

import html
from typing import Any

from comfy_api.v0_0_2 import io, ui
from server import PromptServer


def show_text(node: type[io.ComfyNode], text: str) -> Any:
    """Shows `text` on a node that has Hidden.unique_id, and returns it as the node's `ui` for API clients."""
    if node.hidden is not None:  # run by a server
        # The frontend takes it for HTML: a placeholder in angle brackets would vanish.
        PromptServer.instance.send_progress_text(html.escape(text, quote=False), node.hidden.unique_id)
    return ui.PreviewText(text)
