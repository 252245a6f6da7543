"""What every quality metric must do: see no difference where there is none, see a broken model, draw from its seed, and keep to plain numbers."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import numpy as np

from plugmesh.records import Observation, QualityMetricRecord
from plugmesh.testing.conformance.base import RecordConformance
from plugmesh.testing.quality import FakeSubject

KINDS = {"logits", "tokens", "answers"}


class QualityMetricConformance(RecordConformance):
    """A metric of things that `FakeSubject` cannot do overrides `subject`."""

    kind = "quality_metrics"
    damage: ClassVar[float] = 8.0

    def subject(self, *, seed: int = 0, damage: float = 0.0) -> Any:
        """A side to observe; with damage, one whose output is as good as noise."""
        return FakeSubject(seed=seed, damage=damage)

    @staticmethod
    def stored(observation: Observation) -> Observation:
        """As it comes out of files and JSON on the other side of a process."""
        return Observation(json.loads(json.dumps(dict(observation.figures))), {n: np.array(a) for n, a in observation.arrays.items()})

    def test_it_needs_what_a_side_may_have(self, record: QualityMetricRecord) -> None:
        assert record.needs
        assert record.needs <= KINDS
        assert not record.uses_reference or record.needs == {"logits"}

    def test_the_same_seed_gives_the_same_observation(self, record: QualityMetricRecord) -> None:
        first, second = (record.observe(self.subject()) for _ in range(2))

        assert first.figures == second.figures
        assert all(np.array_equal(first.arrays[n], second.arrays[n]) for n in {**first.arrays, **second.arrays})

    def test_it_shows_plain_finite_numbers(self, record: QualityMetricRecord) -> None:
        found = record.observe(self.subject())

        assert all(math.isfinite(v) for v in found.figures.values())
        assert all(np.asarray(a).dtype.kind in "biuf" for a in found.arrays.values())

    def test_two_equal_sides_differ_in_nothing(self, record: QualityMetricRecord) -> None:
        sides = [self.stored(record.observe(self.subject())) for _ in range(2)]
        deltas = record.compare(*sides)

        assert deltas
        assert all(d.low == d.value == d.high for d in deltas)

    def test_a_broken_side_is_worse_than_a_sound_one(self, record: QualityMetricRecord) -> None:
        sound, broken = (self.stored(record.observe(self.subject(damage=d))) for d in (0.0, self.damage))
        same = {d.name: d.value for d in record.compare(sound, sound)}
        worse = record.compare(sound, broken)

        assert all(d.low <= d.value <= d.high for d in worse)
        assert all((d.value > same[d.name]) == (d.better == "lower") for d in worse if d.value != same[d.name])
        assert any(d.value != same[d.name] for d in worse)
