"""Prompt binding in the real host: which rows a placeholder takes, and what the binding survives (DESIGN section 4)."""

from __future__ import annotations

import copy

import comfy.hooks
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def bound(sdxl):
    """(model, clip) with <person>."""
    return sdxl.apply(sdxl.subject())


def places(cond, index=0):
    return {k: tuple(v) for k, v in cond[index][1]["nested_attention"]["places"].items()}


def row_of(clip, text, word, branch="l"):
    """Rows of a word's tokens by an independent way: the host's own word ids."""
    tokens = clip.tokenize(text, return_word_ids=True)[branch]
    wanted = [t for t, *_ in clip.tokenize(word)[branch][0] if t not in (0, 49406, 49407)]
    flat = [int(t) for section in tokens for t, *_ in section]
    return [i + j for i in range(len(flat)) if flat[i : i + len(wanted)] == wanted for j in range(len(wanted))]


PROMPTS = [
    "<person>",
    "a photo of <person> in a garden",
    "a photo of (<person>:1.2) in a (garden:0.8)",
    "((<person>)), [old] photo",
    r"a photo \(of <person>\) in a garden",
    "<person> and <person>, twice",
    "photo of <person>'s hat",
    "photo,<person>,garden",
    "photo of <PERSON>",
    "\n\nphoto of\n<person>\t!",
    "ein Bild von <person>, 写真 📷 é",
    "a < b <dog> <person>",
]


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.works_with(
    "Prompt", "Weights, brackets, escapes, other scripts, emoji", "the text encoder sees the class word; bit for bit"
)
def test_placeholder_reads_as_its_class_word_and_is_found(bound, text, sdxl):
    cond = sdxl.encode(bound[1], text)
    stock_text = text.replace("<person>", "person").replace("<PERSON>", "person")
    stock = sdxl.encode(sdxl.clip, stock_text)
    assert torch.equal(cond[0][0], stock[0][0])
    assert torch.equal(cond[0][1]["pooled_output"], stock[0][1]["pooled_output"])
    assert places(cond) == {"<person>": tuple(row_of(sdxl.clip, stock_text, "person"))}


def test_text_without_placeholder_is_the_stock_encoding(bound, sdxl):
    for text in ("", "a person in a <garden>", "5 < 7 > 3", "(weights:1.3) [x] embedding:none"):
        ours, stock = sdxl.encode(bound[1], text), sdxl.encode(sdxl.clip, text)
        assert torch.equal(ours[0][0], stock[0][0])
        assert torch.equal(ours[0][1]["pooled_output"], stock[0][1]["pooled_output"])
        assert places(ours) == {}


def test_every_token_of_a_class_word_is_bound(sdxl):
    _, clip = sdxl.apply(sdxl.subject("<rex>", "golden retriever"))
    cond = sdxl.encode(clip, "photo of <rex> running, <rex>")
    expected = row_of(sdxl.clip, "photo of golden retriever running, golden retriever", "golden retriever")
    assert len(expected) == 4
    assert places(cond) == {"<rex>": tuple(expected)}
    assert torch.equal(cond[0][0], sdxl.encode(sdxl.clip, "photo of golden retriever running, golden retriever")[0][0])


def test_a_plain_word_binds_where_it_stands(sdxl):
    _, clip = sdxl.apply(sdxl.subject("man", "person"))
    text = "a Man with a mandolin and a womanly manner, man-made, man"
    cond = sdxl.encode(clip, text)
    assert torch.equal(cond[0][0], sdxl.encode(sdxl.clip, text)[0][0]), "a plain word stays as it is"
    assert places(cond) == {"man": tuple(row_of(sdxl.clip, text, "man"))}
    assert len(places(cond)["man"]) == 3


def test_glued_and_neighbouring_placeholders(sdxl):
    _, clip = sdxl.apply(sdxl.subject("<b>", "dog"), *sdxl.apply(sdxl.subject("<a>", "cat")))
    cond = sdxl.encode(clip, "<a><b>, two <a>s")
    assert torch.equal(cond[0][0], sdxl.encode(sdxl.clip, "cat dog, two cats")[0][0])
    assert places(cond) == {"<a>": (1, 5), "<b>": (2,)}


