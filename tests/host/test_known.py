"""A picture depends on its graph alone, and a subject that is applied acts or says why not.

What stands in for other packs are patches of their kind, written for these tests; docs/compatibility.md says which
packs' own code was tried.
"""

from __future__ import annotations

import copy
import logging
import re

import comfy.ops
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_photomaker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.studio import Studio

SIZE = (8, 8)


@pytest.fixture(scope="module")
def studio(pack, clip_vision, photo):
    return Studio(pack, "sd15", clip_vision, photo, channels=32, tapered=True)


@pytest.fixture(scope="module")
def bound(studio):
    return studio.apply(studio.subject())


@pytest.fixture(scope="module")
def refused(pack):
    """refused(message) is a context in which a run must be refused."""
    return lambda message: pytest.raises(pack.errors.NestedAttentionError, match=message)


@pytest.fixture
def acted(fired, studio):
    """acted(model, positive, negative, ...) -> what was bound: {(batch rows, text length, places)}."""

    def run(model, positive, negative, of=studio, **options):
        fired.clear()
        of.sample(model, positive, negative, **{"size": SIZE, **options})
        return {(call.q[0], call.k[1], *(tuple(t.places.tolist()) for t in call.terms)) for call in fired}

    return run


def rows(pack, cond, index=0):
    """[{placeholder: rows}] of a conditioning, for each picture that it has a text for."""
    return pack.text.rows_of(cond[index][0])


# -- nothing but the graph ------------------------------------------------------------------------------------------


@pytest.mark.works_with("Prompt", "The same graph after other graphs ran", "the same picture, bit for bit")
def test_a_stranger_in_another_area_stays_a_stranger(pack, studio, bound, refused):
    """A text from the checkpoint's own CLIP that reads like one with the subject is never the subject's."""
    model, clip = bound
    nodes = pack.host_nodes
    left = nodes["ConditioningSetArea"]().append(studio.encode(clip, "<person>"), 64, 32, 0, 0, 1.0)[0]
    stranger = studio.encode(studio.clip, "a photo of a person in the rain")
    right = nodes["ConditioningSetArea"]().append(stranger, 64, 32, 0, 32, 1.0)[0]
    scene = nodes["ConditioningCombine"]().combine(left, right)[0]
    negative = studio.encode(clip, "")
    skipping, _ = studio.apply_advanced(studio.subject(), when_unmentioned="skip")

    def pictures():
        with refused("No positive prompt mentions <person>"):
            studio.sample(model, stranger, negative, size=SIZE)
        return studio.sample(model, scene, negative, size=SIZE), studio.sample(skipping, stranger, negative, size=SIZE)

    before = pictures()
    studio.encode(clip, "a photo of a <person> in the rain")
    after = pictures()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(after[1], studio.sample(studio.model, stranger, negative, size=SIZE))


