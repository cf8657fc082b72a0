"""Subjects on a MODEL in the real host: which layers fire, what strength, windows and masks do, and no leaks."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention


def scene_of(studio):
    """(patched model, its CLIP, positive, negative) with one subject."""
    model, clip = studio.apply(studio.subject())
    return model, clip, studio.encode(clip, "a photo of <person> in a garden"), studio.encode(clip, "blurry")


@pytest.fixture(scope="module")
def scene(sd15):
    """On SD 1.5, whose 16 layers take a quarter of the time of SDXL's 70, for what no layout has a say in."""
    return scene_of(sd15)


@pytest.fixture(scope="module")
def sdxl_scene(sdxl):
    return scene_of(sdxl)


def test_all_70_layers_of_sdxl_fire(sdxl_scene, fired, sdxl):
    model, _, positive, negative = sdxl_scene
    sdxl.sample(model, positive, negative)
    assert len(fired) == 70
    assert all(call.delta.any() for call in fired)
    assert {call.q[0] for call in fired} == {1}, "only the positive prompt's rows are touched"


def test_all_16_layers_of_sd15_fire(sd15, fired):
    model, clip = sd15.apply(sd15.subject())
    sd15.sample(model, sd15.encode(clip, "a photo of <person>"), sd15.encode(clip, ""))
    assert len(fired) == 16
    assert all(call.delta.any() for call in fired)


def test_a_subject_changes_the_picture_and_strength_0_does_not(sdxl_scene, sdxl):
    model, _, positive, negative = sdxl_scene
    stock = sdxl.encode(sdxl.clip, "a photo of person in a garden")
    plain = sdxl.sample(sdxl.model, stock, sdxl.encode(sdxl.clip, "blurry"))
    assert not torch.equal(sdxl.sample(model, positive, negative), plain)
    zero, clip = sdxl.apply(sdxl.subject(), strength=0.0)
    assert torch.equal(sdxl.sample(zero, sdxl.encode(clip, "a photo of <person> in a garden"), negative), plain)


def test_the_model_it_came_from_is_untouched(scene, sd15):
    _, _, positive, negative = scene
    before = sd15.sample(sd15.model, positive, negative)
    sd15.sample(scene[0], positive, negative)
    assert torch.equal(sd15.sample(sd15.model, positive, negative), before)


def test_runs_repeat_and_branches_do_not_see_each_other(scene, sd15):
    model, _, positive, negative = scene
    first = sd15.sample(model, positive, negative)
    other, clip = sd15.apply(sd15.subject("<dog>", "dog", view=2))
    sd15.sample(other, sd15.encode(clip, "a <dog>"), negative)
    sd15.sample(model.clone(), positive, negative)
    assert torch.equal(sd15.sample(model, positive, negative), first)


