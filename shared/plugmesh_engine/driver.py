"""Runs an engine on a thread of its own and speaks to it from an event loop.

The engine belongs to the thread; everything else reaches it through commands that run between steps. What a step
produced comes back as one call into the event loop per step, so cost grows with steps, not tokens.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from plugmesh.errors import InternalError
from plugmesh.mesh.scheduling import shorten_slice
from plugmesh_engine.engine import BlockReady, Engine, EngineRequest, StepOutput

log = structlog.get_logger()
R = TypeVar("R")

SWITCH_S = 0.0005  # see EngineDriver.start
WAKE_S = 1.0  # the idle thread looks for a stop request this often, should a wake-up ever be lost


@dataclass(frozen=True, slots=True)
class ExportedBlock:
    """One finished block with its bytes, in the order of `KvLayout`; the bytes are a copy."""

    ready: BlockReady
    data: bytes


class EngineDriver:
    """The thread around one engine.

    Args:
        engine: Not to be touched by anybody else after `start`.
        on_step: Called in the event loop with (output of a step, blocks exported by it).
        on_failure: Called in the event loop when `step` itself raised; the driver goes on with the next step
            after the engine dropped all its requests.
        export: Copy the bytes of every `BlockReady` out, on the engine's thread, before the next step.
    """

    def __init__(
        self,
        engine: Engine,
        on_step: Callable[[StepOutput, list[ExportedBlock]], None],
        on_failure: Callable[[BaseException], None],
        *,
        export: bool = False,
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_failure = on_failure
        self._export = export
        self._commands: collections.deque[Callable[[Engine], None]] = collections.deque()
        self._wake = threading.Event()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread. Call from the event loop that is to receive the callbacks.

        Shortens the interpreter's switch interval for the whole process: after native code, which runs without the lock, the
        engine's thread waits for so long when the event loop is busy at that moment, and its cores idle meanwhile.
        """
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after the step in progress; requests still alive are forgotten."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, timeout_s)

    async def submit(self, request: EngineRequest) -> None:
        """Adds a request before the next step. Raises what `Engine.add` raises."""
        await self.call(lambda engine: engine.add(request))

    def cancel(self, request_id: str, sequence: int | None = None, *, then: Callable[[], None] | None = None) -> None:
        """Frees a request or one of its sequences before the next step; a finished prefill-only one lets go of its blocks.

        Unknown ids are ignored. `then` is called in the event loop afterwards: from then on the engine reads no buffer of
        `EngineRequest.kv`, so that they can be given back.
        """

        def command(engine: Engine) -> None:
            engine.cancel(request_id, sequence)
            if then is not None:
                self._deliver(then)

        self._post(command)

    async def call(self, work: Callable[[Engine], R]) -> R:
        """Runs `work` on the engine's thread between two steps and returns its result."""
        result: concurrent.futures.Future[R] = concurrent.futures.Future()

        def command(engine: Engine) -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(work(engine))
            except BaseException as e:
                result.set_exception(e)

        self._post(command)
        return await asyncio.wrap_future(result)

    def cached_prefix(self, token_ids: Sequence[int]) -> int:
        """`Engine.cached_prefix` at once, from any thread: it only looks names up, and a step may make the answer old at any time anyway."""
        return self._engine.cached_prefix(token_ids)

    @property
    def num_running(self) -> int:
        """Sequences that run, as of now, from any thread."""
        return self._engine.num_running

    def _post(self, command: Callable[[Engine], Any]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _run(self) -> None:
        shorten_slice(0)  # whoever started it may have a short one
        engine = self._engine
        while not self._stopping:
            self._wake.clear()
            while self._commands:
                self._commands.popleft()(engine)
            if not engine.has_work():
                self._wake.wait(WAKE_S)
                continue
            try:
                output = engine.step()
                exported = (
                    [ExportedBlock(b, bytes(engine.export_block(b.request_id, b.block_index))) for b in output.blocks_ready]
                    if self._export
                    else []
                )
            except Exception as e:
                log.exception("engine.step_failed")
                self._deliver(self._on_failure, InternalError(f"the engine failed: {type(e).__name__}"))
                continue
            if output.tokens or output.blocks_ready or output.kv_imported or output.hidden:
                self._deliver(self._on_step, output, exported)

    def _deliver(self, callback: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(callback, *args)
