"""Crop Subject."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.v0_0_2 import io

from ..nested_core.faces import align_face
from ..nested_core.images import crop_to_subject
from .types import CATEGORY, FaceLandmarks


class NestedCropSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedCropSubject",
            display_name="Crop Subject",
            category=CATEGORY,
            description=(
                "Cuts the square that an encoder likes out of a photo: around a mask, or around a face, upright, if "
                "face landmarks are connected (what the public face encoder was trained on)."
            ),
            search_aliases=["nested attention", "face crop", "align", "ffhq", "square"],
            inputs=[
                io.Image.Input("image", tooltip="Photos of the subject; each is cropped on its own."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What is the subject, in white. Not used where landmarks are connected.",
                ),
                FaceLandmarks.Input(
                    "face_landmarks",
                    optional=True,
                    tooltip="From the host's Detect Face Landmarks (MediaPipe), if it has that node: the largest face "
                    "found in each photo is turned upright and cropped as the FFHQ face photos are.",
                ),
                io.Float.Input(
                    "margin",
                    default=0.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Extra room on each side, as a part of the crop. For faces 0 is the usual crop.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="Squares, for Encode Subject."),
                io.Mask.Output(display_name="mask", tooltip="The mask, cut alike; with landmarks: where the photo is."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        margin: float,
        mask: torch.Tensor | None = None,
        face_landmarks: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        if face_landmarks is not None:
            return io.NodeOutput(*align_face(image, face_landmarks, margin))
        return io.NodeOutput(*crop_to_subject(image, mask, margin))