def test_a_stock_negative_in_tiles_is_not_bound(studio, bound, fired):
    """Tiled packs send negative and positive in an order of their own: each row is known by its own text."""
    model, clip = bound
    studio.encode(clip, "photo of <person>")
    positive, alike = studio.encode(clip, "photo of <person>"), studio.encode(studio.clip, "photo of person")

    def tiles(apply, args):
        c = {k: v.repeat(2, *[1] * (v.ndim - 1)) if torch.is_tensor(v) else v for k, v in args["c"].items()}
        out = apply(args["input"][:, :, :4].repeat(2, 1, 1, 1), args["timestep"].repeat(2), **c)
        return torch.cat((out[: len(out) // 2], out[len(out) // 2 :]), 2)

    model = model.clone()
    model.set_model_unet_function_wrapper(tiles)
    fired.clear()
    studio.sample(model, positive, alike, size=SIZE)
    assert {call.q[0] for call in fired} == {1} and len(fired) == 2 * 16  # one of two rows, in each of two tiles


TEXTS = ["<person>", "photo of <person>", "photo of person", "a (<person>:1.3) by a lake", "person", "a lake", "man"]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.sampled_from(TEXTS), st.booleans()), min_size=1, max_size=3),
    st.lists(st.tuples(st.sampled_from(TEXTS), st.booleans()), max_size=6),
    st.sampled_from(["combine", "concat", "average"]),
)
def test_a_picture_depends_on_its_graph_alone(pack, studio, bound, graph, between, how):
    """Random graphs, and random encodes between two runs of one: equal bit for bit."""
    model, clip = studio.apply_advanced(studio.subject(), when_unmentioned="skip")
    nodes = pack.host_nodes
    joined = {
        "combine": lambda a, b: nodes["ConditioningCombine"]().combine(a, b)[0],
        "concat": lambda a, b: nodes["ConditioningConcat"]().concat(a, b)[0],
        "average": lambda a, b: nodes["ConditioningAverage"]().addWeighted(a, b, 0.4)[0],
    }[how]

    def picture():
        made = None
        for text, ours in graph:
            cond = studio.encode(clip if ours else studio.clip, text)
            cond = [
                [cond[0][0], {"pooled_output": cond[0][1]["pooled_output"]}]
            ]  # as a node that rebuilds it leaves it
            made = cond if made is None else joined(made, cond)
        return studio.sample(model, made, studio.encode(studio.clip, "photo of person"), size=SIZE)

    before = picture()
    for text, ours in between:
        studio.encode(bound[1] if ours else studio.clip, text)
    assert torch.equal(picture(), before)


def test_encodes_leave_nothing_behind(pack, studio, bound):
    """A prompt in use is not forgotten, and thousands of others cost nothing later."""
    clip = bound[1]
    cond = studio.encode(clip, "etching of <person>")
    known = len(pack.prompt._placeholders)
    for i in range(40):
        studio.encode(clip, f"{i} <person>")
    assert len(pack.prompt._placeholders) == known
    assert rows(pack, [[cond[0][0], {}]]) == [{"<person>": (3,)}]


# -- text encode nodes of other packs -------------------------------------------------------------------------------


def _one_by_one(clip, text):
    """A node that calls the text encoders one by one, and weighs by sums over texts with words masked out."""
    tokens = clip.tokenize(text, return_word_ids=True)
    texts = []
    for name in ("l", "g"):
        encoder = getattr(clip.cond_stage_model, f"clip_{name}", None)
        if encoder is None:
            continue
        clip.load_model()
        sections = [[(t, 1.0) for t, _, _ in section] for section in tokens[name]]
        masked = [[(266 if i == 4 else t, 1.0) for i, (t, _) in enumerate(section)] for section in sections]
        base = encoder.encode_token_weights(sections)[0]
        stack = torch.cat([base, encoder.encode_token_weights(masked)[0]])
        weights = torch.tensor([0.6, 0.4]).reshape(-1, 1, 1)
        mixed = (weights * stack).sum(axis=0, keepdim=True)
        texts.append((base.mean() / mixed.mean()) * mixed)
    pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1]
    return [[torch.cat(texts, dim=-1), {"pooled_output": pooled}]]


