"""Subjects beside what else an artist's graph has: the rows of docs/compatibility.md, run in the real host.

A test with the mark `works_with(group, what, how)` is a row of that table; `scripts/compatibility.py` writes it.
"""

from __future__ import annotations

import copy
import os

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.ldm.modules.attention as host_attention
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.supported_models
import folder_paths
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from safetensors.torch import save_file

from kit import random_models
from kit.studio import Studio

SIZE = (16, 16)


@pytest.fixture(scope="module")
def studio(pack, clip_vision, photo):
    """A small SD 1.5, wider towards the middle: some nodes go by the widths, or act on a grid that SDXL skips."""
    return Studio(pack, "sd15", clip_vision, photo, channels=32, tapered=True)


@pytest.fixture(scope="module")
def anna(studio):
    return studio.subject("<anna>", "woman")


@pytest.fixture(scope="module")
def scene(studio, anna):
    """(patched model, its CLIP, positive, negative) with one subject."""
    model, clip = studio.apply(anna)
    return model, clip, studio.encode(clip, "a photo of <anna> in a garden"), studio.encode(clip, "blurry")


@pytest.fixture(scope="module")
def plain_pictures(studio, scene):
    """plain_pictures(steps) -> (with the subject, without), from models that nothing else is done to."""
    made = {}

    def of(steps):
        if steps not in made:
            made[steps] = [studio.sample(m, *scene[2:], size=SIZE, steps=steps) for m in (scene[0], studio.model)]
        return made[steps]

    return of


def row(group, what, how, *values):
    """A parametrised case that is a row of the table."""
    return pytest.param(*values, marks=pytest.mark.works_with(group, what, how), id=what)


# -- patches of the model -------------------------------------------------------------------------------------------


