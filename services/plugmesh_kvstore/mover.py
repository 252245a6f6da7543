"""Moves blocks between arena and disk in the background, without the store ever waiting."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import sqlalchemy.exc
import structlog

from plugmesh.tasks import end
from plugmesh_kvstore.blocks import Block
from plugmesh_kvstore.disk import DiskFiles
from plugmesh_kvstore.disk_index import Row
from plugmesh_kvstore.store import BlockStore

log = structlog.get_logger()

T = TypeVar("T")

_IDLE_S = 1.0
_RETRY_S = 2.0


class Mover:
    """One worker thread in front of `DiskFiles`, and the tasks that feed it.

    Its queue is bounded by construction: at most one batch of writes, and one read per block being loaded, each of
    which holds an arena slot.

    Args:
        files: None switches the disk tier off: every load fails and nothing is spilled.
        executor: The thread that made `files`.
        spill_above: Share of the arena above which cold blocks are copied.
    """

    def __init__(
        self,
        store: BlockStore,
        files: DiskFiles | None,
        executor: concurrent.futures.ThreadPoolExecutor,
        *,
        spill_above: float,
        spill_batch: int,
    ) -> None:
        self._store = store
        self._files = files
        self._executor = executor
        self._above_bytes = spill_above * store.arena_bytes
        self._batch = spill_batch
        self._loads: dict[Block, asyncio.Task[bool]] = {}
        self._wake = asyncio.Event()
        self._spilling = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._files is not None:
            self._task = asyncio.create_task(self._run(), name="kvstore.spill")

    def wake(self) -> None:
        """Something was stored or removed; there may be work."""
        self._wake.set()

    async def load(self, block: Block) -> bool:
        """Brings a block of the disk into the arena; True when it is there. The caller holds the block.

        Concurrent callers share one read. A cancelled caller does not stop it.
        """
        if block.slot is not None:
            return True
        task = self._loads.get(block)
        if task is None:
            task = asyncio.create_task(self._load(block), name="kvstore.load")
            self._loads[block] = task
            task.add_done_callback(lambda _: self._loads.pop(block, None))
        return await asyncio.shield(task)

    async def _load(self, block: Block) -> bool:
        if self._files is None or block.place is None:
            return False
        slot = self._store.begin_load(block)
        if slot is None:
            return False
        ok = False
        try:
            arena = block.partition.arena
            assert arena is not None
            with arena.view(slot, block.num_bytes) as view:
                ok = await self._call(functools.partial(self._files.read, block.place, view, block.checksum))
        except OSError as e:
            log.warning("kvstore.disk_read_failed", error=type(e).__name__)
        finally:
            self._store.end_load(block, slot, ok=ok)
            self.wake()
        return ok

    async def spill_once(self, above_bytes: float) -> int:
        """Copies one batch of cold blocks to disk and makes the index true; returns how many were copied."""
        assert self._files is not None and self._store.disk is not None
        async with self._spilling:
            chosen = self._store.begin_spill(self._batch, above_bytes)
            changes = self._store.disk.take_changes()
            if not chosen and not changes:
                return 0
            layouts = {b.partition.key: b.partition.layout for b in chosen}
            rows = [_row(b) for b in chosen]
            views = [self._store.view(b) for b in chosen]
            written: Sequence[bool] = [False] * len(chosen)
            try:
                await self._call(functools.partial(self._files.apply, changes, list(layouts.values())))
                written = await self._call(functools.partial(self._files.write, rows, views))
            finally:
                for view in views:
                    view.release()
                for block, ok in zip(chosen, written, strict=True):
                    self._store.end_spill(block, ok=ok)
            return sum(written)

    async def clear(self) -> int:
        """`BlockStore.clear`, not in the middle of a batch."""
        async with self._spilling:
            num = self._store.clear()
        self.wake()
        return num

    async def _run(self) -> None:
        while True:
            try:
                while await self.spill_once(self._above_bytes):
                    pass
            except (OSError, sqlalchemy.exc.SQLAlchemyError) as e:
                log.warning("kvstore.spill_failed", error=type(e).__name__)
                await asyncio.sleep(_RETRY_S)
            try:
                async with asyncio.timeout(_IDLE_S):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    async def stop(self, flush_s: float) -> None:
        """Ends the background task, then copies what only the arena has, for at most `flush_s`."""
        if self._task is not None:
            # Cancelling would leave a batch to a thread that outlives its views: wait for the batch to end.
            async with self._spilling:
                self._task.cancel()
            await end(self._task)
            self._task = None
        if self._loads:
            await asyncio.wait(list(self._loads.values()), timeout=5.0)
        if self._files is None:
            return
        deadline = asyncio.get_running_loop().time() + flush_s
        try:
            while asyncio.get_running_loop().time() < deadline and await self.spill_once(-1.0):
                pass
            await self._call(functools.partial(self._files.apply, self._store.disk.take_changes()))  # type: ignore[union-attr]
        except (OSError, sqlalchemy.exc.SQLAlchemyError) as e:
            log.warning("kvstore.flush_failed", error=type(e).__name__)
        await self._call(self._files.close)

    async def _call(self, work: Callable[[], T]) -> T:
        """Runs `work` on the disk thread. When cancelled it still waits for the thread: views must outlive it."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise


def _row(block: Block) -> Row:
    assert block.place is not None
    return Row(
        block.partition.key, block.block_id, block.parent_id, block.num_tokens, block.num_bytes, block.checksum, block.place
    )
