"""KV that outlives its sequence so that others can go on from it: what `EngineRequest.hold` keeps, and where a fork starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from plugmesh_engine.kv.pool import BlockPool


@dataclass(slots=True, eq=False)
class Origin:
    """A sequence as a fork sees it, at a step boundary.

    Attributes:
        tokens: Prompt and output. Not to be changed: a running sequence's own list.
        num_computed: Tokens whose KV is in `blocks`; 0 when memory was short and the KV had to go.
        blocks: Not the fork's until it has taken references.
    """

    tokens: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


class Holds:
    """Finished sequences whose tokens and KV stay until `release`.

    The KV is a saving, not a promise: a fork that finds it gone computes it again, with the same result. So holds never keep a running or waiting request
    from memory: `shed` gives the oldest one's blocks back.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._of: dict[str, dict[int, Origin]] = {}  # oldest request first

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._of

    @property
    def num_sequences(self) -> int:
        return sum(map(len, self._of.values()))

    def blocks(self) -> Iterator[int]:
        """Every reference that the holds have, blocks with several of them as often."""
        for sequences in self._of.values():
            for origin in sequences.values():
                yield from origin.blocks

    def keep(self, request_id: str, sequence: int, origin: Origin) -> None:
        """Takes over the caller's references to the blocks."""
        self._of.setdefault(request_id, {})[sequence] = origin

    def find(self, request_id: str, sequence: int) -> Origin | None:
        return self._of.get(request_id, {}).get(sequence)

    def release(self, request_id: str) -> bool:
        """True if anything was held; calling it twice is harmless."""
        sequences = self._of.pop(request_id, None)
        for origin in (sequences or {}).values():
            self._pool.drop(reversed(origin.blocks))
        return sequences is not None

    def shed(self) -> bool:
        """Gives back the KV of the oldest sequence that still has any; its tokens stay. False when there is none."""
        for sequences in self._of.values():
            for origin in sequences.values():
                if origin.blocks:
                    self._pool.drop(reversed(origin.blocks))
                    origin.blocks, origin.num_computed = [], 0
                    return True
        return False