def _lora_file(studio):
    """A LoRA of the usual kind, on self- and cross-attention of two layers."""
    path = os.path.join(folder_paths.get_folder_paths("loras")[0], f"{studio.family}.safetensors")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    unet, weights = studio.model.model.diffusion_model.state_dict(), {}
    for block in ("input_blocks.4.1", "output_blocks.5.1"):
        for layer in ("attn1.to_q", "attn2.to_k", "attn2.to_v"):
            name = f"{block}.transformer_blocks.0.{layer}"
            rows, columns = unet[f"{name}.weight"].shape
            stem = "lora_unet_" + name.replace(".", "_")
            weights[f"{stem}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.2
            weights[f"{stem}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
            weights[f"{stem}.alpha"] = torch.tensor(4.0)
    save_file(weights, path)
    return os.path.basename(path)


def _hypernetwork_file():
    path = os.path.join(folder_paths.get_folder_paths("hypernetworks")[0], "net.pt")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    generator = torch.Generator().manual_seed(2)

    def part():
        shapes = {"linear.0.weight": (64, 768), "linear.0.bias": (64,), "linear.1.weight": (768, 64)}
        made = {k: torch.randn(*shape, generator=generator) * 0.05 for k, shape in shapes.items()}
        return {**made, "linear.1.bias": torch.zeros(768)}

    torch.save({768: [part(), part()]}, path)
    return "net.pt"


def _hypernetwork(node, model):
    return node("HypernetworkLoader", model=model, hypernetwork_name=_hypernetwork_file())


def _multiply(node, model):
    model = node("UNetSelfAttentionMultiply", model=model, q=1.1, k=0.9, v=1.0, out=1.0)
    return node("UNetCrossAttentionMultiply", model=model, q=1.0, k=1.1, v=1.2, out=0.9)


def _simple(node_id, **inputs):
    return lambda node, model: node(node_id, model=model, **inputs)


CACHE = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0}

CACHES = [_simple("EasyCache", **CACHE), _simple("LazyCache", **CACHE)]

PATCHES = [
    row("Weights", "LoRA", "before or after", _simple("LoraLoaderModelOnly", lora_name="sd15.safetensors",
                                                     strength_model=1.0)),
    row("Weights", "Hypernetwork", "before or after", _hypernetwork),
    row("Speed", "HyperTile", "before or after", _simple("HyperTile", tile_size=32)),
    row("Speed", "Token merging (ToMe)", "before or after", _simple("TomePatchModel", ratio=0.3)),
    row("Speed", "EasyCache", "before or after", CACHES[0]),
    row("Speed", "LazyCache", "before or after", CACHES[1]),
    row("Picture", "FreeU", "before or after", _simple("FreeU")),
    row("Picture", "FreeU v2", "before or after", _simple("FreeU_V2")),
    row("Picture", "DeepShrink (Kohya)", "before or after", _simple("PatchModelAddDownscale", block_number=4)),
    row("Picture", "UNet self- and cross-attention multiply", "before or after", _multiply),
    row("Guidance", "Perturbed-Attention Guidance (PAG)", "before or after", _simple("PerturbedAttentionGuidance")),
    row("Guidance", "Self-Attention Guidance (SAG)", "before or after", _simple("SelfAttentionGuidance")),
    row("Guidance", "Normalized Attention Guidance (NAG)", "before or after", _simple("NAGuidance")),
    row("Guidance", "RescaleCFG", "before or after", _simple("RescaleCFG")),
    row("Guidance", "TCFG", "before or after", _simple("TCFG")),
    row("Guidance", "APG", "before or after", _simple("APG", eta=0.5)),
    row("Guidance", "FreSca", "before or after", _simple("FreSca")),
    row("Guidance", "Mahiro", "before or after", _simple("Mahiro")),
    row("Guidance", "Epsilon Scaling", "before or after", _simple("Epsilon Scaling", scaling_factor=1.05)),
    row("Sampling", "ModelSamplingDiscrete (v-prediction, zero-terminal SNR)", "before or after",
        _simple("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True)),
    row("Sampling", "ModelSamplingContinuousEDM", "before or after", _simple("ModelSamplingContinuousEDM")),
]  # fmt: skip


@pytest.mark.parametrize("patch", PATCHES)
def test_patches_before_and_after_make_the_same_picture(node, studio, anna, scene, plain_pictures, patch):
    """And strength 0 is the patched model alone, bit for bit; nothing stays on the models they came from."""
    model, _, positive, negative = scene
    _lora_file(studio)
    steps = 4 if patch in CACHES else 2  # caches begin after the second step

    def picture(model):
        return studio.sample(model, positive, negative, size=SIZE, steps=steps)

    with_subject, without = plain_pictures(steps)
    after = picture(patch(node, model))
    alone = picture(patch(node, studio.model))
    assert after.isfinite().all()
    assert not torch.equal(alone, without), "the other node does not act, so this shows nothing"
    assert not torch.equal(after, alone), "the subject does not act"
    assert torch.equal(after, picture(studio.apply(anna, model=patch(node, studio.model))[0]))
    assert torch.equal(picture(patch(node, studio.apply(anna, strength=0.0)[0])), alone)
    assert torch.equal(picture(model), with_subject)


# -- other packs' attention -------------------------------------------------------------------------------------------


def _plain_attention(q, k, v, extra_options):
    return optimized_attention(q, k, v, extra_options["n_heads"])


class _AddsToWhatItFinds:
    """An attn2 replacement of the IPAdapter, InstantID and PuLID kind: the next pack adds its own to it, in place."""

    def __init__(self, amount):
        self.amounts = [amount]

    def add(self, amount):
        self.amounts.append(amount)

    def __call__(self, q, k, v, extra_options):
        return _plain_attention(q, k, v, extra_options) + sum(self.amounts)


def _add_or_set(model, amount):
    """What those packs do: `.add` on what is there, else put one there."""
    model = model.clone()
    for key in (("input", 4, 0), ("middle", 0, 3)):
        there = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {}).get(key)
        if there is None:
            model.set_model_attn2_replace(_AddsToWhatItFinds(amount), *key)
        else:
            there.add(amount)
    return model


def _function(model):
    model = model.clone()
    model.set_model_attn2_replace(lambda q, k, v, e: _plain_attention(q, k, v * 1.3, e), "input", 4, 0)
    return model


def _whole_block(model):
    """At the address without the transformer's index: for those of a block's layers that have none of their own."""
    model = model.clone()
    model.set_model_attn2_replace(_AddsToWhatItFinds(0.1), "output", 5)
    return model


def _lists(model):
    """attn2_patch and attn2_output_patch, as style and layer-weight packs use them."""
    model = model.clone()
    model.set_model_attn2_patch(lambda q, k, v, extra_options: (q, k * 1.1, v))
    model.set_model_attn2_output_patch(lambda out, extra_options: out * 1.05)
    return model


def _override(model):
    """Another attention function for the whole model, as attention-backend nodes set it."""
    model = model.clone()
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda func, q, k, v, *args, **kwargs: (
        func(q, k, v, *args, **kwargs) * 1.02
    )
    return model


OTHERS = [
    row("Other packs", "attn2 replacement, a function", "before or after; called for the first term", _function),
    row("Other packs", "attn2 replacement with .add (IPAdapter, InstantID, PuLID kind)",
        "before or after; called for the first term", lambda model: _add_or_set(model, 0.05)),
    row("Other packs", "Two packs that .add to each other", "before or after",
        lambda model: _add_or_set(_add_or_set(model, 0.05), 0.1)),
    row("Other packs", "attn2 replacement of a whole block", "before or after", _whole_block),
    row("Other packs", "attn2_patch and attn2_output_patch", "before or after", _lists),
    row("Other packs", "optimized_attention_override", "before or after; the nested attention uses it", _override),
]  # fmt: skip


@pytest.mark.parametrize("foreign", OTHERS)
def test_other_packs_patches_stay_in_the_first_term(studio, anna, scene, foreign):
    """The same picture in either order, no leak into sibling branches or the next run, exact at strength 0."""
    model, _, positive, negative = scene

    def picture(model):
        return studio.sample(model, positive, negative, size=(8, 8))

    base, plain = picture(model), picture(studio.model)
    theirs = foreign(studio.model)
    alone = picture(theirs)
    assert not torch.equal(alone, plain), "the other pack does not act, so this shows nothing"
    after, before = foreign(model), studio.apply(anna, model=theirs)[0]
    both = picture(after)
    assert not torch.equal(both, alone), "the subject does not act"
    assert torch.equal(both, picture(before))
    assert torch.equal(both, picture(after)), "the second run differs"
    sibling = model.clone()
    assert torch.equal(picture(sibling), base) and torch.equal(picture(model), base)
    assert torch.equal(picture(theirs), alone) and torch.equal(picture(studio.model), plain)
    assert torch.equal(picture(foreign(studio.apply(anna, strength=0.0)[0])), alone)


@pytest.mark.works_with("Other packs", "Clones of one model, deep-copied or shared", "what is added to one stays there")
def test_clones_do_not_see_what_is_added_to_one_of_them(studio, scene):
    """A pack that mutates what it finds finds nothing of ours to mutate: branches of a subject stay apart."""
    model, _, positive, negative = scene

    def picture(model):
        return studio.sample(model, positive, negative, size=(8, 8))

    base = picture(model)
    one, other = model.clone(), model.clone()
    changed = _add_or_set(one, 0.05)
    assert not torch.equal(picture(changed), base)
    assert torch.equal(picture(other), base) and torch.equal(picture(model), base)
    deep = copy.deepcopy(model.model_options)  # as older hosts do with each clone
    assert deep["transformer_options"].keys() == model.model_options["transformer_options"].keys()
    assert not model.model_options["transformer_options"].get("patches_replace", {}).get("attn2")


def _negpip(model, clip):
    """A pack of the NegPip kind: a row for K and one for V per token, whose sign is that of the weight."""
    model, clip = model.clone(), clip.clone()

    def interleaved(part):
        stock = type(part).encode_token_weights

        def encode(pairs):
            keys, pooled, *rest = stock(part, [[(t, abs(w)) for t, w in section] for section in pairs])
            signs = torch.tensor([[-1.0 if w < 0 else 1.0 for _, w in section] for section in pairs]).flatten()
            values = keys * signs[None, :, None]
            return torch.stack((keys, values), 2).flatten(1, 2), pooled, *rest

        return encode

    for name in ("clip_l", "clip_g"):
        clip.patcher.add_object_patch(f"{name}.encode_token_weights", interleaved(getattr(clip.cond_stage_model, name)))
    model.set_model_attn2_patch(lambda q, k, v, extra_options: (q, k[:, 0::2], v[:, 1::2]))
    return model, clip


@pytest.mark.works_with("Other packs", "NegPip (doubled K and V)", "before or after, prompts of unequal length too")
def test_doubled_keys_and_values(node, sdxl, fired):
    anna = sdxl.subject("<anna>", "woman")
    model, clip = sdxl.apply(anna)
    positive, negative = sdxl.encode(clip, "a photo of <anna> in a garden"), sdxl.encode(clip, "blurry")
    expected = sdxl.sample(model, positive, negative, size=(8, 8))
    orders = [_negpip(model, clip), sdxl.apply(anna, *_negpip(sdxl.model, sdxl.clip))]
    for doubled, encoder in orders:
        fired.clear()
        one, other = sdxl.encode(encoder, "a photo of <anna> in a garden"), sdxl.encode(encoder, "blurry")
        assert one[0][0].shape[1] == 154
        # Without negative weights NegPip changes nothing: the picture is that of the plain prompt.
        torch.testing.assert_close(sdxl.sample(doubled, one, other, size=(8, 8)), expected)
        assert {tuple(call.terms[0].places.tolist()) for call in fired} == {(4,)}

        fired.clear()
        sdxl.sample(doubled, one, sdxl.encode(encoder, "tree " * 100), size=(8, 8))
        assert {tuple(call.terms[0].places.tolist()) for call in fired} == {(4, 81)}, "the host repeats the shorter"

        fired.clear()
        joined = node("ConditioningConcat", conditioning_to=other, conditioning_from=one)
        sdxl.sample(doubled, joined, other, size=(8, 8))
        assert {tuple(call.terms[0].places.tolist()) for call in fired} == {(81,)}

        turned = sdxl.encode(encoder, "a photo of <anna> in a (garden:-1.0)")
        assert not torch.equal(sdxl.sample(doubled, turned, other, size=(8, 8)), expected)


# -- conditioning, sampling -------------------------------------------------------------------------------------------


def _controlnet(studio):
    """A ControlNet with random weights that fits the studio's model, as the host's loader makes it."""
    shape = {**studio.model.model.model_config.unet_config, "hint_channels": 3}
    shape = {k: v for k, v in shape.items() if k not in ("out_channels", "transformer_depth_output")}
    net = comfy.cldm.cldm.ControlNet(**shape | {"dtype": torch.float32}, operations=comfy.ops.manual_cast)
    net.load_state_dict(random_models.randomise(net.state_dict()))
    return comfy.controlnet.ControlNet(net, load_device=studio.model.load_device)


@pytest.mark.works_with("Conditioning", "ControlNet", "applied to the prompts")
def test_controlnet(node, studio, anna, scene, fired, photo):
    model, _, positive, negative = scene
    control = _controlnet(studio)
    pair = node("ControlNetApplyAdvanced", all_outputs=True, positive=positive, negative=negative,
                control_net=control, image=photo, strength=1.0, start_percent=0.0, end_percent=1.0)  # fmt: skip
    plain = studio.sample(studio.model, positive, negative, size=SIZE)
    alone = studio.sample(studio.model, *pair, size=SIZE)
    assert not torch.equal(alone, plain)
    fired.clear()
    both = studio.sample(model, *pair, size=SIZE)
    assert len(fired) == 16
    assert not torch.equal(both, alone) and not torch.equal(both, studio.sample(model, positive, negative, size=SIZE))
    zero, _ = studio.apply(anna, strength=0.0)
    assert torch.equal(studio.sample(zero, *pair, size=SIZE), alone)


@pytest.mark.works_with("Conditioning", "GLIGEN", "text boxes, on SD 1.5")
def test_gligen(node, studio, fired):
    shapes = {
        "position_net.null_positive_feature": (768,),
        "position_net.null_position_feature": (64,),
        "position_net.linears.0.weight": (512, 768 + 64),
        "position_net.linears.2.weight": (512, 512),
        "position_net.linears.4.weight": (768, 512),
    }
    shapes |= {f"position_net.linears.{i}.bias": (n,) for i, n in ((0, 512), (2, 512), (4, 768))}
    for layer in studio.pack.unet.unet_layers_of(studio.model)[1]:
        kind, number, _ = layer.block
        stem = "middle_block.1" if kind == "middle" else f"{kind}_blocks.{number}.1"
        fuser = comfy.gligen.GatedSelfAttentionDense(layer.width, 768, 8, layer.width // 8)
        shapes |= {f"{stem}.transformer_blocks.0.fuser.{k}": v.shape for k, v in fuser.state_dict().items()}
    weights = random_models.randomise({k: torch.empty(shape, device="meta") for k, shape in shapes.items()})
    for name in weights:
        if name.endswith(("alpha_attn", "alpha_dense")):
            weights[name] = torch.tensor(0.5)
    gligen = comfy.model_patcher.ModelPatcher(
        comfy.gligen.load_gligen(weights), load_device=studio.model.load_device, offload_device=torch.device("cpu")
    )
    model, clip = studio.apply()
    positive, negative = studio.encode(clip, "photo of <person>"), studio.encode(clip, "")
    boxed = node("GLIGENTextBoxApply", conditioning_to=positive, clip=clip, gligen_textbox_model=gligen, text="a hat",
                 width=64, height=64, x=0, y=0)  # fmt: skip
    plain = studio.sample(studio.model, positive, negative, size=SIZE)
    alone = studio.sample(studio.model, boxed, negative, size=SIZE)
    assert not torch.equal(alone, plain)
    fired.clear()
    both = studio.sample(model, boxed, negative, size=SIZE)
    assert len(fired) == 16
    assert not torch.equal(both, alone) and not torch.equal(both, studio.sample(model, positive, negative, size=SIZE))
    zero, _ = studio.apply(strength=0.0)
    assert torch.equal(studio.sample(zero, boxed, negative, size=SIZE), alone)


@pytest.mark.works_with("Conditioning", "LoRA by hooks, with keyframes", "on the prompts; scheduled over the steps")
def test_hook_lora(node, studio, anna, scene, fired):
    model, _, positive, negative = scene
    hooks = node("CreateHookLoraModelOnly", lora_name=_lora_file(studio), strength_model=1.0)
    frames = node("CreateHookKeyframesInterpolated", strength_start=0.0, strength_end=1.0, interpolation="linear",
                  start_percent=0.0, end_percent=1.0, keyframes_count=3)  # fmt: skip
    hooks = node("SetHookKeyframes", hooks=hooks, hook_kf=frames)
    pair = node("PairConditioningSetProperties", all_outputs=True, positive_NEW=positive, negative_NEW=negative,
                strength=1.0, set_cond_area="default", hooks=hooks)  # fmt: skip
    plain = studio.sample(studio.model, positive, negative, size=(8, 8), steps=3)
    alone = studio.sample(studio.model, *pair, size=(8, 8), steps=3)
    assert not torch.equal(alone, plain)
    fired.clear()
    both = studio.sample(model, *pair, size=(8, 8), steps=3)
    assert len(fired) == 3 * 16
    assert not torch.equal(both, alone)
    zero, _ = studio.apply(anna, strength=0.0)
    assert torch.equal(studio.sample(zero, *pair, size=(8, 8), steps=3), alone)
    assert torch.equal(studio.sample(studio.model, positive, negative, size=(8, 8), steps=3), plain), (
        "weights came back"
    )


@pytest.mark.works_with("Conditioning", "CLIP hooks and prompts by time range", "each prompt binds in its steps")
def test_prompt_scheduling_by_hooks(node, studio, scene, fired):
    """A CLIP with hooks encodes a schedule of prompts, each valid for a range of the sampling."""
    model, clip, _, negative = scene
    hooks = node("CreateHookLora", lora_name=_lora_file(studio), strength_model=1.0, strength_clip=1.0)
    scheduled = node("SetClipHooks", clip=clip, hooks=hooks, apply_to_conds=True, schedule_clip=True)
    early = node("ConditioningTimestepsRange", all_outputs=True, start_percent=0.0, end_percent=0.5)
    first, second = studio.encode(scheduled, "<anna>"), studio.encode(scheduled, "an etching of <anna>")
    first = node("ConditioningSetProperties", cond_NEW=first, strength=1.0, set_cond_area="default", timesteps=early[0])
    both = node("ConditioningSetPropertiesAndCombine", cond=first, cond_NEW=second, strength=1.0,
                set_cond_area="default", timesteps=early[2])  # fmt: skip
    fired.clear()
    studio.sample(model, both, negative, size=(8, 8), steps=4)
    places = [tuple(call.terms[0].places.tolist()) for call in fired[::16]]
    assert places[0] == (1,) and places[-1] == (4,)
    assert set(places) == {(1,), (4,)}


@pytest.mark.works_with("Model", "ModelMergeSimple", "merged before or after, with a second checkpoint")
def test_merged_models(node, studio, anna, scene):

    model, _, positive, negative = scene
    other = studio.make_model()
    weights = {f"diffusion_model.{k}": v for k, v in other.model.diffusion_model.state_dict().items()}
    for value in weights.values():
        value.mul_(1.05)
    before = node("ModelMergeSimple", model1=model, model2=other, ratio=0.5)
    after, _ = studio.apply(anna, model=node("ModelMergeSimple", model1=studio.model, model2=other, ratio=0.5))
    first = studio.sample(before, positive, negative, size=(8, 8))
    assert torch.equal(first, studio.sample(after, positive, negative, size=(8, 8)))
    assert not torch.equal(first, studio.sample(model, positive, negative, size=(8, 8)))


@pytest.mark.works_with("Sampling", "Image to image (denoise below 1)", "the window counts the whole noise schedule")
def test_image_to_image(node, studio, anna, fired):
    """At denoise 0.5 only the later half of the schedule is sampled: a subject that ends before does not act."""
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}

    def run(**inputs):
        fired.clear()
        model, clip = studio.apply(anna, **inputs)
        result = node("KSampler", model=model, seed=1, steps=4, cfg=4.0, sampler_name="euler", scheduler="normal",
                      positive=studio.encode(clip, "<anna>"), negative=studio.encode(clip, ""), latent_image=latent,
                      denoise=0.5)  # fmt: skip
        return result["samples"], len(fired) // 16

    whole, steps = run()
    assert steps == 4
    late, steps = run(start_percent=0.7)
    assert 0 < steps < 4
    early, steps = run(end_percent=0.3)
    assert steps == 0
    assert not torch.equal(whole, late) and not torch.equal(late, early)


@pytest.mark.works_with("Sampling", "Inpainting by a noise mask, differential diffusion", "what is masked out stays")
def test_inpainting(node, studio, scene, fired):
    model, _, positive, negative = scene
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    masked = node("SetLatentNoiseMask", samples=latent, mask=mask)
    for differential in (False, True):
        fired.clear()
        used = node("DifferentialDiffusion", model=model) if differential else model
        out = node("KSampler", model=used, seed=1, steps=2, cfg=4.0, sampler_name="euler", scheduler="normal",
                   positive=positive, negative=negative, latent_image=masked, denoise=1.0)["samples"]  # fmt: skip
        assert len(fired) == 2 * 16
        assert not torch.allclose(out[..., 4:], latent["samples"][..., 4:])
        if not differential:
            torch.testing.assert_close(out[..., :4], latent["samples"][..., :4], rtol=1e-4, atol=1e-4)


@pytest.mark.works_with("Sampling", "Inpainting models (9 channels)", "with InpaintModelConditioning's inputs")
def test_inpaint_models(studio, anna, fired):
    config = comfy.supported_models.SD15({**studio.model.model.model_config.unet_config, "in_channels": 9})
    config.set_inference_dtype(torch.float32, None)
    inner = config.get_model({}, device=torch.device("cpu"))
    inner.set_inpaint()
    inner.diffusion_model.load_state_dict(random_models.randomise(inner.diffusion_model.state_dict()))
    inpaint = comfy.model_patcher.ModelPatcher(inner, studio.model.load_device, torch.device("cpu"))
    model, clip = studio.apply(anna, model=inpaint)
    pixels = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    values = {"concat_latent_image": pixels, "concat_mask": torch.ones(1, 1, 64, 64)}
    positive, negative = (
        [[cond, {**extra, **values}] for cond, extra in studio.encode(clip, text)] for text in ("<anna>", "")
    )
    picture = studio.sample(model, positive, negative, size=(8, 8))
    assert len(fired) == 16
    assert not torch.equal(picture, studio.sample(inpaint, positive, negative, size=(8, 8)))


@pytest.mark.works_with("Sampling", "Context windows over a batch", "masks and prompts of each picture go with it")
def test_context_windows_over_images(node, studio, anna, fired):
    """Four pictures in windows of two, each with a mask of its own; a window of all is the plain batch."""
    masks = torch.zeros(4, 64, 64)
    for i in range(4):
        masks[i, :, 16 * i : 16 * (i + 1)] = 1
    model, clip = studio.apply(anna, mask=masks)
    one, other = studio.encode(clip, "<anna>"), studio.encode(clip, "a photo of <anna>")
    texts = [one, other, one, other]
    positive = [
        [torch.cat([t[0][0] for t in texts]), {"pooled_output": torch.cat([t[0][1]["pooled_output"] for t in texts])}]
    ]
    negative = studio.encode(clip, "")
    plain = studio.sample(model, positive, negative, size=(8, 8), batch=4)
    seen = _acting(fired)
    fired.clear()
    windowed = node("ContextWindowsManual", model=model, context_length=2, context_overlap=0, dim=0)
    picture = studio.sample(windowed, positive, negative, size=(8, 8), batch=4)
    assert _acting(fired) == seen == {((0,), (1,)), ((1,), (4,)), ((2,), (1,)), ((3,), (4,))}
    torch.testing.assert_close(picture, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.works_with("Sampling", "Context windows over the picture", "masks are cut to the window")
def test_context_windows_over_columns(node, studio, anna, fired):
    mask = torch.zeros(1, 64, 128)
    mask[..., 64:] = 1  # the right half: the second window alone
    model, clip = studio.apply(anna, mask=mask)
    # Newer hosts put a column of the window before in front, which is black here.
    exact = {"causal_window_fix": False}
    windowed = node("ContextWindowsManual", where_known=exact, model=model, context_length=8, context_overlap=0, dim=3)
    studio.sample(windowed, studio.encode(clip, "<anna>"), studio.encode(clip, ""), size=(8, 16))
    amounts = [call.delta.abs().amax(-1).flatten() for call in fired]
    first, second = amounts[:16], amounts[16:]
    assert len(second) == 16
    assert all((a == 0).all() for a in first) and all((a > 0).all() for a in second)


def _acting(calls):
    """{(columns of the 4 x 4 grid in which a picture is changed, places)} over the calls of those layers."""
    seen = set()
    for call in calls:
        if call.q[1] != 16:
            continue
        for image in call.delta.abs().amax(-1):
            columns = image.unflatten(0, (4, 4)).amax(0).nonzero().flatten().tolist()
            seen.add((tuple(columns), tuple(call.terms[0].places.tolist())))
    return seen


@pytest.mark.works_with("Sampling", "Dual Model CFG Guider", "the subject on the positive model")
def test_dual_model_guider(node, studio, scene, fired):
    model, _, positive, negative = scene
    guider = node(
        "DualModelGuider", model=model, model_negative=studio.model, positive=positive, negative=negative, cfg=4.0
    )
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([10.0, 0.0])
    latent = torch.zeros(1, 4, 8, 8)
    guider.sample(comfy.sample.prepare_noise(latent, 0), latent, sampler, sigmas, disable_pbar=True)
    assert [call.q[0] for call in fired] == [1] * 16


# -- the host itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        row("Host", "--use-split-cross-attention", "", "attention_split"),
        row("Host", "--use-quad-cross-attention", "", "attention_sub_quad"),
        row("Host", "--use-pytorch-cross-attention", "", "attention_pytorch"),
        row("Host", "basic attention", "", "attention_basic"),
    ],
)
def test_attention_backends(studio, scene, monkeypatch, function):
    """What the flags choose: the function by which the host, and so the nested attention, computes attention."""
    model, _, positive, negative = scene
    expected = studio.sample(model, positive, negative, size=(8, 8))
    chosen, lengths = getattr(host_attention, function), set()

    def counted(q, k, *args, **kwargs):
        lengths.add(k.shape[1])
        return chosen(q, k, *args, **kwargs)

    monkeypatch.setattr(host_attention, "optimized_attention", counted)
    torch.testing.assert_close(studio.sample(model, positive, negative, size=(8, 8)), expected, rtol=1e-3, atol=1e-3)
    assert {8, 77} <= lengths  # the subject's tokens, and the text's
