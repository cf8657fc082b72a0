"""Record Attention, Attention Maps, Explain Point."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.v0_0_2 import io

from ..nested_core.errors import NestedAttentionError
from ..nested_core.figures import explain, overlay
from ..nested_core.hosts.comfy.apply import record_attention
from ..nested_core.hosts.comfy.recording import RecordedRun, Recording, heats_of, look_into
from ..nested_core.layer_weights import parse_layer_weights
from ..nested_core.maps import masks, relative
from .apply import check_window
from .types import CATEGORY, NestedRecording

CATEGORY_SEE = f"{CATEGORY}/See"
_AFTER = (
    "What the sampler made, so that this node runs after it: the picture (from VAE Decode), or the latent, which has "
    "a grey background."
)


class NestedRecordAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedRecordAttention",
            display_name="Record Attention",
            category=CATEGORY_SEE,
            description=(
                "Remembers, while the sampler runs, where in the picture each subject's word was looked at. Give the "
                "recording to Attention Maps or Explain Point. The picture stays the same, bit for bit."
            ),
            search_aliases=["nested attention", "attention map", "heat map", "daam", "debug"],
            inputs=[
                io.Model.Input("model", tooltip="With the subjects applied. It goes on to the sampler."),
                io.Float.Input(
                    "explain_at",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The part of the sampling that Explain Point looks into: 0 the first step, 1 the last.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="For ONE sampler: a second one would replace what is kept."
                ),
                NestedRecording.Output(display_name="recording", tooltip="For Attention Maps and Explain Point."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, explain_at: float) -> io.NodeOutput:
        recording = Recording(explain_at)
        return io.NodeOutput(record_attention(model, recording), recording)


def _background(after: Any, run: RecordedRun) -> torch.Tensor:
    """Pictures (images, H, W, 3): `after` itself, or grey where it is a latent.

    Raises NestedAttentionError where those are not the recorded run's.
    """
    if isinstance(after, dict):
        rows, columns = run.grid
        pictures = torch.full((after["samples"].shape[0], rows * 8, columns * 8, 3), 0.5)
    else:
        pictures = after
    if len(pictures) != run.images:
        raise NestedAttentionError(
            f"The input after has {len(pictures)} picture(s), the recorded run made {run.images}. Connect what comes "
            "from the sampler that has the model of this Record Attention."
        )
    return pictures


class NestedAttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionMaps",
            display_name="Attention Maps",
            category=CATEGORY_SEE,
            description=(
                "Where each subject is: the picture with every subject in a colour of its own, and a mask of each, for "
                "inpainting, for an area, or for the mask of Apply Subject in a second pass."
            ),
            search_aliases=["nested attention", "heat map", "subject mask", "segmentation", "daam"],
            inputs=[
                NestedRecording.Input("recording", tooltip="From Record Attention."),
                io.MultiType.Input("after", types=[io.Image, io.Latent], tooltip=_AFTER),
                io.String.Input(
                    "placeholder",
                    default="",
                    tooltip="Whose mask: the word in the prompt, such as <anna>. Empty: all, one after another.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the most heat a place needs to be in the mask. Higher: a smaller mask.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which of the steps on. The first ones decide where things are.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Up to which of the steps.",
                ),
                io.String.Input(
                    "layer_weights",
                    default="",
                    tooltip="How much each part of the model counts, as in Apply Subject (Advanced): all=0, output=1.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture with the heat of every subject."),
                io.Mask.Output(display_name="mask", tooltip="A mask per picture, of the size of the picture."),
            ],
        )

    @classmethod
    def execute(
        cls,
        recording: Recording,
        after: Any,
        placeholder: str,
        threshold: float,
        start_percent: float,
        end_percent: float,
        layer_weights: str,
    ) -> io.NodeOutput:
        check_window(start_percent, end_percent)
        run = recording.last()
        pictures = _background(after, run)
        weights = parse_layer_weights(layer_weights, run.layers)
        heats = heats_of(run, start_percent, end_percent, weights)
        found = masks(heats, threshold)
        labels = [(a.placeholder.text, a.placeholder.class_word) for a in run.applications]
        shown = relative(heats)
        images = [overlay(picture, shown[:, i], found[:, i], labels) for i, picture in enumerate(pictures)]
        wanted = found if not placeholder.strip() else found[run.subject(placeholder)][None]
        size = pictures.shape[1:3]
        large = torch.nn.functional.interpolate(wanted.flatten(0, 1)[:, None], size=size, mode="bilinear")[:, 0]
        return io.NodeOutput(torch.stack(images), (large > 0.5).float())


class NestedExplain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedExplain",
            display_name="Explain Point",
            category=CATEGORY_SEE,
            description=(
                "Why one point of the picture looks as it does: what the subject is there, which of its tokens answer, "
                "and where in its photo those come from. Figures 4 and 5 of the paper, for your own picture."
            ),
            search_aliases=["nested attention", "explain", "why", "q-former", "attention"],
            inputs=[
                NestedRecording.Input("recording", tooltip="From Record Attention."),
                io.MultiType.Input("after", types=[io.Image, io.Latent], tooltip=_AFTER),
                io.String.Input(
                    "placeholder", default="", tooltip="Whose: the word in the prompt. Empty, if there is only one."
                ),
                io.Float.Input(
                    "x",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where: 0 is the left edge of the picture, 1 the right one.",
                ),
                io.Float.Input(
                    "y",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where: 0 is the upper edge of the picture, 1 the lower one.",
                ),
                io.Int.Input(
                    "batch_index", default=0, min=0, max=4095, tooltip="Which picture of the batch; 0 is first."
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The figure, for Preview Image or Save Image.")],
        )

    @classmethod
    def execute(
        cls, recording: Recording, after: Any, placeholder: str, x: float, y: float, batch_index: int
    ) -> io.NodeOutput:
        run = recording.last()
        pictures = _background(after, run)
        picture = pictures[min(batch_index, len(pictures) - 1)]
        return io.NodeOutput(explain(look_into(run, placeholder, (x, y), batch_index, picture))[None])
