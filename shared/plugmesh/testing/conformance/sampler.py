"""What every sampler must do: choose among what is ready, each row once, the same from the same, and never hand out what it was told has gone."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.errors import InvalidRequest
from plugmesh.records import SampleContext, Sampler, SamplerRecord
from plugmesh.testing.conformance.base import RecordConformance

SLOW_MS = 250.0  # for 10,000 ready rows, on the table's event loop


@dataclass(frozen=True, slots=True)
class ReadyRow:
    """A row as the table shows it."""

    index: int
    id: str
    group: str
    version: int | None
    sizes: Mapping[str, int] = field(default_factory=lambda: {"response_ids": 5})
    scalars: Mapping[str, float] = field(default_factory=dict)


def ready_rows(versions: Sequence[int | None], group_size: int, sizes: Sequence[int] = ()) -> list[ReadyRow]:
    """Rows in groups of neighbours; the last group may be incomplete."""
    return [
        ReadyRow(i, f"r{i}", f"g{i // group_size}" if group_size > 1 else "", v, {"response_ids": sizes[i] if sizes else 5})
        for i, v in enumerate(versions)
    ]  # fmt: skip


class SamplerConformance(RecordConformance):
    """A suite's subclass says with which options its samplers are built and whether they keep groups whole."""

    kind = "samplers"
    options: ClassVar[Mapping[str, Any]] = {}
    keeps_groups: ClassVar[bool] = False
    max_examples: ClassVar[int] = 60

    def ask(self, sampler: Sampler, ready: Sequence[ReadyRow], batch_size: int, context: SampleContext, earlier: Collection[int] = ()) -> list[int]:
        """The rows taken by an answer that the table would accept, `earlier` ones having been taken before; a typed refusal counts as none."""
        before = list(ready)
        try:
            sampled, consumed = sampler.sample(ready, batch_size, context)
        except InvalidRequest:
            return []
        here = {row.index for row in ready}
        assert list(ready) == before, "`ready` is not the sampler's to change"
        assert set(consumed) <= here, "it takes rows that are not ready"
        assert len(set(consumed)) == len(consumed), "it takes a row twice"
        assert bool(sampled) or not consumed, "it takes rows and hands none out"
        assert len(sampled) <= batch_size
        assert len(set(sampled)) == len(sampled), "it hands a row out twice"
        assert set(sampled) <= here | set(earlier), "it hands out rows that were never ready"
        if self.keeps_groups and sampled and context.group_size > 1:
            groups = {row.group: {r.index for r in ready if r.group == row.group} for row in ready if row.index in sampled}
            assert all(len(g) == context.group_size and g <= set(sampled) for g in groups.values()), "a group is handed out in part"
        return list(consumed)

    def test_whatever_is_ready_it_takes_rows_of_it_and_each_once(self, record: SamplerRecord) -> None:
        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def check(data: st.DataObject) -> None:
            group_size = data.draw(st.integers(1, 3))
            versions = data.draw(st.lists(st.none() | st.integers(0, 4), max_size=24))
            left = ready_rows(versions, group_size, data.draw(st.lists(st.integers(0, 99), min_size=len(versions), max_size=len(versions))))
            sampler = record.build(self.options)
            taken: set[int] = set()
            for number in range(6):
                batch = group_size * data.draw(st.integers(1, 3))
                ranks = data.draw(st.integers(1, 3))
                latest = data.draw(st.none() | st.just(4))
                context = SampleContext(
                    "t", "train", group_size, data.draw(st.integers(1, batch)), None if latest is None else 4, latest, batch_rows=batch,
                    rank=data.draw(st.integers(0, ranks - 1)), num_ranks=ranks, batch_index=number,
                )  # fmt: skip
                consumed = set(self.ask(sampler, left, batch, context, taken))
                assert not consumed & taken, "it takes a row that was taken"
                taken |= consumed
                left = [row for row in left if row.index not in consumed]

        check()

    def test_the_same_rows_give_the_same_batch(self, record: SamplerRecord) -> None:
        ready = ready_rows([i // 4 % 3 for i in range(32)], 2, [i * 7 % 31 for i in range(32)])
        context = SampleContext("t", "train", 2, 4, 4, 4, batch_rows=4, batch_index=0)
        assert self.ask(record.build(self.options), ready, 4, context) == self.ask(record.build(self.options), ready, 4, context)

    def test_nothing_ready_is_no_batch(self, record: SamplerRecord) -> None:
        assert self.ask(record.build(self.options), [], 4, SampleContext("t", "train", batch_index=0)) == []

    def test_two_topics_do_not_share_state(self, record: SamplerRecord) -> None:
        ready, context = ready_rows([0] * 8, 1), SampleContext("t", "train", 1, 4, batch_rows=4, batch_index=0)
        first, second = record.build(self.options), record.build(self.options)
        assert first is not second
        assert self.ask(first, ready, 4, context) == self.ask(second, ready, 4, context)

    def test_rows_that_come_back_are_handed_out_again(self, record: SamplerRecord) -> None:
        """A consumer died: what it had is ready once more."""
        ready, context = ready_rows([0] * 8, 1), SampleContext("t", "train", 1, 4, batch_rows=4, batch_index=0)
        sampler = record.build(self.options)
        had = self.ask(sampler, ready, 4, context)
        forget = getattr(sampler, "forget", None)
        if forget is not None:
            forget(had)
        assert self.ask(sampler, ready, 4, context) == had

    def test_it_is_quick_with_many_rows(self, record: SamplerRecord) -> None:
        ready, context = ready_rows([i % 3 for i in range(10_000)], 1), SampleContext("t", "train", 1, 64, 4, 4, batch_rows=64, batch_index=0)
        took_ms = []
        for _ in range(5):  # the quickest first question counts: a busy machine may put any of them aside
            sampler = record.build(self.options)
            began = time.perf_counter()
            self.ask(sampler, ready, 64, context)
            took_ms.append((time.perf_counter() - began) * 1e3)
        assert min(took_ms) < SLOW_MS
