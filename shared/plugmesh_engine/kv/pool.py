"""Who holds which block of the KV memory: reference counts over blocks of 16 tokens."""

from __future__ import annotations

import array
from collections.abc import Iterable

import numpy as np

from plugmesh.types import BLOCK_TOKENS, KvLayout
from plugmesh_engine.kv.prefix import PrefixCache
from plugmesh_engine.seams import KvMemory

NULL_BLOCK = 0  # pads block tables; always zero, never handed out


class OutOfBlocks(Exception):
    """No block is free and none can be evicted: a flow signal, upon which the engine preempts."""


class BlockPool:
    """Counts references to the blocks of a memory.

    A block is free (no content), idle (content findable through `prefix`, nobody holds it) or held (`refs` > 0). `take` hands out zeroed
    blocks, so that no row that was never written can reach an attention sum (0 * NaN is NaN) and exported tails are zero beyond their tokens.

    Args:
        num_blocks: Blocks that can be handed out, 1 to num_blocks of `memory`.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, memory: KvMemory) -> None:
        self.layout = layout
        self.num_total = num_blocks
        self.memory = memory
        self.prefix = PrefixCache()
        self.refs = array.array("i", bytes(4 * (num_blocks + 1)))  # three times as fast as numpy to index one by one
        self._free = list(range(num_blocks, 0, -1))  # a stack: recently used memory first

    @property
    def num_free(self) -> int:
        """Blocks that `take` can hand out, idle ones included."""
        return len(self._free) + self.prefix.num_idle

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_total - self.num_free

    def take(self, *, zero: bool = True) -> int:
        """A block with one reference; evicts an idle one when nothing is free. Raises OutOfBlocks."""
        if self._free:
            block = self._free.pop()
        elif self.prefix.num_idle:
            block = self.prefix.evict()
        else:
            raise OutOfBlocks
        self.refs[block] = 1
        if zero:
            self.memory.zero(block)
        return block

    def hold(self, block: int) -> None:
        """One more reference to a held or idle block."""
        if self.refs[block] == 0:
            assert self.prefix.is_idle(block), f"block {block} has no content"
            self.prefix.set_held(block)
        self.refs[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """One reference less to each. Give a sequence's blocks last first, so that the ends of prefixes are evicted before their heads."""
        for block in blocks:
            assert self.refs[block] > 0, f"block {block} dropped once too often"
            self.refs[block] -= 1
            if self.refs[block] == 0:
                if self.prefix.holds(block):
                    self.prefix.set_idle(block)
                else:
                    self._free.append(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes blocks unfindable, whoever holds them."""
        for block in blocks:
            if self.prefix.forget(block):
                self._free.append(block)

    def own(self, block: int) -> int:
        """A block with the same content that only the caller holds: itself, or a copy in exchange for one reference. Raises OutOfBlocks."""
        if self.refs[block] == 1:
            return block
        copy = self.take(zero=False)
        self.memory.copy(block, copy)
        self.drop([block])
        return copy

    def read(self, block: int) -> memoryview:
        """The block's bytes in `KvLayout` order; on a CPU the memory itself, valid while the block is held."""
        return self.memory.read(block)

    def write(self, block: int, data: bytes | bytearray | memoryview, num_tokens: int = BLOCK_TOKENS) -> None:
        """Fills a block from bytes in `KvLayout` order; rows from `num_tokens` on become zero."""
        self.memory.write(block, data, num_tokens)

    def truncate(self, block: int, num_tokens: int) -> None:
        """Makes the rows from `num_tokens` on zero again."""
        self.memory.write(block, bytes(self.memory.read(block)), num_tokens)

    def leaked(self, held: Iterable[int]) -> int:
        """Blocks whose reference count differs from how often they occur in `held`."""
        wanted = np.bincount(np.fromiter(held, dtype=np.int64), minlength=self.num_total + 1)
        return int((wanted != np.frombuffer(self.refs, dtype=np.int32)).sum())