def _by_lists(clip, text):
    """A node that tokenizes a list of texts, cuts the ids by itself and hands them to the encoders as a tensor."""
    texts = []
    for name in ("l", "g"):
        encoder = getattr(clip.cond_stage_model, f"clip_{name}", None)
        if encoder is None:
            continue
        tokenizer = getattr(clip.tokenizer, f"clip_{name}")
        pieces = tokenizer.tokenizer([text, "lake"], truncation=False, add_special_tokens=False)["input_ids"]
        ids = [49406, *(t for piece in pieces for t in piece)]
        ids += [49407] * (77 - len(ids))
        tokens = torch.asarray([ids])
        clip.load_model()
        try:
            z, pooled = encoder(tokens)
        except Exception:
            z, pooled = encoder(tokens.tolist())
        z.pooled = pooled
        z = z * torch.full((1, 77), 1.1, device=z.device).reshape(1, 77, 1).expand(z.shape)
        texts.append(torch.hstack([z]).cpu())
    return [[torch.cat(texts, dim=-1), {"pooled_output": pooled}]]


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
@pytest.mark.parametrize(
    "encode",
    [
        pytest.param(
            _one_by_one,
            marks=pytest.mark.works_with(
                "Other packs", "Text encode nodes that call the text encoders one by one", "weightings by sums too"
            ),
        ),
        pytest.param(
            _by_lists,
            marks=pytest.mark.works_with(
                "Other packs", "Text encode nodes that tokenize lists of texts", "ids as tensors too"
            ),
        ),
    ],
)
def test_text_encode_nodes_of_other_packs(request, pack, acted, encode, family):
    of = request.getfixturevalue(family)
    model, clip = of.apply()
    cond = encode(clip, "photo of <person> in a garden")
    assert rows(pack, cond) == [{"<person>": (3,)}]
    stock = encode(of.clip, "photo of person in a garden")
    assert torch.equal(pack.text.plain(cond[0][0]), stock[0][0]) and not rows(pack, stock)[0]
    assert acted(model, cond, of.encode(clip, ""), of) == {(1, 77, (3,))}


@pytest.mark.works_with("Conditioning", "Average with the subject in either text", "at 0 and 1 it is one of the two")
def test_averages(pack, studio, bound, acted, refused):
    model, clip = bound
    average = pack.host_nodes["ConditioningAverage"]().addWeighted
    lake, person = studio.encode(clip, "a lake"), studio.encode(clip, "photo of <person>")
    for first, second, weight in ((lake, person, 0.3), (person, lake, 0.3), (lake, person, 0.0), (person, lake, 1.0)):
        assert acted(model, average(first, second, weight)[0], lake) == {(1, 77, (3,))}
    for first, second, weight in ((lake, person, 1.0), (person, lake, 0.0)):
        with refused("No positive prompt mentions <person>"):
            acted(model, average(first, second, weight)[0], lake)


def test_two_subjects_at_one_place_are_refused(pack, studio, bound, refused):
    model, clip = studio.apply(studio.subject("<anna>", "woman", view=1), *bound)
    average = pack.host_nodes["ConditioningAverage"]().addWeighted
    both = average(studio.encode(clip, "<anna> x"), studio.encode(clip, "<person> x"), 0.5)[0]
    with refused("stand at the same place of one text, as when a node averages"):
        studio.sample(model, both, studio.encode(clip, ""), size=SIZE)


@pytest.mark.works_with("Prompt", "PhotoMaker Encode", "its trigger and the subject in one prompt")
def test_photomaker(pack, sdxl, acted):
    """PhotoMaker puts a row of its own in the place of its trigger's: the subject keeps its own."""
    fuse = nodes_photomaker.FuseModule(2048, comfy.ops.disable_weight_init)
    for parameter in fuse.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    class Photomaker:
        load_device = torch.device("cpu")

        def __call__(self, id_pixel_values, prompt_embeds, class_tokens_mask):
            return fuse(prompt_embeds, torch.ones(1, 1, 1, 2048), class_tokens_mask)

    model, clip = sdxl.apply()
    text = "photo photomaker with <person>"
    made = nodes_photomaker.PhotoMakerEncode.execute(Photomaker(), torch.rand(1, 64, 64, 3), clip, text)[0]
    expected = rows(pack, sdxl.encode(clip, text))
    assert rows(pack, made) == expected and expected[0]
    assert not torch.equal(pack.text.plain(made[0][0]), pack.text.plain(sdxl.encode(clip, text)[0][0]))
    assert acted(model, made, sdxl.encode(clip, ""), sdxl) == {(1, 77, expected[0]["<person>"])}


