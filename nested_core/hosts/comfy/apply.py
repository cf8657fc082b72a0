"""Applying subjects: clones of MODEL and CLIP with values attached. Nothing else is changed, and nothing can leak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_patcher

from ...errors import NestedAttentionError
from ...prompt import Placeholder
from ...subject import is_plain_word
from ...words import fold
from .prompt import bind_clip
from .recording import Recording
from .run import APART_KEY, KEY, RECORDING_KEY, applications_of, stand_on
from .unet import check_encoder_fits, unet_layers_of
from .values import Apart, Application, HostSubject


def apply_subject(
    model: comfy.model_patcher.ModelPatcher,
    clip: Any,
    application: Application,
    unconditional: HostSubject | None = None,
) -> tuple[comfy.model_patcher.ModelPatcher, Any]:
    """Clones of MODEL and CLIP with one more subject; the originals are untouched.

    unconditional: stands in the subject's place, and on its class word, in texts that are steered away from. Without
    it the subject itself does, where such a text mentions it.

    Raises NestedAttentionError: encoder and model don't fit; the placeholder is taken; the CLIP is unsupported; an
    unconditional subject of another encoder, or another one than the class word has already.
    """
    check_encoder_fits(application.source.encoder, model)
    applied = applications_of(model)
    if application.placeholder.key in {a.placeholder.key for a in applied if not a.negative_of}:
        raise NestedAttentionError(
            f"A subject with the placeholder {application.placeholder.text} is already applied to this model. Give "
            "each subject its own in Encode Subject or Load Subject, for example <anna> and <ben>, and use both in "
            "the prompt."
        )
    clip = bind_clip(clip, application.placeholder)
    applied = (*applied, application)
    if unconditional is not None:
        applied, clip = _with_unconditional(applied, clip, unconditional)
    return _with_attachment(model, KEY, applied), clip


def _with_unconditional(
    applied: tuple[Application, ...], clip: Any, source: HostSubject
) -> tuple[tuple[Application, ...], Any]:
    """The applications, and the CLIP, with one for the negative side of the last of them."""
    subject = applied[-1]
    encoders = [s.encoder.config.fingerprint for s in (source, subject.source)]
    if encoders[0] != encoders[1]:
        raise NestedAttentionError(
            f"The unconditional subject of {subject.placeholder.text} was made by another encoder. Encode it with the "
            "same Load Nested Encoder as the subject."
        )
    word = subject.placeholder
    if not is_plain_word(word.text):
        word = Placeholder(word.class_word, word.class_word, negative=True)
    key = subject.placeholder.key
    for i, other in enumerate(applied[:-1]):
        if other.placeholder.key == word.key:
            if not other.negative_of or other.source is not source:
                what = "another unconditional subject" if other.negative_of else "a subject"
                raise NestedAttentionError(
                    f"The word {word.text} has {what} on this model already. Connect one and the same Encode Subject "
                    "as unconditional to all subjects of a class word, and give no subject that word as placeholder."
                )
            shared = replace(other, negative_of=(*other.negative_of, key))
            return (*applied[:i], shared, *applied[i + 1 :]), clip
    if word.key != key:
        clip = bind_clip(clip, word)
    negative = replace(subject, source=source, placeholder=word, negative_of=(key,), skip_unmentioned=True)
    return (*applied, negative), clip


def adjust_subjects(
    model: comfy.model_patcher.ModelPatcher, placeholder: str, change: Callable[[Application], Application]
) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL in which the subject of a placeholder, or every subject where that is empty, is changed.

    Raises NestedAttentionError when there is no such subject, naming those that are there.
    """
    applied = applications_of(model)
    subjects = [a.placeholder for a in applied if not a.negative_of]
    key = fold(placeholder.strip())
    if not applied:
        raise NestedAttentionError(
            "No subject is applied to this model: connect the model that comes out of Apply Subject."
        )
    if key and key not in {p.key for p in subjects}:
        raise NestedAttentionError(
            f"No subject with the placeholder {placeholder.strip()} is applied to this model. There "
            f"{'is' if len(subjects) == 1 else 'are'} {', '.join(p.text for p in subjects)}. Leave the "
            "placeholder empty to adjust all of them."
        )
    changed = tuple(change(a) if not key or key in (a.negative_of or a.keys) else a for a in applied)
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
