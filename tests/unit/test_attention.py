"""The fused form against a literal implementation of equations (1) to (4), which lives here and nowhere else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_core.attention import (
    VALUE_NORMS,
    NestedTerm,
    nested_delta,
    one_hot_values,
    outer_probabilities,
    scaled_dot_product,
)
from nested_core.errors import NestedAttentionError


@pytest.fixture(scope="module", params=["fused", "written out"], autouse=True)
def kernels(request):
    """Inference runs in fused kernels, training on a CPU in written-out attention: all of this is about both."""
    with torch.set_grad_enabled(request.param == "written out"):
        yield


def literal(q, k, v, heads, terms):
    """Equations (1)-(4) as the paper writes them, one query, head and row at a time."""
    batch, queries, channels = q.shape
    d = channels // heads
    out = torch.zeros_like(q)
    for b in range(batch):
        for i in range(queries):
            logits = torch.stack([k[b, :, h * d : (h + 1) * d] @ q[b, i, h * d : (h + 1) * d] for h in range(heads)])
            logits = logits / d**0.5  # (H, T)
            values = v[b].clone()[None].repeat(heads, 1, 1)  # V_q, per head: only that head's channels are used
            for term in terms:
                w = term.strength
                if term.spatial is not None:
                    w = w * term.spatial[min(b, len(term.spatial) - 1), i].item()
                key = term.key[min(b, len(term.key) - 1)]
                value = term.value[min(b, len(term.value) - 1)]
                star = torch.zeros(channels, dtype=q.dtype)
                for h in range(heads):
                    part = slice(h * d, (h + 1) * d)
                    scores = key[:, part] @ q[b, i, part] / d**0.5
                    if term.log_weights is not None:
                        scores = scores + term.log_weights
                    star[part] = torch.softmax(scores, 0) @ value[:, part]  # (1)
                for place in term.places.tolist():
                    scaled = star.clone()
                    if term.value_norm == "match":  # (4)
                        scaled = star * term.alpha * v[b, place].norm() / star.norm()
                    elif term.value_norm in ("match_per_head", "unit"):
                        for h in range(heads):
                            part = slice(h * d, (h + 1) * d)
                            target = v[b, place, part].norm() if term.value_norm == "match_per_head" else 1.0
                            scaled[part] = star[part] * term.alpha * target / star[part].norm()
                    values[:, place] = v[b, place] + w * (scaled - v[b, place])  # (2), w = 1 is the paper
                    raised = torch.maximum(logits[:, place], term.focus * logits[:, place])
                    logits[:, place] = logits[:, place] + w * (raised - logits[:, place])
            weights = torch.softmax(logits, -1)
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                out[b, i, part] = weights[h] @ values[h][:, part]  # (3)
    return out


@st.composite
def layers(draw):
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    heads, d = draw(st.sampled_from([(1, 8), (2, 8), (3, 4), (5, 8)]))
    batch, queries, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(4, 12))

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = rand(batch, queries, heads * d), rand(batch, tokens, heads * d), rand(batch, tokens, heads * d)
    free = draw(st.permutations(range(tokens)))
    terms, taken = [], 0
    for _ in range(draw(st.integers(1, 3))):
        count = min(draw(st.integers(1, 2)), tokens - taken)
        if count == 0:
            break
        n = draw(st.integers(1, 6))
        terms.append(
            NestedTerm(
                key=rand(draw(st.sampled_from([1, batch])), n, heads * d),
                value=rand(1, n, heads * d),
                places=torch.tensor(sorted(free[taken : taken + count])),
                strength=draw(st.sampled_from([0.0, 0.35, 1.0, 1.7])),
                alpha=draw(st.sampled_from([0.5, 1.0, 2.0])),
                value_norm=draw(st.sampled_from(VALUE_NORMS)),
                focus=draw(st.sampled_from([1.0, 1.0, 0.5, 1.5, 4.0])),
                spatial=draw(st.sampled_from([None, torch.rand(1, queries, generator=g)])),
                log_weights=draw(st.sampled_from([None, torch.rand(n, generator=g, dtype=torch.float64)])),
            )
        )
        taken += count
    return q, k, v, heads, terms


def cast(terms, dtype):
    return [dataclasses.replace(t, key=t.key.to(dtype), value=t.value.to(dtype)) for t in terms]


# Half types are compared with the fp64 result of the *rounded* inputs; what is left is rounding inside the layer.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-2), (torch.float16, 6e-3)])
@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_fused_equals_literal(layer, dtype, tolerance):
    q, k, v, heads, terms = layer
    q, k, v, terms = q.to(dtype), k.to(dtype), v.to(dtype), cast(terms, dtype)
    expected = literal(q.double(), k.double(), v.double(), heads, cast(terms, torch.float64))
    got = scaled_dot_product(q, k, v, heads) + nested_delta(q, k, v, heads, terms)
    assert got.dtype == dtype
    assert (got.double() - expected).norm() <= tolerance * (1 + expected.norm())


@settings(max_examples=30, deadline=None)
@given(layer=layers())
def test_strength_zero_adds_exactly_nothing(layer):
    q, k, v, heads, terms = layer
    terms = [dataclasses.replace(t, strength=0.0) for t in terms]
    assert torch.count_nonzero(nested_delta(q, k, v, heads, terms)) == 0


@settings(max_examples=30, deadline=None)
@given(layer=layers())
def test_without_focus_subjects_are_a_sum(layer):
    q, k, v, heads, terms = layer
    terms = [dataclasses.replace(t, focus=1.0) for t in terms]
    together = nested_delta(q, k, v, heads, terms)
    apart = sum(nested_delta(q, k, v, heads, [t]) for t in terms)
    torch.testing.assert_close(together, apart)


def test_weight_two_counts_as_twice_the_token():
    g = torch.Generator().manual_seed(0)
    q, k, v, key, value = (torch.randn(1, n, 16, generator=g) for n in (7, 9, 9, 4, 4))
    doubled = [1, 1, 2, 1]
    index = torch.arange(4).repeat_interleave(torch.tensor(doubled))
    weighted = NestedTerm(key, value, torch.tensor([3]), log_weights=torch.tensor(doubled).log())
    repeated = NestedTerm(key[:, index], value[:, index], torch.tensor([3]))
    torch.testing.assert_close(nested_delta(q, k, v, 2, [weighted]), nested_delta(q, k, v, 2, [repeated]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("focus", [1.0, 2.0])
def test_into_an_output_of_any_type(dtype, focus):
    """The sum ends up in the rows that are given, and nowhere else; with one-hot values made before it is the same."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, 16, generator=g) for n in (9, 12, 12))
    key, value = torch.randn(1, 6, 16, generator=g), torch.randn(1, 6, 16, generator=g)
    terms = [NestedTerm(key, value, torch.tensor([3, 7]), focus=focus), NestedTerm(value, key, torch.tensor([5]))]
    output = torch.randn(3, 9, 16, generator=g).to(dtype)
    before = output.clone()
    values = one_hot_values(torch.tensor([3, 7, 5]), 12, 8, q.dtype)
    prob = outer_probabilities(q, k, 2, torch.tensor([3, 7, 5]), values)
    got = nested_delta(q, k, v, 2, terms, into=output[1:2], prob=prob)
    assert got.data_ptr() == output[1].data_ptr()
    assert torch.equal(output[[0, 2]], before[[0, 2]])
    expected = before[1:2].float() + nested_delta(q, k, v, 2, terms)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(output[1:2].float(), expected, rtol=tolerance, atol=tolerance)


