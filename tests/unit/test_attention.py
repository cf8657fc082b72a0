"""The fused form against a literal implementation of equations (1) to (4), which lives here and nowhere else."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_core import attention
from nested_core.attention import (
    VALUE_NORMS,
    NestedTerm,
    nested_delta,
    one_hot_values,
    outer_probabilities,
    scaled_dot_product,
)
from nested_core.errors import NestedAttentionError


@pytest.fixture(scope="module", params=["inference", "training"], autouse=True)
def kernels(request):
    """Inference runs in fused kernels, training on a CPU in written-out attention: all of this is about both."""
    with torch.set_grad_enabled(request.param == "training"):
        yield


@pytest.fixture(scope="module")
def rand(device):
    """rand(seed, tokens..., channels=16) -> random (rows, n, channels) for each n, the same on every device."""

    def made(seed, *tokens, rows=1, channels=16, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        return [torch.randn(rows, n, channels, generator=g, dtype=torch.float64).to(device, dtype) for n in tokens]

    return made


@pytest.fixture(scope="module")
def at(device):
    """at(3, 7) -> places on the device."""
    return lambda *places: torch.tensor(places, device=device)


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


def moved(layer, device, dtype=torch.float64):
    """A drawn layer on a device, with keys and values in a type."""

    def there(x):
        return x if x is None else x.to(device)

    q, k, v, heads, terms = layer
    terms = [
        dataclasses.replace(
            t,
            key=t.key.to(device, dtype),
            value=t.value.to(device, dtype),
            places=there(t.places),
            spatial=there(t.spatial),
            log_weights=there(t.log_weights),
        )
        for t in terms
    ]
    return *(x.to(device, dtype) for x in (q, k, v)), heads, terms


# Half types are compared with the fp64 result of the *rounded* inputs; what is left is rounding inside the layer.
@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_fused_equals_literal(layer, device, dtype, tolerance):
    rounded = moved(layer, device, dtype)
    expected = literal(*moved(rounded, "cpu"))
    q, k, v, heads, terms = rounded
    got = scaled_dot_product(q, k, v, heads) + nested_delta(q, k, v, heads, terms)
    assert (got.dtype, got.device) == (q.dtype, q.device)
    assert (got.cpu().double() - expected).norm() <= tolerance * (1 + expected.norm())


@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_in_the_form_for_cuda_too(layer, dtype, tolerance):
    """There one operation may mix types, and a norm is one kernel: the same numbers, in another order."""
    rounded = moved(layer, "cpu", dtype)
    expected = literal(*moved(rounded, "cpu"))
    q, k, v, heads, terms = rounded
    with torch.inference_mode(), mock.patch.object(attention, "_mixes_types", lambda x: True):
        got = scaled_dot_product(q, k, v, heads) + nested_delta(q, k, v, heads, terms)
    assert got.dtype == q.dtype
    assert (got.double() - expected).norm() <= tolerance * (1 + expected.norm())


@pytest.mark.parametrize("norm", VALUE_NORMS)
def test_a_nested_value_of_nothing_stays_nothing(rand, at, norm):
    q, k, v = rand(8, 30, 12, 12)
    nothing = torch.zeros(1, 6, 16)
    for mixes in (False, True):
        with mock.patch.object(attention, "_mixes_types", lambda x: mixes):  # noqa: B023
            got = nested_delta(q, k, v, 2, [NestedTerm(nothing, nothing, at(3), value_norm=norm)])
        share = outer_probabilities(q, k, 2, at(3))
        torch.testing.assert_close(got, -(share * v[:, 3].unflatten(-1, (2, 8))[:, None]).flatten(2))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_four_subjects_round_no_more_than_the_plain_attention_does(rand, at, half):
    """Summed in a half type, four subjects had 2.4 times its error."""
    q, k, v = (x.to(half) for x in rand(5, 256, 24, 24, rows=2))
    terms = [NestedTerm(*(x.to(half) for x in rand(i, 64, 64)), at(3 * i + 1)) for i in range(4)]
    plain = scaled_dot_product(q, k, v, 2)
    with torch.inference_mode():
        ours = nested_delta(q, k, v, 2, terms, into=plain.clone())
    exact_plain = scaled_dot_product(*(x.double() for x in (q, k, v)), 2)
    exact = literal(*moved((q, k, v, 2, terms), "cpu"))

    def error(got, exact):
        return (got.double() - exact).norm() / exact.norm()

    assert error(ours, exact) < 1.7 * error(plain, exact_plain)


@settings(max_examples=30, deadline=None)
@given(layer=layers())
def test_strength_zero_adds_exactly_nothing(layer, device):
    q, k, v, heads, terms = moved(layer, device)
    terms = [dataclasses.replace(t, strength=0.0) for t in terms]
    assert torch.count_nonzero(nested_delta(q, k, v, heads, terms)) == 0


@settings(max_examples=30, deadline=None)
@given(layer=layers())
def test_without_focus_subjects_are_a_sum(layer, device):
    q, k, v, heads, terms = moved(layer, device)
    terms = [dataclasses.replace(t, focus=1.0) for t in terms]
    together = nested_delta(q, k, v, heads, terms)
    apart = sum(nested_delta(q, k, v, heads, [t]) for t in terms)
    torch.testing.assert_close(together, apart)


@settings(max_examples=30, deadline=None)
@given(layer=layers())
def test_without_focus_the_sum_is_linear_in_strength(layer, device):
    """A line through 0 on which 1 is the step: below 0, between, and beyond 1."""
    q, k, v, heads, terms = moved(layer, device)

    def added(strength):
        return nested_delta(q, k, v, heads, [dataclasses.replace(t, focus=1.0, strength=strength) for t in terms])

    whole = added(1.0)
    for strength in (-1.5, 0.25, 0.5, 2.0, 5.0):
        torch.testing.assert_close(added(strength), strength * whole)


def test_weight_two_counts_as_twice_the_token(rand, at):
    q, k, v, key, value = rand(0, 7, 9, 9, 4, 4)
    index = [0, 1, 2, 2, 3]
    weighted = NestedTerm(key, value, at(3), log_weights=at(1, 1, 2, 1).log())
    repeated = NestedTerm(key[:, index], value[:, index], at(3))
    torch.testing.assert_close(nested_delta(q, k, v, 2, [weighted]), nested_delta(q, k, v, 2, [repeated]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("focus", [1.0, 2.0])
def test_into_an_output_of_any_type(rand, at, dtype, focus):
    """The sum ends up in the rows that are given, and nowhere else; with one-hot values made before it is the same."""
    q, k, v, key, value = rand(1, 9, 12, 12, 6, 6)
    terms = [NestedTerm(key, value, at(3, 7), focus=focus), NestedTerm(value, key, at(5))]
    (output,) = rand(2, 9, rows=3, dtype=dtype)
    before = output.clone()
    values = one_hot_values(at(3, 7, 5), 12, 2, 8, q.dtype).repeat(len(q), 1, 1)
    prob = outer_probabilities(q, k, 2, at(3, 7, 5), values)
    got = nested_delta(q, k, v, 2, terms, into=output[1:2], prob=prob)
    assert got.data_ptr() == output[1].data_ptr()
    assert torch.equal(output[[0, 2]], before[[0, 2]])
    expected = before[1:2].float() + nested_delta(q, k, v, 2, terms)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(output[1:2].float(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def separated(rand, at, device):
    """A layer with three subjects; one of them has two places, one may have a mask. separation: by name."""

    def layer(masked=False, **separation):
        q, k, v = rand(3, 30, 12, 12, rows=2, dtype=torch.float64)
        terms = []
        for seed, (name, places) in enumerate({"anna": at(3, 7), "ben": at(5), "cleo": at(9)}.items()):
            key, value = rand(10 + seed, 6, 6, dtype=torch.float64)
            ramp = (torch.arange(30, device=device) / 20).clamp(0, 1).double()[None]
            made = {
                "spatial": ramp if masked and name == "ben" else None,
                "strength": 0.4 if masked and name == "cleo" else 1.3,
            }
            terms.append(NestedTerm(key, value, places, separation=separation.get(name, 0.0), **made))
        return q, k, v, terms

    return layer


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("amounts", [{"anna": 0.5, "ben": 0.25}, {"anna": 1.0, "ben": 1.0, "cleo": 1.0}, {"cleo": 0.8}])
def test_separation_is_a_mask_made_of_the_outer_attention(separated, amounts, masked):
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


def test_focus_far_beyond_what_an_exponent_holds_is_a_hard_choice(rand, at, dtype):
    """Strengths and factors multiply: e^Δ overflows long before its share of the softmax is anything but 0 or 1."""
    q, k, v = (3 * x for x in rand(8, 30, 12, 12, rows=2, dtype=dtype))
    key, value = rand(6, 6, 6, dtype=dtype)
    for strength in (8.0, 1000.0, -1000.0):
        got = nested_delta(q, k, v, 2, [NestedTerm(key, value, at(3), focus=10.0, strength=strength)])
        assert got.isfinite().all(), strength
    # Where the logit is raised, all attention is on the token: what is left there of the layer is v* alone.
    term = NestedTerm(key, value, at(3), focus=1e4, value_norm="none")
    out = (scaled_dot_product(q, k, v, 2) + nested_delta(q, k, v, 2, [term])).unflatten(-1, (2, 8)).float()
    nested = scaled_dot_product(q, key.expand(2, -1, -1), value.expand(2, -1, -1), 2).unflatten(-1, (2, 8)).float()
    logits = (q.unflatten(-1, (2, 8)).float() * k[:, 3].unflatten(-1, (2, 8))[:, None].float()).sum(-1)
    share = outer_probabilities(q, k, 2, at(3))[..., 0]
    there = (logits > 1) & (share > 1e-4)
    assert there.sum() > 30
    torch.testing.assert_close(out[there], nested[there], rtol=0.1, atol=0.15 if dtype != torch.float32 else 1e-3)


def test_separation_0_is_the_plain_sum_and_alone_it_does_nothing(separated):
    q, k, v, plain = separated()
    _, _, _, terms = separated(anna=0.5)
    assert torch.equal(nested_delta(q, k, v, 2, terms[:1]), nested_delta(q, k, v, 2, plain[:1]))
    zero = [dataclasses.replace(term, separation=0.0) for term in terms]
    assert torch.equal(nested_delta(q, k, v, 2, zero), nested_delta(q, k, v, 2, plain))
    assert not torch.equal(nested_delta(q, k, v, 2, terms), nested_delta(q, k, v, 2, plain))


@pytest.mark.parametrize("amount", [-0.1, 1.5, float("nan")])
def test_separation_outside_0_to_1_is_refused(at, amount):
    key = torch.zeros(1, 2, 16)
    with pytest.raises(NestedAttentionError, match="separation is .* expected 0"):
        NestedTerm(key, key, at(1), separation=amount)


def test_outer_probabilities_of_all_places_are_the_softmax(rand, at):
    # 12 places in heads of 8 channels: more than one call's worth.
    q, k = rand(1, 5, 12, rows=2)
    got = outer_probabilities(q, k, 2, at(*range(12)))
    scores = q.unflatten(-1, (2, 8)).transpose(1, 2) @ k.unflatten(-1, (2, 8)).permute(0, 2, 3, 1) / 8**0.5
    torch.testing.assert_close(got, scores.softmax(-1).transpose(1, 2))


@pytest.mark.parametrize("norm", VALUE_NORMS)
def test_tiny_and_zero_values_do_not_overflow(rand, at, dtype, norm):
    # ‖v*‖ far below 1 must not blow the factor of equation (4) up into inf or nan.
    q, k, v, key, value = rand(2, 7, 9, 9, 4, 4, dtype=dtype)
    assert nested_delta(q, k, v, 2, [NestedTerm(key, value * 1e-4, at(3), value_norm=norm)]).isfinite().all()
    assert nested_delta(q, k, v * 100, 2, [NestedTerm(key, value * 0, at(3), value_norm=norm)]).isfinite().all()


def test_gradients_reach_the_nested_keys_and_values(rand, at):
    q, k, v, key, value = rand(3, 7, 9, 9, 4, 4)
    with torch.enable_grad():
        key.requires_grad_()
        value.requires_grad_()
        nested_delta(q, k, v, 2, [NestedTerm(key, value, at(3), focus=1.5)]).square().sum().backward()
    assert key.grad is not None and value.grad is not None
    assert key.grad.abs().sum() > 0 and value.grad.abs().sum() > 0


def test_bad_options_say_what_is_expected(at):
    x = torch.zeros(1, 1, 4)
    with pytest.raises(NestedAttentionError, match="expected one of match, match_per_head, unit, none"):
        NestedTerm(x, x, at(0), value_norm="both")
    with pytest.raises(NestedAttentionError, match="focus is -1; expected 0 or more"):
        NestedTerm(x, x, at(0), focus=-1)


@pytest.mark.parametrize("focus", [1.0, 2.0])
def test_rows_with_their_own_places_are_as_if_alone(rand, at, focus):
    q, k, v, key, value = rand(0, 5, 7, 7, 4, 4, rows=3, channels=8, dtype=torch.float64)
    places = at([2, -1], [1, 4], [-1, -1])
    shown = at([0.0, 0, 0, 0], [0, 0, 0, float("-inf")], [0, 0, 0, 0]).double()
    everywhere = NestedTerm(key=key[:1], value=value[:1], places=at(6), focus=focus)
    batch = NestedTerm(key=key, value=value, places=places, focus=focus, log_weights=shown)
    got = nested_delta(q, k, v, 2, [everywhere, batch])
    for row, tokens in enumerate((4, 3, 4)):
        own = NestedTerm(key[[row], :tokens], value[[row], :tokens], places[row][places[row] >= 0], focus=focus)
        terms = [everywhere, own] if len(own.places) else [everywhere]
        torch.testing.assert_close(got[[row]], nested_delta(q[[row]], k[[row]], v[[row]], 2, terms))
