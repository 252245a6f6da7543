"""What a grammar instance counts; docs/operations.md lists it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import prometheus_client

from plugmesh.metrics import Metrics

if TYPE_CHECKING:
    from plugmesh_grammar.service import GrammarService

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Measures:
    """Counters that the calls move, and gauges that are read off the service when somebody asks."""

    def __init__(self, registry: prometheus_client.CollectorRegistry, service: GrammarService) -> None:
        metrics = Metrics(registry)
        self.num_calls = metrics.counter("grammar_calls_total", "Calls by outcome", ("method", "code"))
        self.num_lookups = metrics.counter("grammar_lookups_total", "Grammars by where they came from", ("source",))
        self.compile_seconds = metrics.histogram("grammar_compile_seconds", "Time of compilations in their process", ("engine",), buckets=_BUCKETS)
        self.mask_seconds = metrics.histogram("grammar_mask_seconds", "Time of one step of a Masks sequence", buckets=_BUCKETS)
        self.exported_bytes = metrics.counter("grammar_exported_bytes_total", "Bytes of compiled forms sent")
        metrics.gauge("grammar_cached", "Compiled grammars in memory").set_function(lambda: len(service.compiler))
        metrics.gauge("grammar_cached_bytes", "Their bytes").set_function(lambda: service.compiler.cached_bytes)
        metrics.gauge("grammar_waiting", "Compilations waiting for a process").set_function(lambda: service.pool.num_waiting)
        metrics.gauge("grammar_workers", "Processes that compile").set_function(lambda: len(service.pool.pids))
        metrics.gauge("grammar_workers_killed", "Processes ended before their time").set_function(lambda: service.num_killed)
        metrics.gauge("grammar_streams", "Masks streams open").set_function(lambda: service.num_streams)
        metrics.gauge("grammar_sequences", "Sequences open on all streams").set_function(lambda: len(service.matching))
        metrics.gauge("grammar_catalogue_failures", "Times that the catalogue could not be used").set_function(
            lambda: service.catalogue.num_failures if service.catalogue else 0)
