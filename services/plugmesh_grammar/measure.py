"""What a grammar instance counts; docs/operations.md lists it."""

from __future__ import annotations

from collections.abc import Callable

import prometheus_client

from plugmesh.metrics import Metrics

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Measures:
    def __init__(self, registry: prometheus_client.CollectorRegistry, gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        metrics = Metrics(registry)
        self.num_calls = metrics.counter("grammar_calls_total", "Calls by outcome", ("method", "code"))
        self.num_lookups = metrics.counter("grammar_lookups_total", "Grammars by where they came from", ("source",))
        self.compile_seconds = metrics.histogram("grammar_compile_seconds", "Time of compilations in their process", ("engine",), buckets=_BUCKETS)
        self.mask_seconds = metrics.histogram("grammar_mask_seconds", "Time of one step of a Masks sequence", buckets=_BUCKETS)
        self.exported_bytes = metrics.counter("grammar_exported_bytes_total", "Bytes of compiled forms sent")
        for name, (text, read) in gauges.items():
            metrics.gauge(name, text).set_function(read)