@pytest.mark.parametrize("at", [0, 40, 74, 75, 76, 77, 120, 160])
@pytest.mark.works_with("Prompt", "Prompts over 77 tokens", "at any place, across chunks")
def test_long_prompts(bound, at, sdxl):
    text = "tree " * at + "<person>" + " lake" * 30
    cond, stock_text = sdxl.encode(bound[1], text), text.replace("<person>", "person")
    assert torch.equal(cond[0][0], sdxl.encode(sdxl.clip, stock_text)[0][0])
    assert places(cond) == {"<person>": tuple(row_of(sdxl.clip, stock_text, "person"))}


@pytest.mark.works_with("Prompt", "CLIPTextEncodeSDXL", "bound where either text mentions it")
def test_two_texts_of_sdxl_bind_where_either_mentions(pack, bound, sdxl):
    node = pack.host_nodes["CLIPTextEncodeSDXL"]
    size = dict(width=1024, height=1024, crop_w=0, crop_h=0, target_width=1024, target_height=1024)

    def two_texts(clip, g, l):  # noqa: E741
        return node.execute(clip=clip, text_g=g, text_l=l, **size)[0]

    cond = two_texts(bound[1], "a photo of <person>", "<person>, oil")
    assert places(cond) == {"<person>": (1, 4)}
    assert torch.equal(cond[0][0], two_texts(sdxl.clip, "a photo of person", "person, oil")[0][0])
    assert places(two_texts(bound[1], "a photo of <person>", "oil")) == {"<person>": (4,)}
    # Texts of different length: the host pads the shorter, both are 154 rows.
    long = "tree " * 100
    assert places(two_texts(bound[1], long + "<person>", "x <person>"))["<person>"][0] == 2


@pytest.mark.works_with("Prompt", "Textual inversion embeddings", "beside the subject, also of another width")
def test_embeddings_beside_a_placeholder(pack, sdxl, tmp_path):
    """Textual inversions take as many rows as they have vectors; those of another width are dropped and padded."""
    save_file({"clip_l": torch.randn(3, 768), "clip_g": torch.randn(3, 1280)}, str(tmp_path / "fits.safetensors"))
    save_file({"emb_params": torch.randn(2, 768)}, str(tmp_path / "narrow.safetensors"))
    clip = sdxl.clip.clone()
    clip.tokenizer = copy.deepcopy(clip.tokenizer)
    for part in (clip.tokenizer.clip_l, clip.tokenizer.clip_g):
        part.embedding_directory = [str(tmp_path)]
    _, ours = sdxl.apply(clip=clip)
    cond = sdxl.encode(ours, "art embedding:fits <person>, embedding:fits")
    assert places(cond) == {"<person>": (5,)}
    assert torch.equal(cond[0][0], sdxl.encode(clip, "art embedding:fits person, embedding:fits")[0][0])
    # CLIP-L keeps both vectors of the narrow one (row 4), CLIP-G drops them (row 2).
    cond = sdxl.encode(ours, "art embedding:narrow <person>")
    assert places(cond) == {"<person>": (2, 4)}


def _lora(clip):
    """A LoRA on the text encoder, as the LoRA loader leaves it."""
    clip = clip.clone()
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    shape = clip.cond_stage_model.state_dict()[key].shape
    assert clip.add_patches({key: ("diff", (torch.full(shape, 0.01),))}, 1.0)
    return clip


def _skip(clip):
    clip = clip.clone()
    clip.clip_layer(-2)
    return clip


@pytest.mark.parametrize("change", [_lora, _skip], ids=["lora", "clip skip"])
@pytest.mark.works_with("Prompt", "LoRA on the text encoder, CLIP Set Last Layer", "before or after")
def test_lora_and_clip_skip_before_or_after(sdxl, change):
    subject = sdxl.subject()
    stock = sdxl.encode(change(sdxl.clip), "photo of person")
    after = sdxl.encode(change(sdxl.apply(subject)[1]), "photo of <person>")
    before = sdxl.encode(sdxl.apply(subject, clip=change(sdxl.clip))[1], "photo of <person>")
    assert torch.equal(after[0][0], stock[0][0]) and torch.equal(before[0][0], stock[0][0])
    assert places(after) == places(before) == {"<person>": (3,)}


