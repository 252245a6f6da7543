"""The native sampler against the sorted, obvious rule of `ops_reference`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugmesh_kernels
from plugmesh_kernels import ops_reference as reference

if not plugmesh_kernels.available():
    pytest.skip(plugmesh_kernels.why_not(), allow_module_level=True)

native = plugmesh_kernels.native()
ISAS = [isa for isa in plugmesh_kernels.ISAS if native.supports(isa)]
each_isa = pytest.mark.parametrize("isa", ISAS)
SEED = st.integers(0, 2**32)


def f32(x):
    """A parameter as the kernel receives it, so that both sides compute with the same number."""
    return float(np.float32(x))


PARAMS = {
    "temperature": st.sampled_from([0.1, 0.7, 1.0, 3.0]).map(f32),
    "top_k": st.sampled_from([0, 1, 5, 50, 400, 10**6]),
    "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01, 0.999]).map(f32),
    "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]).map(f32),
}


def sample(isa, logits, temperature, top_k, top_p, min_p, u):
    rows = len(logits)
    one = np.ones(rows)
    return native.sample_rows(
        logits, temperature * one, (top_k * one).astype(np.int32), top_p * one, min_p * one, np.asarray(u), isa
    )


@each_isa
@given(n=st.integers(1, 1500), seed=SEED, spread=st.sampled_from([0.01, 1.0, 5.0, 50.0]), ties=st.booleans(), **PARAMS)
@settings(max_examples=80, deadline=None)
def test_lets_in_what_the_rule_lets_in_with_the_right_mass(
    isa, n, seed, spread, ties, temperature, top_k, top_p, min_p
):
    """u runs over a grid, so a token's share of the draws is its share of the mass up to one step at either end."""
    rng = np.random.default_rng(seed)
    row = (rng.standard_normal(n) * spread).astype(np.float32)
    if ties:
        row = np.round(row * 2) / 2
    row[rng.random(n) < 0.1] = -np.inf
    row[rng.integers(n)] = 1.0
    steps = 64
    u = (np.arange(steps) + rng.random()) / steps
    drawn = sample(isa, np.broadcast_to(row, (steps, n)), temperature, top_k, top_p, min_p, u)
    mass = reference.admitted(row, temperature, top_k, top_p, min_p)
    # Both sides sum in float64, in another order: a u may lie so close to a boundary that the neighbour is right as well.
    cdf = mass.cumsum() / mass.sum()
    low, high = cdf[drawn] - mass[drawn] / mass.sum(), cdf[drawn]

    assert (mass[drawn] > 0).all()
    assert (low <= u + 1e-12).all() and (u - 1e-12 <= high).all()


@each_isa
def test_agrees_with_the_reference_on_a_whole_vocabulary(isa):
    """Token for token; 1 in 1,000 may fall on a boundary, and none is expected to."""
    rng = np.random.default_rng(0)
    differ = []
    for case in range(120):
        row = (rng.standard_normal(49152) * rng.choice([0.1, 1, 3, 6])).astype(np.float32)
        if case % 4 == 0:
            row = np.round(row, 1)
        temperature, top_p = f32(rng.choice([0.3, 0.8, 1.5])), f32(rng.choice([1, 0.95, 0.5]))
        top_k, min_p, u = int(rng.choice([0, 40, 20000])), f32(rng.choice([0, 0.02])), rng.random()
        drawn = int(sample(isa, row[None], temperature, top_k, top_p, min_p, [u])[0])
        if drawn != reference.sample_row(row, temperature, top_k, top_p, min_p, u):
            differ.append(case)

    assert differ == []


@each_isa
def test_draws_follow_the_distribution(isa):
    """Chi-square over 20,000 draws of 30 tokens: 29 degrees of freedom, 64.4 is exceeded once in 5,000 times, and the seed is fixed."""
    rng = np.random.default_rng(5)
    row = rng.standard_normal(30).astype(np.float32)
    num = 20000
    drawn = sample(isa, np.broadcast_to(row, (num, 30)), 1.0, 0, 1.0, 0.0, rng.random(num))
    expected = np.exp(row.astype(np.float64))
    expected *= num / expected.sum()
    chi2 = ((np.bincount(drawn, minlength=30) - expected) ** 2 / expected).sum()

    assert chi2 < 64.4


@each_isa
@pytest.mark.parametrize("u", [0.0, np.nextafter(1.0, 0.0)])
def test_the_ends_of_u_give_the_first_and_the_last_token_with_mass(isa, u):
    row = np.full(200, -np.inf, np.float32)
    row[[17, 90, 180]] = [1.0, 3.0, 0.5]

    assert [17 if u == 0 else 180] == sample(isa, row[None], 1.0, 0, 1.0, 0.0, [u]).tolist()


@each_isa
def test_ties_with_the_last_admitted_token_are_admitted(isa):
    row = np.array([0, 2, 1, 1, 1, 0], np.float32)
    drawn = sample(isa, np.broadcast_to(row, (500, 6)), 1.0, 2, 1.0, 0.0, np.linspace(0, 0.999, 500))

    assert {1, 2, 3, 4} == set(drawn.tolist())


@each_isa
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_finite_maximum_give_no_token_and_disturb_nobody(isa, temperature):
    logits = np.tile(np.arange(300, dtype=np.float32) % 7, (5, 1))
    logits[1, 250] = np.nan
    logits[2, 3] = np.inf
    logits[3] = -np.inf
    drawn = sample(isa, logits, temperature, 0, 0.9, 0.0, np.full(5, 0.5))

    assert [-1, -1, -1] == drawn[1:4].tolist()
    assert drawn[0] == drawn[4] >= 0


@each_isa
@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-3, 1e30])
def test_extreme_temperatures(isa, temperature):
    rng = np.random.default_rng(1)
    row = rng.standard_normal(1000).astype(np.float32)
    drawn = sample(isa, row[None], temperature, 0, 0.9, 0.0, [0.5])

    if temperature < 1:
        assert [int(row.argmax())] == drawn.tolist()
    else:
        assert abs(int(drawn[0]) - 500) <= 60  # nearly uniform


@each_isa
@given(n=st.integers(1, 400), num_top=st.integers(0, 20), seed=SEED)
@settings(max_examples=50, deadline=None)
def test_logprobs_are_the_log_softmax_best_first_and_lower_ids_first(isa, n, num_top, seed):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal((2, n)) * 4).astype(np.float32)  # many ties
    token = rng.integers(0, n, 2)
    logprob, ids, values = native.logprobs_rows(logits, token, num_top, isa)
    x = logits.astype(np.float64)
    expected = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    have = min(num_top, n)
    order = np.lexsort((np.broadcast_to(np.arange(n), (2, n)), -logits), axis=1)[:, :have]

    np.testing.assert_allclose(logprob, expected[[0, 1], token], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(ids[:, :have], order)
    np.testing.assert_allclose(values[:, :have], np.take_along_axis(expected, order, axis=1), rtol=1e-6, atol=1e-6)
    assert (ids[:, have:] == -1).all()


@each_isa
def test_logprobs_of_a_row_that_is_not_finite_are_nan(isa):
    logits = np.zeros((2, 50), np.float32)
    logits[0, 9] = np.nan
    logprob, ids, values = native.logprobs_rows(logits, [1, 1], 3, isa)

    assert np.isnan(logprob[0]) and np.isnan(values[0]).all() and (ids[0] == -1).all()
    np.testing.assert_allclose(logprob[1], -np.log(50), rtol=1e-6)
    assert [0, 1, 2] == ids[1].tolist()
