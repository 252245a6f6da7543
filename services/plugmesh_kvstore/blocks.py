"""The records of the store: blocks, where they are, and the slots nobody may reuse yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from plugmesh.arena import Arena
from plugmesh.kv.guard import GuardProbe
from plugmesh.types import KvLayout


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block lies on disk."""

    segment: int
    slot: int


@dataclass(slots=True, eq=False)
class Block:
    """A committed block. `slot` is its place in the arena, `place` on disk; a block has at least one of them.

    `pins` counts leases (and running transfers) that need it in the arena, `holds` further reasons not to touch
    it: a background write, a load, a fenced holder that may still read.
    """

    partition: Partition
    block_id: bytes
    parent_id: bytes
    num_tokens: int
    num_bytes: int
    checksum: int
    slot: int | None = None
    place: Place | None = None
    pins: int = 0
    holds: int = 0
    condemned: bool = False   # its bytes in the arena are damaged; invisible, removed once nobody holds it
    tried_disk: bool = False  # the disk tier refused it; do not try again and again

    @property
    def busy(self) -> bool:
        return self.pins > 0 or self.holds > 0

    @property
    def tier(self) -> str:
        return "disk" if self.slot is None else "arena"


@dataclass(slots=True, eq=False)
class Partition:
    """The blocks of one layout; `arena` is None until a client attaches (blocks may be on disk from before)."""

    layout: KvLayout
    key: bytes
    slot_bytes: int
    arena: Arena | None = None
    blocks: dict[bytes, Block] = field(default_factory=dict)
    loading: dict[int, Block] = field(default_factory=dict)  # slot to the block being read into it
    last_attached: float = 0.0


@dataclass(slots=True, eq=False)
class Quarantine:
    """What a fenced holder on this host may still write (`slots`) or read (`blocks`) while its guard is held."""

    guard: GuardProbe
    partition: Partition
    holder: str
    slots: list[int]
    blocks: list[Block]