def test_sd15(sd15):
    _, clip = sd15.apply(sd15.subject())
    cond = sd15.encode(clip, "photo of (<person>:1.3)")
    assert places(cond) == {"<person>": (3,)}
    assert torch.equal(cond[0][0], sd15.encode(sd15.clip, "photo of (person:1.3)")[0][0])


def test_other_ways_to_encode(bound, sdxl):
    """`encode`, tuples instead of dictionaries, schedules by hooks: packs use all of them."""
    clip = bound[1]
    tokens = clip.tokenize("photo of <person>")
    stock = sdxl.clip.encode_from_tokens(sdxl.clip.tokenize("photo of person"), return_pooled=True)
    cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    assert torch.equal(cond, stock[0]) and torch.equal(pooled, stock[1])
    assert torch.equal(clip.encode("photo of <person>"), stock[0])
    scheduled = clip.clone()
    scheduled.use_clip_schedule = True
    scheduled.patcher.forced_hooks = comfy.hooks.HookGroup()
    for _, values in scheduled.encode_from_tokens_scheduled(tokens):
        assert values["nested_attention"]["places"] == {"<person>": [3]}


@pytest.mark.works_with("Other packs", "Nodes that cut, join or reweigh token lists", "tokens remember their word")
def test_tokens_survive_what_packs_do_to_lists(bound):
    clip = bound[1]
    tokens = clip.tokenize("photo of <person>")
    shuffled = {k: [[(t, 1.1 * w) for t, w in section] for section in v] for k, v in copy.deepcopy(tokens).items()}
    joined = {k: v + clip.tokenize("and <person>")[k] for k, v in shuffled.items()}
    ((_, values),) = clip.encode_from_tokens_scheduled(joined)
    assert values["nested_attention"]["length"] == 154
    assert values["nested_attention"]["places"] == {"<person>": [3, 79]}


def test_original_clip_is_untouched(bound, sdxl):
    literal = sdxl.encode(sdxl.clip, "photo of <person>")
    assert "nested_attention" not in literal[0][1]
    assert not torch.equal(literal[0][0], sdxl.encode(bound[1], "photo of <person>")[0][0])


# -- conditioning nodes: what the sampler ends up binding -----------------------------------------------------------


@pytest.fixture
def sampled(bound, fired, sdxl):
    """sampled(positive, negative="blurry", **options) -> what was bound: (batch rows, text length, places), sorted."""
    model, clip = bound

    def run(positive, negative="blurry", **options):
        fired.clear()
        negative = sdxl.encode(clip, negative) if isinstance(negative, str) else negative
        sdxl.sample(model, positive, negative, **{"size": (8, 8), **options})
        assert len(fired) % 70 == 0
        return sorted({(call.q[0], call.k[1], tuple(call.terms[0].places.tolist())) for call in fired})

    return run


@pytest.mark.works_with(
    "Conditioning", "Combine, Concat, Average, SetMask, SetTimestepRange, ZeroOut", "each prompt binds its own"
)
def test_binding_survives_conditioning_nodes(pack, bound, sampled, sdxl):
    clip, nodes = bound[1], pack.host_nodes
    one, other = sdxl.encode(clip, "photo of <person>"), sdxl.encode(clip, "a lake")
    assert sampled(one) == [(1, 77, (3,))]
    assert sampled(nodes["ConditioningCombine"]().combine(other, one)[0]) == [(1, 77, (3,))]
    assert sampled(nodes["ConditioningConcat"]().concat(other, one)[0]) == [(1, 154, (80,))]
    assert sampled(nodes["ConditioningConcat"]().concat(one, other)[0]) == [(1, 154, (3,))]
    both = nodes["ConditioningConcat"]().concat(one, sdxl.encode(clip, "<person> again"))[0]
    assert sampled(both) == [(1, 154, (3, 78))]
    assert sampled(nodes["ConditioningAverage"]().addWeighted(one, other, 0.8)[0]) == [(1, 77, (3,))]
    assert sampled(nodes["ConditioningSetTimestepRange"]().set_range(one, 0.0, 1.0)[0]) == [(1, 77, (3,))]
    masked = nodes["ConditioningSetMask"]().append(one, torch.ones(1, 64, 64), "default", 1.0)[0]
    assert sampled(masked) == [(1, 77, (3,))]
    zeroed = nodes["ConditioningZeroOut"]().zero_out(one)[0]
    assert sampled(one, zeroed) == [(1, 77, (3,))]
    assert sampled(one, sdxl.encode(clip, "bad <person>")) == [(1, 77, (2,)), (1, 77, (3,))]
    assert sampled(one, sdxl.encode(sdxl.clip, "blurry")) == [(1, 77, (3,))]
    assert sampled(one, cfg=1.0) == [(1, 77, (3,))]


