"""The table's metrics, brought up to date at every sweep."""

from __future__ import annotations

import prometheus_client

from plugmesh.metrics import Metrics
from plugmesh_rollout.table.ledger import Ledger
from plugmesh_rollout.table.table import Table


class Gauges:
    """`docs/operations.md` defines each name."""

    def __init__(self, registry: prometheus_client.CollectorRegistry, table: Table, ledger: Ledger | None) -> None:
        m = Metrics(registry)
        self._table = table
        self._ledger = ledger
        self._rows = m.gauge("rollout_rows", "Live rows", ("topic",))
        self._bytes = m.gauge("rollout_bytes", "Bytes of live rows, bookkeeping included", ("topic",))
        self._in_flight = m.gauge("rollout_in_flight", "Rows that the admission task is not done with", ("topic",))
        self._leases = m.gauge("rollout_leases", "Live leases", ("topic",))
        self._stale = m.gauge("rollout_stale_rows", "Rows outside the version window that nobody holds", ("topic",))
        self._free = m.gauge("rollout_free_rows", "Rows that a task has not got", ("topic", "task"))
        self._waiting = m.gauge("rollout_waiting", "Calls that wait", ("topic", "kind"))
        self._waiting_bytes = m.gauge("rollout_waiting_bytes", "Values of calls that wait for room")
        self._done = m.counter("rollout_done_total", "Rows that a task is done with", ("topic", "task"))
        self._put = m.counter("rollout_put_total", "Rows put", ("topic",))
        self._expired = m.counter("rollout_expired_total", "Rows that came back from expired leases")
        self._commits = m.counter("rollout_commits_total", "Transactions of the ledger")
        self._entries = m.gauge("rollout_ledger_waiting", "Changes that are not durable yet")
        self._seen: dict[tuple[str, ...], int] = {}
        self._topics: set[tuple[str, tuple[str, ...]]] = set()

    def update(self) -> None:
        statuses = self._table.statuses()
        here = {(s.spec.name, s.spec.tasks) for _, s in statuses}
        for name, tasks in self._topics - here:
            for gauge in (self._rows, self._bytes, self._in_flight, self._leases, self._stale):
                gauge.remove(name)
            for task in tasks:
                self._free.remove(name, task)
            for kind in ("get", "put"):
                self._waiting.remove(name, kind)
        self._topics = here
        for opened, s in statuses:
            name = s.spec.name
            self._rows.labels(name).set(s.num_rows)
            self._bytes.labels(name).set(s.num_bytes)
            self._in_flight.labels(name).set(s.num_in_flight)
            self._leases.labels(name).set(s.num_leases)
            self._stale.labels(name).set(s.num_stale)
            self._waiting.labels(name, "get").set(len(opened.getters))
            self._waiting.labels(name, "put").set(len(opened.putters) + len(opened.field_putters))
            self._count(self._put.labels(name), ("put", name), s.num_put)
            for task, t in s.tasks.items():
                self._free.labels(name, task).set(t.num_free)
                self._count(self._done.labels(name, task), ("done", name, task), t.num_done)
        self._waiting_bytes.set(self._table.num_waiting_bytes)
        self._count(self._expired, ("expired",), self._table.num_expired)
        if self._ledger is not None:
            self._entries.set(self._ledger.num_waiting)
            self._count(self._commits, ("commits",), self._ledger.num_commits)

    def _count(self, counter: prometheus_client.Counter, key: tuple[str, ...], now: int) -> None:
        counter.inc(max(0, now - self._seen.get(key, 0)))  # a topic of the same name may have been made anew
        self._seen[key] = now