@pytest.mark.works_with("Other packs", "Noise added to texts while sampling (CADS)", "the subject stays where it is")
def test_noise_on_texts_while_sampling(studio, bound, acted):
    model, clip = bound

    def noisy(args):
        conds = copy.deepcopy(args["conds"])
        for entry in (entry for entries in conds for entry in entries or ()):
            old = entry["model_conds"]["c_crossattn"]
            y = 0.75 * old.cond + 0.25 * torch.randn_like(old.cond)
            y = (y - y.mean()) / y.std() * old.cond.std() + old.cond.mean()
            entry["model_conds"]["c_crossattn"] = old._copy_with(y)
        return comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])

    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(noisy)
    assert acted(model, studio.encode(clip, "photo of <person>"), studio.encode(clip, "x")) == {(1, 77, (3,))}


@pytest.mark.works_with("Other packs", "Nodes that swap a CLIP's tokenizer or text encoder", "before or after")
def test_a_clip_whose_parts_are_swapped(pack, sdxl, acted, refused):
    """Long-CLIP's kind: another tokenizer and text encoder for half of SDXL's text, put in before or after."""

    class Longer:
        """A tokenizer of its own: a list of ids per text, as `tokenizer(text)[0]`."""

        def __init__(self, part):
            self.__dict__.update(vars(part))
            inner = getattr(part.tokenizer, "inner", part.tokenizer)
            self.tokenizer = lambda texts: [
                inner(t)["input_ids"] for t in ([texts] if isinstance(texts, str) else texts)
            ]
            self.part = copy.copy(part)

        def tokenize_with_weights(self, text, return_word_ids=False, **_):
            ids = [t for word in text.split() for t in self.tokenizer(word)[0][1:-1]]
            return [[(t, 1.0) for t in [49406, *ids, *[49407] * (76 - len(ids))]]]

    def swapped(clip):
        clip = clip.clone()
        clip.tokenizer = copy.copy(clip.tokenizer)
        clip.tokenizer.clip_l = Longer(clip.tokenizer.clip_l)
        model = copy.copy(clip.cond_stage_model)
        model._modules = {**model._modules, "clip_l": copy.deepcopy(model.clip_l)}
        clip.cond_stage_model = model
        return clip

    model, clip = sdxl.apply()
    stock = sdxl.encode(swapped(sdxl.clip), "photo of person")
    for ours in (swapped(clip), sdxl.apply(clip=swapped(sdxl.clip))[1]):
        cond = sdxl.encode(ours, "photo of <person>")
        assert torch.equal(pack.text.plain(cond[0][0]), stock[0][0])
        assert bool(pack.text.marks_of(cond[0][0])["<person>"][0, 3].all()), "in both halves of the text"
        assert acted(model, cond, sdxl.encode(ours, ""), sdxl) == {(1, 77, (3,))}

    class Raw(Longer):
        def __init__(self, part):
            super().__init__(part)
            self.words = self.tokenizer
            del self.tokenizer

        def tokenize_with_weights(self, text, return_word_ids=False, **_):
            self.tokenizer = self.words
            try:
                return super().tokenize_with_weights(text)
            finally:
                del self.tokenizer

    unreadable = clip.clone()
    unreadable.tokenizer = copy.copy(unreadable.tokenizer)
    unreadable.tokenizer.clip_l = Raw(unreadable.tokenizer.clip_l)
    with refused(r"gave this CLIP another tokenizer \(Raw\) for its text encoder 'l'.*in front of Apply Subject"):
        sdxl.encode(unreadable, "photo of <person>")


# -- what can't be known is refused with its cause ------------------------------------------------------------------


def test_causes_of_a_missing_subject(pack, studio, bound, refused):
    model, clip = bound
    negative = studio.encode(clip, "")
    with refused("None of the texts comes from the CLIP of Apply Subject"):
        studio.sample(model, studio.encode(studio.clip, "photo of <person>"), negative, size=SIZE)
    with refused('The text encoder reads "a photo of in a garden". If you did write <person> there, .* such as'):
        studio.sample(model, studio.encode(clip, "a photo of  in a garden"), negative, size=SIZE)
    cond, values = studio.encode(clip, "photo of <person>")[0]
    left = torch.from_numpy(cond.numpy().copy())
    with refused("A text did mention <person>, but a node behind the text encode node made it anew outside of"):
        studio.sample(model, [[left, values]], negative, size=SIZE)
    zeroed = pack.host_nodes["ConditioningZeroOut"]().zero_out([[cond, values]])[0]
    with refused("The text that mentions <person> was emptied by a node such as Conditioning Zero Out"):
        studio.sample(model, zeroed, negative, size=SIZE)
    both, first = studio.apply(studio.subject("<anna>", "woman", view=1), *bound)[0], clip
    prompt = studio.encode(first, "<person> and <anna>")
    with refused('reads "person and < anna >".* With several of them, take the CLIP from the last one'):
        studio.sample(both, prompt, negative, size=SIZE)


