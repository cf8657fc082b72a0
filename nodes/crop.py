"""Crop Subject."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.v0_0_2 import io, ui

from ..nested_core.faces import CHOICES, align_face, describe_faces
from ..nested_core.images import crop_to_subject
from .types import CATEGORY, FaceLandmarks

log = logging.getLogger(__name__)


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
                    tooltip="What is the subject, in white. With landmarks connected only photos in which no face was "
                    "found are cropped around it.",
                ),
                FaceLandmarks.Input(
                    "face_landmarks",
                    optional=True,
                    tooltip="From the host's Detect Face Landmarks (MediaPipe), if it has that node: one face of each "
                    "photo is turned upright and cropped as the FFHQ face photos are. A photo in which no face was "
                    "found goes on as it is, and the node says so.",
                ),
                io.Float.Input(
                    "margin",
                    default=0.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Extra room on each side, as a part of the crop. For faces 0 is the usual crop; around a "
                    "painted face 0.3 is about the same.",
                ),
                io.Combo.Input(
                    "face",
                    options=list(CHOICES),
                    default="largest",
                    optional=True,
                    tooltip="Which face, where landmarks of several are connected. largest; first: the one that the "
                    "detector is surest of, as in the public release; number: see face_number.",
                ),
                io.Int.Input(
                    "face_number",
                    default=1,
                    min=1,
                    max=99,
                    optional=True,
                    advanced=True,
                    tooltip="With face set to number: which one, counted from the left of the photo. The detector's "
                    "num_faces must be 0 (all) or large enough.",
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
        face: str = "largest",
        face_number: int = 1,
    ) -> io.NodeOutput:
        if face_landmarks is not None:
            upright, inside = align_face(image, face_landmarks, margin, face=face, number=face_number, mask=mask)
            counts = [len(faces) for faces in face_landmarks["frames"]]
            told = describe_faces(counts, face, face_number)
            if 0 in counts:
                log.warning("Crop Subject: %s", told)
            return io.NodeOutput(upright, inside, ui=ui.PreviewText(told))
        return io.NodeOutput(*crop_to_subject(image, mask, margin))
