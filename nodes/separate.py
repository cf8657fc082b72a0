"""Separate Subjects."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from ..nested_core.hosts.comfy.apply import separate_subjects
from ..nested_core.hosts.comfy.values import Apart
from .apply import check_window
from .types import CATEGORY, window_inputs


class NestedSeparateSubjects(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedSeparateSubjects",
            display_name="Separate Subjects",
            category=CATEGORY,
            description=(
                "For two or more subjects in one picture that melt into each other: their parts of the picture no "
                "longer look at each other. Where each one is, its mask says, or where its word is looked at."
            ),
            search_aliases=["nested attention", "two people", "bounded attention", "blending", "leaking", "identity"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="Anywhere between checkpoint and sampler, before or after the subjects."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How far the subjects are kept apart. 0: not at all. 1: they do not see each other.",
                ),
                *window_inputs(
                    "When in the sampling it begins. Not in the very first step, where nobody is anywhere yet.",
                    "When it stops. Earlier (0.7): light and touch between them are more natural.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For the sampler or the next node.")],
        )

    @classmethod
    def execute(cls, model: Any, strength: float, start_percent: float, end_percent: float) -> io.NodeOutput:
        check_window(start_percent, end_percent)
        return io.NodeOutput(separate_subjects(model, Apart(strength, start_percent, end_percent)))
