"""Show Binding."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io, ui

from ..nested_core.hosts.comfy.prompt import describe_binding
from .record import CATEGORY_SEE


class NestedShowBinding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedShowBinding",
            display_name="Show Binding",
            category=CATEGORY_SEE,
            description=(
                "Which word of a prompt each subject took, as the text encoder reads it. For when a subject does not "
                "appear, or appears in the wrong place."
            ),
            search_aliases=["nested attention", "placeholder", "tokens", "prompt", "debug"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="From CLIP Text Encode, or from any node after it, as the sampler gets it."
                )
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="As it came in."),
                io.String.Output(display_name="text", tooltip="What the node shows, as text."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning: Any) -> io.NodeOutput:
        text = describe_binding(conditioning)
        return io.NodeOutput(conditioning, text, ui=ui.PreviewText(text))
