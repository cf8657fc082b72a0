"""Apply Subject, Apply Subject (Advanced)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.v0_0_2 import io

from ..nested_core.attention import VALUE_NORMS
from ..nested_core.errors import NestedAttentionError
from ..nested_core.hosts.comfy.apply import apply_subject
from ..nested_core.hosts.comfy.unet import unet_layers_of
from ..nested_core.hosts.comfy.values import Application, HostSubject
from ..nested_core.images import checked_mask
from ..nested_core.layer_weights import parse_layer_weights
from ..nested_core.prompt import Placeholder
from .types import CATEGORY, NestedSubject, window_inputs

_ENCODERS_OWN = "encoder's own"

log = logging.getLogger(__name__)


def _checked_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """`checked_mask`; one that is black everywhere is allowed, and said."""
    if mask is None:
        return None
    mask = checked_mask(mask)
    if not mask.any():
        log.warning("The mask of a subject is black everywhere: the subject acts nowhere.")
    return mask


def check_window(start: float, end: float) -> None:
    """Raises NestedAttentionError where a window ends before it begins."""
    if start > end:
        raise NestedAttentionError(
            f"start_percent ({start:g}) is after end_percent ({end:g}). Start must come first; 0 and 1 are the whole "
            "run."
        )


def _applied(
    model: Any,
    clip: Any,
    subject: HostSubject,
    mask: torch.Tensor | None,
    layer_weights: str = "",
    **knobs: Any,
) -> io.NodeOutput:
    """MODEL and CLIP with the subject; `knobs` are fields of `Application`."""
    if clip is None:
        raise NestedAttentionError(
            "The clip input is empty: this checkpoint has no text encoder. Load one with DualCLIPLoader and connect it."
        )
    check_window(knobs["start"], knobs["end"])
    config, word = subject.encoder.config, subject.subject
    application = Application(
        source=subject,
        placeholder=Placeholder(
            word.placeholder,
            word.class_word,
            pooled=config.pooled == "placeholder",
            seeks_class_word=knobs.get("unconditional") is not None,
        ),
        mask=_checked_mask(mask),
        layer_weights=parse_layer_weights(layer_weights, unet_layers_of(model)[1]),
        **{"alpha": config.alpha, "value_norm": config.value_norm, **knobs},
    )
    return io.NodeOutput(*apply_subject(model, clip, application))


def _common_inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="From the checkpoint, a LoRA, or another Apply Subject."),
        io.Clip.Input("clip", tooltip="From the same place. The prompts must use the CLIP that comes out here."),
        NestedSubject.Input("subject", tooltip="From Encode Subject, Merge Subjects or Load Subject."),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How much of the subject. 1 is what the encoder was trained for; 0 is the untouched model.",
        ),
        *window_inputs(
            "When in the sampling the subject begins. Later (0.2): the composition follows the prompt more.",
            "When it stops. Earlier (0.8): fine detail comes from the model alone.",
        ),
    ]


def _mask_input() -> Any:
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="Where in the picture the subject may act: white yes, black no. Stretched over the whole picture.",
    )


def _knobs() -> list[Any]:
    """What only the advanced node has, but for `separation`."""
    return [
        io.Float.Input(
            "identity",
            display_name="identity (0 = auto)",
            default=0.0,
            min=0.0,
            max=20.0,
            step=0.05,
            tooltip="Alpha, how loud the subject's values are. Higher: more likeness, less prompt. 0: the "
            "encoder's own (2 for the public one).",
        ),
        io.Float.Input(
            "focus",
            default=1.0,
            min=1.0,
            max=10.0,
            step=0.05,
            tooltip="How much the picture looks at the subject's word. 1: as the prompt has it. Above: more, "
            "where it already looks there.",
        ),
        io.Combo.Input(
            "value_norm",
            options=[_ENCODERS_OWN, *VALUE_NORMS],
            default=_ENCODERS_OWN,
            tooltip="How the subject's values are scaled: match (like the word they replace, times alpha), "
            "match_per_head (the same within each head), unit (alpha itself), none (identity is unused then).",
        ),
        io.String.Input(
            "layer_weights",
            default="",
            tooltip="Factor on the strength per part of the model: output=0.5, middle=0, input.4-5=1.2, "
            "output.0.0-4=0. Later entries win; what is not named keeps 1.",
        ),
        io.Combo.Input(
            "when_unmentioned",
            options=["stop", "skip"],
            default="stop",
            tooltip="When no positive prompt has the placeholder. stop: end the run with a message. skip: go "
            "on without it (it still acts in a negative prompt that mentions it).",
        ),
    ]


def _outputs() -> list[Any]:
    return [
        io.Model.Output(display_name="model", tooltip="For the sampler or the next Apply Subject."),
        io.Clip.Output(display_name="clip", tooltip="For the text encode nodes or the next Apply Subject."),
    ]


class NestedApplySubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedApplySubject",
            display_name="Apply Subject",
            category=CATEGORY,
            description=(
                "Binds a subject to its word in the prompt. Wire it like a LoRA: model and clip go in and come out. "
                "Then write the placeholder (<person>) in the prompt. Chain one per subject for several subjects."
            ),
            search_aliases=["nested attention", "subject", "identity", "face", "personalization", "ipadapter"],
            inputs=[*_common_inputs(), _mask_input()],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        subject: HostSubject,
        strength: float,
        start_percent: float,
        end_percent: float,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        return _applied(model, clip, subject, mask, strength=strength, start=start_percent, end=end_percent)


class NestedApplySubjectAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedApplySubjectAdvanced",
            display_name="Apply Subject (Advanced)",
            category=CATEGORY,
            description="Apply Subject with every knob of the method.",
            search_aliases=["nested attention", "subject", "identity", "layer weights", "ipadapter"],
            inputs=[
                *_common_inputs(),
                *_knobs(),
                _mask_input(),
                # Last, and optional: graphs of before it keep opening.
                io.Float.Input(
                    "separation",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How far this subject holds back where another subject of the same prompt is looked at "
                    "more. 0: not at all. 1: wholly. For two people that melt into each other; set it on both. In "
                    "the models this pack is measured with it changes little.",
                ),
                NestedSubject.Input(
                    "unconditional",
                    optional=True,
                    tooltip="What stands on the class word in the negative prompt: usually a black picture (Empty "
                    "Image, colour 0) through Encode Subject. Not connected: nothing, as long as the negative prompt "
                    "does not mention the subject.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        subject: HostSubject,
        strength: float,
        start_percent: float,
        end_percent: float,
        identity: float,
        focus: float,
        value_norm: str,
        layer_weights: str,
        when_unmentioned: str,
        mask: torch.Tensor | None = None,
        separation: float = 0.0,
        unconditional: HostSubject | None = None,
    ) -> io.NodeOutput:
        config = subject.encoder.config
        return _applied(
            model,
            clip,
            subject,
            mask,
            layer_weights,
            strength=strength,
            start=start_percent,
            end=end_percent,
            alpha=identity or config.alpha,
            focus=focus,
            value_norm=config.value_norm if value_norm == _ENCODERS_OWN else value_norm,
            skip_unmentioned=when_unmentioned == "skip",
            separation=separation,
            unconditional=unconditional,
        )