@pytest.mark.works_with("Conditioning", "SetArea", "the prompt, and not its opposite in the area")
def test_area_conditioning_binds_the_prompt_and_not_its_opposite(pack, bound, sampled, sdxl):
    """The host copies a prompt's dictionary and uuid onto the negative tensor it pairs with the area."""
    clip, nodes = bound[1], pack.host_nodes
    one = nodes["ConditioningSetArea"]().append(sdxl.encode(clip, "photo of <person>"), 32, 64, 0, 0, 1.0)[0]
    combined = nodes["ConditioningCombine"]().combine(sdxl.encode(clip, "a lake"), one)[0]
    assert sampled(combined) == [(1, 77, (3,))]
    # With the subject in the negative prompt, its copy keeps its own place.
    assert sampled(combined, sdxl.encode(clip, "<person>")) == [(1, 77, (1,)), (1, 77, (3,))]


def test_a_mask_is_cut_to_the_area_even_where_that_leaves_the_picture(pack, fired, sdxl):
    mask = torch.zeros(1, 128, 128)
    mask[:, 64:] = 1  # the lower half of the picture; the area is the lower right corner and more
    model, clip = sdxl.apply(mask=mask)
    area = pack.host_nodes["ConditioningSetArea"]()
    corner = area.append(sdxl.encode(clip, "<person>"), 96, 96, 64, 32, 1.0)[0]
    whole = pack.host_nodes["ConditioningCombine"]().combine(sdxl.encode(clip, "a lake"), corner)[0]
    sdxl.sample(model, whole, sdxl.encode(clip, ""), size=(16, 16))
    assert len(fired) == 70
    for call in fired:  # the area: 12 rows from row 4 on, 8 columns from column 8 on; white from its row 4 on
        grid = call.delta.abs().amax(-1)[0].unflatten(0, {6 * 4: (6, 4), 3 * 2: (3, 2)}[call.q[1]])
        third = len(grid) // 3
        assert (grid[:third] == 0).all() and (grid[third:] > 0).all()


def test_scheduled_prompts_bind_in_their_steps(pack, bound, sampled, fired, sdxl):
    clip, nodes = bound[1], pack.host_nodes
    first = nodes["ConditioningSetTimestepRange"]().set_range(sdxl.encode(clip, "<person>"), 0.0, 0.5)[0]
    then = nodes["ConditioningSetTimestepRange"]().set_range(sdxl.encode(clip, "photo of <person>"), 0.5, 1.0)[0]
    both = nodes["ConditioningCombine"]().combine(first, then)[0]
    assert sampled(both, steps=4) == [(1, 77, (1,)), (1, 77, (3,))]
    steps = [call.terms[0].places.tolist() for call in fired[::70]]
    assert steps == sorted(steps) and len(steps) == 4, "the first prompt in the first steps, then the other"


@pytest.mark.works_with("Conditioning", "Prompts of unequal length in one batch", "all copies of the shorter are bound")
def test_longer_and_shorter_prompts_in_one_batch(bound, sampled, sdxl):
    """The host repeats the shorter prompt to the common length: every copy is bound."""
    clip = bound[1]
    assert sampled(sdxl.encode(clip, "photo of <person>"), "tree " * 100) == [(1, 154, (3, 80))]
    assert sampled(sdxl.encode(clip, "tree " * 100 + "<person>"), "x") == [(1, 154, (103,))]


