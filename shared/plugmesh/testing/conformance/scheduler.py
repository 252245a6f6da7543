"""What every scheduler must do: finish everything within memory, change no token, keep nothing, and get along with any load."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.records import SchedulerContext, SchedulerRecord
from plugmesh.testing.conformance.base import RecordConformance, num_reachable
from plugmesh.testing.conformance.loads import Arrival, check_idle, fake_engine, loads, play
from plugmesh_engine import Engine, KvView, SequenceView
from plugmesh_engine.testing import steps

Plan = list[tuple[SequenceView, int]]


class Watched:
    """Hands on what a scheduler says, and remembers it without holding the sequences."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.plans: list[list[tuple[str, int, int]]] = []

    def schedule(self, waiting: Sequence[SequenceView], running: Sequence[SequenceView], kv: KvView) -> Plan:
        plan: Plan = self.scheduler.schedule(waiting, running, kv)
        self.plans.append([(s.request_id, s.index, n) for s, n in plan])
        return plan


class SchedulerConformance(RecordConformance):
    """`max_examples` of random loads per property."""

    kind = "schedulers"
    max_examples: ClassVar[int] = 25

    def engine(self, record: SchedulerRecord, **config: Any) -> tuple[Engine, Watched]:
        watched: list[Watched] = []

        def build(context: SchedulerContext) -> Watched:
            watched.append(Watched(record.build(context)))
            return watched[0]

        return fake_engine(scheduler=SchedulerRecord(record.name, build), **config), watched[0]

    def test_whatever_the_load_every_request_ends_with_the_tokens_of_the_engines_own_scheduler(self, record: SchedulerRecord) -> None:
        """In pools that are ample, tight and hardly large enough for one request; with siblings, priorities, cached prefixes."""

        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(loads(), st.sampled_from([96, 24, 9]))
        def check(load: list[Arrival], num_blocks: int) -> None:
            load = [a for a in load if a.length + 16 < 8 * num_blocks // a.num_sequences] or [Arrival(20, 4)]
            engine, _ = self.engine(record, num_blocks=num_blocks)
            expected = play(fake_engine(num_blocks=num_blocks), load)

            assert play(engine, load) == expected
            check_idle(engine)

        check()

    def test_what_a_request_gets_does_not_depend_on_its_neighbours(self, record: SchedulerRecord) -> None:
        load = [Arrival(40, 12, temperature=0.9, seed=1), Arrival(90, 6, num_sequences=3, temperature=0.9, seed=2, gap=2), Arrival(3, 16, seed=3)]
        together = play(self.engine(record)[0], load)
        alone = {f"r{i}": play(self.engine(record)[0], [a])["r0"] for i, a in enumerate(load)}

        assert together == alone

    def test_the_same_load_is_planned_the_same_way_again(self, record: SchedulerRecord) -> None:
        load = [Arrival(30 + i, 5 + i, seed=i % 3, gap=i % 2) for i in range(6)]
        plans = []
        for _ in range(2):
            engine, watched = self.engine(record)
            play(engine, load)
            plans.append(watched.plans)

        assert plans[0] == plans[1]
        assert sum(map(len, plans[0])) > 0

    def test_a_plan_names_only_what_was_offered_once_and_within_its_pending_tokens(self, record: SchedulerRecord) -> None:
        """The engine would fall back to its own scheduler and count an error."""
        engine, watched = self.engine(record, num_blocks=20, max_num_sequences=3)
        play(engine, [Arrival(60, 9, seed=i) for i in range(8)])

        assert engine.stats().num_scheduler_errors == 0
        assert all(len({(r, i) for r, i, _ in plan}) == len(plan) and all(n > 0 for _, _, n in plan) for plan in watched.plans)

    def test_nobody_starves_behind_a_stream_of_newcomers(self, record: SchedulerRecord) -> None:
        """A prompt that needs several steps ends although another one arrives in every step."""
        engine, _ = self.engine(record, num_blocks=400)
        engine.add(Arrival(150, 4, seed=9).request("old"))
        done: list[str] = []
        for i in range(400):
            if len(done) < 1:
                engine.add(Arrival(8, 2, seed=i % 4).request(f"new{i}"))
            done += [e.request_id for e in engine.step().tokens if e.request_done and e.request_id == "old"]
            if done:
                break

        assert done == ["old"]
        steps(engine)
        check_idle(engine)

    def test_without_work_the_plan_is_empty(self, record: SchedulerRecord) -> None:
        engine, watched = self.engine(record)
        engine.step()

        assert [p for p in watched.plans if p] == []
        assert engine.stats().num_scheduler_errors == 0

    @pytest.mark.parametrize("limits", [{"max_tokens_per_step": 1}, {"max_num_sequences": 1}, {"max_tokens_per_step": 1 << 20, "max_num_sequences": 1 << 16}])
    def test_the_smallest_and_the_largest_limits_work(self, record: SchedulerRecord, limits: dict[str, int]) -> None:
        load = [Arrival(20, 4, seed=i) for i in range(3)]
        engine, _ = self.engine(record, **limits)

        assert play(engine, load) == play(fake_engine(), load)
        check_idle(engine)

    def test_cancelled_requests_leave_nothing_behind(self, record: SchedulerRecord) -> None:
        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(loads(cancels=True))
        def check(load: list[Arrival]) -> None:
            engine, _ = self.engine(record, num_blocks=64)
            play(engine, load)
            check_idle(engine)

        check()

    def test_finished_requests_are_forgotten(self, record: SchedulerRecord) -> None:
        engine, watched = self.engine(record)
        sizes = []
        for _ in range(3):
            play(engine, [Arrival(12, 3, seed=i) for i in range(40)])
            gc.collect()
            sizes.append(num_reachable(watched.scheduler))

        assert sizes[2] <= sizes[1] + 10, "it grows by what it keeps of every request"

    def test_two_engines_of_one_process_do_not_share_state(self, record: SchedulerRecord) -> None:
        first, second = self.engine(record)[0], self.engine(record)[0]
        load = [Arrival(50, 6, seed=i) for i in range(4)]
        for i, a in enumerate(load):
            first.add(a.request(f"other{i}"))
        for _ in range(3):
            first.step()

        assert play(second, load) == play(fake_engine(), load)
        steps(first)
        check_idle(first)