@pytest.mark.parametrize("placeholder", ["[person]", "@anna"])
def test_placeholders_that_loaders_of_lora_tags_leave_alone(studio, acted, placeholder):
    model, clip = studio.apply(studio.subject(placeholder, "person"))
    text = re.sub(r"<[^>]*>", "", f"a photo of {placeholder} <lora:x:1> in a garden")
    assert acted(model, studio.encode(clip, text), studio.encode(clip, "")) == {(1, 77, (4,))}


def test_a_text_for_a_subject_that_the_model_does_not_have_is_said(pack, studio, bound, caplog):
    """CLIP taken from Apply Subject and MODEL not: the picture is that of the class word, and the log says so."""
    model, clip = bound
    negative = studio.encode(studio.clip, "x")
    plain = studio.sample(studio.model, studio.encode(studio.clip, "photo of person"), negative, size=SIZE)
    pack.run._warned = ()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(
            studio.sample(studio.model, studio.encode(clip, "photo of <person>"), negative, size=SIZE), plain
        )
    assert caplog.text.count("A text that mentions <person> is read by a model that has no such subject") == 1
    caplog.clear()
    _, both = studio.apply(studio.subject("<anna>", "woman", view=1), *bound)
    with caplog.at_level(logging.WARNING):
        studio.sample(model, studio.encode(both, "<person> and <anna>"), negative, size=SIZE)
    assert "A text that mentions <anna> is read by a model that has no such subject" in caplog.text


# -- a subject that is applied acts, or says why not ----------------------------------------------------------------


def _blocks_by_itself(model):
    """A function wrapper that runs the U-Net's own layers and never calls the model: DeepCache's kind."""

    def wrapper(_, args):
        base, c = model.model, args["c"]
        x = base.model_sampling.calculate_input(args["timestep"], args["input"])
        t = base.model_sampling.timestep(args["timestep"]).float()
        out = base.diffusion_model(
            x, t, context=c["c_crossattn"].to(x.dtype), y=c.get("y"), transformer_options=c["transformer_options"]
        )
        return base.model_sampling.calculate_denoised(args["timestep"], out, args["input"])

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.works_with("Other packs", "Wrappers that run the U-Net by themselves (DeepCache)", "before or after")
def test_wrappers_that_run_the_unet_by_themselves(studio, bound):
    model, clip = bound
    positive, negative = studio.encode(clip, "photo of <person>"), studio.encode(clip, "x")
    expected = studio.sample(model, positive, negative, size=SIZE)
    assert torch.equal(studio.sample(_blocks_by_itself(model), positive, negative, size=SIZE), expected)
    before, _ = studio.apply(model=_blocks_by_itself(studio.model))
    assert torch.equal(studio.sample(before, positive, negative, size=SIZE), expected)


def _with_copied_options(model):
    """A node that samples with the options as they were when it ran: AutomaticCFG's kind."""
    copied = copy.deepcopy(model.model_options)

    def guided(args):
        again = comfy.samplers.calc_cond_batch(args["model"], [args["conds"][1]], args["input"], args["sigma"], copied)
        return [args["conds_out"][0], again[0]]

    def pre_cfg(args):
        return guided(args)

    model = model.clone()
    model.set_model_sampler_pre_cfg_function(pre_cfg)
    return model


