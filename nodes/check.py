"""Check Encoder."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import comfy.utils
import torch
from comfy_api.v0_0_2 import io, ui
from server import PromptServer

from ..nested_core.check.chart import chart
from ..nested_core.check.keep import keep
from ..nested_core.check.search import passes_of, search
from ..nested_core.check.settings import config_with
from ..nested_core.check.verdict import headline, report, table_text
from ..nested_core.errors import NestedAttentionError
from ..nested_core.hosts.comfy.check import HostBench
from ..nested_core.hosts.comfy.values import HostEncoder
from .folders import ENCODERS, find
from .types import CATEGORY, NestedEncoder

log = logging.getLogger(__name__)


class NestedCheckEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedCheckEncoder",
            display_name="Check Encoder",
            category=CATEGORY,
            description=(
                "Finds out which settings an encoder was trained with, and whether it does anything on this model: by "
                "how well photos are denoised under each. Run it once for a file of somebody else's."
            ),
            search_aliases=["nested attention", "encoder settings", "diagnose", "value norm", "alpha"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint that the encoder is for, without subjects."),
                io.Clip.Input("clip", tooltip="Of the same checkpoint."),
                io.Vae.Input("vae", tooltip="Of the same checkpoint."),
                NestedEncoder.Input("encoder", tooltip="From Load Nested Encoder."),
                io.ClipVision.Input("clip_vision", tooltip="The vision model that the encoder was trained with."),
                io.Image.Input(
                    "photos",
                    tooltip="3 or more, 8 are better, each of another subject, such as the encoder was trained on: for "
                    "faces cut out and upright.",
                ),
                io.String.Input("class_word", default="person", tooltip="What the subjects are: person, dog."),
                io.String.Input(
                    "caption",
                    default="a photo of <subject>",
                    tooltip="What all photos show, with <subject> where the subject stands.",
                ),
                io.Int.Input(
                    "size",
                    default=768,
                    min=64,
                    max=2048,
                    step=64,
                    advanced=True,
                    tooltip="Side of the pictures that are denoised, in pixels. Smaller is faster.",
                ),
                io.Boolean.Input(
                    "remember",
                    default=True,
                    tooltip="Write what is sure into a small file beside the encoder's: Load Nested Encoder then uses "
                    "it where its inputs say auto. A file that says its settings itself needs none.",
                ),
            ],
            outputs=[
                NestedEncoder.Output(display_name="encoder", tooltip="The encoder with the best settings."),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="chart"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        encoder: HostEncoder,
        clip_vision: Any,
        photos: torch.Tensor,
        class_word: str,
        caption: str,
        size: int = 768,
        remember: bool = True,
    ) -> io.NodeOutput:
        if clip is None or vae is None:
            raise NestedAttentionError("Check Encoder needs the text encoder and the VAE of the checkpoint.")
        passes = passes_of(encoder.config, len(photos))
        said = f"{passes} forward passes of the U-Net at {size} x {size} are ahead, for {len(photos)} photos."
        log.info("Check Encoder: %s", said)
        if cls.hidden is not None:  # run by a server
            PromptServer.instance.send_progress_text(said, cls.hidden.unique_id)
        bench = HostBench(model, clip, vae, encoder, clip_vision, photos, caption, class_word, size)
        bar = comfy.utils.ProgressBar(passes)
        found = search(bench, lambda: bar.update(1))
        text = report(found, encoder.config, encoder.name, bench.kinship())
        if remember:
            file = find(ENCODERS, encoder.name, "encoder", "")
            text += "\n\n" + keep(file, encoder.config, found, type(model.model).__name__)
        table = table_text(found)
        log.info("%s\n\n%s", text, table)
        best = replace(encoder, config=config_with(encoder.config, found.settings))
        picture = chart(found, encoder.name, headline(found))[None]
        return io.NodeOutput(best, f"{text}\n\n{table}", picture, ui=ui.PreviewText(text))