def test_batches_bind_every_picture(bound, sampled, sdxl):
    assert sampled(sdxl.encode(bound[1], "<person>"), batch=2) == [(2, 77, (1,))]


@pytest.mark.works_with(
    "Other packs", "Text encode nodes that rebuild the conditioning", "the text itself knows its rows"
)
def test_dictionaries_that_were_rebuilt_do_not_matter(bound, sampled, sdxl):
    """What text-encode packs of the older kind return: [[cond, {"pooled_output": pooled}]], perhaps cast or scaled."""
    cond, values = sdxl.encode(bound[1], "watercolour of <person> by a lake")[0]
    pooled = {"pooled_output": values["pooled_output"]}
    assert sampled([[cond, pooled]]) == [(1, 77, (3,))]
    assert sampled([[cond.half().float(), pooled]]) == [(1, 77, (3,))]
    assert sampled([[cond.bfloat16().float() * 1.3, pooled]]) == [(1, 77, (3,))]
    tail = sdxl.encode(bound[1], "plain words")[0][0]
    assert sampled([[torch.cat((tail, cond, tail), 1), pooled]]) == [(1, 231, (80,))]


def test_a_subject_that_no_prompt_mentions_stops_the_run(pack, bound, sampled, sdxl):
    for positive, negative in (
        (sdxl.encode(bound[1], "a lake"), "x"),
        (sdxl.encode(sdxl.clip, "photo of <person>"), "x"),
        (sdxl.encode(bound[1], "a lake"), "<person>"),
    ):
        with pytest.raises(pack.errors.NestedAttentionError) as error:
            sampled(positive, negative)
        assert "No positive prompt mentions <person>. Write <person> in the prompt" in str(error.value)
        assert "when_unmentioned = skip" in str(error.value)


def test_the_advanced_node_can_skip(sdxl):
    model, clip = sdxl.apply_advanced(sdxl.subject(), when_unmentioned="skip")
    positive, negative = sdxl.encode(clip, "a lake"), sdxl.encode(clip, "")
    assert torch.equal(sdxl.sample(model, positive, negative), sdxl.sample(sdxl.model, positive, negative))


@pytest.mark.works_with("Guidance", "PerpNeg, DualCFG", "prompts numbered above 1")
def test_guiders_with_more_than_two_prompts(pack, bound, fired, sdxl):
    """PerpNeg and DualCFG number their prompts beyond 1."""
    model, clip = bound
    person, other, plain = sdxl.encode(clip, "<person>"), sdxl.encode(clip, "two of <person>"), sdxl.encode(clip, "")
    guiders = []
    dual = pack.host_nodes["DualCFGGuider"]
    guiders.append((dual.execute(model, person, other, plain, 3.0, 2.0, "regular")[0], {(1,), (3,)}))
    perp = pack.host_nodes["PerpNeg"].execute(model, plain, 1.0)[0]
    guider = comfy.samplers.CFGGuider(perp)
    guider.set_conds(person, sdxl.encode(clip, "bad"))
    guider.set_cfg(4.0)
    guiders.append((guider, {(1,)}))
    for guider, expected in guiders:
        fired.clear()
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([10.0, 0.0])
        latent = torch.zeros(1, 4, 8, 8)
        guider.sample(comfy.sample.prepare_noise(latent, 0), latent, sampler, sigmas, disable_pbar=True)
        assert {tuple(call.terms[0].places.tolist()) for call in fired} == expected