def separated(masked=False, **separation):
    """A layer with three subjects; one of them has two places, one may have a mask. separation: by name."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, 16, generator=g, dtype=torch.float64) for n in (30, 12, 12))
    names = {"anna": [3, 7], "ben": [5], "cleo": [9]}
    terms = []
    for name, places in names.items():
        key, value = (torch.randn(1, 6, 16, generator=g, dtype=torch.float64) for _ in range(2))
        spatial = (torch.arange(30) / 20).clamp(0, 1).double()[None] if masked and name == "ben" else None
        made = {"spatial": spatial, "strength": 0.4 if masked and name == "cleo" else 1.3}
        terms.append(NestedTerm(key, value, torch.tensor(places), separation=separation.get(name, 0.0), **made))
    return q, k, v, terms


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("amounts", [{"anna": 0.5, "ben": 0.25}, {"anna": 1.0, "ben": 1.0, "cleo": 1.0}, {"cleo": 0.8}])
def test_separation_is_a_mask_made_of_the_outer_attention(amounts, masked):
    q, k, v, terms = separated(masked, **amounts)
    scores = q.unflatten(-1, (2, 8)).transpose(1, 2) @ k.unflatten(-1, (2, 8)).permute(0, 2, 3, 1) / 8**0.5
    prob = scores.softmax(-1).mean(1)  # (B, Q, T)
    seen = [
        prob[..., term.places].sum(-1) * min(term.strength, 1) * (1 if term.spatial is None else term.spatial)
        for term in terms
    ]
    most = torch.stack(seen).amax(0)
    as_masks = []
    for term, p in zip(terms, seen, strict=True):
        own = term.separation
        factor = (p == most).double() if own == 1 else (p / most) ** (own / (1 - own))
        spatial = factor if term.spatial is None else factor * term.spatial
        as_masks.append(dataclasses.replace(term, spatial=spatial, separation=0.0))
    torch.testing.assert_close(nested_delta(q, k, v, 2, terms), nested_delta(q, k, v, 2, as_masks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_focus_far_beyond_what_an_exponent_holds_is_a_hard_choice(dtype):
    """Strengths and factors multiply: e^Δ overflows long before its share of the softmax is anything but 0 or 1."""
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, n, 16, generator=g).to(dtype) * 3 for n in (30, 12, 12))
    key, value = (torch.randn(1, 6, 16, generator=g).to(dtype) for _ in range(2))
    for strength in (8.0, 1000.0, -1000.0):
        got = nested_delta(q, k, v, 2, [NestedTerm(key, value, torch.tensor([3]), focus=10.0, strength=strength)])
        assert got.isfinite().all(), strength
    # Where the logit is raised, all attention is on the token: what is left there of the layer is v* alone.
    term = NestedTerm(key, value, torch.tensor([3]), focus=1e4, value_norm="none")
    out = (scaled_dot_product(q, k, v, 2) + nested_delta(q, k, v, 2, [term])).unflatten(-1, (2, 8)).float()
    nested = scaled_dot_product(q, key.expand(2, -1, -1), value.expand(2, -1, -1), 2).unflatten(-1, (2, 8)).float()
    logits = (q.unflatten(-1, (2, 8)).float() * k[:, 3].unflatten(-1, (2, 8))[:, None].float()).sum(-1)
    share = outer_probabilities(q, k, 2, torch.tensor([3]))[..., 0]
    there = (logits > 1) & (share > 1e-4)
    assert there.sum() > 30
    torch.testing.assert_close(out[there], nested[there], rtol=0.1, atol=0.15 if dtype != torch.float32 else 1e-3)


def test_separation_0_is_the_plain_sum_and_alone_it_does_nothing():
    q, k, v, plain = separated()
    _, _, _, terms = separated(anna=0.5)
    assert torch.equal(nested_delta(q, k, v, 2, terms[:1]), nested_delta(q, k, v, 2, plain[:1]))
    zero = [dataclasses.replace(term, separation=0.0) for term in terms]
    assert torch.equal(nested_delta(q, k, v, 2, zero), nested_delta(q, k, v, 2, plain))
    assert not torch.equal(nested_delta(q, k, v, 2, terms), nested_delta(q, k, v, 2, plain))


@pytest.mark.parametrize("amount", [-0.1, 1.5, float("nan")])
def test_separation_outside_0_to_1_is_refused(amount):
    key = torch.zeros(1, 2, 16)
    with pytest.raises(NestedAttentionError, match="separation is .* expected 0"):
        NestedTerm(key, key, torch.tensor([1]), separation=amount)


def test_outer_probabilities_of_all_places_are_the_softmax():
    # 12 places in heads of 8 channels: more than one call's worth.
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 5, 16, generator=g), torch.randn(2, 12, 16, generator=g)
    got = outer_probabilities(q, k, 2, torch.arange(12))
    scores = q.unflatten(-1, (2, 8)).transpose(1, 2) @ k.unflatten(-1, (2, 8)).permute(0, 2, 3, 1) / 8**0.5
    torch.testing.assert_close(got, scores.softmax(-1).transpose(1, 2))


def test_tiny_half_values_do_not_overflow():
    # ‖v*‖ far below 1 must not blow the fp16 factor up into inf or nan.
    g = torch.Generator().manual_seed(2)
    q, k, v, key, value = (torch.randn(1, n, 16, generator=g).half() for n in (7, 9, 9, 4, 4))
    for norm in VALUE_NORMS:
        term = NestedTerm(key, value * 1e-4, torch.tensor([3]), value_norm=norm)
        assert nested_delta(q, k, v, 2, [term]).isfinite().all(), norm
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            a, b, c, x, y = (t.to(dtype) for t in (q, k, v, key, value * 0))
            zero = NestedTerm(x, y, torch.tensor([3]), value_norm=norm)
            assert nested_delta(a, b, c * 100, 2, [zero]).isfinite().all(), (norm, dtype)


def test_gradients_reach_the_nested_keys_and_values():
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, 16, generator=g) for n in (7, 9, 9))
    key, value = (torch.randn(1, 4, 16, generator=g, requires_grad=True) for _ in range(2))
    with torch.enable_grad():
        nested_delta(q, k, v, 2, [NestedTerm(key, value, torch.tensor([3]), focus=1.5)]).square().sum().backward()
    assert key.grad is not None and value.grad is not None
    assert key.grad.abs().sum() > 0 and value.grad.abs().sum() > 0


def test_bad_options_say_what_is_expected():
    x = torch.zeros(1, 1, 4)
    with pytest.raises(NestedAttentionError, match="expected one of match, match_per_head, unit, none"):
        NestedTerm(x, x, torch.tensor([0]), value_norm="both")
    with pytest.raises(NestedAttentionError, match="focus is -1; expected 0 or more"):
        NestedTerm(x, x, torch.tensor([0]), focus=-1)


@pytest.mark.parametrize("focus", [1.0, 2.0])
def test_rows_with_their_own_places_are_as_if_alone(focus):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 8, generator=g, dtype=torch.float64) for n in (5, 7, 7))
    key, value = (torch.randn(3, 4, 8, generator=g, dtype=torch.float64) for _ in range(2))
    places = torch.tensor([[2, -1], [1, 4], [-1, -1]])
    shown = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, float("-inf")], [0, 0, 0, 0]], dtype=torch.float64)
    everywhere = NestedTerm(key=key[:1], value=value[:1], places=torch.tensor([6]), focus=focus)
    batch = NestedTerm(key=key, value=value, places=places, focus=focus, log_weights=shown)
    got = nested_delta(q, k, v, 2, [everywhere, batch])
    for row, tokens in enumerate((4, 3, 4)):
        at = slice(row, row + 1)
        own = NestedTerm(key[at, :tokens], value[at, :tokens], places[row][places[row] >= 0], focus=focus)
        terms = [everywhere, own] if len(own.places) else [everywhere]
        torch.testing.assert_close(got[at], nested_delta(q[at], k[at], v[at], 2, terms))
