"""What every workload must do: the same work for the same seed, other work for another one, and nothing that a model cannot take."""

from __future__ import annotations

import pytest

from plugmesh.records import WorkloadContext, WorkloadRecord
from plugmesh.testing.conformance.base import RecordConformance
from plugmesh.testing.quality import FakeSubject

VOCAB_SIZE = 50_000


def context(seed: int) -> WorkloadContext:
    fake = FakeSubject()
    return WorkloadContext(seed, VOCAB_SIZE, fake.encode, lambda question: [1, *fake.encode(question), 2], fake.english)


class WorkloadConformance(RecordConformance):
    kind = "workloads"

    @pytest.fixture
    def records(self, host) -> list[WorkloadRecord]:  # type: ignore[no-untyped-def] # the base's fixture says what it is
        return list(host.records(self.kind))

    def test_its_work_can_be_sent(self, records: list[WorkloadRecord]) -> None:
        for record in records:
            made = record.build(context(1))
            calls = [call for conversation in made for call in conversation]

            assert len(calls) >= record.streams >= 1
            assert all(len(prompt) > 0 and max_tokens > 0 for prompt, max_tokens in calls)
            assert all(0 <= i < VOCAB_SIZE for prompt, _ in calls for i in prompt)

    def test_a_round_has_the_same_work_on_every_side_and_other_work_than_the_next(self, records: list[WorkloadRecord]) -> None:
        for record in records:
            assert record.build(context(1)) == record.build(context(1))
            assert record.build(context(1)) != record.build(context(2))

    def test_it_is_measured_by_a_figure_in_a_place_that_there_is(self, records: list[WorkloadRecord]) -> None:
        from plugmesh.ab.workloads import FIGURES

        for record in records:
            assert record.figure in FIGURES
            assert record.tiers
            assert set(record.tiers) <= {"engine", "served"}