def _couple(region, key):
    """An attention-couple kind of pack: the positive prompt's rows once more with a region's text, mixed by halves."""

    def before(q, k, v, extra_options):
        kinds = extra_options["cond_or_uncond"]
        qs, ks, out = [], [], []
        for kind, qc, kc in zip(kinds, q.chunk(len(kinds)), k.chunk(len(kinds)), strict=True):
            qs += [qc] if kind == 1 else [qc, qc]
            ks += [kc] if kind == 1 else [kc, region.to(kc).expand(len(kc), -1, -1) * 0.9]
            out += [kind] if kind == 1 else [kind, kind]
        extra_options[key] = out
        k = torch.cat(ks)
        return torch.cat(qs), k, k

    def after(out, extra_options):
        kinds = extra_options[key]
        parts = out.chunk(len(kinds))
        merged, i = [], 0
        while i < len(kinds):
            merged.append(parts[i] if kinds[i] == 1 else (parts[i] + parts[i + 1]) / 2)
            i += 1 if kinds[i] == 1 else 2
        return torch.cat(merged)

    return before, after


@pytest.mark.parametrize("key", ["cond_or_uncond_couple", "cond_or_uncond_hook_couple"])
@pytest.mark.works_with(
    "Other packs", "Attention couple (both recorded layouts)", "the base prompt and each region bind their own"
)
def test_attention_couple_layouts(bound, fired, key, sdxl):
    """The base prompt keeps its rows, and a region's text that mentions the subject is bound in the region's rows."""
    model, clip = bound
    before, after = _couple(sdxl.encode(clip, "garden with <person>")[0][0], key)
    model = model.clone()
    model.set_model_attn2_patch(before)
    model.set_model_attn2_output_patch(after)
    sdxl.sample(model, sdxl.encode(clip, "photo of <person>"), sdxl.encode(clip, ""))
    assert [call.terms[0].places.tolist() for call in fired] == [[3], [3]] * 70
    fired.clear()
    before, after = _couple(sdxl.encode(clip, "a lake")[0][0], key)
    plain_region = bound[0].clone()
    plain_region.set_model_attn2_patch(before)
    plain_region.set_model_attn2_output_patch(after)
    sdxl.sample(plain_region, sdxl.encode(clip, "<person>"), sdxl.encode(clip, ""), batch=2)
    assert [call.terms[0].places.tolist() for call in fired] == [[1]] * 70


def test_a_subject_that_only_a_region_mentions(pack, bound, fired, sdxl):
    """The region's text is in no list of the guider: the run goes on, and binds it there. If it acted nowhere, it says
    so at its end."""
    model, clip = bound
    before, after = _couple(sdxl.encode(clip, "garden with <person>")[0][0], "cond_or_uncond_couple")
    model = model.clone()
    model.set_model_attn2_patch(before)
    model.set_model_attn2_output_patch(after)
    sdxl.sample(model, sdxl.encode(clip, "people by a lake"), sdxl.encode(clip, ""))
    assert [call.terms[0].places.tolist() for call in fired] == [[3]] * 70
    nowhere = bound[0].clone()
    nowhere.set_model_attn2_patch(_couple(sdxl.encode(clip, "a lake")[0][0], "cond_or_uncond_couple")[0])
    nowhere.set_model_attn2_output_patch(after)
    with pytest.raises(pack.errors.NestedAttentionError, match="No prompt mentions <person>, neither those of the"):
        sdxl.sample(nowhere, sdxl.encode(clip, "people by a lake"), sdxl.encode(clip, ""))


@pytest.mark.works_with(
    "Other packs", "Tiled sampling (several tiles per call)", "without masks; a mask is refused with a message"
)
def test_tiles_in_an_order_of_their_own(bound, sdxl):
    """Tiled-diffusion packs send all tiles of a batch in one call: negative, positive, negative, positive."""
    model, clip = bound

    def tiled(tiles_per_call):
        def wrapper(apply, args):
            x, t, c = args["input"], args["timestep"], args["c"]
            out = torch.zeros_like(x)
            tops = [0, 8]
            for i in range(0, 2, tiles_per_call):
                group = tops[i : i + tiles_per_call]
                tiles = torch.cat([x[:, :, top : top + 8] for top in group])
                repeated = {
                    k: v.repeat(len(group), *[1] * (v.ndim - 1)) if torch.is_tensor(v) else v for k, v in c.items()
                }
                done = apply(tiles, t.repeat(len(group)), **repeated).chunk(len(group))
                for top, tile in zip(group, done, strict=True):
                    out[:, :, top : top + 8] = tile
            return out

        other = model.clone()
        other.set_model_unet_function_wrapper(wrapper)
        return sdxl.sample(other, positive, negative)

    positive, negative = sdxl.encode(clip, "photo of <person>"), sdxl.encode(clip, "blurry")
    torch.testing.assert_close(tiled(1), tiled(2), rtol=1e-3, atol=1e-2)


