"""Load Nested Encoder."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.v0_0_2 import io

from ..nested_core.attention import VALUE_NORMS
from ..nested_core.encoder import POOLED
from ..nested_core.hosts.comfy.unet import load_host_encoder
from ..nested_core.remembered import SUFFIX
from .folders import ENCODERS, check_choice, content_marker, find
from .types import CATEGORY, NestedEncoder

_AUTO = "auto"
_ADVICE = (
    "Put the encoder file into models/nested_attention (the README has the link to the public one), then refresh "
    "the page or press R."
)


class NestedEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedEncoderLoader",
            display_name="Load Nested Encoder",
            category=CATEGORY,
            description="Loads the encoder that turns photos of a subject into what the picture model can look at. It "
            "belongs to one kind of model (SDXL or SD 1.5) and one kind of subject (the public one: faces).",
            search_aliases=["nested attention", "subject", "identity", "personalization", "face", "ipadapter"],
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=folder_paths.get_filename_list(ENCODERS),
                    tooltip="A file of models/nested_attention. Press R after adding one.",
                ),
                io.Combo.Input(
                    "image_features",
                    options=[_AUTO, "penultimate", "last"],
                    default=_AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Which layer of the vision tower the encoder reads. auto: what the file says, Check "
                    "Encoder found or its kind needs, else the last but one.",
                ),
                io.Combo.Input(
                    "value_norm",
                    options=[_AUTO, *VALUE_NORMS],
                    default=_AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="How strongly the subject's values are scaled: match (like the word they replace, times "
                    "alpha), match_per_head (the same within each attention head), unit (alpha itself), none (not at "
                    "all: alpha does nothing then). auto: what the file says, Check Encoder found or its kind needs, "
                    "else match.",
                ),
                io.Float.Input(
                    "alpha",
                    display_name="alpha (0 = auto)",
                    default=0.0,
                    min=0.0,
                    max=20.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Factor on the subject's values. 0 is auto: what the file says or Check Encoder found, "
                    "else 2.",
                ),
                io.Combo.Input(
                    "pooled",
                    options=[_AUTO, *POOLED],
                    default=_AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="SDXL also reads one summary vector of the prompt. eos: at the prompt's end, as always; "
                    "placeholder: at the subject's word. auto: what the file says or Check Encoder found; "
                    "placeholder for a file of the public encoder's sizes, else eos.",
                ),
            ],
            outputs=[NestedEncoder.Output(display_name="encoder", tooltip="For Encode Subject and Load Subject.")],
        )

    @classmethod
    def validate_inputs(cls, encoder_name: str | None) -> bool | str:
        return check_choice(ENCODERS, encoder_name, "encoder", _ADVICE)

    @classmethod
    def fingerprint_inputs(cls, encoder_name: str | None, **kwargs: object) -> str:
        marker = content_marker(ENCODERS, encoder_name)
        remembered = f"{encoder_name}{SUFFIX}"  # by Check Encoder, beside the file
        if encoder_name is None or folder_paths.get_full_path(ENCODERS, remembered) is None:
            return marker
        return f"{marker} {content_marker(ENCODERS, remembered)}"

    @classmethod
    def execute(
        cls,
        encoder_name: str,
        **overrides: Any,
    ) -> io.NodeOutput:
        path = find(ENCODERS, encoder_name, "encoder", _ADVICE)
        said: Any = {name: None if value in (_AUTO, 0.0) else value for name, value in overrides.items()}
        return io.NodeOutput(load_host_encoder(path, encoder_name, **said))
