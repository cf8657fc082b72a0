"""What subjects cost and leave behind: encoders that the host moves, copies per device, and nothing after a run."""

from __future__ import annotations

import gc
from collections import Counter
from itertools import cycle

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import pytest
import torch
from torch._subclasses import FakeTensor


def living() -> tuple[Counter, int]:
    """Tensors alive by shape and type, and the bytes of their storages."""
    gc.collect()
    tensors = [
        t
        for t in gc.get_objects()
        # What newer PyTorch keeps of a compilation are pretended tensors, without memory.
        if issubclass(type(t), torch.Tensor) and not issubclass(type(t), FakeTensor) and t.layout == torch.strided
    ]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return Counter((tuple(t.shape), t.dtype) for t in tensors), sum(storages.values())


@pytest.fixture
def device_memory():
    """Bytes on a CUDA device, where there is one."""

    def measure() -> int:
        if not torch.cuda.is_available():
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    return measure


def test_twenty_runs_end_with_the_memory_they_began_with(pack, sd15, device_memory):
    """Seeds, branches, strengths, two subjects, interrupts and errors; then the first picture again."""
    anna = sd15.subject("<anna>", "woman")
    ben = sd15.subject("<ben>", "man", view=3)
    one, clip = sd15.apply(anna)
    both, clip = sd15.apply(ben, one, clip)
    branch, _ = sd15.apply(ben, strength=0.5)
    masked, _ = sd15.apply(anna, mask=torch.ones(1, 64, 64).tril())
    idle, _ = sd15.apply(anna, strength=0.0)
    texts = {text: sd15.encode(clip, text) for text in ("<anna>", "<ben> alone", "<anna> and <ben>", "blurry")}

    def stops(*args):
        raise comfy.model_management.InterruptProcessingException

    def breaks(*args):
        raise RuntimeError("another node's fault")

    # (model, prompt, seed, what a patch in the middle of the U-Net does)
    kinds = [
        (one, "<anna>", 3, None),
        (one, "<anna>", 4, None),
        (both, "<anna> and <ben>", 3, None),
        (branch, "<ben> alone", 3, None),
        (both, "<anna> and <ben>", 3, stops),
        (masked, "<anna>", 5, None),
        (idle, "<anna>", 3, None),
        (both, "<anna> and <ben>", 4, breaks),
        (one, "<ben> alone", 3, None),  # forgets its subject: refused
    ]

    def run(model, text, seed, fault):
        if fault:
            model = model.clone()
            model.set_model_attn1_patch(fault)
        return sd15.sample(model, texts[text], texts["blurry"], seed=seed)

    first = run(*kinds[0])
    for kind in kinds[1:4]:  # what is made once: the host's caches, kernels' buffers
        run(*kind)
    before, on_device = living(), device_memory()
    ended = Counter()
    for _, kind in zip(range(20), cycle(kinds), strict=False):
        try:
            run(*kind)
            ended["finished"] += 1
        except (
            comfy.model_management.InterruptProcessingException,
            RuntimeError,
            pack.errors.NestedAttentionError,
        ) as e:
            ended[type(e).__name__] += 1
    assert ended == {
        "finished": 14, "InterruptProcessingException": 2, "RuntimeError": 2, "NestedAttentionError": 2
    }  # fmt: skip
    after = living()
    assert after[0] == before[0], after[0] - before[0]
    assert after[1] == before[1]
    assert device_memory() == on_device
    assert torch.equal(run(*kinds[0]), first)


@pytest.mark.works_with("Host", "--lowvram, --novram", "the encoder may stay off the device; tried on a CPU")
def test_an_encoder_that_is_not_wholly_on_the_device_gives_the_same(pack, sdxl, monkeypatch, watch):
    """As with --lowvram and --novram: the host puts few weights on the device, the rest is cast as it is used."""
    encoder = sdxl.make_encoder()
    model, clip = sdxl.apply(sdxl.subject(encoder=encoder))
    positive, negative = sdxl.encode(clip, "<person>"), sdxl.encode(clip, "")
    whole = sdxl.sample(model, positive, negative)
    load, partly = comfy.model_management.load_models_gpu, []

    def load_little(models, *args, **kwargs):
        load(models, *args, **kwargs)
        if encoder.patcher in models:
            encoder.patcher.unpatch_model(encoder.patcher.offload_device)
            encoder.patcher.load(encoder.patcher.load_device, lowvram_model_memory=1)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_little)
    watch(pack.encoder.NestedEncoder, "keys_values", lambda said: partly.append(said["self"].model_lowvram))
    again, _ = sdxl.apply(sdxl.subject(encoder=encoder))  # of the same subject K̈ and V̈ are there
    assert torch.equal(sdxl.sample(again, positive, negative), whole)
    assert partly == [True] * 70


def test_a_run_counts_the_encoder_among_the_host_s_models(sdxl):
    encoder = sdxl.make_encoder()
    model, clip = sdxl.apply(sdxl.subject(encoder=encoder))
    comfy.model_management.unload_all_models()
    assert encoder.patcher not in comfy.model_management.loaded_models()
    sdxl.sample(model, sdxl.encode(clip, "<person>"), sdxl.encode(clip, ""))
    assert encoder.patcher in comfy.model_management.loaded_models()
    assert encoder.patcher not in model.get_additional_models(), "those stay loaded as long as the model"


