"""Encode Subject, Merge Subjects."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.v0_0_2 import io, ui

from ..nested_core.encoder import EncoderConfig
from ..nested_core.errors import NestedAttentionError
from ..nested_core.faces import unlike_aligned
from ..nested_core.hosts.comfy.unet import encode_tokens, vision_features
from ..nested_core.hosts.comfy.values import HostEncoder, HostSubject, ReferenceView
from ..nested_core.images import content_hash, prepare
from ..nested_core.subject import Subject, merge_subjects, validate_class_word, validate_placeholder
from .types import CATEGORY, NestedEncoder, NestedSubject

log = logging.getLogger(__name__)

PLACEHOLDER_TOOLTIP = (
    "The word you write in the prompt where the subject belongs. In angle brackets it can't be mistaken for an "
    "ordinary word; a plain word (man) binds to that word where it stands. Each subject needs its own."
)
CLASS_WORD_TOOLTIP = (
    'What the subject is, in plain English: person, woman, dog, "golden retriever". The text encoder reads this '
    "instead of the placeholder. Write a kind of thing, not a name. Not used with a plain-word placeholder."
)


MANY_VIEWS = 12
"""More photos of one subject than people have at hand: a batch of more is most likely a video. With 1024 tokens a view
it is also where each step takes about half as long again, and keys and values about 4 GB."""


def _warn_of_many_views(views: int, tokens: int, encoder: HostEncoder) -> None:
    """Says in the log what `tokens` of `views` views, in all, will cost; not for a number that is usual."""
    if views > MANY_VIEWS:
        gigabytes = tokens * sum(encoder.config.widths) * 2 * 2 / 1e9  # K̈ and V̈, two bytes each
        log.warning(
            "This subject has %d views: %s tokens, which every layer looks at in every step, and about %.2g GB of keys "
            "and values in fp16. Each view makes sampling slower. If these are the frames of a video, take a few that "
            "differ.",
            views, f"{tokens:,}", gigabytes,
        )  # fmt: skip


_RELEASE = EncoderConfig()  # its defaults are the public release's


def _look_at_crops(image: torch.Tensor, encoder: HostEncoder) -> str:
    """A line about whether `image` may be what a face encoder of the public release's sizes was trained on.

    A hint and no more: an encoder of these sizes may have been trained on something else. Empty for other encoders.
    """
    sizes = [(c.kind, c.family, c.tokens, c.token_dim, c.feature_dim) for c in (encoder.config, _RELEASE)]
    if sizes[0] != sizes[1]:
        return ""
    unlike = unlike_aligned(image.shape[1], image.shape[2])
    if not unlike:
        return f"{image.shape[2]} x {image.shape[1]}, as aligned crops are."
    photo = "This photo does" if len(image) == 1 else "These photos do"
    hint = (
        f"{photo} not look like an aligned face ({unlike}), which the public encoder was trained on: the likeness may "
        "be poor. Put Detect Face Landmarks and Crop Subject in front, as the template first_portrait has them."
    )
    log.warning("Encode Subject: %s", hint)
    return hint


class NestedEncodeSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedEncodeSubject",
            display_name="Encode Subject",
            category=CATEGORY,
            description=(
                "Turns one or more photos of ONE subject into a subject that prompts can mention. Several photos "
                "(an image batch) are several views of the same subject. Look at the second output: it is what the "
                "encoder was shown."
            ),
            search_aliases=["nested attention", "subject", "reference", "identity", "face"],
            inputs=[
                NestedEncoder.Input("encoder", tooltip="From Load Nested Encoder."),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The vision model that the encoder was trained with; for the public one CLIP ViT-H/14, "
                    "the same file that IP-Adapter uses.",
                ),
                io.Image.Input("image", tooltip="Photos of the subject. A batch is several views of one subject."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What in the photo is the subject, in white. The rest is painted a neutral colour, and "
                    "crop centres on it. (Load Image's mask of a transparent PNG is the other way round: invert it.)",
                ),
                io.String.Input("placeholder", default="<person>", tooltip=PLACEHOLDER_TOOLTIP),
                io.String.Input("class_word", default="person", tooltip=CLASS_WORD_TOOLTIP),
                io.Combo.Input(
                    "fit",
                    options=["crop", "pad"],
                    default="crop",
                    tooltip="The encoder sees a square. crop: the middle of the photo (or around the mask); pad: all "
                    "of it, with bars. For the public face encoder use Crop Subject before this node.",
                ),
            ],
            outputs=[
                NestedSubject.Output(display_name="subject", tooltip="For Apply Subject, Merge or Save Subject."),
                io.Image.Output(display_name="seen", tooltip="The squares that the encoder was shown."),
            ],
        )

    @classmethod
    def execute(
        cls,
        encoder: HostEncoder,
        clip_vision: Any,
        image: torch.Tensor,
        placeholder: str,
        class_word: str,
        fit: str,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        placeholder, class_word = validate_placeholder(placeholder), validate_class_word(class_word)
        seen = prepare(image, mask, fit, clip_vision.image_size)
        _warn_of_many_views(len(seen), len(seen) * encoder.config.tokens, encoder)
        features = vision_features(encoder, clip_vision, seen)
        tokens = encode_tokens(encoder, features)
        subject = Subject(
            tokens=tokens,
            placeholder=placeholder,
            class_word=class_word,
            encoder=encoder.config.fingerprint,
            encoder_title=encoder.config.title,
            family=encoder.config.family,
            views=len(seen),
            provenance={
                "images": ",".join(content_hash(view) for view in image),
                "fit": fit,
                "image_features": encoder.config.image_features,
            },
        )
        views = tuple(ReferenceView(seen[i : i + 1], features[i : i + 1]) for i in range(len(seen)))
        hint = _look_at_crops(image, encoder)
        return io.NodeOutput(HostSubject(encoder, subject, views), seen, ui=ui.PreviewText(hint) if hint else None)


_VIEWS = [f"subject_{i}" for i in range(1, 17)]


class NestedMergeSubjects(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedMergeSubjects",
            display_name="Merge Subjects",
            category=CATEGORY,
            description=(
                "Makes one subject of several encodes of the SAME subject (front, side, another day). For two "
                "different subjects in one picture use one Apply Subject for each instead."
            ),
            search_aliases=["nested attention", "combine", "views", "average"],
            inputs=[
                io.Autogrow.Input(
                    "subjects",
                    template=io.Autogrow.TemplateNames(
                        NestedSubject.Input("subject", tooltip="One encode of the subject."), names=_VIEWS, min=2
                    ),
                    tooltip="Encodes of one subject, all from the same encoder. Placeholder and class word come from "
                    "the first.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="How much each counts, in order, separated by commas: 1, 1, 0.5. Empty: all the same. "
                    "A weight of 2 counts as if the view were there twice; 0 leaves it out.",
                ),
            ],
            outputs=[NestedSubject.Output(display_name="subject")],
        )

    @classmethod
    def execute(cls, subjects: dict[str, HostSubject], weights: str) -> io.NodeOutput:
        hosted = list(subjects.values())
        numbers = None
        if weights.strip():
            try:
                numbers = [float(part) for part in weights.split(",")]
            except ValueError as error:
                raise NestedAttentionError(
                    f'weights is "{weights}"; expected numbers separated by commas, one per subject, such as '
                    f'"{", ".join(["1"] * len(hosted))}", or nothing.'
                ) from error
        merged = merge_subjects([h.subject for h in hosted], numbers)
        _warn_of_many_views(merged.views, merged.tokens.shape[1], hosted[0].encoder)
        views: tuple[ReferenceView, ...] = ()
        if all(h.views for h in hosted):  # in the order of the tokens, which those of weight 0 are not among
            views = tuple(v for h, w in zip(hosted, numbers or [1.0] * len(hosted), strict=True) if w for v in h.views)
        return io.NodeOutput(HostSubject(hosted[0].encoder, merged, views))
