"""Record Attention, Attention Maps, Explain Point and Show Binding in the real host."""

from __future__ import annotations

import gc
import weakref

import comfy.sample
import comfy.samplers
import pytest
import torch


@pytest.fixture(scope="module")
def pair(sd15):
    """(model, clip, positive, negative) with two subjects."""
    anna, ben = sd15.subject("<anna>", "woman"), sd15.subject("<ben>", "man", view=3)
    model, clip = sd15.apply(ben, *sd15.apply(anna))
    return model, clip, sd15.encode(clip, "<anna> and <ben> by a lake"), sd15.encode(clip, "bad <anna>")


@pytest.fixture
def refused(pack):
    return lambda match: pytest.raises(pack.errors.NestedAttentionError, match=match)


def pictures(images=1, size=64):
    return torch.rand(images, size, size, 3, generator=torch.Generator().manual_seed(0))


def test_the_picture_stays_and_every_layer_and_step_is_kept(node, sd15, pair):
    """The positive prompt alone is recorded, for each picture of the batch, and no call is kept twice."""
    model, _, positive, negative = pair
    recorded, recording = node("NestedRecordAttention", all_outputs=True, model=model)

    def picture(model):
        return sd15.sample(model, positive, negative, size=(8, 8), steps=3, batch=2)

    assert torch.equal(picture(recorded), picture(model))
    run = recording.last()
    assert [a.placeholder.text for a in run.applications] == ["<anna>", "<ben>"]
    assert (run.images, run.grid, run.steps) == (2, (8, 8), 3)
    kept = {(s.step, s.layer, s.subject) for s in run.attention}
    assert len(run.attention) == len(kept) == 3 * 16 * 2
    assert {s.attention.shape[0] for s in run.attention} == {2}
    assert {s.attention.dtype for s in run.attention} == {torch.float16}
    assert {q.step for q in run.queries} == {1} and len({q.layer for q in run.queries}) == 1
    # What was seen is the outer attention: of a layer, over all words, it sums to 1 at most.
    both = sum(s.attention.float() for s in run.attention if s.layer == 0 and s.step == 0)
    assert 0 < float(both.max()) <= 1.001


def test_guidance_that_calls_the_model_again_is_not_recorded_twice(node, sd15, pair):
    model, _, positive, negative = pair
    recorded, recording = node("NestedRecordAttention", all_outputs=True, model=model)
    plain, alone = node("NestedRecordAttention", all_outputs=True, model=model)
    sd15.sample(node("PerturbedAttentionGuidance", model=recorded), positive, negative, size=(8, 8), steps=1)
    sd15.sample(plain, positive, negative, size=(8, 8), steps=1)
    first, other = recording.last(), alone.last()
    assert len(first.attention) == len(other.attention) == 16 * 2
    assert all(torch.equal(a.attention, b.attention) for a, b in zip(first.attention, other.attention, strict=True))


def test_prompts_of_guiders_are_told_apart_by_name(node, sd15, pair):
    """DualCFG begins with the negative prompt and has two positive ones: both are recorded, the negative is not."""
    model, clip, _, negative = pair
    recorded, recording = node("NestedRecordAttention", all_outputs=True, model=model)
    one, other = sd15.encode(clip, "<anna>"), sd15.encode(clip, "a photo of <ben>")
    guider = node("DualCFGGuider", model=recorded, cond1=one, cond2=other, negative=negative)
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([10.0, 0.0])
    latent = torch.zeros(1, 4, 8, 8)
    guider.sample(comfy.sample.prepare_noise(latent, 0), latent, sampler, sigmas, disable_pbar=True)
    assert sorted((s.layer, s.subject) for s in recording.last().attention) == [
        (i, s) for i in range(16) for s in (0, 1)
    ]


def test_a_run_replaces_the_last_one_and_nothing_outlives_the_recording(pack, node, sd15, pair):
    model, clip, positive, negative = pair
    recorded, recording = node("NestedRecordAttention", all_outputs=True, model=model)
    sd15.sample(recorded, positive, negative, size=(8, 8), steps=2)
    first = weakref.ref(recording.last())
    sd15.sample(recorded, positive, negative, size=(8, 8), steps=1)
    gc.collect()
    assert first() is None and recording.last().steps == 1
    idle = sd15.apply(sd15.subject("<cleo>", "cat"), recorded, clip, strength=0.0)[0]
    silent = pack.nodes["NestedAdjustSubject"].execute(idle, "", 0.0, 0.0, 1.0, "constant", "", "")[0]
    sd15.sample(silent, positive, negative, size=(8, 8), steps=1)
    assert recording.run is None, "a run without subjects has nothing to show"
    sd15.sample(recorded, positive, negative, size=(8, 8), steps=1)
    last = weakref.ref(recording.last())
    del recording, recorded, idle, silent
    gc.collect()
    assert last() is None


