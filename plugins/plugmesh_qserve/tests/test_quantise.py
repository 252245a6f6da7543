"""Two-level quantisation: what must hold exactly, and what it may cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plugmesh_qserve.quantise import PROTECTED, quantise, rule


def extremes_fit(protected: int) -> bool:
    """Whether for all pairs of a group's ends the way back of both stays within int8."""
    low, high = np.meshgrid(np.arange(-protected, protected + 1), np.arange(-protected, protected + 1))
    pairs = np.stack((low, high), axis=-1).reshape(-1, 2)[(low <= high).reshape(-1)].astype(np.float32)
    scales, zeros = rule(pairs, 2)
    codes = np.clip(np.rint(pairs / scales) + zeros, 0, 15)
    back = (codes - zeros) * scales
    return bool((back >= -128).all() and (back <= 127).all())


def test_the_protective_range_is_the_largest_that_is_safe() -> None:
    assert extremes_fit(PROTECTED)
    assert not extremes_fit(PROTECTED + 1)


matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.sampled_from([16, 32, 48])), elements=st.floats(-100, 100, width=32))


@settings(max_examples=60, deadline=None)
@given(w=matrices, is_searched=st.booleans(), is_compensated=st.booleans())
def test_every_matrix_comes_back_within_int8_and_a_group_step(w: np.ndarray, is_searched: bool, is_compensated: bool) -> None:
    x = np.random.default_rng(0).standard_normal((40, w.shape[1])).astype(np.float32)
    p = quantise(w, 16, is_searched=is_searched, hessian=x.T @ x if is_compensated else None)

    assert p.codes.max() <= 15
    assert p.zeros.max() <= 15
    assert p.scales.min() >= 1
    assert p.int8().min() >= -128
    assert p.int8().max() <= 127
    if not is_searched and not is_compensated:  # half a step of the group, half a unit of either rounding before it, and what a range of 15 steps lacks
        room = (0.5 * p.scales + 0.5 + 8.5).repeat(16, axis=1) * p.row_scales[:, None]
        assert (np.abs(p.float32() - w) <= room * 1.001 + 1e-30).all()


def test_the_search_never_has_a_larger_error_than_the_rule() -> None:
    w = np.random.default_rng(1).standard_t(4, (64, 128)).astype(np.float32)
    by_rule, searched = (quantise(w, 32, is_searched=s).float32() for s in (False, True))

    assert np.square(searched - w).sum() < 0.97 * np.square(by_rule - w).sum()


def test_compensation_lowers_the_error_of_the_product_on_its_own_inputs() -> None:
    rng = np.random.default_rng(2)
    w = rng.standard_normal((48, 128)).astype(np.float32)
    x = (rng.standard_normal((600, 32)) @ rng.standard_normal((32, 128)) + 0.3 * rng.standard_normal((600, 128))).astype(np.float32)  # channels that go together
    errors = [np.square(x @ (quantise(w, 32, hessian=h).float32() - w).T).sum() for h in (None, x.T @ x)]

    assert errors[1] < 0.6 * errors[0]


def test_what_cannot_be_packed_is_refused() -> None:
    w = np.ones((4, 128), np.float32)
    with pytest.raises(ValueError, match="do not divide"):
        quantise(w, 48)
    w[1, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        quantise(w, 64)
