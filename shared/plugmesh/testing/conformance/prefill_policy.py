"""What every prefill policy must do: answer "local" or "remote" for any numbers, at once."""

from __future__ import annotations

import time
from typing import ClassVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.records import PrefillPolicyRecord
from plugmesh.testing.conformance.base import RecordConformance


class PrefillPolicyConformance(RecordConformance):
    kind = "prefill_policies"
    max_examples: ClassVar[int] = 200

    def test_any_numbers_get_one_of_the_two_answers(self, record: PrefillPolicyRecord) -> None:
        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.integers(0, 1 << 40), st.integers(0, 1 << 20), st.integers(0, 1 << 10))
        def check(num_uncached_tokens: int, num_running: int, num_prefill_instances: int) -> None:
            assert record.choose(num_uncached_tokens, num_running, num_prefill_instances) in ("local", "remote")

        check()

    def test_the_edges_get_an_answer_too(self, record: PrefillPolicyRecord) -> None:
        for numbers in ((0, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1 << 20, 1), (1 << 40, 0, 1), (1 << 40, 1 << 20, 1 << 10)):
            assert record.choose(*numbers) in ("local", "remote")

    def test_a_prompt_that_is_cached_but_for_a_token_is_computed_here_when_nobody_waits(self, record: PrefillPolicyRecord) -> None:
        """Sending it away costs a hop and two copies of the KV and can save nothing."""
        assert record.choose(1, 0, 1) == "local"

    def test_it_does_not_hold_up_the_event_loop(self, record: PrefillPolicyRecord) -> None:
        times = []
        for i in range(200):
            began = time.perf_counter()
            record.choose(1000 + i, i % 40, 4)
            times.append((time.perf_counter() - began) * 1e3)

        assert sorted(times)[100] < 5.0