def test_maps_have_the_picture_s_size_and_masks_follow_the_heat(node, sd15, pair):
    model, _, positive, negative = pair
    recorded, recording = node("NestedRecordAttention", all_outputs=True, model=model)
    sd15.sample(recorded, positive, negative, size=(8, 16), steps=2, batch=2)
    after = torch.rand(2, 64, 128, 3)
    image, both = node("NestedAttentionMaps", all_outputs=True, recording=recording, after=after)
    assert image.shape[0] == 2 and image.shape[2] >= 512 and image.shape[1] > image.shape[2] // 2
    assert both.shape == (4, 64, 128) and set(both.unique().tolist()) <= {0.0, 1.0}
    _, ben = node("NestedAttentionMaps", all_outputs=True, recording=recording, after=after, placeholder=" <BEN>")
    assert torch.equal(ben, both[2:])
    small = node("NestedAttentionMaps", all_outputs=True, recording=recording, after=after, threshold=0.9)[1]
    assert small.sum() < both.sum()
    latent = {"samples": torch.zeros(2, 4, 8, 16)}
    assert torch.equal(node("NestedAttentionMaps", all_outputs=True, recording=recording, after=latent)[1], both)
    one = {"layer_weights": "all=0, output.4=1", "end_percent": 0.4}
    other = node("NestedAttentionMaps", all_outputs=True, recording=recording, after=after, **one)[1]
    assert not torch.equal(other, both)


def test_a_mask_in_apply_subject_is_where_a_prompt_in_an_area_is(pack, node, sd15):
    """An area's prompt is recorded where the area is."""
    model, clip = sd15.apply()
    area = pack.host_nodes["ConditioningSetArea"]()
    right = area.append(sd15.encode(clip, "<person>"), 64, 64, 64, 0, 1.0)[0]
    positive = pack.host_nodes["ConditioningCombine"]().combine(sd15.encode(clip, "a lake"), right)[0]
    recorded, recording = node("NestedRecordAttention", all_outputs=True, model=model)
    sd15.sample(recorded, positive, sd15.encode(clip, ""), size=(8, 16), steps=1)
    mask = node(
        "NestedAttentionMaps", all_outputs=True, recording=recording, after=pictures(1)[:, :, :1].repeat(1, 1, 128, 1)
    )[1]
    assert mask[..., :64].sum() == 0 and mask[..., 64:].sum() > 0


def test_explain_shows_the_query_s_own_nested_attention(pack, node, sd15, pair):
    """Against equation (1) written out, from the keys that the encoder makes."""
    model, _, positive, negative = pair
    recorded, recording = node("NestedRecordAttention", all_outputs=True, model=model, explain_at=0.0)
    sd15.sample(recorded, positive, negative, size=(8, 8), steps=1)
    run, after = recording.last(), pictures()
    look_into = pack.recording.look_into
    point = look_into(run, "<ben>", (0.3, 0.9), 0, after[0])
    expected = []
    for query in (q for q in run.queries if q.subject == 1):
        rows, columns = query.shape
        q = query.q[0, int(0.9 * rows) * columns + int(0.3 * columns)].float()
        application = run.applications[1]
        encoder, tokens = application.source.encoder.module, application.source.subject.tokens.to(q.device)
        key = encoder.to_k[query.layer](tokens)[0]
        heads, d = query.heads, q.shape[0] // query.heads
        logits = torch.einsum("hd,nhd->hn", q.view(heads, d), key.float().view(-1, heads, d)) / d**0.5
        expected.append(logits.softmax(-1).mean(0))
    torch.testing.assert_close(point.tokens.cpu(), torch.stack(expected).mean(0).cpu(), rtol=1e-3, atol=1e-4)
    assert point.photos.shape == (1, 224, 224, 3)
    for source in point.sources:
        assert source.shape == (1, 16, 16) and float(source.sum()) == pytest.approx(1)
    figure = node("NestedExplain", recording=recording, after=after, placeholder="<ben>", x=0.3, y=0.9)
    assert figure.shape[0] == 1 and figure.shape[2] == 1372 and figure.std() > 0.05


def test_explain_without_photos_says_so(pack, node, sd15, pair):
    _, clip, _, _ = pair
    subject = sd15.subject("<anna>", "woman")
    saved = type(subject)(subject.encoder, subject.subject)  # as from a file: without views
    model, clip = sd15.apply(saved)
    recorded, recording = node("NestedRecordAttention", all_outputs=True, model=model)
    sd15.sample(recorded, sd15.encode(clip, "<anna>"), sd15.encode(clip, ""), size=(8, 8), steps=1)
    look_into = pack.recording.look_into
    assert "comes from a file" in look_into(recording.last(), "", (0.5, 0.5), 0, pictures()[0]).sources
    assert node("NestedExplain", recording=recording, after=pictures()).shape[2] == 1372


