"""Blueprints: some nodes as one."""

from __future__ import annotations

from collections.abc import Callable

from .template import CLIP, ENCODER, FACE, MODEL, VISION, Template


def subject(t: Template) -> list[tuple[str, ...]]:
    t.column(330)
    t.node("encoder", "NestedEncoderLoader", widgets={"encoder_name": ENCODER})
    t.node("tower", "CLIPVisionLoader", widgets={"clip_name": VISION})
    t.column(330)
    t.node("checkpoint", "CheckpointLoaderSimple")
    t.node("photo", "LoadImage")
    t.encode("subject", ("photo", "IMAGE"), "<person>", "person")
    t.apply("apply", ("subject", "subject"), MODEL, CLIP)
    t.column(330)
    t.prompts(("apply", "clip"), "")
    t.size()
    t.sampler(("apply", "model"))
    t.node("seen", "PreviewImage", images=("subject", "seen"))
    return [
        ("encoder", "encoder_name"), ("tower", "clip_name"), ("subject", "placeholder"), ("subject", "class_word"),
        ("apply", "strength"),
    ]  # fmt: skip


def face(t: Template) -> list[tuple[str, ...]]:
    t.column(330)
    t.node("encoder", "NestedEncoderLoader", widgets={"encoder_name": ENCODER})
    t.node("tower", "CLIPVisionLoader", widgets={"clip_name": VISION})
    t.node("detector", "LoadMediaPipeFaceLandmarker", widgets={"model_name": FACE})
    t.column(330)
    t.node("checkpoint", "CheckpointLoaderSimple")
    t.node("photo", "LoadImage")
    t.encode("subject", t.face("face", "photo"), "<person>", "person")
    t.apply("apply", ("subject", "subject"), MODEL, CLIP)
    t.column(330)
    t.prompts(("apply", "clip"), "")
    t.size()
    t.sampler(("apply", "model"))
    t.node("seen", "PreviewImage", images=("subject", "seen"))
    return [
        ("encoder", "encoder_name"), ("tower", "clip_name"), ("detector", "model_name", "face_detection_model"),
        ("face", "face"), ("subject", "placeholder"), ("subject", "class_word"), ("apply", "strength"),
    ]  # fmt: skip


def two_subjects_in_one(t: Template) -> list[tuple[str, ...]]:
    t.column(330)
    t.node("encoder", "NestedEncoderLoader", widgets={"encoder_name": ENCODER})
    t.node("tower", "CLIPVisionLoader", widgets={"clip_name": VISION})
    t.column(330)
    t.node("checkpoint", "CheckpointLoaderSimple")
    t.node("first", "LoadImage")
    t.node("second", "LoadImage")
    t.encode("anna", ("first", "IMAGE"), "<anna>", "woman")
    t.encode("ben", ("second", "IMAGE"), "<ben>", "man")
    t.column(330)
    t.apply("apply_anna", ("anna", "subject"), MODEL, CLIP)
    t.apply("apply_ben", ("ben", "subject"), ("apply_anna", "model"), ("apply_anna", "clip"))
    t.column(330)
    t.prompts(("apply_ben", "clip"), "")
    t.size()
    t.sampler(("apply_ben", "model"))
    return [
        ("encoder", "encoder_name"), ("tower", "clip_name"),
        ("anna", "placeholder", "first placeholder"), ("anna", "class_word", "first class_word"),
        ("ben", "placeholder", "second placeholder"), ("ben", "class_word", "second class_word"),
    ]  # fmt: skip


#: File and title: (graph around it, what is inside).
ENCLOSED: dict[str, tuple[Callable[[Template], list[tuple[str, ...]]], list[str]]] = {
    "Your Subject (Nested Attention)": (subject, ["encoder", "tower", "subject", "apply"]),
    "Your Face (Nested Attention)": (
        face, ["encoder", "tower", "detector", "face_found", "face", "subject", "apply"],
    ),
    "Two Subjects (Nested Attention)": (
        two_subjects_in_one, ["encoder", "tower", "anna", "ben", "apply_anna", "apply_ben"],
    ),
}  # fmt: skip
