"""Cutting a batch into passes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from plugmesh_rollout.loop.parts import PASS_TOKENS, cut


def cost(lengths, ranges):
    return sum(PASS_TOKENS + (end - begin) * max(lengths[begin:end]) for begin, end in ranges)


@given(st.lists(st.integers(1, 400), max_size=9).map(sorted), st.integers(1, 5))
def test_no_way_to_cut_a_batch_costs_less(lengths, max_rows):
    found = cut(lengths, max_rows)

    assert [i for begin, end in found for i in range(begin, end)] == list(range(len(lengths)))
    assert all(0 < end - begin <= max_rows for begin, end in found)
    ways = []
    for borders in itertools.product((False, True), repeat=max(0, len(lengths) - 1)):
        at = [0, *(i + 1 for i, is_border in enumerate(borders) if is_border), len(lengths)]
        ranges = [(a, b) for a, b in itertools.pairwise(at) if a < b]
        if all(b - a <= max_rows for a, b in ranges):
            ways.append(cost(lengths, ranges))
    assert cost(lengths, found) == min(ways)


def test_one_long_row_is_not_paid_for_by_all():
    assert cut([20] * 15 + [400], 16) == [(0, 15), (15, 16)]


def test_rows_of_one_length_go_together():
    assert len(cut([12] * 70, 32)) == 3
