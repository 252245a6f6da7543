"""A budget that concurrent children can never exceed."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from plugmesh.ledger import Ledger


@given(st.integers(0, 300), st.integers(0, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 80), st.floats(0, 1)), max_size=60))
def test_whatever_is_reserved_and_settled_in_whatever_order_stays_within_the_budget(budget, calls, steps):
    ledger, open_, used, granted_calls = Ledger(budget, calls), [], 0, 0
    for is_reserve, amount, share in steps:
        if is_reserve:
            granted = ledger.reserve(amount)
            assert granted in (0, amount, budget - used - sum(open_))
            if granted:
                open_.append(granted)
                granted_calls += 1
        elif open_:
            reserved = open_.pop(amount % len(open_))
            spent = int(reserved * share)
            ledger.settle(reserved, spent)
            used += spent
        assert used + sum(open_) == ledger.num_tokens + ledger.num_reserved <= budget
        assert granted_calls == ledger.num_calls <= calls
        assert ledger.num_left == budget - used - sum(open_)


def test_a_call_that_used_more_than_its_grant_is_refused_and_changes_nothing():
    ledger = Ledger(10, 2)
    granted = ledger.reserve(4)
    with pytest.raises(ValueError, match="5 tokens used of 4"):
        ledger.settle(granted, 5)
    assert (ledger.num_tokens, ledger.num_left) == (0, 6)
