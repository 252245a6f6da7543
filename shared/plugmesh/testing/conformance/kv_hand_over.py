"""What every hand-over of KV must do: a plan for any prompt and any layout, the same for the same prompt, at once."""

from __future__ import annotations

import time
from typing import ClassVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.records import HandOver, KvHandOverRecord
from plugmesh.testing.conformance.base import RecordConformance
from plugmesh.types import BLOCK_TOKENS, KvLayout

LAYOUT = KvLayout("m", "raw", "bfloat16", 30, 3, 64, BLOCK_TOKENS, 30 * 2 * BLOCK_TOKENS * 3 * 64 * 2)


class KvHandOverConformance(RecordConformance):
    kind = "kv_hand_overs"
    max_examples: ClassVar[int] = 100

    def test_any_prompt_and_layout_gets_a_plan(self, record: KvHandOverRecord) -> None:
        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.integers(1, 1 << 24), st.integers(1, 128), st.integers(1, 1 << 26), st.sampled_from(["raw", "unheard_of/4"]))
        def check(num_prompt_tokens: int, num_layers: int, block_bytes: int, codec: str) -> None:
            layout = KvLayout("m", codec, "int8", num_layers, 3, 64, BLOCK_TOKENS, block_bytes)

            assert isinstance(record.plan(num_prompt_tokens, layout), HandOver)

        check()

    def test_the_same_prompt_travels_the_same_way(self, record: KvHandOverRecord) -> None:
        lengths = [1, 15, 16, 17, 511, 512, 513, 100_000]

        assert [record.plan(n, LAYOUT) for n in lengths] == [record.plan(n, LAYOUT) for n in lengths]

    def test_it_does_not_hold_up_the_event_loop(self, record: KvHandOverRecord) -> None:
        times = []
        for n in range(1, 200):
            began = time.perf_counter()
            record.plan(n, LAYOUT)
            times.append((time.perf_counter() - began) * 1e3)

        assert sorted(times)[100] < 5.0
