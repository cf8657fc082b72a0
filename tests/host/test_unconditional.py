"""What a subject is in the negative prompt: Apply Subject (Advanced)'s `unconditional`."""

from __future__ import annotations

import logging

import comfy.sample
import comfy.samplers
import pytest
import torch

POSITIVE, NEGATIVE = "a woman beside <anna>", "a blurry woman"
SIZE = (8, 8)


@pytest.fixture(scope="module")
def black(sd15):
    """Any other picture: what it shows makes no difference here."""
    return sd15.subject("<black>", "something", view=2)


@pytest.fixture(scope="module")
def anna(sd15):
    return sd15.subject("<anna>", "woman")


@pytest.fixture(scope="module")
def eve(sd15):
    return sd15.subject("<eve>", "woman", view=1)


@pytest.fixture(scope="module")
def sides(sd15, anna, black):
    """(model, clip) of the subject by itself, and with an unconditional one."""
    return sd15.apply_advanced(anna), sd15.apply_advanced(anna, unconditional=black)


@pytest.fixture(scope="module")
def sampled(sd15):
    """sampled(applied, positive, negative): the latent; texts are encoded if they are not."""

    def run(applied, positive=POSITIVE, negative=NEGATIVE, **options):
        model, clip = applied
        texts = (sd15.encode(clip, text) if isinstance(text, str) else text for text in (positive, negative))
        return sd15.sample(model, *texts, **{"size": SIZE, **options})

    return run


@pytest.fixture
def acted(fired, sampled, anna, black):
    """acted(...) as `sampled`: {(whose tokens, text length, places)} of the layers of one run."""

    def run(*args, **options):
        fired.clear()
        sampled(*args, **options)
        return {(whose(term), call.k[1], tuple(term.places.tolist())) for call in fired for term in call.terms}

    def whose(term):
        made = {}
        for name, subject in (("anna", anna), ("black", black)):
            tokens = subject.subject.tokens
            made[name] = subject.encoder.module.keys_values(tokens, 0)[0]
        first = [name for name, key in made.items() if key.shape == term.key.shape and torch.equal(key, term.key)]
        return first[0] if first else "other layer"

    return lambda *args, **options: {entry for entry in run(*args, **options) if entry[0] != "other layer"}


# -- where it acts ----------------------------------------------------------------------------------------------------


def test_the_positive_side_is_bit_for_bit_as_without_it(sd15, sides):
    """In one batch with the negative, whose side is another one then."""
    seen = []
    for model, clip in sides:
        model = model.clone()

        def note(args):
            seen.append((args["cond_denoised"], args["uncond_denoised"]))
            return args["denoised"]

        model.set_model_sampler_post_cfg_function(note)
        sd15.sample(model, sd15.encode(clip, POSITIVE), sd15.encode(clip, NEGATIVE), size=SIZE)
    (positive, negative), (positive_with, negative_with) = seen
    assert torch.equal(positive, positive_with)
    assert not torch.equal(negative, negative_with)


def test_it_acts_on_the_class_word_and_on_the_placeholder_of_the_negative_prompt(sides, acted):
    plain, with_black = sides
    assert acted(plain) == {("anna", 77, (4,))}
    assert acted(with_black) == {("anna", 77, (4,)), ("black", 77, (3,))}
    assert acted(with_black, negative="<anna>, Woman, women") == {("anna", 77, (4,)), ("black", 77, (1, 3))}
    assert acted(with_black, cfg=1.0) == {("anna", 77, (4,))}
    assert acted(plain, negative="<anna>, woman") == {("anna", 77, (4,)), ("anna", 77, (1,))}


def test_every_token_of_a_class_word_has_it(sd15, black, acted):
    rex = sd15.subject("<rex>", "golden retriever")
    applied = sd15.apply_advanced(rex, unconditional=black)
    assert ("black", 77, (2, 3)) in acted(applied, "<rex>", "a golden retriever, a retriever")


def test_a_plain_word_is_its_own_class_word_or_not(sd15, black, acted):
    applied = sd15.apply_advanced(sd15.subject("woman", "person"), unconditional=black)
    assert ("black", 77, (1, 2)) in acted(applied, "woman smiles", "woman person")
    applied = sd15.apply_advanced(sd15.subject("woman", "woman"), unconditional=black)
    assert ("black", 77, (1,)) in acted(applied, "woman smiles", "woman person")


