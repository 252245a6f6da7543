"""Elementwise kernels and argmax of every instruction set against `ops_reference`."""

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


@each_isa
@given(rows=st.integers(1, 4), k=st.integers(1, 700), seed=SEED, size=st.sampled_from([1e-6, 1.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_rms_norm(isa, rows, k, seed, size):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, k)) * size).astype(np.float32)
    weight = rng.standard_normal(k).astype(np.float32)

    np.testing.assert_allclose(native.rms_norm(isa, x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), rtol=3e-6)


@each_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rms_norm_keeps_what_is_not_finite_in_its_row(isa, bad):
    x = np.ones((3, 100), np.float32)
    x[1, 70] = bad
    out = native.rms_norm(isa, x, np.ones(100, np.float32), 1e-5)

    assert np.isnan(out[1]).any()
    assert np.isfinite(out[[0, 2]]).all()


@each_isa
@given(n=st.integers(1, 100), seed=SEED, size=st.sampled_from([0.1, 3.0, 40.0]))
@settings(max_examples=40, deadline=None)
def test_silu_mul(isa, n, seed, size):
    rng = np.random.default_rng(seed)
    gate = (rng.standard_normal(n) * size).astype(np.float32)
    up = rng.standard_normal(n).astype(np.float32)

    np.testing.assert_allclose(native.silu_mul(isa, gate, up), reference.silu_mul(gate, up), rtol=2e-6, atol=1e-36)


@each_isa
def test_silu_mul_at_the_ends(isa):
    gate = np.array([0, -0.0, 200, -200, 3e38, -3e38, np.inf, np.nan, 88, -88, 1e-40] * 3, np.float32)
    with np.errstate(all="ignore"):
        expected = reference.silu_mul(gate, np.ones_like(gate))

    np.testing.assert_allclose(native.silu_mul(isa, gate, np.ones_like(gate)), expected, rtol=2e-6, atol=1e-35)


@each_isa
@pytest.mark.parametrize("interleaved", [False, True])
@given(half=st.integers(1, 70), seed=SEED)
@settings(max_examples=30, deadline=None)
def test_rope(isa, interleaved, half, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(2 * half).astype(np.float32)
    angle = rng.uniform(0, 7, half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    expected = reference.rope_head(x, cos, sin, interleaved)
    np.testing.assert_allclose(native.rope_head(isa, x, cos, sin, interleaved), expected, rtol=0, atol=1e-6)


@each_isa
@given(n=st.integers(1, 300), seed=SEED)
@settings(max_examples=60, deadline=None)
def test_argmax_is_the_first_of_equals(isa, n, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-5, 5, n).astype(np.float32)  # many ties
    x[rng.random(n) < 0.2] = -np.inf
    index, value = native.argmax(isa, x)

    if np.isneginf(x).all():
        assert index == -1
    else:
        assert (int(x.argmax()), x.max()) == (index, value)


@each_isa
@given(n=st.integers(1, 300), seed=SEED, scale=st.sampled_from([0.1, 3.0, 30.0, 1e6]))
@settings(max_examples=60, deadline=None)
def test_steps_below_bound_the_largest_of_four(isa, n, seed, scale):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * scale).astype(np.float32)
    x[rng.random(n) < 0.1] = -np.inf
    if np.isneginf(x).all():
        x[0] = 0
    top = x.max()
    padded = np.full(-(-n // 64) * 64, -np.inf, np.float32)
    padded[:n] = x
    largest = padded.reshape(-1, 4, 16).max(1).reshape(-1)

    found = native.steps_below(isa, x, float(top))
    assert found.tolist() == np.minimum(255, np.floor((top - largest) * np.float32(8))).tolist()


@each_isa
@given(n=st.integers(1, 300), seed=SEED, bad=st.sampled_from([np.nan, np.inf]))
@settings(max_examples=30, deadline=None)
def test_argmax_refuses_what_is_not_finite(isa, n, seed, bad):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n).astype(np.float32)
    x[rng.integers(n)] = bad

    assert native.argmax(isa, x)[0] == -1
    assert native.argmax(isa, np.full(n, -np.inf, np.float32))[0] == -1
