"""A pool of processes that compile and validate, each of them killed when it takes too long."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Callable
from typing import Any

import structlog

from plugmesh.config import MeshConfig
from plugmesh.errors import GrammarTimeout, LimitExceeded, Overloaded, Unavailable
from plugmesh.grammar.seams import GrammarVocabulary
from plugmesh.grammar.spec import GrammarSpec
from plugmesh_grammar import protocol
from plugmesh_grammar.config import Settings
from plugmesh_grammar.process import Worker, WorkerDied

log = structlog.get_logger()

_MAX_BROKEN = 2  # ways to compile a grammar that may end a process before the grammar is given up on


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """What an engine made of a grammar."""

    engine: str
    engine_version: str
    compile_ms: float
    unenforced: tuple[tuple[str, str, str], ...]
    data: bytes


class WorkerPool:
    """At most `compile_workers` processes. One of them stays; the others end when they were idle for `idle_worker_s`.

    Args:
        on_load: Called when `num_waiting` or `num_running` has changed.
    """

    def __init__(self, config: MeshConfig, settings: Settings, *, on_load: Callable[[], None] = lambda: None) -> None:
        self._config = config
        self._settings = settings
        self._free = asyncio.Semaphore(settings.compile_workers)
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._is_closed = False
        self._reaper: asyncio.Task[None] | None = None
        self._refills: set[asyncio.Task[None]] = set()
        self._on_load = on_load
        self.num_waiting = 0
        self.num_running = 0
        self.num_killed = 0

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._all]

    async def start(self, vocabulary: GrammarVocabulary, packed: bytes) -> None:
        """Starts the first process, so that the first grammar need not wait for it."""
        async with self._free:
            worker = await self._take(vocabulary, packed)
            self._put_back(worker)
        self._reaper = asyncio.create_task(self._reap(), name="grammar-reap")

    async def stop(self) -> None:
        """Ends all processes; calls under way fail with Unavailable."""
        self._is_closed = True
        tasks = [*self._refills, *([self._reaper] if self._reaper is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in self._all))
        self._all.clear()
        self._idle.clear()

    async def compile(self, spec: GrammarSpec, vocabulary: GrammarVocabulary, packed: bytes) -> Compiled:
        """Front end and engine, in a process.

        Raises:
            UnsupportedGrammar, LimitExceeded: What they say of the grammar; or it needs more memory than allowed.
            GrammarTimeout: It takes longer than `compile_timeout_s`.
            Overloaded: Too many wait.
            Unavailable: No process starts, or no engine is there.
        """
        settings = self._settings
        fields = {
            "op": "compile", "hash": vocabulary.tokenizer_hash, "spec": dataclasses.asdict(spec), "max_compiled_bytes": settings.max_compiled_bytes,
            "limits": {
                "max_bytes": settings.max_schema_bytes, "max_depth": settings.max_schema_depth,
                "max_enum_values": settings.max_enum_values, "max_regex_chars": settings.max_regex_chars,
            },
        }
        reply, data = await self._ask(fields, b"", vocabulary, packed)
        return Compiled(
            reply["engine"], reply["version"], reply["compile_ms"], tuple((u["keyword"], u["path"], u["reason"]) for u in reply["unenforced"]), data)

    async def validate(self, compiled: Compiled, text: bytes, vocabulary: GrammarVocabulary, packed: bytes) -> dict[str, Any]:
        """{"num_valid", "is_prefix", "is_valid"}; raises as `compile`."""
        fields = {"op": "validate", "hash": vocabulary.tokenizer_hash, "engine": compiled.engine, "num_text": len(text)}
        return (await self._ask(fields, text + compiled.data, vocabulary, packed))[0]

    async def _ask(self, fields: dict[str, Any], data: bytes, vocabulary: GrammarVocabulary, packed: bytes) -> tuple[dict[str, Any], bytes]:
        if self.num_waiting >= self._settings.max_waiting:
            raise Overloaded(f"{self.num_waiting} grammars wait to be compiled", retry_after_s=1)
        self._count(waiting=1)
        try:
            await self._free.acquire()
        finally:
            self._count(waiting=-1)
        self._count(running=1)
        try:
            was_killed, num_broken = False, 0
            while True:
                try:
                    return await self._ask_once({**fields, "num_broken": num_broken}, data, vocabulary, packed)
                except WorkerDied as e:
                    if self._is_closed:
                        raise Unavailable("the grammar service is stopping", retry_after_s=1) from e
                    log.warning("grammar.worker_died", signal=e.number, op=fields["op"])
                    if e.number == signal.SIGALRM:
                        raise self._too_long() from e
                    if e.number == signal.SIGKILL and not was_killed:
                        was_killed = True  # by somebody else perhaps, then the grammar is not to blame; twice is no accident
                    elif e.number != signal.SIGKILL and fields["op"] == "compile" and num_broken < _MAX_BROKEN:
                        num_broken += 1  # another engine may do better
                    else:
                        raise LimitExceeded("the grammar needs more memory than allowed, or breaks its engine", param="grammar") from e
        finally:
            self._free.release()
            self._count(running=-1)

    def _count(self, *, waiting: int = 0, running: int = 0) -> None:
        self.num_waiting += waiting
        self.num_running += running
        self._on_load()

    async def _ask_once(self, fields: dict[str, Any], data: bytes, vocabulary: GrammarVocabulary, packed: bytes) -> tuple[dict[str, Any], bytes]:
        worker = await self._take(vocabulary, packed)
        reply: dict[str, Any] | None = None
        try:
            async with asyncio.timeout(self._settings.compile_timeout_s):
                reply, answer = await worker.ask(fields, data)
        except TimeoutError:
            raise self._too_long() from None
        finally:
            # After an answer the process is as before; without one (time, death, cancelled caller) it is unusable.
            if reply is not None and not self._is_closed:
                self._put_back(worker)
            else:
                self.num_killed += 1
                self._all.discard(worker)
                await worker.kill()
                if not self._is_closed:
                    task = asyncio.create_task(self._refill(vocabulary, packed), name="grammar-refill")
                    self._refills.add(task)
                    task.add_done_callback(self._refills.discard)
        if "error" in reply:
            raise protocol.error_of(reply["error"])
        return reply, answer

    def _too_long(self) -> GrammarTimeout:
        return GrammarTimeout(f"the grammar did not compile within {self._settings.compile_timeout_s:g} s; it may be valid", param="grammar")

    async def _take(self, vocabulary: GrammarVocabulary, packed: bytes, *, fresh: bool = False) -> Worker:
        """An idle process, or a new one (always a new one if `fresh`); one that dies while it learns the vocabulary is replaced once."""
        for is_last in (False, True):
            if self._is_closed:
                raise Unavailable("the grammar service is stopping", retry_after_s=1)
            worker = self._idle.pop() if self._idle and not fresh else None
            if worker is not None and not worker.is_alive:
                self._all.discard(worker)
                worker = None
            if worker is None:
                worker = await Worker.start(
                    self._config, memory_bytes=self._settings.compile_memory_bytes, timeout_s=self._settings.compile_timeout_s + 1.0)
                self._all.add(worker)
            try:
                await worker.teach(vocabulary, packed)
                return worker
            except BaseException as e:
                self._all.discard(worker)
                await worker.kill()
                if not isinstance(e, WorkerDied):
                    raise
                if is_last:
                    raise Unavailable("the grammar process does not start", retry_after_s=5) from e
        raise AssertionError("unreachable")

    async def _refill(self, vocabulary: GrammarVocabulary, packed: bytes) -> None:
        """Another process for one that was killed, before somebody must wait for its start."""
        async with self._free:
            if len(self._all) < self._settings.compile_workers and not self._is_closed:
                try:
                    self._put_back(await self._take(vocabulary, packed, fresh=True))
                except Unavailable as e:
                    log.warning("grammar.refill_failed", error=e.message)

    def _put_back(self, worker: Worker) -> None:
        worker.idle_since = asyncio.get_running_loop().time()
        self._idle.append(worker)

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(min(5.0, self._settings.idle_worker_s))
            now = asyncio.get_running_loop().time()
            # The longest idle one is at the front; the last one stays.
            while len(self._all) > 1 and self._idle and now - self._idle[0].idle_since > self._settings.idle_worker_s:
                worker = self._idle.pop(0)
                self._all.discard(worker)
                await worker.kill()