@pytest.mark.works_with(
    "Conditioning", "An unconditional subject in a negative of several parts", "areas, Concat, Average, long texts"
)
def test_negatives_of_every_kind(pack, sd15, sides, acted):
    _, (model, clip) = sides
    nodes = pack.host_nodes
    word, lake = sd15.encode(clip, NEGATIVE), sd15.encode(clip, "a lake")
    anna = ("anna", 77, (4,))
    area = nodes["ConditioningSetArea"]()
    left = area.append(word, 32, 64, 0, 0, 1.0)[0]
    for negative, expected in {
        "combined": (nodes["ConditioningCombine"]().combine(lake, word)[0], ("black", 77, (3,))),
        "joined": (nodes["ConditioningConcat"]().concat(lake, word)[0], ("black", 154, (80,))),
        "averaged": (nodes["ConditioningAverage"]().addWeighted(word, lake, 0.6)[0], ("black", 77, (3,))),
        "an area": (left, ("black", 77, (3,))),
        "long": (sd15.encode(clip, "lake " * 90 + "woman"), ("black", 154, (93,))),
        "weighed": (sd15.encode(clip, "a lake, (blurry woman:1.3)"), ("black", 77, (5,))),
    }.values():
        entries = acted((model, clip), negative=negative)
        assert expected in entries
        # The host repeats the shorter text of a batch.
        assert {entry[0] for entry in entries} == {"anna", "black"} and anna[2] in {e[2][:1] for e in entries}
    away = nodes["ConditioningAverage"]().addWeighted(word, lake, 0.0)[0]
    assert acted((model, clip), negative=away) == {anna}
    zeroed = nodes["ConditioningZeroOut"]().zero_out(word)[0]
    assert acted((model, clip), negative=zeroed) == {anna}


