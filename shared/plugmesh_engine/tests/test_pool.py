"""Blocks are neither lost nor doubled, and prefixes are found exactly while their content is there."""

import collections

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from plugmesh.types import BLOCK_TOKENS, KvLayout
from plugmesh_engine.executors.torch import TorchKvMemory
from plugmesh_engine.kv.pool import NULL_BLOCK, BlockPool, OutOfBlocks
from plugmesh_engine.kv.prefix import PrefixCache

LAYOUT = KvLayout("m", "raw", "float32", 1, 1, 2, BLOCK_TOKENS, 2 * BLOCK_TOKENS * 2 * 4)


def pool_of(layout: KvLayout, num_blocks: int) -> BlockPool:
    return BlockPool(layout, num_blocks, TorchKvMemory(layout, num_blocks))


class PoolMachine(RuleBasedStateMachine):
    """Against a plain list of holdings and of names in order of use."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(LAYOUT, 6)
        self.held: list[int] = []  # one entry per reference
        self.named: dict[int, bytes] = {}  # content that must be findable
        self.idle: list[int] = []  # named and not held, least recently used first
        self.fresh = 0

    @rule()
    def take(self) -> None:
        free = 6 - len(set(self.held)) - len(self.idle)
        if not free and not self.idle:
            with pytest.raises(OutOfBlocks):
                self.pool.take()
            return
        block = self.pool.take()
        if not free:
            victim = self.idle.pop(0)
            del self.named[victim]
            assert block == victim
        assert block not in self.held and block not in self.idle and block != NULL_BLOCK
        assert not self.pool.memory.storage[block].any()
        self.pool.memory.storage[block].fill_(float(block))
        self.held.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.fresh += 1
        name = self.fresh.to_bytes(4, "little")
        self.pool.prefix.insert(name, block)
        self.named.setdefault(block, name)

    @precondition(lambda self: self.held or self.idle)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held + self.idle))
        self.pool.hold(block)
        self.held.append(block)
        if block in self.idle:
            self.idle.remove(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.pool.drop([block])
        self._dropped(block)

    def _dropped(self, block: int) -> None:
        self.held.remove(block)
        if block not in self.held and block in self.named:
            self.idle.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def own(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        if self.held.count(block) > 1 and len(set(self.held)) == 6:
            with pytest.raises(OutOfBlocks):
                self.pool.own(block)
            return
        before = self.pool.memory.storage[block].clone()
        full = self.held.count(block) > 1 and len(set(self.held)) + len(self.idle) == 6
        copy = self.pool.own(block)
        assert torch.equal(self.pool.memory.storage[copy], before)
        if copy != block:
            assert self.held.count(block) > 1
            if full:
                del self.named[self.idle.pop(0)]
            self._dropped(block)
            self.held.append(copy)
        assert self.held.count(copy) == 1

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.named)))
        self.pool.forget([block])
        del self.named[block]
        if block in self.idle:
            self.idle.remove(block)

    @invariant()
    def agrees(self) -> None:
        assert self.pool.leaked(self.held) == 0
        assert self.pool.num_used == len(set(self.held))
        assert self.pool.prefix.num_idle == len(self.idle)
        assert len(self.pool.prefix) == len(self.named)
        for block, name in self.named.items():
            assert self.pool.prefix.find(name) == block


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_leak_is_counted() -> None:
    pool = pool_of(LAYOUT, 4)
    a, b = pool.take(), pool.take()

    assert pool.leaked([a]) == 1
    assert pool.leaked([a, b]) == 0
    assert pool.leaked([a, b, b]) == 1


def test_a_chain_matches_up_to_its_first_unknown_block() -> None:
    cache = PrefixCache()
    cache.insert(b"a", 1)
    cache.insert(b"c", 3)

    assert cache.match([b"a", b"b", b"c"]) == [1]


def test_bytes_survive_export_and_import() -> None:
    rng = np.random.default_rng(0)
    layout = KvLayout("m", "raw", "bfloat16", 2, 3, 4, BLOCK_TOKENS, 2 * 2 * BLOCK_TOKENS * 3 * 4 * 2)
    here, there = pool_of(layout, 2), pool_of(layout, 2)
    a, b = here.take(), there.take()
    here.memory.storage[a] = torch.from_numpy(rng.standard_normal(here.memory.storage[a].shape))

    there.write(b, bytes(here.read(a)))

    assert len(here.read(a)) == layout.block_bytes
    assert torch.equal(here.memory.storage[a], there.memory.storage[b])


def test_rows_beyond_an_imported_tail_are_zero() -> None:
    pool = pool_of(LAYOUT, 2)
    block = pool.take()
    garbage = np.full(LAYOUT.block_bytes // 4, np.nan, dtype=np.float32)
    garbage.reshape(1, 2, BLOCK_TOKENS, 2)[:, :, :5] = 1.0

    pool.write(block, garbage.tobytes(), 5)

    assert (pool.memory.storage[block][:, :, :5] == 1).all()
    assert (pool.memory.storage[block][:, :, 5:] == 0).all()


def test_idle_blocks_go_tail_first() -> None:
    pool = pool_of(LAYOUT, 3)
    blocks = [pool.take() for _ in range(3)]
    for i, b in enumerate(blocks):
        pool.prefix.insert(bytes([i]), b)
    pool.drop(reversed(blocks))
    pool.take()

    assert pool.prefix.match([b"\0", b"\1", b"\2"]) == blocks[:2]


def test_blocks_are_counted_by_reference() -> None:
    pool = pool_of(LAYOUT, 3)
    block = pool.take()
    pool.hold(block)

    assert collections.Counter(pool.refs.tolist()) == {0: 3, 2: 1}
