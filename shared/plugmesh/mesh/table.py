"""The table of instances as one process sees it: what leases say, how old they are, who was declared dead.

Pure bookkeeping with the time handed in; `discovery` feeds it from the broker.

    joined -> (updated)* -> suspect -> updated (the lease came back) or left

An incarnation that left without saying so is *fenced*: leases and calls under it are refused from then on, even if the
process wakes up. It has to come back under a new incarnation id.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from plugmesh.types import InstanceInfo

log = structlog.get_logger()

MAX_FENCED = 4096

Watcher = Callable[[str, InstanceInfo], None]


@dataclass(slots=True)
class Entry:
    """One instance. `seen` is the local time of its last lease, `inbox` where it can be probed."""

    info: InstanceInfo
    seen: float
    inbox: str = ""
    probing: bool = False


class InstanceTable:
    """Instances by (role, instance id)."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.entries: dict[tuple[str, str], Entry] = {}
        self._fenced: OrderedDict[str, None] = OrderedDict()
        self._watchers: list[Watcher] = []

    def put(self, info: InstanceInfo, inbox: str, now: float) -> None:
        """A lease was written."""
        if info.incarnation in self._fenced:
            return
        key = (info.role, info.instance_id)
        entry = self.entries.get(key)
        if entry is not None and entry.info.incarnation != info.incarnation:
            if info.started_unix_s < entry.info.started_unix_s:
                self.fence(info.incarnation)  # an older life speaks late
                return
            self._leave(key, fence=True)
            entry = None
        if entry is None:
            self.entries[key] = Entry(info, now, inbox)
            self._tell("joined", info)
            return
        changed = entry.info != info
        entry.info, entry.seen, entry.inbox, entry.probing = info, now, inbox, False
        if changed:
            self._tell("updated", info)

    def remove(self, role: str, instance_id: str) -> None:
        """The instance took its lease back: a clean end."""
        self._leave((role, instance_id), fence=False)

    def overdue(self, now: float) -> list[Entry]:
        """Entries whose lease has expired; to be marked suspect and probed."""
        return [e for e in self.entries.values() if now - e.seen > self.ttl_s]

    def suspect(self, entry: Entry) -> None:
        if entry.info.state != "suspect" and self._is_current(entry):
            entry.info = dataclasses.replace(entry.info, state="suspect")
            self._tell("suspect", entry.info)

    def declare_dead(self, entry: Entry) -> None:
        """No lease and no answer: removed and fenced."""
        if self._is_current(entry):
            self._leave((entry.info.role, entry.info.instance_id), fence=True)

    def forgive(self, now: float) -> None:
        """Nobody is overdue any more: we could not have heard of renewals for a while."""
        for e in self.entries.values():
            e.seen = now

    def live(self, role: str, *, include_suspect: bool = False) -> list[InstanceInfo]:
        """Instances of a role, in the order of their ids; an empty role means all."""
        found = [
            e.info for e in self.entries.values()
            if (not role or e.info.role == role) and (include_suspect or e.info.state != "suspect")
        ]
        return sorted(found, key=lambda i: (i.role, i.instance_id))

    def fence(self, incarnation: str) -> None:
        self._fenced[incarnation] = None
        while len(self._fenced) > MAX_FENCED:
            self._fenced.popitem(last=False)

    def is_fenced(self, caller: str) -> bool:
        """Whether "<instance>/<incarnation>" names an incarnation that was declared dead."""
        return caller.rpartition("/")[2] in self._fenced

    def watch(self, callback: Watcher) -> Callable[[], None]:
        self._watchers.append(callback)
        return lambda: self._watchers.remove(callback) if callback in self._watchers else None

    def _is_current(self, entry: Entry) -> bool:
        return self.entries.get((entry.info.role, entry.info.instance_id)) is entry

    def _leave(self, key: tuple[str, str], *, fence: bool) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            if fence:
                self.fence(entry.info.incarnation)
            self._tell("left", entry.info)

    def _tell(self, event: str, info: InstanceInfo) -> None:
        log.debug("discovery." + event, role=info.role, instance=info.instance_id, incarnation=info.incarnation)
        for watcher in list(self._watchers):
            try:
                watcher(event, info)
            except Exception:
                log.exception("discovery.watcher_failed", change=event)
