"""Who may write and pin: leases, their expiry, and the fencing of earlier incarnations of a holder."""

from __future__ import annotations

import collections
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from plugmesh.errors import Overloaded, StaleIncarnation
from plugmesh.kv.guard import GuardProbe

if TYPE_CHECKING:
    from plugmesh_kvstore.blocks import Block, Partition

_REMEMBERED_HOLDERS = 4096
_REMEMBERED_INCARNATIONS = 16


@dataclass(slots=True, eq=False)
class Lease:
    """What one attachment of one holder has: pins on blocks and reserved slots.

    `guard` is None for a holder on another host, which cannot touch the arena.
    """

    lease_id: str
    holder: str
    incarnation: str
    partition: Partition
    expires_at: float
    guard: GuardProbe | None = None
    pins: dict[Block, int] = field(default_factory=dict)
    reserved: dict[bytes, int] = field(default_factory=dict)  # block id to slot


class Leases:
    """The table of live leases. Removing one only forgets it here; the store takes back what it had."""

    def __init__(self, ttl_s: float, cap: int, clock: Callable[[], float]) -> None:
        self.ttl_s = ttl_s
        self._cap = cap
        self._clock = clock
        self._live: dict[str, Lease] = {}
        self._current: collections.OrderedDict[str, str] = collections.OrderedDict()  # holder to incarnation
        self._retired: collections.OrderedDict[str, collections.deque[str]] = collections.OrderedDict()
        self._prefix = secrets.token_hex(4)  # ids of an earlier life of the store never fit

    def open(self, partition: Partition, holder: str, incarnation: str) -> Lease:
        """Raises Overloaded at the cap."""
        if len(self._live) >= self._cap:
            raise Overloaded(f"{self._cap} leases are out", retry_after_s=self.ttl_s)
        lease_id = f"{self._prefix}{secrets.token_hex(8)}"
        lease = Lease(lease_id, holder, incarnation, partition, self._clock() + self.ttl_s)
        self._live[lease.lease_id] = lease
        return lease

    def get(self, lease_id: str) -> Lease:
        """A live lease. Raises StaleIncarnation when it expired, was fenced, or is of another life of the store."""
        lease = self._live.get(lease_id)
        if lease is None or lease.expires_at <= self._clock():
            raise StaleIncarnation("the lease has ended; attach again", lease=lease_id[:8])
        return lease

    def renew(self, lease_id: str) -> Lease:
        lease = self.get(lease_id)
        lease.expires_at = self._clock() + self.ttl_s
        return lease

    def pop(self, lease_id: str) -> Lease | None:
        return self._live.pop(lease_id, None)

    def expired(self) -> list[Lease]:
        now = self._clock()
        return [lease for lease in self._live.values() if lease.expires_at <= now]

    def note_incarnation(self, holder: str, incarnation: str) -> list[Lease]:
        """Makes `incarnation` the holder's current one; returns the leases of its predecessor, now fenced.

        A predecessor is never accepted again, however late it wakes.
        """
        before = self._current.get(holder)
        self._current[holder] = incarnation
        self._current.move_to_end(holder)
        if len(self._current) > _REMEMBERED_HOLDERS:
            self._current.popitem(last=False)
        if before is None or before == incarnation:
            return []
        self._retired.setdefault(holder, collections.deque(maxlen=_REMEMBERED_INCARNATIONS)).append(before)
        self._retired.move_to_end(holder)
        if len(self._retired) > _REMEMBERED_HOLDERS:
            self._retired.popitem(last=False)
        return [lease for lease in self._live.values() if lease.holder == holder and lease.incarnation != incarnation]

    def check_incarnation(self, holder: str, incarnation: str) -> None:
        """Raises StaleIncarnation for one that was replaced."""
        if incarnation in self._retired.get(holder, ()):
            raise StaleIncarnation(f"{holder} was replaced by a newer incarnation", holder=holder, incarnation=incarnation)

    def of_holder(self, holder: str, incarnation: str) -> list[Lease]:
        return [x for x in self._live.values() if x.holder == holder and x.incarnation == incarnation]

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._live.values())

    def __len__(self) -> int:
        return len(self._live)