@pytest.mark.works_with(
    "Other packs", "Nodes that sample with copied options (AutomaticCFG)", "after Apply Subject; before it, a message"
)
def test_nodes_that_sample_with_options_copied_when_they_ran(studio, bound, acted, refused):
    model, clip = bound
    positive, negative = studio.encode(clip, "photo of <person>"), studio.encode(clip, "<person>, bad")
    assert len(positive) == 1
    # conds are (positive, negative) there: the copied options sample the negative prompt once more.
    assert acted(_with_copied_options(model), positive, negative) == {(1, 77, (3,)), (1, 77, (1,))}
    before, _ = studio.apply(model=_with_copied_options(studio.model))
    with refused("<person> is in a prompt and on the model, but reached no layer: .*Put Apply Subject in front of"):
        acted(before, positive, negative)


def _options_rebuilt(change):
    """A function wrapper that sends one prompt per call and changes what the options say of it: TGate's kind."""

    def wrapper(apply, args):
        out = []
        for i in range(len(args["input"])):
            c = {k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in args["c"].items()}
            c["transformer_options"] = change(dict(c["transformer_options"]), i)
            out.append(apply(args["input"][i : i + 1], args["timestep"][i : i + 1], **c))
        return torch.cat(out)

    return wrapper


def _one_kind(options, i):
    return {**options, "cond_or_uncond": [options["cond_or_uncond"][i]]}


def _wrong_kind(options, i):
    return {**options, "cond_or_uncond": [i]}


def _no_uuids(options, i):
    return {k: v for k, v in options.items() if k != "uuids"}


@pytest.mark.parametrize("change", [_one_kind, _wrong_kind, _no_uuids])
@pytest.mark.works_with("Other packs", "Wrappers that send one prompt per call (TGate)", "with masks too")
def test_wrappers_that_send_one_prompt_per_call(studio, change):
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    model, clip = studio.apply(mask=mask)
    positive, negative = studio.encode(clip, "photo of <person>"), studio.encode(clip, "x")
    expected = studio.sample(model, positive, negative, size=SIZE)
    model = model.clone()
    model.set_model_unet_function_wrapper(_options_rebuilt(change))
    torch.testing.assert_close(studio.sample(model, positive, negative, size=SIZE), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.works_with("Other packs", "Nodes that call the model past the host's batching", "without masks")
def test_nodes_that_call_the_model_past_the_hosts_batching(studio, bound, refused):
    """Old copies of the host's calc_cond_batch: no labels, no uuids. Whose words are in a text it says itself."""

    def own(args):
        out = []
        for i, entries in enumerate(args["conds"]):
            (entry,) = entries
            c = {k: v.process_cond(batch_size=1, area=None).cond for k, v in entry["model_conds"].items()}
            c["transformer_options"] = {**args["model_options"]["transformer_options"], "cond_or_uncond": [i]}
            out.append(args["model"].apply_model(args["input"], args["sigma"], **c))
        return out

    def sampled(model):
        model = model.clone()
        model.set_model_sampler_calc_cond_batch_function(own)
        return studio.sample(model, positive, negative, size=SIZE, steps=2)

    model, clip = bound
    positive, negative = studio.encode(clip, "photo of <person>"), studio.encode(clip, "x")
    expected = studio.sample(model, positive, negative, size=SIZE, steps=2)
    torch.testing.assert_close(sampled(model), expected, rtol=1e-3, atol=1e-2)
    assert not torch.allclose(sampled(studio.model), expected, rtol=1e-3, atol=1e-2)
    masked, _ = studio.apply(mask=torch.ones(1, 64, 64))
    with refused("mask of <person> can't be placed: another node"):
        sampled(masked)


@pytest.mark.works_with("Other packs", "Windows of frames (AnimateDiff-Evolved)", "a mask per frame; maps; no Separate")
def test_windows_of_frames(pack, studio, bound, node, refused):
    """AnimateDiff-Evolved's kind: windows that overlap and wrap, frames in any order, said in ad_params."""
    mask = torch.zeros(6, 64, 64)
    mask[3:] = 1

    def windowed(model):
        def windows(executor, base, conds, x, timestep, options):
            out, count = [torch.zeros_like(x) for _ in conds], x.new_zeros(len(x), 1, 1, 1)
            for frames in ([0, 1, 2], [4, 3, 5], [5, 0, 1]):
                inside = {**options["transformer_options"], "ad_params": {"sub_idxs": frames, "full_length": 6}}
                part = executor(base, conds, x[frames], timestep[frames], {**options, "transformer_options": inside})
                for all_of, some in zip(out, part, strict=True):
                    all_of[frames] += some
                count[frames] += 1
            return [o / count for o in out]

        model = model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "windows", windows)
        return model

    def frames(model, positive, negative):
        return studio.sample(windowed(model), positive, negative, size=SIZE, batch=6)

    masked, clip = studio.apply(mask=mask)
    positive, negative = studio.encode(clip, "photo of <person>"), studio.encode(clip, "x")
    plain = frames(studio.model, studio.encode(studio.clip, "photo of person"), negative)
    changed = [not torch.equal(a, b) for a, b in zip(frames(masked, positive, negative), plain, strict=True)]
    assert changed == [False, False, False, True, True, True]

    recorded, recording = node("NestedRecordAttention", all_outputs=True, model=bound[0])
    frames(recorded, positive, negative)
    run = recording.last()
    heats = pack.recording.heats_of(run, 0.0, 1.0, [1.0] * 16)[0]
    assert heats.shape[0] == 6 and (heats.amax((1, 2)) > 0).all()
    alone = studio.sample(node("NestedRecordAttention", model=bound[0]), positive, negative, size=SIZE, batch=6)
    torch.testing.assert_close(alone, frames(bound[0], positive, negative), rtol=1e-3, atol=1e-3)

    both, clip = studio.apply(studio.subject("<anna>", "woman", view=1), *bound)
    apart = node("NestedSeparateSubjects", model=both)
    with refused("Separate Subjects can't tell where the subjects are: another node samples in context windows"):
        frames(apart, studio.encode(clip, "<person> and <anna>"), negative)


