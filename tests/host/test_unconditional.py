"""What stands on the class word in the negative prompt: Apply Subject (Advanced)'s `unconditional`."""

from __future__ import annotations

import pytest
import torch

POSITIVE, NEGATIVE = "<anna> smiles", "a blurry woman"


@pytest.fixture(scope="module")
def black(sdxl):
    return sdxl.subject("<black>", "woman", view=2)


@pytest.fixture(scope="module")
def anna(sdxl):
    return sdxl.subject("<anna>", "woman")


@pytest.fixture(scope="module")
def sampled(sdxl):
    """sampled(applied, positive, negative): the latent after two steps."""

    def run(applied, positive=POSITIVE, negative=NEGATIVE, cfg=4.0):
        model, clip = applied
        return sdxl.sample(model, sdxl.encode(clip, positive), sdxl.encode(clip, negative), steps=2, cfg=cfg)

    return run


def test_it_acts_in_the_negative_prompt_alone(sdxl, anna, black, sampled):
    plain = sdxl.apply_advanced(anna)
    with_black = sdxl.apply_advanced(anna, unconditional=black)
    assert not torch.equal(sampled(plain), sampled(with_black))
    for positive in (POSITIVE, "a woman beside <anna>"):
        assert torch.equal(sampled(plain, positive, cfg=1.0), sampled(with_black, positive, cfg=1.0))


def test_a_negative_prompt_without_the_word_is_as_before_and_said(sdxl, anna, black, sampled, caplog):
    plain, with_black = sdxl.apply_advanced(anna), sdxl.apply_advanced(anna, unconditional=black)
    assert torch.equal(sampled(plain, negative="blurry"), sampled(with_black, negative="blurry"))
    assert "The unconditional subject acts nowhere: no negative prompt has the word woman." in caplog.text
    caplog.clear()
    sampled(with_black)
    sampled(with_black, negative="blurry <anna>")
    assert "acts nowhere" not in caplog.text


def test_the_subject_itself_leaves_the_negative_prompt_to_it(sdxl, anna, black, sampled):
    """Written as <anna> or as the class word, the text encoder reads the same; so the picture is the same."""
    with_black = sdxl.apply_advanced(anna, unconditional=black)
    by_word, by_placeholder = (sampled(with_black, negative=f"a blurry {word}") for word in ("woman", "<anna>"))
    assert torch.equal(by_word, by_placeholder)
    assert not torch.equal(by_placeholder, sampled(sdxl.apply_advanced(anna), negative="a blurry <anna>"))


def test_adjusting_a_subject_adjusts_it_too(sdxl, anna, black, sampled):
    model, clip = sdxl.apply_advanced(anna, unconditional=black)
    adjust = sdxl.pack.nodes["NestedAdjustSubject"].execute
    silent = [adjust(model, name, 0.0, 0.0, 1.0, "constant", "", "")[0] for name in ("<anna>", "")]
    bare = sdxl.sample(sdxl.model, sdxl.encode(clip, POSITIVE), sdxl.encode(clip, NEGATIVE), steps=2)
    assert all(torch.equal(sampled((one, clip)), bare) for one in silent)
    with pytest.raises(sdxl.pack.errors.NestedAttentionError, match="There is <anna>. Leave"):
        adjust(model, "woman", 0.0, 0.0, 1.0, "constant", "", "")


def test_subjects_of_a_class_word_share_it(sdxl, anna, black, sampled):
    first = sdxl.apply_advanced(anna, unconditional=black)
    other = sdxl.subject("<eve>", "woman", view=1)
    both = sdxl.apply_advanced(other, *first, unconditional=black)
    alone = sdxl.apply_advanced(other, *first)
    positive = "<anna> and <eve>"
    assert torch.equal(sampled(both, positive), sampled(alone, positive))
    eves = "a blurry <eve>"
    assert not torch.equal(sampled(both, positive, eves), sampled(alone, positive, eves))
    with pytest.raises(sdxl.pack.errors.NestedAttentionError, match="The word woman has another unconditional subject"):
        sdxl.apply_advanced(other, *first, unconditional=sdxl.subject("<black>", "woman", view=3))


def test_a_plain_word_is_its_own(sdxl, black, sampled):
    subject = sdxl.subject("woman", "person")
    plain, with_black = (sdxl.apply_advanced(subject, unconditional=source) for source in (None, black))
    assert torch.equal(sampled(plain, "woman smiles", "blurry"), sampled(with_black, "woman smiles", "blurry"))
    assert not torch.equal(sampled(plain, "woman smiles"), sampled(with_black, "woman smiles"))


def test_another_encoders_is_refused(sdxl, black):
    subject = sdxl.subject("<anna>", "woman", encoder=sdxl.make_encoder(5))
    with pytest.raises(sdxl.pack.errors.NestedAttentionError, match="made by another encoder"):
        sdxl.apply_advanced(subject, unconditional=black)


def test_recordings_know_the_subject_alone(sdxl, anna, black):
    model, clip = sdxl.apply_advanced(anna, unconditional=black)
    model, recording = sdxl.pack.nodes["NestedRecordAttention"].execute(model, 0.5)
    latent = sdxl.sample(model, sdxl.encode(clip, POSITIVE), sdxl.encode(clip, NEGATIVE), steps=2)
    assert [a.placeholder.text for a in recording.last().applications] == ["<anna>"]
    assert latent.isfinite().all()
