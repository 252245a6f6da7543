"""Prometheus metrics that several services define the same way. `docs/operations.md` holds the formulas."""

from __future__ import annotations

import prometheus_client

SECONDS_FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Makes metrics on one registry, each name once: asking again for a name gives the first object.

    Every name gets the prefix `plugmesh_`.
    """

    def __init__(self, registry: prometheus_client.CollectorRegistry) -> None:
        self.registry = registry
        self._made: dict[str, object] = {}

    def counter(self, name: str, help: str, labels: tuple[str, ...] = ()) -> prometheus_client.Counter:
        return self._once(name, lambda: prometheus_client.Counter(f"plugmesh_{name}", help, labels, registry=self.registry))

    def gauge(self, name: str, help: str, labels: tuple[str, ...] = ()) -> prometheus_client.Gauge:
        return self._once(name, lambda: prometheus_client.Gauge(f"plugmesh_{name}", help, labels, registry=self.registry))

    def histogram(self, name: str, help: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = SECONDS_FAST) -> prometheus_client.Histogram:
        return self._once(
            name, lambda: prometheus_client.Histogram(f"plugmesh_{name}", help, labels, buckets=buckets, registry=self.registry)
        )

    def _once(self, name, make):  # type: ignore[no-untyped-def]
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]
