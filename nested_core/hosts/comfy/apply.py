"""Applying subjects: clones of MODEL and CLIP with values attached. Nothing else is changed, and nothing can leak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_patcher

from ...errors import NestedAttentionError
from ...subject import check_same_encoder
from ...words import fold
from .prompt import bind_clip
from .recording import Recording
from .run import APART_KEY, KEY, RECORDING_KEY, applications_of, stand_on
from .unet import check_encoder_fits, unet_layers_of
from .values import Apart, Application


def apply_subject(
    model: comfy.model_patcher.ModelPatcher, clip: Any, application: Application
) -> tuple[comfy.model_patcher.ModelPatcher, Any]:
    """Clones of MODEL and CLIP with one more subject; the originals are untouched.

    Raises NestedAttentionError: encoder and model don't fit; the placeholder is taken; the CLIP is unsupported; an
    unconditional subject of another encoder.
    """
    check_encoder_fits(application.source.encoder, model)
    if application.unconditional is not None:
        check_same_encoder(application.source.subject, application.unconditional.subject)
    applied = applications_of(model)
    if application.placeholder.key in {a.placeholder.key for a in applied}:
        raise NestedAttentionError(
            f"A subject with the placeholder {application.placeholder.text} is already applied to this model. Give "
            "each subject its own in Encode Subject or Load Subject, for example <anna> and <ben>, and use both in "
            "the prompt."
        )
    clip = bind_clip(clip, application.placeholder)
    return _with_attachment(model, KEY, (*applied, application)), clip


def adjust_subjects(
    model: comfy.model_patcher.ModelPatcher, placeholder: str, change: Callable[[Application], Application]
) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL in which the subject of a placeholder, or every subject where that is empty, is changed.

    Raises NestedAttentionError when there is no such subject, naming those that are there.
    """
    applied = applications_of(model)
    key = fold(placeholder.strip())
    if not applied:
        raise NestedAttentionError(
            "No subject is applied to this model: connect the model that comes out of Apply Subject."
        )
    if key and key not in {a.placeholder.key for a in applied}:
        raise NestedAttentionError(
            f"No subject with the placeholder {placeholder.strip()} is applied to this model. There "
            f"{'is' if len(applied) == 1 else 'are'} {', '.join(a.placeholder.text for a in applied)}. Leave the "
            "placeholder empty to adjust all of them."
        )
    changed = tuple(change(a) if key in ("", a.placeholder.key) else a for a in applied)
    return _with_attachment(model, KEY, changed)


def separate_subjects(model: comfy.model_patcher.ModelPatcher, apart: Apart) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL whose subjects, those before and those to come, do not look at each other in self-attention."""
    unet_layers_of(model)
    return _with_attachment(model, APART_KEY, apart)


def record_attention(model: comfy.model_patcher.ModelPatcher, recording: Recording) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL whose runs leave in `recording` where its subjects' words were looked at."""
    unet_layers_of(model)
    return _with_attachment(model, RECORDING_KEY, recording)


def _with_attachment(model: comfy.model_patcher.ModelPatcher, key: str, value: Any) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL with a value of ours, which the wrappers that stand on it read."""
    model = model.clone()
    model.set_attachments(key, value)
    stand_on(model)
    return model
