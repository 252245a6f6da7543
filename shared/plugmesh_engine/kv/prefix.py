"""Finds blocks by the hash chain of the tokens before them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class PrefixCache:
    """Names of blocks (`plugmesh.types.block_id`) to their slots in the pool, and which of them may be reused first.

    A cached block is either held (by sequences; the pool counts) or idle. Idle ones keep their content and are
    evicted least recently used first. Knows nothing of memory.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._id_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.observer: Callable[[bytes, bool], None] | None = None  # told (name, whether it came or went) of every change

    def __len__(self) -> int:
        return len(self._block_of)

    @property
    def num_idle(self) -> int:
        """Cached blocks that nobody holds."""
        return len(self._idle)

    def names(self) -> list[bytes]:
        """Names of all cached blocks, in the order in which they came."""
        return list(self._block_of)

    def find(self, block_id: bytes) -> int | None:
        """The block of that name. Changes nothing."""
        return self._block_of.get(block_id)

    def match(self, block_ids: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of a chain. Changes nothing."""
        found: list[int] = []
        for name in block_ids:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def insert(self, block_id: bytes, block: int) -> None:
        """Makes a held block findable. The first block of a name stays; a block has at most one name."""
        if block_id not in self._block_of and block not in self._id_of:
            self._block_of[block_id] = block
            self._id_of[block] = block_id
            if self.observer is not None:
                self.observer(block_id, True)

    def holds(self, block: int) -> bool:
        return block in self._id_of

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def set_idle(self, block: int) -> None:
        """The last holder let go; the block becomes the most recently used idle one."""
        self._idle[block] = None

    def set_held(self, block: int) -> None:
        """Somebody took the block again."""
        self._idle.pop(block, None)

    def evict(self) -> int:
        """Forgets the least recently used idle block and returns it. Raises KeyError when there is none."""
        block, _ = self._idle.popitem(last=False)
        name = self._id_of.pop(block)
        del self._block_of[name]
        if self.observer is not None:
            self.observer(name, False)
        return block

    def forget(self, block: int) -> bool:
        """Makes a block unfindable (its content turned out bad). True if it was idle, and thus is the caller's to free."""
        name = self._id_of.pop(block, None)
        if name is not None:
            del self._block_of[name]
            if self.observer is not None:
                self.observer(name, False)
        was_idle = block in self._idle
        self._idle.pop(block, None)
        return was_idle