def test_a_mask_is_refused_on_tiles(pack, sdxl):
    model, clip = sdxl.apply(mask=torch.ones(1, 128, 128))
    model.set_model_unet_function_wrapper(lambda apply, a: apply(a["input"][:, :, :8], a["timestep"], **a["c"]))
    with pytest.raises(pack.errors.NestedAttentionError, match="mask of <person> can't be placed: another node"):
        sdxl.sample(model, sdxl.encode(clip, "<person>"), sdxl.encode(clip, ""))


@pytest.mark.works_with("Conditioning", "A prompt per picture of the batch", "each picture at its own place")
def test_a_prompt_per_picture_of_the_batch(bound, fired, sdxl):
    """Prompt travel: one conditioning with a text for each image. Every image is bound at its own place."""
    model, clip = bound
    one, other = sdxl.encode(clip, "<person> x"), sdxl.encode(clip, "a b c d e f <person>")
    values = {"pooled_output": torch.cat((one[0][1]["pooled_output"], other[0][1]["pooled_output"]))}
    both = [[torch.cat((one[0][0], other[0][0])), values]]
    sdxl.sample(model, both, sdxl.encode(clip, ""), batch=2)
    assert [(call.q[0], call.terms[0].places.tolist()) for call in fired] == [(1, [1]), (1, [7])] * 70


def test_a_stock_negative_that_reads_alike_is_not_bound(bound, sdxl, sampled):
    alike = sdxl.encode(sdxl.clip, "photo of person")
    assert sampled(sdxl.encode(bound[1], "a lake, <person>"), alike) == [(1, 77, (4,))]
    sdxl.encode(bound[1], "photo of <person>")
    assert sampled(sdxl.encode(bound[1], "a lake, <person>"), alike) == [(1, 77, (4,))]


@pytest.mark.works_with("Other packs", "attn2 replacements by hooks", "called for the first term")
def test_replacements_that_hooks_bring_stay_in_the_first_term(bound, sdxl):
    model, clip = bound
    calls = []

    def foreign(q, k, v, extra_options):
        calls.append(len(q))
        return optimized_attention(q, k, v, extra_options["n_heads"])

    hook = comfy.hooks.TransformerOptionsHook({"patches_replace": {"attn2": {("input", 4, 0): foreign}}})
    hook.hook_scope = comfy.hooks.EnumHookScope.HookedOnly
    group = comfy.hooks.HookGroup()
    group.add(hook)
    cond, values = sdxl.encode(clip, "<person>")[0]
    hooked = [[cond, {**values, "hooks": group}]]
    sdxl.sample(sdxl.model, hooked, sdxl.encode(clip, ""))
    alone = len(calls)
    calls.clear()
    sdxl.sample(model, hooked, sdxl.encode(clip, ""))
    assert len(calls) == alone == 1


@pytest.mark.parametrize(("placeholder", "written"), [("<İrem>", "<irem>"), ("<susi>", "<ſusi>"), ("<ANNA>", "<Anna>")])
def test_placeholders_in_any_case(sdxl, placeholder, written):
    _, clip = sdxl.apply(sdxl.subject(placeholder, "woman"))
    assert places(sdxl.encode(clip, f"photo of {written}")) == {placeholder: (3,)}