@pytest.mark.parametrize("window", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_an_empty_window_is_the_plain_model(sd15, window):
    model, clip = sd15.apply(sd15.subject(), start_percent=window[0], end_percent=window[1])
    positive, negative = sd15.encode(clip, "<person>"), sd15.encode(clip, "")
    assert torch.equal(sd15.sample(model, positive, negative), sd15.sample(sd15.model, positive, negative))


def test_a_window_acts_in_its_steps_only(sd15, fired):
    model, clip = sd15.apply(sd15.subject(), start_percent=0.5)
    so_far = []  # after each step
    sd15.sample(
        model, sd15.encode(clip, "<person>"), sd15.encode(clip, ""), steps=4, size=(8, 8),
        callback=lambda *_: so_far.append(len(fired)),
    )  # fmt: skip
    assert so_far == [0, 0, 16, 32]


def test_strength_is_linear_in_the_first_layer_and_half_a_picture_lies_between(sd15, fired):
    """What the first layer adds is a line through 0: from there on queries differ, and the picture is none."""
    pictures, first = {}, {}
    for strength in (0.0, 0.25, 0.5, 1.0, 2.0):
        model, clip = sd15.apply(sd15.subject(), strength=strength)
        fired.clear()
        pictures[strength] = sd15.sample(model, sd15.encode(clip, "<person>"), sd15.encode(clip, ""))
        first[strength] = fired[0].delta if fired else None
    assert first.pop(0.0) is None
    for strength, delta in first.items():
        torch.testing.assert_close(delta, strength * first[1.0])
    half, full = (pictures[strength] - pictures[0.0] for strength in (0.5, 1.0))
    assert 0 < half.norm() < full.norm()


def test_a_mask_of_zeros_is_the_plain_model_and_ones_is_no_mask(sdxl):
    subject = sdxl.subject()
    plain, clip = sdxl.apply(subject)
    positive, negative = sdxl.encode(clip, "<person>"), sdxl.encode(clip, "")
    size = {"size": (16, 24)}
    none, _ = sdxl.apply(subject, mask=torch.zeros(1, 128, 192))
    full, _ = sdxl.apply(subject, mask=torch.ones(128, 192))
    half, _ = sdxl.apply(subject, mask=torch.ones(1, 128, 192).tril())
    untouched = sdxl.sample(sdxl.model, positive, negative, **size)
    with_subject = sdxl.sample(plain, positive, negative, **size)
    torch.testing.assert_close(sdxl.sample(none, positive, negative, **size), untouched, rtol=0, atol=1e-5)
    torch.testing.assert_close(sdxl.sample(full, positive, negative, **size), with_subject)
    partly = sdxl.sample(half, positive, negative, **size)
    assert 0 < (partly - untouched).norm() < 1.2 * (with_subject - untouched).norm()


@pytest.mark.works_with(
    "Conditioning", "Masks per subject, latents that are not square, batches", "on the grid of each layer"
)
def test_a_mask_acts_where_it_is_white(sdxl, fired):
    """On the left half only, on a grid that is not square, for a batch of two: in every layer."""
    mask = torch.zeros(1, 128, 192)
    mask[..., :96] = 1
    model, clip = sdxl.apply(sdxl.subject(), mask=mask)
    sdxl.sample(model, sdxl.encode(clip, "<person>"), sdxl.encode(clip, ""), size=(16, 24), batch=2)
    assert len(fired) == 70
    for call in fired:
        grid = call.delta.abs().amax(-1).unflatten(1, {8 * 12: (8, 12), 4 * 6: (4, 6)}[call.q[1]])
        middle = grid.shape[2] // 2
        assert len(grid) == 2
        assert (grid[..., :middle] > 0).all()
        assert (grid[..., middle:] == 0).all()


def test_layer_weights_silence_what_they_name(sdxl, fired):
    weights = "output=0, middle=0, input.4=0.5"
    model, clip = sdxl.apply_advanced(sdxl.subject(), layer_weights=weights)
    sdxl.sample(model, sdxl.encode(clip, "<person>"), sdxl.encode(clip, ""))
    # Input 4 and 5 with 2 layers each, 7 and 8 with 10 each.
    assert [call.terms[0].strength for call in fired] == [0.5] * 2 + [1.0] * 22


def test_advanced_with_defaults_is_the_plain_node(scene, sd15):
    model, _, positive, negative = scene
    advanced, _ = sd15.apply_advanced(sd15.subject())
    assert torch.equal(sd15.sample(advanced, positive, negative), sd15.sample(model, positive, negative))


@pytest.mark.parametrize(
    "knob",
    [
        {"identity": 5.0},
        {"focus": 3.0},
        {"value_norm": "none"},
        {"value_norm": "unit"},
        {"value_norm": "match_per_head"},
    ],
)
def test_every_knob_changes_the_picture(scene, sd15, knob):
    model, _, positive, negative = scene
    turned, _ = sd15.apply_advanced(sd15.subject(), **knob)
    got = sd15.sample(turned, positive, negative)
    assert got.isfinite().all()
    assert not torch.equal(got, sd15.sample(model, positive, negative))


def test_two_subjects_act_at_their_own_words(pack, sdxl, fired):
    """In either order of application, with encoders of their own, in one prompt or each in one."""
    anna = sdxl.subject("<anna>", "woman")
    ben = sdxl.subject("<ben>", "man", view=3, encoder=sdxl.make_encoder(1))

    def both(first, second):
        return sdxl.apply(second, *sdxl.apply(first))

    model, clip = both(anna, ben)
    positive, negative = sdxl.encode(clip, "<anna> and <ben>"), sdxl.encode(clip, "blurry")
    together = sdxl.sample(model, positive, negative)
    assert [[term.places.tolist() for term in call.terms] for call in fired] == [[[1], [3]]] * 70
    assert torch.equal(sdxl.sample(both(ben, anna)[0], positive, negative), together)

    fired.clear()
    only_anna, _ = sdxl.apply(anna)
    alone = sdxl.encode(clip, "portrait of <anna>")
    conditioned = pack.host_nodes["ConditioningCombine"]().combine(alone, sdxl.encode(clip, "portrait of <ben>"))[0]
    sdxl.sample(model, conditioned, negative)
    assert [len(call.terms) for call in fired] == [1] * 140
    assert all(call.terms[0].places.tolist() == [3] for call in fired)
    assert len({id(call.terms[0].key) for call in fired}) == 140, "in every layer one of each subject"
    assert not torch.equal(sdxl.sample(only_anna, alone, negative), together)


def test_separation_keeps_each_where_it_is_looked_at_more(pack, sd15, fired):
    """Set on both nodes; 0 is the plain sum bit for bit, and graphs from before it may leave it out."""
    assert "separation" in pack.nodes["NestedApplySubjectAdvanced"].INPUT_TYPES()["optional"]
    anna, ben = sd15.subject("<anna>", "woman"), sd15.subject("<ben>", "man", view=3)
    model, clip = sd15.apply(ben, *sd15.apply(anna))
    positive, negative = sd15.encode(clip, "<anna> and <ben>"), sd15.encode(clip, "blurry")
    pictures = {"plain": sd15.sample(model, positive, negative)}
    for separation in (0.0, 0.5, 1.0):
        model, _ = sd15.apply_advanced(ben, *sd15.apply_advanced(anna, separation=separation), separation=separation)
        fired.clear()
        pictures[separation] = sd15.sample(model, positive, negative)
        assert {term.separation for call in fired for term in call.terms} == {separation}
    assert torch.equal(pictures["plain"], pictures[0.0])
    assert not torch.equal(pictures[0.5], pictures[0.0])
    assert not torch.equal(pictures[0.5], pictures[1.0])


def test_nothing_is_kept_after_a_run(pack, scene, watch, sd15):
    model, _, positive, negative = scene
    runs = []
    watch(pack.store.Store, "_load", lambda said: runs.append(weakref.ref(said["self"])))
    sd15.sample(model, positive, negative)
    gc.collect()
    assert runs and runs[0]() is None
    assert "patches_replace" not in model.model_options["transformer_options"]


def test_a_failed_run_leaves_nothing_behind(pack, scene, sd15):
    model, _, positive, negative = scene
    before = sd15.sample(model, positive, negative)

    def fail(*_):
        raise RuntimeError("in the middle")

    broken = model.clone()
    broken.set_model_attn2_output_patch(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        sd15.sample(broken, positive, negative)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is pack.store.Store]
    assert torch.equal(sd15.sample(model, positive, negative), before)


class _Add:
    """A foreign attn2 replacement of the kind that IPAdapter and its kin leave: an object with `.add`."""

    def __init__(self, amount):
        self.amounts = [amount]

    def add(self, amount):
        self.amounts.append(amount)

    def __call__(self, q, k, v, extra_options):
        return optimized_attention(q, k, v, extra_options["n_heads"]) + sum(self.amounts)


@pytest.mark.parametrize("address", [("input", 4, 1), ("input", 4)])
def test_foreign_replacements_stay_in_the_first_term(sdxl, address):
    """Applied before or after ours, at an address with or without the transformer's index: the same picture."""
    subject = sdxl.subject()
    block, number, *index = address

    def foreign(model):
        model = model.clone()
        model.set_model_attn2_replace(_Add(0.05), block, number, *index)
        return model

    after, clip = sdxl.apply(subject)
    after = foreign(after)
    before, _ = sdxl.apply(subject, foreign(sdxl.model))
    positive, negative = sdxl.encode(clip, "<person>"), sdxl.encode(clip, "")
    picture = sdxl.sample(after, positive, negative)
    assert torch.equal(picture, sdxl.sample(before, positive, negative))
    assert not torch.equal(picture, sdxl.sample(foreign(sdxl.model), positive, negative))
    assert not torch.equal(picture, sdxl.sample(sdxl.apply(subject)[0], positive, negative))


def test_attention_override_sees_the_nested_attention(sdxl_scene, sdxl):
    model, _, positive, negative = sdxl_scene
    lengths = set()

    def override(func, q, k, *args, **kwargs):
        lengths.add(k.shape[1])
        return func(q, k, *args, **kwargs)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    sdxl.sample(model, positive, negative)
    assert 8 in lengths  # tokens of the subject
    assert 77 in lengths


@pytest.mark.parametrize(
    ("weights", "compute"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float8_e4m3fn, torch.float32)],
    ids=["bf16", "fp16", "fp8 weights"],
)
@pytest.mark.works_with("Host", "fp16, bf16, fp8 weights", "the nested attention in the type of the layer")
def test_models_in_other_types(sdxl, fired, weights, compute):
    model = sdxl.make_model(weights, compute)
    patched, clip = sdxl.apply(model=model)
    positive, negative = sdxl.encode(clip, "<person>"), sdxl.encode(clip, "")
    picture = sdxl.sample(patched, positive, negative, size=(8, 8))
    assert len(fired) == 70
    assert {call.delta.dtype for call in fired} == {compute or weights}
    assert picture.isfinite().all()
    assert not torch.equal(picture, sdxl.sample(model, positive, negative, size=(8, 8)))


