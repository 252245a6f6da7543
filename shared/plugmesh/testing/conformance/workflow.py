"""What every workflow must do: a plan with which the loop never stops and never trains a token that is too old, or a refusal before anything is started.

The plan is played: a table of names and versions, generation that finishes in any order, and the plan's own sampler.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.errors import InvalidRequest
from plugmesh.host import PluginHost
from plugmesh.records import LoopPlan, LoopShape, SampleContext, Sampler, WorkflowRecord
from plugmesh.testing.conformance.base import RecordConformance
from plugmesh.testing.conformance.sampler import ReadyRow

MAX_MOVES = 20_000


class LoopStops(AssertionError):
    """Nothing can happen any more, and steps are left."""


class Play:
    """The loop without a model: one move at a time, drawn from `dice`.

    Args:
        slow: Numbers of groups that finish only when nothing else can happen.
    """

    def __init__(self, plan: LoopPlan, sampler: Sampler, shape: LoopShape, dice: random.Random, slow: frozenset[int] = frozenset()) -> None:
        self._plan = plan
        self._sampler = sampler
        self._shape = shape
        self._dice = dice
        self._slow = slow
        self._num_fed = 0
        self._waiting: list[int] = []
        self._generating: dict[int, int] = {}  # group to version
        self._ready: dict[int, int] = {}
        self.version = 0
        self.trained: list[tuple[int, int, int]] = []  # step, group, version

    def run(self, steps: int) -> None:
        """Raises LoopStops."""
        end = steps * self._shape.groups_per_step
        for _ in range(MAX_MOVES):
            if self.version == steps:
                return
            fast = [g for g in self._generating if g not in self._slow]
            moves = {"feed": self._may_feed(end), "start": self._may_start(), "finish": bool(fast), "train": True}
            possible = [name for name, may in moves.items() if may]
            self._dice.shuffle(possible)
            if not any(self._move(name, fast) for name in possible):
                if not self._generating:
                    break
                self._finish(self._dice.choice(sorted(self._generating)))
        raise LoopStops(
            f"step {self.version} of {steps} never comes: waiting {self._waiting}, generating {self._generating}, ready {self._ready} (group to version); {self._plan}"
        )

    def _may_feed(self, end: int) -> bool:
        size, plan = self._shape.group_size, self._plan
        rows = size * (len(self._waiting) + len(self._generating) + len(self._ready) + 1)
        is_in = not plan.is_gated or rows <= (plan.staleness + 1) * self._shape.batch_rows
        return is_in and rows <= plan.capacity_rows and (self._num_fed < end or plan.evicts)

    def _wanted(self, group: int) -> int:
        return max(0, group // self._shape.groups_per_step - self._plan.staleness) if self._plan.is_pinned else self.version

    def _may_start(self) -> bool:
        return bool(self._waiting) and len(self._generating) < self._shape.groups_at_once and self._wanted(self._waiting[0]) <= self.version

    def _move(self, name: str, fast: list[int]) -> bool:
        if name == "feed":
            self._waiting.append(self._num_fed)
            self._num_fed += 1
        elif name == "start":
            group = self._waiting.pop(0)
            self._generating[group] = self._wanted(group)
        elif name == "finish":
            self._finish(self._dice.choice(fast))
        else:
            return self._train()
        return True

    def _finish(self, group: int) -> None:
        self._ready[group] = self._generating.pop(group)

    def _train(self) -> bool:
        plan, size, batch = self._plan, self._shape.group_size, self._shape.batch_rows
        oldest = self.version - plan.staleness
        ready = [
            ReadyRow(group * size + i, f"{group:08d}/{i}", f"{group:08d}", version)
            for group, version in sorted(self._ready.items()) if oldest <= version <= self.version for i in range(size)
        ]  # fmt: skip
        pending: dict[int, int] = {}
        for version in () if plan.is_pinned else self._generating.values():  # a pinned row is given its version when it is done
            pending[version] = pending.get(version, 0) + size
        context = SampleContext(
            "t", "train", size, batch, plan.staleness, self.version, pending, batch if plan.is_gated else 0, batch_index=self.version,
        )  # fmt: skip
        rows, taken = self._sampler.sample(ready, batch, context)
        if not rows:
            return False
        assert sorted(rows) == sorted(taken) and len(rows) == batch, f"a step trains {batch} rows and has them then; got {rows}, taken {taken}"
        groups = sorted({row // size for row in rows})
        assert len(groups) == self._shape.groups_per_step, f"a step trains whole groups, not {rows}"
        self.trained += [(self.version, g, self._ready.pop(g)) for g in groups]
        self.version += 1
        late = {g: v for part in (self._generating, self._ready) for g, v in part.items() if v < self.version - plan.staleness}
        assert plan.evicts or not late, f"step {self.version} finds groups that are too old, and nobody drops them: {late} (group to version); {plan}"
        for group in late:
            self._generating.pop(group, None)
            self._ready.pop(group, None)
        return True


class WorkflowConformance(RecordConformance):
    """A suite's subclass says with which options a run's file names the workflow."""

    kind = "workflows"
    options: ClassVar[Mapping[str, Any]] = {}
    max_examples: ClassVar[int] = 40

    def sampler(self, plan: LoopPlan, host: PluginHost) -> Sampler:
        """The plan's: of the plugin, or of the core."""
        core = pytest.importorskip("plugmesh_rollout.table.samplers").CoreSamplers()
        records = {r.name: r for r in (*core.register_samplers(), *host.records("samplers"))}
        assert plan.train_sampler in records, f"no sampler {plan.train_sampler!r}; known: {', '.join(records)}"
        sampler: Sampler = records[plan.train_sampler].build(json.loads(json.dumps(dict(plan.train_options))))  # they reach the table as JSON
        return sampler

    def play(self, plan: LoopPlan, shape: LoopShape, host: PluginHost, *, seed: int, slow: frozenset[int], steps: int = 5) -> Play:
        """The run of a plan; it must end, and within its bound."""
        found = Play(plan, self.sampler(plan, host), shape, random.Random(seed), slow)
        found.run(steps)
        assert all(0 <= step - version <= plan.staleness for step, _, version in found.trained)
        return found

    def test_a_plan_never_stops_and_trains_nothing_too_old(self, record: WorkflowRecord, host: PluginHost) -> None:
        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99), st.frozensets(st.integers(0, 12), max_size=3))
        def check(group_size: int, groups_per_step: int, groups_at_once: int, seed: int, slow: frozenset[int]) -> None:
            shape = LoopShape(group_size, groups_per_step, groups_at_once)
            try:
                plan = record.plan(dict(self.options), shape)
            except InvalidRequest:  # before anything was started
                return
            self.play(plan, shape, host, seed=seed, slow=slow)

        check()

    def test_an_ordinary_run_is_not_refused(self, record: WorkflowRecord, host: PluginHost) -> None:
        """With groups of 4, of which 8 are a step, as the loop's examples have; and each slow group in its turn."""
        shape = LoopShape(4, 8, 6)
        plan = record.plan(dict(self.options), shape)
        for slow in range(0, 24, 5):
            self.play(plan, shape, host, seed=slow, slow=frozenset({slow}), steps=4)

    def test_a_capacity_with_which_the_loop_would_stop_is_refused(self, record: WorkflowRecord, host: PluginHost) -> None:
        """Of workflows that have the option `capacity_rows`; one without it refuses the word."""
        shape = LoopShape(2, 3, 4)
        for capacity in range(record.plan(dict(self.options), shape).capacity_rows + 1):
            try:
                plan = record.plan({**self.options, "capacity_rows": capacity}, shape)
            except InvalidRequest:
                continue
            assert plan.capacity_rows == capacity
            needed = max(shape.group_size, (plan.staleness + 1) * shape.batch_rows if plan.is_gated else 0)
            assert capacity >= needed, f"the table refuses {capacity} rows where {needed} are in flight"
            self.play(plan, shape, host, seed=capacity, slow=frozenset({1}))

    def test_the_plan_follows_from_options_and_shape(self, record: WorkflowRecord) -> None:
        """Every worker makes it for itself."""
        options, shape = dict(self.options), LoopShape(4, 8, 6)
        first = record.plan(options, shape)
        record.plan(dict(self.options), LoopShape(2, 2, 1))

        assert first == record.plan(options, shape)
        assert options == dict(self.options), "`options` are not the workflow's to change"
        assert isinstance(first.staleness, int) and first.staleness >= 0
        assert first.capacity_rows >= shape.batch_rows

    def test_a_pinned_run_is_the_same_every_time(self, record: WorkflowRecord, host: PluginHost) -> None:
        """In whatever order its groups come."""
        shape = LoopShape(2, 3, 4)
        plan = record.plan(dict(self.options), shape)
        if not plan.is_pinned:
            pytest.skip("the plan pins no weights")
        runs = [self.play(plan, shape, host, seed=seed, slow=frozenset({seed})).trained for seed in range(6)]
        assert all(run == runs[0] for run in runs)

    def test_an_option_that_does_not_exist_is_refused(self, record: WorkflowRecord) -> None:
        with pytest.raises(InvalidRequest):
            record.plan({**self.options, "no_such_option": 1}, LoopShape(2, 2, 1))