def test_one_prompt_per_call(sd15, sides, sampled):
    """A text that has nothing but the class word is alone in its call."""
    _, (model, clip) = sides

    def one_by_one(apply, args):
        out = []
        for i in range(len(args["input"])):
            c = {k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in args["c"].items()}
            kinds = [args["c"]["transformer_options"]["cond_or_uncond"][i]]
            c["transformer_options"] = {**c["transformer_options"], "cond_or_uncond": kinds}
            out.append(apply(args["input"][i : i + 1], args["timestep"][i : i + 1], **c))
        return torch.cat(out)

    expected = sampled((model, clip))
    model = model.clone()
    model.set_model_unet_function_wrapper(one_by_one)
    torch.testing.assert_close(sampled((model, clip)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.works_with("Guidance", "An unconditional subject with PerpNeg, DualCFG", "in their negative prompts alone")
def test_guiders_with_more_than_two_prompts(pack, sd15, sides, fired):
    _, (model, clip) = sides
    person, word = sd15.encode(clip, "<anna>"), sd15.encode(clip, NEGATIVE)
    middle = sd15.encode(clip, "a woman, <anna>")
    dual = pack.host_nodes["DualCFGGuider"].execute(model, person, middle, word, 3.0, 2.0, "regular")[0]
    perp = pack.host_nodes["PerpNegGuider"].execute(model, person, word, sd15.encode(clip, ""), 4.0, 1.0)[0]
    for guider, expected in ((dual, {(1,), (4,), (3,)}), (perp, {(1,), (3,)})):
        fired.clear()
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([10.0, 0.0])
        latent = torch.zeros(1, 4, *SIZE)
        guider.sample(comfy.sample.prepare_noise(latent, 0), latent, sampler, sigmas, disable_pbar=True)
        assert {tuple(call.terms[0].places.tolist()) for call in fired} == expected


def test_a_batch_of_pictures(sides, acted, fired):
    assert acted(sides[1], batch=3) == {("anna", 77, (4,)), ("black", 77, (3,))}
    assert {call.q[0] for call in fired} == {3}


def test_weighed_views_of_it(pack, sd15, anna, black, fired, sampled):
    """A merged subject's weights are its own: the conditional side has none."""
    views = {"subject0": black, "subject1": sd15.subject("<black>", "something", view=3)}
    merged = pack.nodes["NestedMergeSubjects"].execute(subjects=views, weights="3, 1")[0]
    sampled(sd15.apply_advanced(anna, unconditional=merged))
    weighed = {(tuple(t.places.tolist()), t.log_weights is not None) for call in fired for t in call.terms}
    assert weighed == {((4,), False), ((3,), True)}


# -- what it leaves alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["<anna>woman", "woman<anna>woman, woman", "womanly <anna>, a woman", "女woman<anna>"])
def test_what_the_text_encoder_reads_is_as_without_it(pack, sd15, sides, text):
    (_, plain), (_, with_black) = sides
    (ours, values), (theirs, _) = sd15.encode(with_black, text)[0], sd15.encode(plain, text)[0]
    assert torch.equal(pack.text.plain(ours), pack.text.plain(theirs))
    marks, expected = (pack.text.rows_of(cond)[0] for cond in (ours, theirs))
    assert {key: rows for key, rows in marks.items() if isinstance(key, str)} == expected
    assert list(values["nested_attention"]["places"]) == ["<anna>"]


def test_a_placeholder_inside_of_a_class_word_stays_one(sd15, black, sampled):
    base = sd15.apply(sd15.subject("woman", "person", view=1))
    young = sd15.subject("<anna>", "young woman")
    plain, with_black = (sd15.apply_advanced(young, *base, unconditional=source) for source in (None, black))
    text = "<anna> and a young woman"
    assert torch.equal(sampled(plain, text, "blurry"), sampled(with_black, text, "blurry"))


def test_without_it_no_text_is_marked(pack, sd15, sides):
    assert not pack.text.marks_of(sd15.encode(sides[0][1], "a woman")[0][0])


def test_skipped_without_the_subject(sd15, anna, black, sampled):
    """when_unmentioned = skip: what goes on without the subject goes on without its other side."""
    plain, with_black = (
        sd15.apply_advanced(anna, unconditional=source, when_unmentioned="skip") for source in (None, black)
    )
    assert torch.equal(sampled(plain, "a lake"), sampled(with_black, "a lake"))
    in_the_negative = [sampled(applied, "a lake", "a blurry <anna>") for applied in (plain, with_black)]
    assert not torch.equal(*in_the_negative)


def test_its_class_word_on_a_model_without_the_subject_is_nothing_to_tell(sd15, sides, sampled, caplog):
    _, (_, clip) = sides
    sampled((sd15.model, clip), "a woman")
    assert not caplog.records


def test_recordings_know_the_subject_alone(pack, sd15, sides, sampled):
    seen = []
    for model, clip in sides:
        model, recording = pack.nodes["NestedRecordAttention"].execute(model, 0.5)
        sampled((model, clip))
        seen.append([(note.layer, note.subject, note.attention) for note in recording.last().attention])
    assert len(seen[0]) == len(seen[1]) == 16
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(*seen, strict=True))


# -- several subjects -------------------------------------------------------------------------------------------------


def test_each_of_several_has_its_own(sd15, black, fired, sampled):
    anna, ben = sd15.subject("<anna>", "woman"), sd15.subject("<ben>", "man", view=3)
    other = sd15.subject("<white>", "something", view=4)
    applied = sd15.apply_advanced(
        ben, *sd15.apply_advanced(anna, unconditional=black, strength=0.5), unconditional=other
    )
    sampled(applied, "<anna> and <ben>", "a man, a woman")
    places = [[(term.places.tolist(), term.strength) for term in call.terms] for call in fired]
    assert [([1], 0.5), ([3], 1.0)] in places  # the positive prompt
    assert [([5], 0.5), ([2], 1.0)] in places


def test_a_class_word_of_two_is_that_of_the_first_who_acts(sd15, anna, eve, black, sampled, caplog):
    """By their placeholders, not by the order of the nodes, and with the mask of that one."""
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1

    def both(first, second, **of_eve):
        knobs = {id(anna): {"mask": left}, id(eve): {"mask": 1 - left, **of_eve}}
        applied = sd15.apply_advanced(first, unconditional=black, **knobs[id(first)])
        return sd15.apply_advanced(second, *applied, unconditional=black, **knobs[id(second)])

    positive = "<anna> and <eve>"
    with caplog.at_level(logging.INFO):
        picture = sampled(both(anna, eve), positive)
    assert "The word woman of the negative prompt is the class word of <anna> and <eve>" in caplog.text
    assert torch.equal(picture, sampled(both(eve, anna), positive))
    idle = sd15.apply_advanced(eve, *sd15.apply_advanced(anna, unconditional=black, strength=0.0), unconditional=black)
    alone = sd15.apply_advanced(eve, *sd15.apply_advanced(anna, strength=0.0), unconditional=black)
    assert torch.equal(sampled(idle, positive), sampled(alone, positive))


def test_subjects_are_kept_apart_as_without_it(pack, sd15, anna, eve, black, sampled):
    """Separate Subjects counts subjects; what they are in the negative prompt is none more."""

    def apart(model, clip):
        return pack.nodes["NestedSeparateSubjects"].execute(model, 1.0, 0.0, 1.0)[0], clip

    for count in (1, 2):
        plain, with_black = (
            sd15.apply_advanced(anna, *(sd15.apply_advanced(eve) if count == 2 else ()), unconditional=source)
            for source in (None, black)
        )
        positive = "<anna> and <eve>" if count == 2 else "<anna>"
        for steps in (1, 2):
            pictures = [sampled(apart(*applied), positive, "blurry", steps=steps) for applied in (plain, with_black)]
            assert torch.equal(*pictures)
        assert sampled(apart(*with_black), positive, NEGATIVE, steps=2).isfinite().all()


def test_adjusting_a_subject_adjusts_it_too(pack, sd15, sides, sampled, fired):
    _, (model, clip) = sides
    adjust = pack.nodes["NestedAdjustSubject"].execute
    half = adjust(model, "<anna>", 0.5, 0.0, 1.0, "constant", "", "")[0]
    sampled((half, clip))
    assert {(tuple(t.places.tolist()), t.strength) for call in fired for t in call.terms} == {((4,), 0.5), ((3,), 0.5)}
    with pytest.raises(pack.errors.NestedAttentionError, match="There is <anna>. Leave"):
        adjust(model, "woman", 0.0, 0.0, 1.0, "constant", "", "")


# -- what is said -----------------------------------------------------------------------------------------------------


def test_a_negative_prompt_without_the_word_is_as_before_and_said(sides, sampled, caplog):
    plain, with_black = sides
    assert torch.equal(sampled(plain, negative="blurry"), sampled(with_black, negative="blurry", steps=1))
    (said,) = caplog.messages
    assert said.startswith(
        "The unconditional subject of <anna> acts nowhere: no negative prompt has the word woman, or <anna>. Write "
        "woman in the negative prompt, in a text encode node whose CLIP comes from Apply Subject"
    )


def test_nothing_is_said_where_it_acts_or_no_negative_prompt_is_sampled(pack, sd15, sides, sampled, caplog):
    _, (model, clip) = sides
    sampled((model, clip))
    sampled((model, clip), negative="blurry <anna>")
    sampled((model, clip), negative="blurry", cfg=1.0)
    guider = pack.host_nodes["BasicGuider"].execute(model, sd15.encode(clip, POSITIVE))[0]
    sampler, latent = comfy.samplers.sampler_object("euler"), torch.zeros(1, 4, *SIZE)
    guider.sample(comfy.sample.prepare_noise(latent, 0), latent, sampler, torch.tensor([10.0, 0.0]), disable_pbar=True)
    assert not caplog.records


def test_another_encoders_is_refused(pack, sd15, black):
    subject = sd15.subject("<anna>", "woman", encoder=sd15.make_encoder(5))
    message = (
        "<anna> was made with the encoder 'random encoder sd15 8 5' .*, its unconditional subject with 'random enc"
    )
    with pytest.raises(pack.errors.NestedAttentionError, match=message):
        sd15.apply_advanced(subject, unconditional=black)


def test_show_binding_tells_where_it_would_act(pack, sd15, sides):
    shown = pack.prompt.describe_binding(sd15.encode(sides[1][1], "a woman, <anna>"))
    assert shown.splitlines() == [
        "a woman , [<anna>: woman]",
        "    <anna> is bound to row 4 of 77",
        "    woman is bound to row 2 of 77 if this is a negative prompt",
    ]
