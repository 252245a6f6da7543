"""The workflow's plans, and its sampler."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh.errors import InvalidRequest
from plugmesh.records import LoopShape, SampleContext
from plugmesh.testing.conformance import SamplerConformance
from plugmesh.testing.conformance.sampler import ready_rows
from plugmesh_asyncflow.in_order import InOrder
from plugmesh_asyncflow.workflow import POLICIES, PRESETS, needed_rows, plan

SHAPE = LoopShape(group_size=4, groups_per_step=8, groups_at_once=6)


class TestInOrder(SamplerConformance):
    slug = "asyncflow"
    name = "in_order"
    keeps_groups = True


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_nothing_but_staleness_and_policy(preset):
    assert plan({"preset": preset}, SHAPE) == plan(PRESETS[preset], SHAPE)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_a_capacity_one_smaller_than_needed_is_refused_before_anything_starts(policy, staleness):
    needed = needed_rows(policy, staleness, SHAPE)
    options = {"policy": policy, "staleness": staleness}

    assert needed == plan({**options, "capacity_rows": needed}, SHAPE).capacity_rows
    with pytest.raises(InvalidRequest, match="would stop"):
        plan({**options, "capacity_rows": needed - 1}, SHAPE)


@pytest.mark.parametrize("options", [{"staleness": -1}, {"staleness": True}, {"staleness": 65}, {"policy": "lifo"}, {"preset": "x"}, {"stale": 1}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(InvalidRequest):
        plan(options, SHAPE)


@given(st.permutations(range(12)), st.integers(0, 2))
def test_a_step_gets_its_own_groups_in_order_once_all_are_ready(order, step):
    """Rows come one by one, in any order; three steps of two groups of two."""
    rows, sampler, ready = ready_rows([0] * 12, 2), InOrder({}), []
    context = SampleContext("t", "train", group_size=2, batch_index=step)
    mine = set(range(4 * step, 4 * step + 4))
    for index in order:
        ready = sorted([*ready, rows[index]], key=lambda r: r.index)
        expected = sorted(mine) if mine <= {r.index for r in ready} else []

        assert (expected, expected) == sampler.sample(ready, 4, context)