def test_merged_views_know_their_photos(pack, node, sd15):
    merged = pack.nodes["NestedMergeSubjects"].execute(
        {"subject_1": sd15.subject(), "subject_2": sd15.subject(view=2), "subject_3": sd15.subject(view=4)}, "1, 0, 2"
    )[0]
    assert len(merged.views) == 2
    model, clip = sd15.apply(merged)
    recorded, recording = node("NestedRecordAttention", all_outputs=True, model=model)
    sd15.sample(recorded, sd15.encode(clip, "<person>"), sd15.encode(clip, ""), size=(8, 8), steps=1)
    point = pack.recording.look_into(recording.last(), "", (0.5, 0.5), 0, pictures()[0])
    assert point.tokens.shape == (16,) and point.sources[1].shape == (2, 16, 16)


def test_what_cannot_be_shown_is_explained(node, sd15, pair, refused):
    model, _, positive, negative = pair
    recorded, recording = node("NestedRecordAttention", all_outputs=True, model=model, explain_at=1.0)
    with refused("Nothing is recorded. The model that comes out of Record Attention must go to the sampler"):
        node("NestedAttentionMaps", recording=recording, after=pictures())
    early, _ = sd15.apply(sd15.subject("<cleo>", "cat"), recorded, pair[1], end_percent=0.3)
    clip = sd15.apply(sd15.subject("<cleo>", "cat"), clip=pair[1])[1]
    sd15.sample(early, sd15.encode(clip, "<anna>, <ben>, <cleo>"), negative, size=(8, 8), steps=4)
    with refused("The input after has 3 picture.s., the recorded run made 1"):
        node("NestedAttentionMaps", recording=recording, after=pictures(3))
    with refused(
        "No subject with the placeholder <carl> acted in the recorded run. Write one of <anna>, <ben>, <cleo>"
    ):
        node("NestedAttentionMaps", recording=recording, after=pictures(), placeholder="<carl>")
    with refused("Several subjects acted in the recorded run. Write one of <anna>, <ben>, <cleo>"):
        node("NestedExplain", recording=recording, after=pictures())
    with refused("batch_index is 2, the recorded run made 1 picture"):
        node("NestedExplain", recording=recording, after=pictures(), placeholder="<anna>", batch_index=2)
    with refused("<cleo> did not act in the step .* It acted in steps 1 to [12] of 4: set explain_at"):
        node("NestedExplain", recording=recording, after=pictures(), placeholder="<cleo>")
    with refused(
        "Nothing was recorded in this part of the sampling and these layers. Subjects acted in steps 1 to 4 of 4"
    ):
        node("NestedAttentionMaps", recording=recording, after=pictures(), layer_weights="all=0")


# -- Show Binding -----------------------------------------------------------------------------------------------------


def test_binding_is_shown_as_the_text_encoder_reads_it(pack, node, sdxl):
    model, clip = sdxl.apply(sdxl.subject("<rex>", "golden retriever"), *sdxl.apply(sdxl.subject("<anna>", "woman")))

    def shown(conditioning):
        out, text = node("NestedShowBinding", all_outputs=True, conditioning=conditioning)
        assert out is conditioning
        return text

    one = sdxl.encode(clip, "a photo of <anna> with (<rex>:1.2) in a garden")
    assert shown(one) == (
        "a photo of [<anna>: woman] with [<rex>: golden retriever] in a garden\n"
        "    <anna> is bound to row 4 of 77\n"
        "    <rex> is bound to rows 6, 7 of 77"
    )
    plain = sdxl.encode(clip, "a lake")
    combined = pack.host_nodes["ConditioningCombine"]().combine(plain, one)[0]
    assert shown(combined).startswith("Text 1 of 2: a lake\n    no subject\nText 2 of 2: a photo of [<anna>: woman]")
    stock = sdxl.encode(sdxl.clip, "a photo of nobody we know")
    assert shown(stock) == "no subject"
    joined = pack.host_nodes["ConditioningConcat"]().concat(plain, one)[0]
    assert shown(joined).splitlines()[:2] == [
        "changed by another node, which kept the subjects' places",
        "    <anna> is bound to row 81 of 154",
    ]
    size = dict(width=1024, height=1024, crop_w=0, crop_h=0, target_width=1024, target_height=1024)
    two = pack.host_nodes["CLIPTextEncodeSDXL"].execute(clip=clip, text_g="<rex> at sea", text_l="oil", **size)[0]
    assert shown(two).startswith("[<rex>: golden retriever] at sea\n")
