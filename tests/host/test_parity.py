"""The same weights and subjects in ComfyUI (nodes, stock sampler) and in diffusers predict the same noise.

That is what proves the layer table: a K̈/V̈ pair at another layer's address would still give a picture.
"""

from __future__ import annotations

import copy

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from kit.twin import diffusers_unet
from nested_core.encoder import EncoderConfig, NestedEncoder
from nested_core.hosts.diffusers import BoundSubject, nested_attention
from nested_core.resampler import ResamplerShape


def in_diffusers(subject, knob, places, rows):
    """The same subject for diffusers, which uses nested_core as a package of its own: built there, same weights."""
    config = subject.encoder.config
    fields = {k: getattr(config, k) for k in config.__dataclass_fields__ if k != "resampler"}
    module = NestedEncoder(EncoderConfig(**fields, resampler=ResamplerShape(**vars(config.resampler))))
    module.load_state_dict(subject.encoder.module.state_dict())
    knobs = {"strength": knob["strength"], "focus": knob.get("focus", 1.0)}
    knobs |= {"value_norm": knob.get("value_norm"), "alpha": knob.get("identity")}
    return BoundSubject(module, subject.subject.tokens, places, rows, **knobs)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_predicted_noise_agrees(request, family, count):
    studio = request.getfixturevalue(family)
    subjects = [
        studio.subject("<anna>", "woman", encoder=studio.make_encoder(1)),
        studio.subject("<rex>", "golden retriever", view=1, encoder=studio.make_encoder(2)),
    ][:count]
    knobs = [{"strength": 1.0}, {"strength": 0.7, "focus": 1.6, "value_norm": "match_per_head", "identity": 1.2}]
    model, clip = studio.model.clone(), studio.clip
    for subject, knob in zip(subjects, knobs, strict=False):
        model, clip = studio.apply_advanced(subject, model, clip, **knob)

    calls = []

    def watch(executor, x, timesteps, context, y, *args, **kwargs):
        out = executor(x, timesteps, context, y, *args, **kwargs)
        calls.append((x, timesteps, context, y, kwargs.get("transformer_options") or args[-1], out))
        return out

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", watch)
    prompt = "<anna> with <rex>, <anna> smiles" if count == 2 else "<anna> smiles" if count else "woman smiles"
    studio.sample(model, studio.encode(clip, prompt), studio.encode(clip, "blurry"), size=(16, 24))
    ((x, timesteps, context, y, options, expected),) = calls
    positive = options["cond_or_uncond"].index(0)

    bound = []
    places = {0: [], 1: [[1]], 2: [[1, 6], [3, 4]]}[count]
    for subject, knob, at in zip(subjects, knobs, places, strict=False):
        bound.append(in_diffusers(subject, knob, at, (positive, positive + 1)))
    unet = diffusers_unet(studio).to(x.device)
    before = copy.copy(unet.attn_processors)
    extra = {}
    if family == "sdxl":
        time_ids = torch.tensor([[128.0, 192.0, 0.0, 0.0, 128.0, 192.0]], device=x.device).expand(len(x), -1)
        extra = {"added_cond_kwargs": {"text_embeds": y[:, :1280], "time_ids": time_ids}}
    with torch.no_grad(), nested_attention(unet, bound):
        got = unet(x, timesteps, encoder_hidden_states=context, **extra).sample
        assert count == 0 or unet.attn_processors != before
    assert unet.attn_processors == before

    assert (got - expected).norm() / expected.norm() < 1e-4
    if count:  # and the subjects are what makes them agree
        with torch.no_grad():
            without = unet(x, timesteps, encoder_hidden_states=context, **extra).sample
        assert (without - expected).norm() / expected.norm() > 1e-3


def test_the_unconditional_subject_is_that_of_the_negative_rows(sdxl):
    """The class word in the negative prompt, and the placeholder: both are the black picture's, in those rows alone."""
    subject = sdxl.subject("<anna>", "woman")
    black = sdxl.subject("<black>", "woman", view=2)
    model, clip = sdxl.apply_advanced(subject, unconditional=black)
    calls = []

    def watch(executor, x, timesteps, context, y, *args, **kwargs):
        out = executor(x, timesteps, context, y, *args, **kwargs)
        calls.append((x, timesteps, context, y, kwargs.get("transformer_options") or args[-1], out))
        return out

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", watch)
    texts = sdxl.encode(clip, "a woman beside <anna>"), sdxl.encode(clip, "blurry woman, <anna>")
    sdxl.sample(model, *texts, size=(16, 24))
    ((x, timesteps, context, y, options, expected),) = calls
    positive, negative = (options["cond_or_uncond"].index(side) for side in (0, 1))
    knob = {"strength": 1.0}
    bound = [
        in_diffusers(subject, knob, [4], (positive, positive + 1)),
        in_diffusers(black, knob, [2, 4], (negative, negative + 1)),
    ]
    unet = diffusers_unet(sdxl).to(x.device)
    time_ids = torch.tensor([[128.0, 192.0, 0.0, 0.0, 128.0, 192.0]], device=x.device).expand(len(x), -1)
    extra = {"added_cond_kwargs": {"text_embeds": y[:, :1280], "time_ids": time_ids}}
    with torch.no_grad():
        with nested_attention(unet, bound):
            got = unet(x, timesteps, encoder_hidden_states=context, **extra).sample
        with nested_attention(unet, bound[:1]):
            without = unet(x, timesteps, encoder_hidden_states=context, **extra).sample
    assert (got - expected).norm() / expected.norm() < 1e-4
    assert (without - expected)[negative].norm() / expected[negative].norm() > 1e-3
    assert (without - expected)[positive].norm() / expected[positive].norm() < 1e-4
