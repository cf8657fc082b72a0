"""Adjust Subject."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.v0_0_2 import io

from ..nested_core.errors import NestedAttentionError
from ..nested_core.hosts.comfy.apply import adjust_subjects
from ..nested_core.hosts.comfy.unet import unet_layers_of
from ..nested_core.hosts.comfy.values import Application
from ..nested_core.layer_weights import parse_layer_weights
from ..nested_core.schedule import SCHEDULES, parse_schedule
from .apply import check_window
from .types import CATEGORY, window_inputs


class NestedAdjustSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAdjustSubject",
            display_name="Adjust Subject",
            category=CATEGORY,
            description=(
                "Changes how a subject acts that is already on a model: weaker or stronger, in fewer steps, fading in "
                "or out over the steps. For a second pass, an upscale, or to compare, without applying it again."
            ),
            search_aliases=["nested attention", "strength schedule", "weight schedule", "subject", "retime"],
            inputs=[
                io.Model.Input("model", tooltip="A model with subjects: from Apply Subject, or anything after it."),
                io.String.Input(
                    "placeholder",
                    default="",
                    tooltip="Whose: the word in the prompt, such as <anna>. Empty: every subject on the model.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Factor on the strength that Apply Subject gave. 1 leaves it, 0 silences the subject.",
                ),
                *window_inputs(
                    "Not before this part of the sampling. What Apply Subject says holds as well.",
                    "Not after this part of the sampling. What Apply Subject says holds as well.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="constant",
                    tooltip="How strength moves over the steps. ease in: it rises. ease out: it falls. ease in and "
                    "out: it rises to the middle, then falls. list: as in values.",
                ),
                io.String.Input(
                    "values",
                    default="",
                    tooltip="For the schedule list: factors from the first step to the last, such as 0, 0.5, 1. Any "
                    "number of them; in between they are mixed.",
                ),
                io.String.Input(
                    "layer_weights",
                    default="",
                    tooltip="Factor per part of the model, as in Apply Subject (Advanced): output=0.5, middle=0.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For the sampler or the next node.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        placeholder: str,
        strength: float,
        start_percent: float,
        end_percent: float,
        schedule: str,
        values: str,
        layer_weights: str,
    ) -> io.NodeOutput:
        check_window(start_percent, end_percent)
        over_steps = parse_schedule(schedule, values)
        weights = parse_layer_weights(layer_weights, unet_layers_of(model)[1])

        def change(application: Application) -> Application:
            start, end = max(application.start, start_percent), min(application.end, end_percent)
            if start >= end and application.start < application.end:
                raise NestedAttentionError(
                    f"{application.placeholder.text} acts from {application.start:g} to {application.end:g} of the "
                    f"sampling, as Apply Subject says, and that leaves nothing of {start_percent:g} to "
                    f"{end_percent:g}. Let the two overlap, or take the subject out of the model."
                )
            return replace(
                application,
                strength=application.strength * strength,
                start=start,
                end=end,
                schedule=over_steps or application.schedule,
                layer_weights=tuple(a * b for a, b in zip(application.layer_weights, weights, strict=True)),
            )

        return io.NodeOutput(adjust_subjects(model, placeholder, change))