def test_a_text_that_leaves_torch_while_sampling_stops_the_run(studio, bound, refused):
    def outside(apply, args):
        text = args["c"]["c_crossattn"]
        c = {**args["c"], "c_crossattn": torch.from_numpy(text.cpu().numpy().copy()).to(text.device)}
        return apply(args["input"], args["timestep"], **c)

    model, clip = bound
    model = model.clone()
    model.set_model_unet_function_wrapper(outside)
    steps = []
    with refused("makes the texts anew while sampling, outside of PyTorch.*model_function_wrapper of"):
        studio.sample(
            model, studio.encode(clip, "<person>"), studio.encode(clip, ""), size=SIZE, steps=4,
            callback=lambda step, *_: steps.append(step),
        )  # fmt: skip
    assert not steps, "by the end of the first step"


def test_a_model_that_nobody_calls_is_said_at_the_end(studio, bound, refused):
    """A cache may skip the model in a step; a run in which it never ran with the subject is no picture of it."""
    model, clip = bound
    model = model.clone()
    model.set_model_unet_function_wrapper(lambda apply, args: args["input"] * 0)
    with refused("reached no layer: .*no layer was called with a text that mentions it"):
        studio.sample(model, studio.encode(clip, "<person>"), studio.encode(clip, ""), size=SIZE)


def test_what_stands_on_the_model_is_nothing_but_names(studio, bound):
    """Wrappers without state, equal for all models and all copies of their options; no patches."""
    options = bound[0].model_options["transformer_options"]
    again, _ = studio.apply(studio.subject("<anna>", "woman", view=1), *bound)
    assert set(options) == {"wrappers"}
    assert again.model_options["transformer_options"]["wrappers"] == options["wrappers"]
    assert copy.deepcopy(options) == options
    assert "transformer_options" not in studio.model.model_options or not studio.model.model_options[
        "transformer_options"
    ].get("wrappers")
