"""The core's own metrics, registered like a plugin's."""

from __future__ import annotations

from plugmesh.hookspecs import hookimpl
from plugmesh.quality import divergence, greedy, needle, perplexity, tasks
from plugmesh.records import QualityMetricRecord


class CoreQualityMetrics:
    """What every plugin is measured by."""

    @hookimpl
    def register_quality_metrics(self) -> list[QualityMetricRecord]:
        return [perplexity.RECORD, divergence.RECORD, greedy.RECORD, needle.RECORD, tasks.RECORD]
