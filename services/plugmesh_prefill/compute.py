"""One prefill job: match the prefix, compute chunk by chunk, store finished blocks while the next chunk runs."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import structlog

from plugmesh import limits
from plugmesh.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    PlugmeshError,
    Unavailable,
)
from plugmesh.host import PluginHost
from plugmesh.kv import BlockRef
from plugmesh.kv.client import KvClient
from plugmesh.kv.stores import KvStores
from plugmesh.records import HandOver, KvHandOverRecord
from plugmesh.tracing import TRACING
from plugmesh.types import BLOCK_TOKENS, TokenInfo, block_chain
from plugmesh.wire import layout_from_pb, sampling_from_pb, token_to_pb
from plugmesh_engine import Engine, EngineRequest, KvSource, StepOutput
from plugmesh_engine.driver import EngineDriver, ExportedBlock
from plugmesh_proto.v1 import prefill_pb2 as pb

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Step:
    """What one step did for a job."""

    blocks: list[ExportedBlock]
    tokens: list[TokenInfo]
    done: bool
    error: PlugmeshError | None


@dataclass(slots=True)
class _Job:
    request_id: str
    steps: asyncio.Queue[_Step] = field(default_factory=lambda: asyncio.Queue(maxsize=65536))
    pins: list[BlockRef] = field(default_factory=list)


class PrefillRunner:
    """Computes the jobs of one prefill instance; lives in its event loop."""

    def __init__(self, engine: Engine, stores: KvStores, plugins: PluginHost, hand_over: KvHandOverRecord, *, instance: str, max_jobs: int) -> None:
        self.driver = EngineDriver(engine, self._on_step, self._on_engine_failure, export=True)
        self.layout = engine.layout
        self.num_done = 0
        self.num_stored_bytes = 0
        self._stores = stores
        self._plugins = plugins
        self._hand_over = hand_over
        self._instance = instance
        self._max_jobs = max_jobs
        self._vocab_size = engine.model.config.vocab_size
        self._jobs: dict[str, _Job] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        return len(self._jobs)

    async def wait_idle(self, timeout_s: float) -> None:
        """Returns when no job runs. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            await self._idle.wait()

    async def run(self, job: pb.PrefillJob) -> AsyncGenerator[pb.PrefillEvent, None]:
        """Computes one job; closing the iterator cancels it and frees its blocks.

        Yields:
            Progress after every chunk whose blocks are stored; the last event has `done` and the first tokens.

        Raises:
            InvalidRequest: Empty prompt, ids outside the vocabulary, bad sampling parameters.
            FailedPrecondition: The job's KV layout (model version, dtype, shape) is not this instance's.
            DeadlineExceeded: It came too late.
            AlreadyExists: A job with this id runs here.
            Unavailable: More than `max_jobs` run, or the kvstore took no block.
        """
        sampling = self._check(job)
        ids = tuple(job.token_ids)
        started = time.monotonic()
        hand_over: HandOver = self._plugins.guard(self._hand_over.name, self._hand_over.plan, len(ids), self.layout)
        store = job.store_instance or self._stores.nearest()
        if not store:
            raise Unavailable("no kvstore lives", retry_after_s=1)
        kv = self._stores.client(store)
        state = _Job(job.job_id)
        self._jobs[job.job_id] = state
        self._idle.clear()
        span = TRACING.start("prefill.job", job.trace.get("traceparent", ""), request_id=job.request_id, num_prompt_tokens=len(ids))
        held: list[ExportedBlock] = []
        first: list[TokenInfo] = []
        num_done = 0
        try:
            # 1. What is in the store already. At least the last token is computed: its logits are the first token.
            chain = block_chain(self.layout.key(), ids[:-1])
            state.pins = await kv.match(chain, pin=True) if chain else []
            sources = tuple(KvSource(ref.block_id, BLOCK_TOKENS, ref.data) for ref in state.pins)
            num_cached = num_done = len(sources) * BLOCK_TOKENS
            # 2. Chunks.
            await self.driver.submit(
                EngineRequest(
                    request_id=job.job_id, token_ids=ids, sampling=dataclasses.replace(sampling, max_tokens=max(1, sampling.max_tokens)),
                    prefill_only=True, kv=sources,
                )
            )
            is_last = False
            while not is_last:
                step = await state.steps.get()
                while not state.steps.empty() and not step.done and step.error is None:  # catch up: store several chunks at once
                    more = state.steps.get_nowait()
                    step = _Step(step.blocks + more.blocks, step.tokens + more.tokens, more.done, more.error)
                if step.error is not None:
                    raise step.error
                is_last = step.done
                first.extend(step.tokens)
                held.extend(step.blocks)
                if not held or not (hand_over.overlap or is_last):
                    continue
                # 3. Finished blocks go to the store while the engine computes the next chunk.
                blocks, held = held, []
                await self._store(blocks, kv)
                num_done = max(num_done, max(b.ready.block_index * BLOCK_TOKENS + b.ready.num_tokens for b in blocks))
                yield pb.PrefillEvent(
                    job_id=job.job_id, num_tokens_done=num_done, block_ids=[b.ready.block_id for b in blocks], done=is_last,
                    first_tokens=[token_to_pb(t) for t in first] if is_last else [], num_cached_tokens=num_cached,
                    store_instance=store, prefill_instance=self._instance,
                    compute_ms=1000 * (time.monotonic() - started),
                )
            self.num_done += 1
        finally:
            pins = state.pins
            self.driver.cancel(job.job_id, then=lambda: kv.release_nowait(pins))
            del self._jobs[job.job_id]
            if not self._jobs:
                self._idle.set()
            span.end(error="" if first else "incomplete", num_tokens_done=num_done)
            log.info(
                "prefill.finished", request_id=job.request_id, num_tokens=len(ids), num_tokens_done=num_done,
                total_ms=round(1000 * (time.monotonic() - started), 1),
            )

    def _check(self, job: pb.PrefillJob):  # type: ignore[no-untyped-def]
        if not job.job_id or not job.token_ids:
            raise InvalidRequest("a prefill job needs an id and a prompt", param="token_ids")
        if min(job.token_ids) < 0 or max(job.token_ids) >= self._vocab_size:
            raise InvalidRequest(f"token ids must lie in 0..{self._vocab_size - 1}", param="token_ids")
        if layout_from_pb(job.layout) != self.layout:
            raise FailedPrecondition("the job's KV layout is not this instance's", wanted=job.layout.dtype, here=self.layout.dtype)
        if job.deadline_unix_s and time.time() > job.deadline_unix_s:
            raise DeadlineExceeded("the job was taken after its deadline")
        if job.job_id in self._jobs:
            raise AlreadyExists(f"job {job.job_id} runs here")
        if len(self._jobs) >= self._max_jobs:
            raise Unavailable(f"{len(self._jobs)} prefill jobs run here", retry_after_s=0.5)
        sampling = sampling_from_pb(job.sampling)
        limits.check_sampling(sampling, vocab_size=self._vocab_size)
        return sampling

    async def _store(self, blocks: list[ExportedBlock], kv: KvClient) -> None:
        items = [(b.ready.block_id, b.ready.parent_id, b.ready.num_tokens, b.data) for b in blocks]
        num_stored = await kv.put(items)
        if num_stored < len(items):
            raise Unavailable(f"the kvstore took {num_stored} of {len(items)} blocks", retry_after_s=1)
        self.num_stored_bytes += sum(len(b.data) for b in blocks)

    def _on_step(self, output: StepOutput, exported: list[ExportedBlock]) -> None:
        blocks: dict[str, list[ExportedBlock]] = {}
        tokens: dict[str, list[TokenInfo]] = {}
        done: set[str] = set()
        errors: dict[str, PlugmeshError] = {}
        for block in exported:
            blocks.setdefault(block.ready.request_id, []).append(block)
        for event in output.tokens:
            tokens.setdefault(event.request_id, []).extend(event.tokens)
            if event.error is not None:
                errors[event.request_id] = event.error
            if event.request_done:
                done.add(event.request_id)
        for request_id in {*blocks, *tokens, *done}:
            job = self._jobs.get(request_id)
            if job is not None:
                step = _Step(blocks.get(request_id, []), tokens.get(request_id, []), request_id in done, errors.get(request_id))
                job.steps.put_nowait(step)

    def _on_engine_failure(self, error: BaseException) -> None:
        failure = error if isinstance(error, PlugmeshError) else InternalError("the engine failed")
        for job in self._jobs.values():
            job.steps.put_nowait(_Step([], [], True, failure))
