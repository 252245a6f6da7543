"""The store's metrics, brought up to date at every sweep."""

from __future__ import annotations

import prometheus_client

from plugmesh.metrics import Metrics
from plugmesh_kvstore.audit import Audit
from plugmesh_kvstore.store import BlockStore


class Gauges:
    """`docs/operations.md` defines each name."""

    def __init__(self, registry: prometheus_client.CollectorRegistry, store: BlockStore) -> None:
        m = Metrics(registry)
        self._store = store
        self._arena = m.gauge("kv_arena_bytes", "Arena bytes by state; pinned is part of committed", ("state",))
        self._disk = m.gauge("kv_disk_bytes", "Bytes of blocks on disk")
        self._blocks = m.gauge("kvstore_blocks", "Blocks in any tier")
        self._leaked = m.gauge("kv_blocks_leaked", "Arena slots with no owner, or with two")
        self._leases = m.gauge("kv_leases", "Live leases")
        self._events_waiting = m.gauge("kv_events_waiting", "Events not yet taken by the bus")
        self._counters = {
            "hits": m.counter("kv_hits", "Blocks asked for and found"),
            "misses": m.counter("kv_misses", "Blocks asked for and not found"),
            "corrupt": m.counter("kv_corrupt", "Blocks dropped because of their checksum"),
            "evicted": m.counter("kv_evictions", "Blocks that left the store for want of room"),
            "evicted_to_disk": m.counter("kv_demotions", "Blocks that left the arena and stayed on disk"),
            "orders_dropped": m.counter("kv_eviction_orders_dropped", "Eviction orders of plugins that failed; recency decides since then"),
            "fenced": m.counter("kv_leases_fenced", "Leases that expired or were replaced"),
        }
        self._seen = dict.fromkeys(self._counters, 0)

    def update(self) -> Audit:
        """Audits the arena and publishes the numbers."""
        audit = self._store.audit()
        for state in ("committed", "pinned", "reserved", "quarantined"):
            self._arena.labels(state).set(getattr(audit, state))
        self._arena.labels("free").set(audit.capacity - audit.used)
        self._disk.set(self._store.disk.used_bytes if self._store.disk else 0)
        self._blocks.set(self._store.num_blocks)
        self._leaked.set(audit.num_leaked + audit.num_doubled)
        self._leases.set(len(self._store.leases))
        self._events_waiting.set(self._store.events.num_waiting)
        for name, counter in self._counters.items():
            now = getattr(self._store.counters, name)
            counter.inc(now - self._seen[name])
            self._seen[name] = now
        return audit
