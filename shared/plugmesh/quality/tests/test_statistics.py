"""Intervals by resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh.quality import statistics

FINITE = st.floats(-1e3, 1e3, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=12))
def test_the_interval_of_a_mean_lies_within_the_items(items: list[float]) -> None:
    found = statistics.mean(np.array(items))

    assert found.value == pytest.approx(np.mean(items))
    assert min(items) - 1e-9 <= found.low <= found.high <= max(items) + 1e-9


def test_the_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = [f.low <= 3 <= f.high for f in (statistics.mean(rng.normal(3, 2, 60)) for _ in range(200))]

    assert 0.89 <= np.mean(hits) <= 0.99


def test_one_item_has_no_interval() -> None:
    assert statistics.exp_mean(np.array([0.5])) == statistics.Interval(math.exp(0.5), math.exp(0.5), math.exp(0.5))
    with pytest.raises(ValueError, match="no items"):
        statistics.mean(np.array([]))


def test_rounds_are_compared_pair_by_pair() -> None:
    """A machine that gets slower over the rounds hits both sides; the ratio stays."""
    theirs = [100.0, 80.0, 50.0, 20.0]
    found = statistics.ratio_of_rounds([2 * t for t in theirs], theirs)

    assert found == statistics.Interval(2.0, 2.0, 2.0)


def test_rounds_without_a_value_are_left_out() -> None:
    assert statistics.ratio_of_rounds([3.0, 1.0, math.nan], [1.0, 0.0, 2.0]) == statistics.Interval(3.0, 3.0, 3.0)
    assert statistics.ratio_of_rounds([0.0], [1.0]) is None


@given(st.lists(FINITE, min_size=1, max_size=40), st.integers(1, 9))
def test_blocks_hold_every_value_once(values: list[float], size: int) -> None:
    found = statistics.blocks(np.array(values), size)
    sizes = [len(values[i : i + size]) for i in range(0, len(values), size)]

    assert sum(f * n for f, n in zip(found, sizes, strict=True)) == pytest.approx(sum(values), abs=1e-6)