def test_keys_and_values_are_made_once(pack, sdxl, watch):
    """Not per step, not for the negative prompt, and not again for another seed: nor is the encoder asked for then."""
    calls, loaded = [], []
    watch(pack.encoder.NestedEncoder, "keys_values", lambda said: calls.append(said["layer"]))
    watch(comfy.model_management, "load_models_gpu", lambda said: loaded.extend(said["models"]))
    encoder = sdxl.make_encoder(seed=7)
    model, clip = sdxl.apply(sdxl.subject(encoder=encoder))
    positive, negative = sdxl.encode(clip, "<person>"), sdxl.encode(clip, "not <person>")
    loaded.clear()
    first = sdxl.sample(model, positive, negative, steps=3, size=(8, 8))
    assert calls == list(range(70)) and encoder.patcher in loaded
    calls.clear(), loaded.clear()
    again = sdxl.sample(model, positive, negative, steps=3, size=(8, 8))
    sdxl.sample(model, positive, negative, steps=1, size=(8, 8), seed=11)
    assert not calls and encoder.patcher not in loaded
    assert torch.equal(first, again)


def test_keys_and_values_go_with_the_subject(pack, sd15):
    kept = pack.store._MADE
    gc.collect()
    before = len(kept)
    model, clip = sd15.apply(sd15.subject(encoder=sd15.make_encoder(seed=8)))
    sd15.sample(model, sd15.encode(clip, "<person>"), sd15.encode(clip, ""))
    assert len(kept) == before + 1
    del model, clip
    gc.collect()
    assert len(kept) == before


def test_what_others_computed_is_not_changed_in_place(sdxl):
    """The output of a replacement or of an attention override may be kept by whoever made it."""
    kept = []

    def remember(out):
        kept.append((out, out.clone()))
        return out

    def replacement(q, k, v, options):
        return remember(host_attention.optimized_attention(q, k, v, options["n_heads"]))

    def override(attention, *args, **kwargs):
        return remember(attention(*args, **kwargs))

    model, clip = sdxl.apply(sdxl.subject())
    positive, negative = sdxl.encode(clip, "<person>"), sdxl.encode(clip, "")
    expected = sdxl.sample(model, positive, negative)
    replaced, overridden = model.clone(), model.clone()
    replaced.set_model_attn2_replace(replacement, "middle", 0, 3)
    overridden.model_options["transformer_options"]["optimized_attention_override"] = override
    for other in (replaced, overridden):
        kept.clear()
        assert torch.equal(sdxl.sample(other, positive, negative), expected)
        assert kept and all(torch.equal(out, as_it_was) for out, as_it_was in kept)


@pytest.mark.works_with("Host", "Multi-GPU", "K̈ and V̈ on each device; tried with two names of a CPU")
def test_several_devices(sdxl, fired, since):
    """The host's multi-GPU clones, two names of the CPU for two GPUs."""
    since("ModelPatcher.deepclone_multigpu")
    base = sdxl.model.clone()
    base.cached_patcher_init = (sdxl.make_model, (torch.float32,))
    second = base.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    second.is_multigpu_base_clone = True
    base.set_additional_models("multigpu", [second])
    subject = sdxl.subject()
    model, clip = sdxl.apply(subject, model=base)
    single, _ = sdxl.apply(subject)
    # Several positive prompts: more than one device has some.
    positive = [*sdxl.encode(clip, "a <person>"), *sdxl.encode(clip, "<person> at night")]
    negative = sdxl.encode(clip, "blurry")
    expected = sdxl.sample(single, positive, negative, steps=2)
    fired.clear()
    picture = sdxl.sample(model, positive, negative, steps=2)
    # Other batches than on one device: rounded otherwise.
    assert (picture - expected).norm() < 1e-4 * expected.norm()
    assert len(fired) >= 2 * 2 * 70
    keys = {term.key.data_ptr() for call in fired for term in call.terms}
    assert len(keys) == 70, "both names are one device"


def test_an_encoder_beyond_the_range_of_fp16_is_run_in_fp32(sd15):
    """V̈ is rescaled after its attention: a million times as much of it is the same picture, if nothing overflows."""
    half = sd15.make_model(torch.float16)
    pictures = []
    for factor in (1.0, 1e6):
        encoder = sd15.make_encoder(seed=5)
        for layer in encoder.module.to_v:
            layer.weight.mul_(factor)
        model, clip = sd15.apply(sd15.subject(encoder=encoder), half, sd15.clip)
        pictures.append(sd15.sample(model, sd15.encode(clip, "a photo of <person>"), sd15.encode(clip, "")))
    plain = sd15.sample(half, sd15.encode(sd15.clip, "a photo of person"), sd15.encode(sd15.clip, ""))
    assert all(picture.isfinite().all() for picture in pictures)
    assert (pictures[0] - pictures[1]).norm() < 0.05 * (pictures[0] - plain).norm()


def test_an_encoder_of_no_numbers_is_refused(pack, sd15):
    encoder = sd15.make_encoder(seed=6)
    subject = sd15.subject(encoder=encoder)
    encoder.module.to_v[3].weight.fill_(torch.nan)
    model, clip = sd15.apply(subject)
    with pytest.raises(pack.errors.NestedAttentionError, match="not finite in 1 of 16 layers"):
        sd15.sample(model, sd15.encode(clip, "a photo of <person>"), sd15.encode(clip, ""))
