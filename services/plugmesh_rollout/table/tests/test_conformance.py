"""The core's samplers against the suite that plugins' samplers are tested with."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest

from plugmesh.records import SamplerRecord
from plugmesh.testing.conformance import SamplerConformance
from plugmesh_rollout.table.samplers import CoreSamplers


class _Core(SamplerConformance):
    max_examples = 25

    @pytest.fixture
    def record(self) -> SamplerRecord:  # type: ignore[override] # the core has no plugin host
        return next(r for r in CoreSamplers().register_samplers() if r.name == self.name)

    test_the_records_name_stays_the_same_from_load_to_load: Any = None  # of plugins with a card
    test_a_setting_that_does_not_exist_is_refused_with_its_name: Any = None


class TestSequential(_Core):
    name = "sequential"


class TestGrpoGroups(_Core):
    name = "grpo_groups"
    keeps_groups = True


class TestRankAware(_Core):
    name = "rank_aware"
    keeps_groups = True


class TestLengthBalanced(_Core):
    name = "length_balanced"
    keeps_groups = True


class TestVersionWindow(_Core):
    name = "version_window"
    keeps_groups = True


class TestVersionWindowFirst(_Core):
    name = "version_window"
    options = {"order": "first"}
    keeps_groups = True


class TestSameVersion(_Core):
    name = "same_version"
    keeps_groups = True


class Broken:
    """Takes a row that it has handed out before."""

    def sample(self, ready: Any, batch_size: int, context: Any) -> tuple[list[int], list[int]]:
        return ([0], [0]) if ready else ([], [])


def test_the_suite_sees_a_sampler_that_takes_rows_twice() -> None:
    profile = hypothesis.settings.get_current_profile_name()
    hypothesis.settings.register_profile("found-is-enough", deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate])
    hypothesis.settings.load_profile("found-is-enough")  # making what it finds smaller would take long
    try:
        with pytest.raises(AssertionError):
            TestSequential().test_whatever_is_ready_it_takes_rows_of_it_and_each_once(SamplerRecord("broken", lambda options: Broken()))
    finally:
        hypothesis.settings.load_profile(profile)
