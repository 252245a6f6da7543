"""Instances of one role as this gateway may use them: what the mesh says, less those that failed us just now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from plugmesh.mesh.api import Mesh
from plugmesh.types import InstanceInfo

log = structlog.get_logger()

_MAX_SUSPECT_S = 5.0


class Peers:
    """Live instances of `role`.

    `on_gone(info)` is called when the mesh lost an instance or found it suspect, or when the same id came back with another
    incarnation; always from the event loop.
    """

    def __init__(self, mesh: Mesh, role: str, on_gone: Callable[[InstanceInfo, str], None] = lambda info, why: None) -> None:
        self.mesh = mesh
        self.role = role
        self.on_gone = on_gone
        self._suspects: dict[str, tuple[str, float]] = {}  # instance id to (incarnation, until when)
        self._failures: dict[str, tuple[str, int]] = {}    # instance id to (incarnation, failures since its last sign of life)
        self._incarnations: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._unwatch: Callable[[], None] | None = None

    def start(self) -> None:
        self._unwatch = self.mesh.watch(self._on_change)

    def stop(self) -> None:
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def live(self) -> list[InstanceInfo]:
        """Ready instances that did not fail us within the last seconds; none while the broker is away, since calls go over it."""
        if not self.mesh.connected:
            return []
        now = time.monotonic()
        found = []
        for info in self.mesh.instances(self.role):
            if info.state != "ready":
                continue
            suspect = self._suspects.get(info.instance_id)
            if suspect is not None:
                if suspect[0] == info.incarnation and now < suspect[1]:
                    continue
                del self._suspects[info.instance_id]
            found.append(info)
        return found

    def is_leaving(self, info: InstanceInfo) -> bool:
        """Whether this very incarnation says that it drains."""
        return any(i.instance_id == info.instance_id and i.incarnation == info.incarnation and i.state == "draining"
                   for i in self.mesh.instances(self.role))

    def suspect(self, info: InstanceInfo, for_s: float) -> None:
        """Leaves this incarnation out of `live` for a while, twice as long after each failure in a row, up to 5 s.

        The table may list a killed instance until its lease is over; asking it again and again would use up all attempts.
        """
        if len(self._suspects) > 1024:
            self._suspects.clear()  # only a hint: forgetting costs one more failed attempt
            self._failures.clear()
        incarnation, count = self._failures.get(info.instance_id, (info.incarnation, 0))
        count = count + 1 if incarnation == info.incarnation else 1
        self._failures[info.instance_id] = (info.incarnation, count)
        for_s = max(for_s, min(for_s * 2 ** (count - 1), _MAX_SUSPECT_S))
        self._suspects[info.instance_id] = (info.incarnation, time.monotonic() + for_s)

    def trust(self, info: InstanceInfo) -> None:
        """It just answered: its failures are forgotten."""
        if self._failures:
            self._failures.pop(info.instance_id, None)

    async def changed(self, timeout_s: float) -> None:
        """Returns after a change of the table, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _on_change(self, event: str, info: InstanceInfo) -> None:
        if info.role != self.role and self.role not in info.roles:
            return
        known = self._incarnations.get(info.instance_id)
        if event in ("left", "suspect"):
            if known in (None, info.incarnation):
                self._incarnations.pop(info.instance_id, None)
            self.on_gone(info, event)
        else:
            if known is not None and known != info.incarnation:
                self.on_gone(InstanceInfo(info.role, info.instance_id, known, "", "", 0), "restarted")
            self._incarnations[info.instance_id] = info.incarnation
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
