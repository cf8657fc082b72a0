"""Separate Subjects in the real host: self-attention bounded between the regions of subjects."""

from __future__ import annotations

import comfy.ldm.modules.attention as host_attention
import pytest
import torch


@pytest.fixture(scope="module")
def pair(sd15):
    """(model, clip, positive, negative) with two subjects."""
    anna, ben = sd15.subject("<anna>", "woman"), sd15.subject("<ben>", "man", view=3)
    model, clip = sd15.apply(ben, *sd15.apply(anna))
    return model, clip, sd15.encode(clip, "<anna> and <ben> by a lake"), sd15.encode(clip, "blurry")


@pytest.fixture
def separate(pack):
    def run(model, strength=1.0, start_percent=0.0, end_percent=1.0):
        return pack.nodes["NestedSeparateSubjects"].execute(model, strength, start_percent, end_percent)[0]

    return run


@pytest.fixture
def biases(pack, watch):
    """The bias of every self-attention that is bounded, in order."""
    seen = []
    watch(host_attention, "attention_pytorch", lambda said: None if said["mask"] is None else seen.append(said["mask"]))
    return seen


def halves(side=64):
    left = torch.zeros(1, side, side)
    left[..., : side // 2] = 1
    return left, 1 - left


def test_subjects_with_masks_do_not_see_each_other_from_the_first_step(sd15, separate, biases):
    left, right = halves()
    model, clip = sd15.apply(sd15.subject("<anna>", "woman"), mask=left)
    model, clip = sd15.apply(sd15.subject("<ben>", "man", view=3), model, clip, mask=right)
    positive, negative = sd15.encode(clip, "<anna> and <ben>"), sd15.encode(clip, "")
    plain = sd15.sample(model, positive, negative, size=(8, 8))
    apart = sd15.sample(separate(model), positive, negative, size=(8, 8))
    assert len(biases) == 2 * 16, "of each prompt"
    assert apart.isfinite().all() and not torch.equal(apart, plain)
    finest = biases[0][0].unflatten(0, (8, 8)).unflatten(2, (8, 8))  # query row, column, key row, column
    assert (finest[:, :4, :, 4:] == -torch.inf).all() and (finest[:, 4:, :, :4] == -torch.inf).all()
    assert (finest[:, :4, :, :4] == 0).all() and (finest[:, 4:, :, 4:] == 0).all()


def test_overlapping_masks_share_the_overlap(sd15, fired):
    """Each subject acts in its own mask, both where the masks overlap; each picture of a batch has its own."""
    left, right = torch.zeros(2, 64, 128), torch.zeros(2, 64, 128)
    left[0, :, :80], right[0, :, 48:] = 1, 1
    left[1, :, 48:], right[1, :, :80] = 1, 1  # the second picture the other way round
    model, clip = sd15.apply(sd15.subject("<anna>", "woman"), mask=left)
    model, clip = sd15.apply(sd15.subject("<ben>", "man", view=3), model, clip, mask=right)
    picture = sd15.sample(model, sd15.encode(clip, "<anna> and <ben>"), sd15.encode(clip, ""), size=(8, 16), batch=2)
    assert picture.isfinite().all() and len(fired) == 16
    finest = fired[0]
    anna, ben = (term.spatial.unflatten(1, (8, 16)) for term in finest.terms)
    assert finest.q[:2] == (2, 8 * 16)
    for image, (first, other) in enumerate(((anna[0], ben[0]), (ben[1], anna[1]))):
        assert (first[:, :10] == 1).all() and (first[:, 10:] == 0).all(), image
        assert (other[:, 6:] == 1).all() and (other[:, :6] == 0).all(), image


def test_without_masks_regions_are_learned_from_the_first_step_on(sd15, pair, separate, biases):
    model, _, positive, negative = pair
    one = sd15.sample(separate(model), positive, negative, size=(8, 8), steps=1)
    assert not biases and torch.equal(one, sd15.sample(model, positive, negative, size=(8, 8), steps=1))
    three = sd15.sample(separate(model), positive, negative, size=(8, 8), steps=3, batch=2)
    assert len(biases) == 2 * 2 * 16, "in two of the steps, of each prompt"
    assert {len(bias) for bias in biases} == {2}, "two pictures"
    assert not torch.equal(three, sd15.sample(model, positive, negative, size=(8, 8), steps=3, batch=2))


def test_strength_0_one_subject_and_an_idle_one_are_the_plain_model(sd15, pair, separate):
    model, clip, positive, negative = pair

    def picture(model, positive=positive):
        return sd15.sample(model, positive, negative, size=(8, 8), steps=2)

    plain = picture(model)
    assert torch.equal(picture(separate(model, 0.0)), plain)
    assert torch.equal(picture(separate(model, 1.0, 0.0, 0.0)), plain)
    assert torch.equal(picture(separate(sd15.model)), picture(sd15.model))
    alone, clip = sd15.apply(sd15.subject("<anna>", "woman"))
    one = sd15.encode(clip, "<anna>")
    assert torch.equal(picture(separate(alone), one), picture(alone, one))


def test_before_or_after_the_subjects_and_without_a_trace(sd15, pair, separate):
    model, _, positive, negative = pair

    def picture(model):
        return sd15.sample(model, positive, negative, size=(8, 8), steps=2)

    plain, apart = picture(model), picture(separate(model))
    anna, ben = sd15.subject("<anna>", "woman"), sd15.subject("<ben>", "man", view=3)
    before, _ = sd15.apply(ben, *sd15.apply(anna, model=separate(sd15.model)))
    assert torch.equal(picture(before), apart)
    assert not torch.equal(apart, plain)
    assert torch.equal(picture(model), plain)
    assert not torch.equal(picture(separate(model, 0.5)), apart)
    assert torch.equal(picture(separate(separate(model, 0.5), 1.0)), apart), "the last one counts"


def test_prompts_in_areas(pack, sd15, pair, separate, biases):
    """A subject in an area of its own: what is learned there, and what is bounded, lies there."""
    model, clip, _, negative = pair
    area = pack.host_nodes["ConditioningSetArea"]()
    left = area.append(sd15.encode(clip, "<anna>"), 64, 64, 0, 0, 1.0)[0]
    right = area.append(sd15.encode(clip, "<ben>"), 64, 64, 64, 0, 1.0)[0]
    both = pack.host_nodes["ConditioningCombine"]().combine(left, right)[0]
    positive = pack.host_nodes["ConditioningCombine"]().combine(sd15.encode(clip, "a lake"), both)[0]
    picture = sd15.sample(separate(model), positive, negative, size=(8, 16), steps=2)
    assert picture.isfinite().all() and biases
    whole = [bias for bias in biases if bias is not None and bias.shape[-1] == 8 * 16]
    assert whole
    between = whole[0][0].unflatten(0, (8, 16)).unflatten(2, (8, 16))
    assert between[:, :8, :, 8:].min() < between[:, :8, :, :8].min() == 0


@pytest.mark.parametrize(
    ("node_id", "inputs"),
    [
        ("HyperTile", {"tile_size": 32}),
        ("TomePatchModel", {"ratio": 0.5}),
        ("ContextWindowsManual", {"context_length": 8, "context_overlap": 0, "dim": 3}),
    ],
)
def test_nodes_that_hide_the_grid_are_named(pack, node, sd15, pair, separate, node_id, inputs):
    model, _, positive, negative = pair
    hidden = node(node_id, model=separate(model), **inputs)
    with pytest.raises(pack.errors.NestedAttentionError, match="Separate Subjects can't tell where the subjects are"):
        sd15.sample(hidden, positive, negative, size=(16, 16), steps=2)


@pytest.mark.works_with(
    "Guidance", "Separate Subjects with other self-attention replacements", "their layers stay theirs"
)
def test_other_self_attention_replacements_stay(node, sd15, pair, separate, biases):
    """As Self-Attention Guidance puts one in the middle: that layer is theirs, all others are bounded."""
    model, _, positive, negative = pair
    theirs = node("SelfAttentionGuidance", model=separate(model))
    picture = sd15.sample(theirs, positive, negative, size=(16, 16), steps=2)
    assert picture.isfinite().all()
    assert len(biases) % 15 == 0 and biases


def test_the_bias_of_large_pictures_is_made_in_parts(pack, pair, sd15, separate, biases, monkeypatch):
    """A whole one has 1 GiB per picture at 2048 x 2048."""
    model, _, positive, negative = pair
    model = separate(model)
    whole = sd15.sample(model, positive, negative, steps=2, size=(16, 16), batch=2)
    assert max(mask.shape[1] for mask in biases) == 16 * 16
    biases.clear()
    monkeypatch.setattr(pack.apart, "_LIMIT", 2**18)
    parts = sd15.sample(model, positive, negative, steps=2, size=(16, 16), batch=2)
    assert max(mask.numel() for mask in biases) * 4 <= 2**18
    assert (parts - whole).norm() < 1e-4 * whole.norm()