@pytest.mark.works_with("Speed", "TorchCompileModel", "while a subject acts, all but attention stays compiled")
def test_a_compiled_model_does_not_go_on_without_the_subject(sd15):
    """The host's compile node hides changes of transformer_options from the compiler, which would reuse a graph."""
    graphs = []

    def backend(graph, inputs, **options):  # PyTorch's own "eager" takes no options; older ones pass all of them on
        graphs.append(graph)
        return graph.forward

    def compiled(model):
        model = model.clone()
        options = {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(model=model, backend=backend, options=options)
        return model

    model, clip = sd15.apply()
    positive, negative = sd15.encode(clip, "photo of <person>"), sd15.encode(clip, "")
    for each in (sd15.model, model):  # the plain model first: its graphs are what could be reused
        graphs.clear()
        fast = compiled(each)
        for seed in (0, 1):
            expected = sd15.sample(each, positive, negative, size=(8, 8), seed=seed)
            torch.testing.assert_close(sd15.sample(fast, positive, negative, size=(8, 8), seed=seed), expected)
            if seed == 0:
                made = len(graphs)
    # Residual blocks and feed-forwards: a graph for each of their shapes, the same ones in steps and runs.
    assert 0 < made <= 24
    assert len(graphs) == made
    assert not [m for m in sd15.model.model.modules() if m._compiled_call_impl is not None], "left behind"


# -- errors when applying -------------------------------------------------------------------------------------------


def test_two_subjects_with_one_placeholder_are_refused(pack, bound, sdxl):
    again = sdxl.subject("<Person>", "man", view=1)
    with pytest.raises(pack.errors.NestedAttentionError, match="placeholder <Person> is already applied to this model"):
        sdxl.apply(again, *bound)
    with pytest.raises(pack.errors.NestedAttentionError, match="Two subjects use the placeholder <Person>"):
        sdxl.apply(again, clip=bound[1])


def test_a_class_word_that_the_text_encoder_cannot_read_is_refused(pack, sdxl):
    blank = pack.prompt.Placeholder("<x>", " ")
    with pytest.raises(pack.errors.NestedAttentionError, match="The class word ' ' of <x> has no tokens"):
        pack.prompt.bind_clip(sdxl.clip, blank)


def test_a_clip_of_another_model_is_refused(pack, sdxl):
    other = sdxl.clip.clone()
    other.tokenizer = object.__new__(type("T5Tokenizer", (), {}))
    with pytest.raises(pack.errors.NestedAttentionError, match=r"This CLIP \(T5Tokenizer\) is not of SDXL or SD 1.5"):
        sdxl.apply(clip=other)


def test_wrong_pairs_name_both_sides(pack, sdxl, sd15):
    with pytest.raises(pack.errors.NestedAttentionError, match="encoder sd15.test is for SD 1.5, the model .* is SDXL"):
        sdxl.apply(sd15.subject())
    with pytest.raises(pack.errors.NestedAttentionError, match="encoder sdxl.test is for SDXL, the model .* is SD 1.5"):
        sd15.apply(sdxl.subject())


# -- pooled at the placeholder --------------------------------------------------------------------------------------


def test_pooled_at_placeholder_is_the_text_cut_there(pack, sdxl):
    """CLIP is causal: the state at the placeholder is that of a text that ends with it, whatever follows."""
    clip = pack.prompt.bind_clip(sdxl.clip, pack.prompt.Placeholder("<person>", "person", pooled=True))

    def pooled(text):
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1]

    stock = sdxl.clip.encode_from_tokens(sdxl.clip.tokenize("photo of person"), return_pooled=True)[1]
    a, b = pooled("photo of <person> in a garden"), pooled("photo of <person>")
    torch.testing.assert_close(a, b)
    assert a.shape == stock.shape and not torch.allclose(a, stock)
    # The same numbers from the text encoder itself: last layer, normalised, projected, at the placeholder's row.
    g = sdxl.clip.cond_stage_model.clip_g
    ids = [[int(t) for t, *_ in clip.tokenize("photo of <person>")["g"][0]]]
    embeds, _, _, info = g.process_tokens(ids, g.transformer.text_projection.weight.device)
    last = g.transformer(None, embeds=embeds, num_tokens=[5], dtype=torch.float32, embeds_info=info)[0]
    torch.testing.assert_close(a, g.transformer.text_projection(last[:, 3]).to(a.device))
    # Without the word, and for everything that is not pooled: as always.
    lake = sdxl.clip.encode_from_tokens(sdxl.clip.tokenize("a lake"), return_pooled=True)[1]
    assert torch.equal(pooled("a lake"), lake)
