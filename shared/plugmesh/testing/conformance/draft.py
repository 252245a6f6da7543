"""What every draft method must do: change no token, keep within limits, survive odd input, and forget what has ended."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.records import DraftContext, DraftRecord
from plugmesh.testing.conformance.base import RecordConformance, num_reachable
from plugmesh.testing.conformance.loads import CONFIG, Arrival, check_idle, fake_engine, loads, play
from plugmesh_engine import DraftOutcome, DraftView, Engine


@dataclass(slots=True)
class View:
    """A decoding sequence as a method sees it, made up. Implements `plugmesh_engine.DraftView`."""

    tokens: list[int]
    num_prompt_tokens: int = 1
    max_draft_tokens: int = 8
    memo: Any = None
    request_id: str = "r"
    index: int = 0


@dataclass(slots=True)
class WatchedDrafts:
    """Hands on what a method says and checks the promises of `DraftMethod` on the way."""

    method: Any
    broken: list[str] = field(default_factory=list)

    def propose(self, views: Sequence[DraftView], num_prompt_rows: int) -> Sequence[Sequence[int]]:
        before = [list(v.tokens) for v in views]
        drafts: Sequence[Sequence[int]] = self.method.propose(views, num_prompt_rows)
        if len(drafts) != len(views):
            self.broken.append(f"{len(drafts)} drafts for {len(views)} sequences")
        if any(len(d) > max(0, v.max_draft_tokens) for d, v in zip(drafts, views, strict=False)):
            self.broken.append("more tokens than max_draft_tokens")
        if any(not 0 <= t < CONFIG.vocab_size for d in drafts for t in d):
            self.broken.append("an id outside the vocabulary")
        if before != [list(v.tokens) for v in views]:
            self.broken.append("it changed the tokens of a sequence")
        return drafts

    def observe(self, outcome: DraftOutcome) -> None:
        self.method.observe(outcome)


class DraftConformance(RecordConformance):
    """`step_ms(num_prefill_tokens, num_decodes, kv_tokens)` is what a step seems to cost while a method profiles; by default rows are nearly free."""

    kind = "drafts"
    max_examples: ClassVar[int] = 12

    def context(self, **changes: Any) -> DraftContext:
        facts = {"max_draft_tokens": 8, "max_num_sequences": 16, "num_blocks": 96, "vocab_size": CONFIG.vocab_size, "measure_step_ms": self.step_ms}
        return DraftContext(**{**facts, **changes})

    @staticmethod
    def step_ms(num_prefill_tokens: int, num_decodes: int, kv_tokens: int) -> float:
        return 8.0 + 0.01 * (num_prefill_tokens + num_decodes)

    def engine(self, record: DraftRecord, **config: Any) -> tuple[Engine, WatchedDrafts]:
        watched = WatchedDrafts(record.build(self.context(max_draft_tokens=int(config.get("max_draft_tokens", 8)))))
        return fake_engine(drafts=watched, max_draft_tokens=config.pop("max_draft_tokens", 8), **config), watched

    def test_output_is_that_without_drafts(self, record: DraftRecord) -> None:
        """Greedy and sampled, with siblings, in small pools, on text that repeats itself and text that does not."""

        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(loads(), st.sampled_from([1, 2, 1 << 30]), st.sampled_from([96, 30]), st.sampled_from([1, 8]))
        def check(load: list[Arrival], window: int, num_blocks: int, max_draft_tokens: int) -> None:
            engine, watched = self.engine(record, window=window, num_blocks=num_blocks, max_draft_tokens=max_draft_tokens)

            assert play(engine, load) == play(fake_engine(window=window, num_blocks=num_blocks), load)
            assert watched.broken == []
            check_idle(engine)

        check()

    def test_a_cancelled_request_costs_nobody_else_a_token(self, record: DraftRecord) -> None:
        load = [Arrival(30, 30, seed=1), Arrival(30, 30, seed=2, cancel_after=4), Arrival(30, 30, seed=3)]
        engine, watched = self.engine(record, window=1)

        assert play(engine, load) == play(fake_engine(window=1), load)
        assert watched.broken == []
        check_idle(engine)

    @pytest.mark.parametrize("tokens", [[0], [5, 5], [7] * 300, list(range(60)), [0, CONFIG.vocab_size - 1] * 100])
    @pytest.mark.parametrize("room", [0, 1, 8, 1000])
    def test_odd_sequences_get_drafts_within_their_limits(self, record: DraftRecord, tokens: list[int], room: int) -> None:
        watched = WatchedDrafts(record.build(self.context()))
        views = [View(list(tokens), max_draft_tokens=room), View([1], max_draft_tokens=room, request_id="s")]
        for _ in range(3):
            drafts = watched.propose(views, 0)
            watched.observe(DraftOutcome(views, [len(d) for d in drafts], [0] * len(views), 2 + sum(map(len, drafts)), 0, 5.0))
            for v in views:
                v.tokens.append(tokens[0])

        assert watched.broken == []

    def test_beside_prompts_and_in_full_batches_it_answers_for_every_sequence(self, record: DraftRecord) -> None:
        watched = WatchedDrafts(record.build(self.context()))
        views = [View([1, 2, 3, i] * 5, request_id=f"r{i}") for i in range(16)]
        for num_prompt_rows in (0, 512):
            watched.propose(views, num_prompt_rows)
            watched.observe(DraftOutcome(views, [0] * 16, [0] * 16, 16 + num_prompt_rows, num_prompt_rows, 9.0))

        assert watched.broken == []

    def test_it_builds_without_a_way_to_measure_steps(self, record: DraftRecord) -> None:
        watched = WatchedDrafts(record.build(self.context(measure_step_ms=None)))
        watched.propose([View([1, 2] * 20)], 0)

        assert watched.broken == []

    def test_finished_requests_are_forgotten(self, record: DraftRecord) -> None:
        engine, watched = self.engine(record, window=1)
        sizes = []
        for _ in range(3):
            play(engine, [Arrival(12, 20, seed=i) for i in range(30)])
            gc.collect()
            sizes.append(num_reachable(watched.method))

        assert sizes[2] <= sizes[1] + 200, "it grows by what it keeps of every request"
