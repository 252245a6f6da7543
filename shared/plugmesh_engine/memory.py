"""Who gets which blocks, and when: admission, room for the next tokens, preemption, forks, stage one of filtered prompts."""

from __future__ import annotations

import abc
import bisect

import structlog

from plugmesh.errors import Overloaded, PlugmeshError
from plugmesh.types import BLOCK_TOKENS
from plugmesh_engine.config import EngineConfig
from plugmesh_engine.filtering import Filtering
from plugmesh_engine.forks import Holds
from plugmesh_engine.kv.pool import BlockPool, OutOfBlocks
from plugmesh_engine.kv.view import PoolView
from plugmesh_engine.requests import StepOutput
from plugmesh_engine.sequence import Group, State
from plugmesh_engine.sequence import Sequence as Seq

log = structlog.get_logger()


class Memory(abc.ABC):
    """The part of `Engine` that moves sequences between waiting and running and blocks between them. Not of use alone: the engine sets what it reads."""

    config: EngineConfig
    _pool: BlockPool
    _view: PoolView
    _holds: Holds
    _filtering: Filtering | None
    _layout_key: bytes
    _retained: dict[str, list[int]]
    _waiting: list[Seq]
    _running: list[Seq]
    _out: StepOutput
    _prefix_queries: int
    _prefix_hits: int
    _num_imported: int
    _num_preemptions: int

    @property
    @abc.abstractmethod
    def num_running(self) -> int:
        """See `Engine`."""

    @abc.abstractmethod
    def _fail(self, g: Group, error: PlugmeshError) -> None:
        """See `Engine`."""

    def _offered(self) -> tuple[Seq, ...]:
        """Sequences that may be admitted: nobody overtakes a prompt whose stage one waits for memory."""
        job = self._filtering.wanting if self._filtering else None
        return tuple(s for s in self._waiting if job is None or s.order < job.order)

    def _advance_filtering(self, filtering: Filtering) -> None:
        """Computes a chunk of stage one, for which the oldest prompt gets blocks once those before it are admitted and running sequences leave enough."""
        job = filtering.wanting
        if job is not None and not any(s.order < job.order for s in self._waiting):
            needed = job.num_blocks + sum(self._view.blocks_for(s, s.num_pending) for s in self._running) + (self._view.watermark if self._running else 0)
            while needed > self._pool.num_free and self._shed():
                pass
            if needed <= self._pool.num_free:
                filtering.begin(job)
        settled = filtering.advance()
        if settled is not None:
            self._enter(settled)

    def _admit(self, s: Seq) -> bool:
        """Gives a waiting sequence what the cache holds and the KV it brings, and lets it run. False when slots or blocks are short."""
        if sum(r.num_slots for r in self._running) + s.num_slots > self.config.max_num_sequences:
            return False
        matched, limit = self._view.matched(s), self._view.limit(s)
        for block in matched:
            self._pool.hold(block)
        blocks, found = list(matched), len(matched) * BLOCK_TOKENS
        inherited, num_inherited = self._view.inherited(s)
        if num_inherited > found:
            for block in inherited:
                self._pool.hold(block)
            self._pool.drop(reversed(matched))
            matched, blocks, found = [], inherited, num_inherited
        try:
            for source in s.group.kv[len(matched) :]:
                block = self._pool.take(zero=False)
                self._pool.write(block, source.data, source.num_tokens)
                blocks.append(block)
                found += source.num_tokens
        except OutOfBlocks:
            self._pool.drop(reversed(blocks))
            return False
        found = min(found, limit)
        self._prefix_queries += limit
        self._prefix_hits += len(matched) * BLOCK_TOKENS
        self._num_imported += max(0, found - len(matched) * BLOCK_TOKENS) if s.group.kv else 0
        if s.group.num_cached_tokens < 0:
            s.group.num_cached_tokens = min(found, s.group.num_prompt)
        s.blocks, s.num_computed = blocks, found
        s.num_registered = len(matched)
        self._drop_imports(s.group)
        self._drop_inherited(s.group)
        self._waiting.remove(s)
        s.state = State.RUNNING
        bisect.insort(self._running, s, key=lambda r: r.order)
        if s.group.cache:
            s.register(self._pool.prefix, self._layout_key)
        if not s.group.forked and s.num_computed >= s.group.num_shared:
            self._fork(s)
        return True

    def _make_room(self, s: Seq, num_tokens: int) -> bool:
        """Blocks for the next tokens, by preempting the newest if need be. False when the sequence itself had to go."""
        while s.state is State.RUNNING:
            try:
                if self._view.writes_shared_block(s):
                    i = s.num_computed // BLOCK_TOKENS
                    s.blocks[i] = self._pool.own(s.blocks[i])
                while len(s.blocks) * BLOCK_TOKENS < s.num_computed + num_tokens:
                    s.blocks.append(self._pool.take())
                return True
            except OutOfBlocks:
                if self._shed() or (self._filtering is not None and self._filtering.give_way()):
                    continue
                if len(self._running) == 1 and not self._retained:
                    self._fail(s.group, Overloaded(f"the KV pool of {self._pool.num_total} blocks is too small to go on with this request"))
                else:
                    self._preempt(self._running[-1])
        return False

    def _make_way(self) -> None:
        """Nobody waits for memory that is only kept for later: holds shrink until the first waiting sequence fits."""
        if not self._waiting or self._waiting[0].num_slots + self.num_running > self.config.max_num_sequences:
            return
        first = self._waiting[0]
        while self._can_shed(first):
            needed = self._view.blocks_for(first, self._view.pending(first)) + sum(self._view.blocks_for(s, s.num_pending) for s in self._running)
            if needed + self._view.watermark <= self._pool.num_free:
                return
            self._shed(first)

    def _can_shed(self, keep: Seq | None = None) -> bool:
        return any(True for _ in self._holds.blocks()) or any(s.group.inherited for s in self._waiting if s is not keep)

    def _shed(self, keep: Seq | None = None) -> bool:
        """Gives back blocks that would only save work later: of the oldest hold, else of the last fork that waits, but not of `keep`. False when there are none."""
        if self._holds.shed():
            return True
        victim = next((s for s in reversed(self._waiting) if s.group.inherited and s is not keep), None)
        if victim is not None:
            self._drop_inherited(victim.group)
        return victim is not None

    def _preempt(self, s: Seq) -> None:
        """Takes a sequence's blocks; it waits, and recomputes what the prefix cache has lost by then."""
        self._num_preemptions += 1
        self._running.remove(s)
        self._drop_blocks(s)
        self._wait(s)
        log.debug("engine.preempted", request_id=s.request_id, sequence=s.index)

    def _enter(self, g: Group) -> None:
        """The request's prompt is settled: its first sequence waits to compute it."""
        alive = g.alive
        g.forked = len(alive) == 1
        self._wait(alive[0])

    def _wait(self, s: Seq) -> None:
        s.state = State.WAITING
        bisect.insort(self._waiting, s, key=lambda w: w.order)

    def _fork(self, first: Seq) -> None:
        """The prompt is complete: every sibling gets references to its blocks. The partial last one is copied by whoever writes first."""
        first.group.forked = True
        for s in first.group.alive:
            if s is first:
                continue
            s.blocks = list(first.blocks)
            for block in s.blocks:
                self._pool.hold(block)
            s.num_computed = first.num_computed
            s.num_registered = first.num_registered
            s.block_ids = first.block_ids[: s.num_computed // BLOCK_TOKENS]
            s.state = State.RUNNING
            bisect.insort(self._running, s, key=lambda r: r.order)

    def _drop_blocks(self, s: Seq) -> None:
        self._pool.drop(reversed(s.blocks))
        s.blocks, s.num_computed, s.num_registered = [], 0, 0

    def _drop_inherited(self, g: Group) -> None:
        if g.inherited:
            self._pool.drop(reversed(g.inherited))
            g.inherited, g.num_inherited = [], 0

    def _drop_imports(self, g: Group) -> None:
        if g.kv:
            g.kv = ()
            self._out.kv_imported.append(g.request.request_id)