def test_an_interrupted_run_leaves_nothing_behind(pack, scene, sd15):
    model, _, positive, negative = scene
    before = sd15.sample(model, positive, negative)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sd15.sample(model, positive, negative)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is pack.store.Store]
    assert torch.equal(sd15.sample(model, positive, negative), before)


def test_adjusting_a_subject_is_applying_it_so(pack, sd15):
    """Factors multiply, windows meet, one subject of two is named, and the model that went in stays as it was."""
    node = pack.nodes["NestedAdjustSubject"]
    defaults = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}

    def adjust(model, **inputs):
        return node.execute(model, **{**defaults, **inputs})[0]

    anna, ben = sd15.subject("<anna>", "woman"), sd15.subject("<ben>", "man", view=3)

    def applied(anna_inputs, ben_inputs):
        return sd15.apply_advanced(ben, *sd15.apply_advanced(anna, **anna_inputs), **ben_inputs)

    model, clip = applied({"strength": 0.8, "layer_weights": "output=0.5"}, {})
    positive, negative = sd15.encode(clip, "<anna> and <ben>"), sd15.encode(clip, "blurry")

    def picture(model):
        return sd15.sample(model, positive, negative, steps=2, size=(8, 8))

    before = picture(model)
    assert torch.equal(picture(adjust(model)), before)
    changed = adjust(model, placeholder=" <ANNA> ", strength=0.5, end_percent=0.9, layer_weights="output=0.5, middle=0")
    same, _ = applied({"strength": 0.4, "end_percent": 0.9, "layer_weights": "output=0.25, middle=0"}, {})
    assert torch.equal(picture(changed), picture(same))
    assert not torch.equal(picture(changed), before)
    assert torch.equal(picture(model), before)
    silent = adjust(model, strength=0.0)
    assert torch.equal(picture(silent), picture(sd15.model))

    with pytest.raises(pack.errors.NestedAttentionError, match="<carl> is applied .* There are <anna>, <ben>"):
        adjust(model, placeholder="<carl>")
    with pytest.raises(pack.errors.NestedAttentionError, match="No subject is applied to this model: connect"):
        adjust(sd15.model)
    with pytest.raises(pack.errors.NestedAttentionError, match="start_percent .* is after end_percent"):
        adjust(model, start_percent=0.5, end_percent=0.2)
    early, _ = sd15.apply(anna, end_percent=0.4)
    with pytest.raises(pack.errors.NestedAttentionError, match="<anna> acts from 0 to 0.4 .* nothing of 0.5 to 1"):
        adjust(early, start_percent=0.5)


@pytest.mark.parametrize(
    ("schedule", "values", "expected"),
    [
        ("constant", "", [0.8, 0.8, 0.8]),
        ("ease in", "", [0.8 * 2 / 27, 0.4, 0.8 * 25 / 27]),
        ("ease in and out", "", [0.8 * 7 / 27, 0.8, 0.8 * 7 / 27]),
        ("list", "0, 1", [0.4, 0.8]),  # nothing is added in the first step
        ("list", "1, 0.5, 0.25", [0.8, 0.4, 0.2]),
        ("list", "0.5", [0.4, 0.4, 0.4]),
    ],
)
def test_schedules_move_strength_over_the_steps(pack, sd15, fired, schedule, values, expected):
    model, clip = sd15.apply(sd15.subject(), strength=0.8)
    node = pack.nodes["NestedAdjustSubject"]
    adjusted = node.execute(model, "", 1.0, 0.0, 1.0, schedule, values, "")[0]
    sd15.sample(adjusted, sd15.encode(clip, "<person>"), sd15.encode(clip, ""), steps=3, size=(8, 8))
    assert [call.terms[0].strength for call in fired[::16]] == pytest.approx(expected)
    assert len(fired) == 16 * len(expected)
