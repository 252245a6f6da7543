"""One request from its admission to its last row."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from plugmesh import limits
from plugmesh.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    PlugmeshError,
    Unavailable,
)
from plugmesh.host import PluginHost
from plugmesh.kv import BlockRef
from plugmesh.kv.client import KvClient
from plugmesh.kv.stores import KvStores
from plugmesh.mesh.api import Mesh
from plugmesh.records import PrefillPolicyRecord
from plugmesh.tracing import TRACING, Span
from plugmesh.types import BLOCK_TOKENS, FinishReason, KvLayout, SamplingParams, TokenInfo, Usage, block_chain
from plugmesh.wire import (
    error_to_pb,
    finish_to_pb,
    layout_to_pb,
    sampling_from_pb,
    token_from_pb,
    usage_to_pb,
)
from plugmesh_decode.config import Settings
from plugmesh_decode.constraints import Constraints
from plugmesh_decode.holds import Held
from plugmesh_decode.prefill_remotely import RemotePrefill
from plugmesh_decode.session import Session
from plugmesh_engine import Engine, EngineRequest, KvSource, StepOutput, TokenEvent
from plugmesh_engine.constrained import Constraint
from plugmesh_engine.driver import EngineDriver, ExportedBlock
from plugmesh_engine.requests import HiddenRows
from plugmesh_proto.v1 import decode_pb2 as pb
from plugmesh_proto.v1 import prefill_pb2

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Extra:
    """What score and tap add to a request; see `plugmesh_engine.EngineRequest`. `on_hidden` is called in the event loop, before the rows of the step."""

    score: tuple[tuple[int, ...], ...] = ()
    taps: tuple[int, ...] = ()
    tap_from: int = 0
    on_hidden: Callable[[HiddenRows], None] | None = None


@dataclass(slots=True)
class Generation:
    """What this instance knows of one live request."""

    request: pb.GenerateRequest
    session: Session
    sampling: SamplingParams
    started_s: float
    extra: Extra = Extra()
    num_prompt: int = 0                         # a fork's is known when it is in the engine
    prefill: str = "local"
    resume: tuple[tuple[int, ...], ...] = ()
    resume_finished: tuple[bool, ...] = ()
    num_cached_tokens: int | None = None        # as the prefill instance reports it
    num_generated: int = 0
    told: dict[int, str] = field(default_factory=dict)  # weight version of each sequence's last row
    finished: set[int] = field(default_factory=set)
    pins: list[tuple[KvClient, list[BlockRef]]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    grammar: asyncio.Task[Constraint] | None = None
    deadline: asyncio.TimerHandle | None = None
    in_engine: bool = False
    span: Span = field(default_factory=lambda: Span(""))


NOTHING = Extra()


class Generator:
    """Serves the requests of one decode instance; lives in its event loop.

    Every request that `begin` takes ends in exactly one row with `request_done`, unless its session is gone.
    """

    def __init__(
        self, mesh: Mesh, engine: Engine, settings: Settings, plugins: PluginHost, stores: KvStores | None,
        policy: PrefillPolicyRecord, counters: Any, constraints: Constraints, *, names: set[str],
    ) -> None:
        self.mesh, self.settings, self.plugins, self.stores, self.policy = mesh, settings, plugins, stores, policy
        self.layout = engine.layout
        self.epochs: dict[str, int] = {}  # of weight versions that were published
        self.driver = EngineDriver(engine, self._on_step, self._on_engine_failure)
        self.remote = RemotePrefill(mesh, settings.remote_prefill_timeout_s)
        self.is_draining = False
        self.held = Held(settings.hold_ttl_s, self.driver.cancel)
        self._constraints = constraints
        self._model = engine.model.config
        self._max_len = engine.max_model_len
        self._is_filtered = engine.is_filtered
        self.names = names
        self._live: dict[str, Generation] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._counters = counters

    # 1. Admission

    def begin(self, request: pb.GenerateRequest, session: Session, extra: Extra = NOTHING) -> None:
        """Takes a request; whatever happens to it comes out of `session`."""
        try:
            generation = self._admit(request, session, extra)
        except PlugmeshError as e:
            self._counters.requests.labels("refused").inc()
            session.put(0, [error_row(request.request_id, e)])
            return
        generation.span = TRACING.start(
            "decode.request", request.trace.get("traceparent", ""), request_id=request.request_id, num_prompt_tokens=len(request.token_ids)
        )
        self._live[request.request_id] = generation
        session.request_ids.add(request.request_id)
        self._idle.clear()
        if request.deadline_unix_s:
            left_s = max(0.0, request.deadline_unix_s - time.time())
            generation.deadline = asyncio.get_running_loop().call_later(left_s, self._on_deadline, generation)
        generation.task = asyncio.create_task(self._start(generation))

    def _admit(self, request: pb.GenerateRequest, session: Session, extra: Extra) -> Generation:
        if self.is_draining:
            raise Unavailable("this decode instance is draining", retry_after_s=1)
        if not request.request_id:
            raise InvalidRequest("request_id is empty", param="request_id")
        if request.request_id in self._live or request.request_id in self.held:
            raise AlreadyExists(f"request {request.request_id} is running or held here", param="request_id")
        if request.model not in self.names:
            raise NotFound(f"model {request.model!r} is not served here; it serves {', '.join(sorted(n for n in self.names if n))}", param="model")
        is_fork = request.HasField("fork")
        if not request.token_ids and not is_fork:
            raise InvalidRequest("the prompt is empty", param="token_ids")
        if request.token_ids and (min(request.token_ids) < 0 or max(request.token_ids) >= self._model.vocab_size):
            raise InvalidRequest(f"token ids must lie in 0..{self._model.vocab_size - 1}", param="token_ids")
        sampling = sampling_from_pb(request.sampling)
        limits.check_sampling(sampling, vocab_size=self._model.vocab_size)
        if request.deadline_unix_s and request.deadline_unix_s <= time.time():
            raise DeadlineExceeded("the deadline has passed")
        generation = Generation(request, session, sampling, time.monotonic(), extra, len(request.token_ids))
        if request.resume:
            tokens: list[tuple[int, ...]] = [()] * sampling.num_sequences
            finished = [False] * sampling.num_sequences
            for prefix in request.resume:
                if not 0 <= prefix.sequence < sampling.num_sequences:
                    raise InvalidRequest(f"resume names sequence {prefix.sequence} of {sampling.num_sequences}", param="resume")
                tokens[prefix.sequence] = tuple(prefix.token_ids)
                finished[prefix.sequence] = prefix.finished
            generation.resume, generation.resume_finished = tuple(tokens), tuple(finished)
            generation.finished = {i for i, done in enumerate(finished) if done}
        return generation

    # 2. Where the prompt is computed

    async def _start(self, g: Generation) -> None:
        if g.request.HasField("grammar"):  # while the prompt is computed elsewhere, or its KV fetched
            g.grammar = asyncio.create_task(self._constraints.get(g.request.grammar))
        try:
            if g.request.HasField("fork"):
                await self._submit(g, (), self.layout)
            elif await self._wants_remote(g):
                await self._prefill_remotely(g)
            else:
                await self._prefill_locally(g)
        except asyncio.CancelledError:
            raise
        except PlugmeshError as e:
            self._fail(g, e)
        except Exception as e:
            log.exception("decode.start_failed", request_id=g.request.request_id)
            self._fail(g, InternalError(f"the request could not be started: {type(e).__name__}"))
        finally:
            if g.grammar is not None:
                g.grammar.add_done_callback(lambda done: done.cancelled() or done.exception())
                g.grammar.cancel()  # nobody waits for it any more, if it is still to come

    async def _wants_remote(self, g: Generation) -> bool:
        mode = g.request.prefill_mode
        if self.stores is None or g.resume or g.extra is not NOTHING or g.request.hold or mode == pb.GenerateRequest.PREFILL_LOCAL:
            return False
        if self._is_filtered(len(g.request.token_ids)):  # its KV will be that of the chosen tokens, which only this engine knows
            return False
        if mode == pb.GenerateRequest.PREFILL_REMOTE:
            return True
        num_prefill = len(self.mesh.instances("prefill"))
        ids = g.request.token_ids
        if num_prefill == 0 or len(ids) < self.settings.remote_prefill_min_tokens:
            return False
        cached = self.driver.cached_prefix(ids)  # without waiting for a step
        choice = self.plugins.guard(self.policy.name, self.policy.choose, len(ids) - cached, self.driver.num_running, num_prefill)
        return choice == "remote"

    async def _prefill_locally(self, g: Generation) -> None:
        sources: list[KvSource] = []
        ids, layout = g.request.token_ids, self.layout
        is_read_whole = g.extra is not NOTHING or not self._is_filtered(len(ids))
        if self.stores is not None and is_read_whole and not g.request.no_prefix_cache and len(ids) > BLOCK_TOKENS and self.stores.nearest():
            chain = block_chain(layout.key(), ids[: len(ids) - 1])
            if self.driver.cached_prefix(ids) < len(chain) * BLOCK_TOKENS:
                sources = await self._pin(g, chain, len(ids))
        await self._submit(g, sources, layout)

    async def _prefill_remotely(self, g: Generation) -> None:
        request, layout = g.request, self.layout
        job = prefill_pb2.PrefillJob(
            job_id=f"{request.request_id}@{self.mesh.self_info.incarnation}", request_id=request.request_id, model=layout.model,
            token_ids=request.token_ids, sampling=request.sampling, layout=layout_to_pb(layout),
            deadline_unix_s=request.deadline_unix_s or time.time() + 600, reply_instance=self.mesh.self_info.instance_id,
            reply_incarnation=self.mesh.self_info.incarnation, trace=g.span.carrier,
        )
        try:
            event = await self.remote.compute(job, request.prefill_instance)
        except PlugmeshError as e:
            log.info("decode.prefill_fell_back", request_id=request.request_id, reason=e.code)
            g.prefill = "fallback"
            await self._prefill_locally(g)
            return
        g.prefill = "remote"
        g.num_cached_tokens = event.num_cached_tokens
        tokens = [token_from_pb(t) for t in event.first_tokens]
        if len(tokens) == g.sampling.num_sequences and g.grammar is None:  # they were sampled without the grammar
            self._emit_first(g, tokens, layout.model)
            if g.request.request_id not in self._live:
                return
        chain = block_chain(layout.key(), request.token_ids, tail=True)
        sources = await self._pin(g, chain, len(request.token_ids), store=event.store_instance)
        if sum(s.num_tokens for s in sources) < len(request.token_ids):
            log.info("decode.prefill_blocks_missing", request_id=request.request_id, num_found=len(sources), num_wanted=len(chain))
        await self._submit(g, sources, layout)

    async def _pin(self, g: Generation, chain: Sequence[bytes], num_tokens: int, store: str = "") -> list[KvSource]:
        assert self.stores is not None
        store = store or self.stores.nearest()
        if not store:
            return []
        client = self.stores.client(store)
        refs = await client.match(chain, pin=True)
        g.pins.append((client, refs))
        if g.request.request_id not in self._live:  # cancelled meanwhile
            self._unpin(g)
            raise asyncio.CancelledError
        return [
            KvSource(ref.block_id, min(BLOCK_TOKENS, num_tokens - i * BLOCK_TOKENS), ref.data) for i, ref in enumerate(refs)
        ]

    async def _submit(self, g: Generation, sources: Sequence[KvSource], layout: KvLayout) -> None:
        grammar = await g.grammar if g.grammar is not None else None
        g.in_engine = True
        request = EngineRequest(
            request_id=g.request.request_id, token_ids=tuple(g.request.token_ids), sampling=g.sampling, priority=g.request.priority,
            kv=tuple(sources), kv_layout=layout.key(), resume=g.resume, resume_finished=g.resume_finished, use_prefix_cache=not g.request.no_prefix_cache,
            hold=g.request.hold, score=g.extra.score, taps=g.extra.taps, tap_from=g.extra.tap_from, max_total_tokens=g.request.max_total_tokens,
            grammar=grammar,
        )
        if g.request.HasField("fork"):
            point = g.request.fork
            num_tokens = point.num_tokens if point.HasField("num_tokens") else None
            self.held.touch(point.request_id)  # not after the call: a short fork may have ended by then, and this task with it
            g.num_prompt += await self.driver.call(lambda engine: engine.fork(point.request_id, point.sequence, request, num_tokens))
        else:
            await self.driver.submit(request)
        self._counters.prefills.labels(g.prefill).inc()

    # 3. Rows out

    def _emit_first(self, g: Generation, tokens: Sequence[TokenInfo], version: str) -> None:
        """First tokens that a prefill instance sampled leave before their KV is here."""
        reasons = [first_finish(t.token_id, g.sampling, self._model.eos_token_ids, len(g.request.token_ids), self._max_len) for t in tokens]
        g.resume = tuple((t.token_id,) for t in tokens)
        g.resume_finished = tuple(r is not None for r in reasons)
        g.finished |= {i for i, reason in enumerate(reasons) if reason is not None}
        all_done = all(g.resume_finished)
        events = [
            TokenEvent(
                request_id=g.request.request_id, sequence=i, index=0, tokens=(token,), finish_reason=reason,
                request_done=all_done and i == len(tokens) - 1,
                usage=Usage(len(g.request.token_ids), len(tokens)) if all_done and i == len(tokens) - 1 else None, error=None,
            )
            for i, (token, reason) in enumerate(zip(tokens, reasons, strict=True))
        ]
        frame = pb.TokenFrame()
        for e in events:
            self._fill_row(g, e, frame.rows.add(), version)
        self._counters.tokens.inc(len(events))
        g.session.put_frame(frame)
        if all_done:
            self._end(g, "stop")

    def _on_step(self, output: StepOutput, _: list[ExportedBlock]) -> None:
        frames: dict[Session, pb.TokenFrame] = {}
        ended: list[tuple[Generation, str]] = []
        num_tokens = 0
        for rows in output.hidden:
            tapped = self._live.get(rows.request_id)
            if tapped is not None and tapped.extra.on_hidden is not None:
                tapped.extra.on_hidden(rows)
        for event in output.tokens:
            g = self._live.get(event.request_id)
            if g is None:
                continue
            frame = frames.get(g.session)
            if frame is None:
                frame = frames[g.session] = pb.TokenFrame(step=output.step)
            self._fill_row(g, event, frame.rows.add(), output.weight_version)
            num_tokens += len(event.tokens)
            if event.request_done:
                ended.append((g, "error" if event.error else event.finish_reason.value if event.finish_reason else "stop"))
        self._counters.tokens.inc(num_tokens)
        self._counters.frames.inc(len(frames))
        for session, frame in frames.items():
            session.put_frame(frame)
            if session.overflowed:
                self.drop_session(session)
        for g, reason in ended:
            if g.request.request_id in self._live:
                self._end(g, reason)
        for request_id in output.kv_imported:
            g_imported = self._live.get(request_id)
            if g_imported is not None:
                self._unpin(g_imported)

    def _fill_row(self, g: Generation, event: TokenEvent, row: pb.TokenRow, version: str) -> None:
        """Runs for every sequence in every step: fields that keep their default are not touched, and nothing is copied."""
        row.request_id = event.request_id
        if event.sequence:
            row.sequence = event.sequence
        row.index = event.index
        for token in event.tokens:
            info = row.tokens.add()
            info.token_id = token.token_id
            info.logprob = token.logprob
            if token.confidence:
                info.confidence = token.confidence
            for token_id, logprob in token.top:
                info.top.add(token_id=token_id, logprob=logprob)
        g.num_generated += len(event.tokens)
        told_before = g.told.get(event.sequence, "")
        if told_before != version:
            g.told[event.sequence] = row.weight_version = version
            row.weight_epoch = self.epochs.get(version, 0)
            if not told_before:
                row.prefill = g.prefill
        if event.finish_reason is not None:
            told = event.sequence in g.finished and not event.tokens  # it left with a first token, or came finished
            if not told or event.error is not None:
                row.finish_reason = finish_to_pb(event.finish_reason)
            g.finished.add(event.sequence)
        if event.request_done:
            row.request_done = True
        if event.error is not None:
            row.error.CopyFrom(error_to_pb(event.error))
        if event.usage is not None:
            usage = event.usage if g.num_cached_tokens is None else dataclasses.replace(event.usage, cached_tokens=g.num_cached_tokens)
            row.usage.CopyFrom(usage_to_pb(usage))

    # 4. Ends

    def fail_unbegun(self, model: str, error: PlugmeshError) -> None:
        """Ends requests that named a model and of which nothing was told yet."""
        for g in list(self._live.values()):
            if g.request.model == model and not g.told and not g.request.resume:
                self._fail(g, error)

    def cancel(self, session: Session, command: pb.CancelRequest) -> None:
        """Cancels a request of this session, or one of its sequences. Unknown or foreign ids are ignored: it may just have ended."""
        g = self._live.get(command.request_id)
        if g is None or g.session is not session:
            return
        if command.one_sequence:
            g.finished.add(command.sequence)
            if g.in_engine and len(g.finished) < g.sampling.num_sequences:
                self.driver.cancel(command.request_id, command.sequence)
                return
            if len(g.finished) < g.sampling.num_sequences:
                finished = list(g.resume_finished or [False] * g.sampling.num_sequences)
                finished[command.sequence] = True
                g.resume_finished = tuple(finished)
                g.resume = g.resume or ((),) * g.sampling.num_sequences
                return
        row = pb.TokenRow(request_id=command.request_id, sequence=command.sequence, finish_reason=finish_to_pb(FinishReason.CANCELLED), request_done=True)
        row.usage.CopyFrom(usage_to_pb(Usage(g.num_prompt, g.num_generated, g.num_cached_tokens or 0)))
        session.put(0, [row])
        self._end(g, "cancelled")

    def drop_session(self, session: Session) -> None:
        """Cancels everything that a consumer left behind."""
        for request_id in list(session.request_ids):
            g = self._live.get(request_id)
            if g is not None and g.session is session:
                self._end(g, "cancelled")
        self.held.release_all_of(session)

    async def release(self, request_id: str) -> bool:
        """Lets go of a held request; one that still runs will not be held. False when there was nothing of that name."""
        g = self._live.get(request_id)
        if g is not None:
            g.request.hold = False
        self.held.forget(request_id)
        return await self.driver.call(lambda engine: engine.release(request_id)) or g is not None

    async def drain(self, deadline_s: float) -> None:
        """Refuses new requests and waits for the running ones; what is left after `deadline_s` ends as Unavailable, so that its
        consumer goes on elsewhere."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        for g in list(self._live.values()):
            self._fail(g, Unavailable("this decode instance has drained", retry_after_s=1, reason="drained"))

    @property
    def num_live(self) -> int:
        return len(self._live)

    def _on_deadline(self, g: Generation) -> None:
        self._fail(g, DeadlineExceeded(f"the deadline passed after {time.monotonic() - g.started_s:.1f} s"))

    def _on_engine_failure(self, error: BaseException) -> None:
        failure = error if isinstance(error, PlugmeshError) else InternalError("the engine failed")
        for g in list(self._live.values()):
            if g.in_engine:
                self._fail(g, failure)

    def _fail(self, g: Generation, error: PlugmeshError) -> None:
        if g.request.request_id in self._live:
            g.session.put(0, [error_row(g.request.request_id, error)])
            self._end(g, "error", code=error.code)

    def _end(self, g: Generation, reason: str, *, code: str = "") -> None:
        request_id = g.request.request_id
        del self._live[request_id]
        g.session.request_ids.discard(request_id)
        if g.deadline is not None:
            g.deadline.cancel()
        if g.task is not None and g.task is not asyncio.current_task():
            g.task.cancel()
        pins, g.pins = g.pins, []
        if g.request.hold and g.in_engine and reason in ("stop", "length"):
            release(pins)
            self.held.keep(request_id, g.session)
        else:
            self.driver.cancel(request_id, then=lambda: release(pins))  # no-op for one that ended by itself
        if not self._live:
            self._idle.set()
        self._counters.requests.labels(reason).inc()
        g.span.end(error=code, reason=reason, prefill=g.prefill, num_generated_tokens=g.num_generated)
        self.plugins.observe(
            "on_request_finished", request_id=request_id, finish_reason=reason,
            num_prompt_tokens=g.num_prompt, num_generated_tokens=g.num_generated,
        )
        log.info(
            "decode.finished", request_id=request_id, reason=reason, code=code, prefill=g.prefill, num_prompt_tokens=g.num_prompt,
            num_generated_tokens=g.num_generated, total_ms=round(1000 * (time.monotonic() - g.started_s), 1),
        )

    def _unpin(self, g: Generation) -> None:
        pins, g.pins = g.pins, []
        release(pins)


def release(pins: Sequence[tuple[KvClient, list[BlockRef]]]) -> None:
    """Gives blocks back to their stores."""
    for client, refs in pins:
        client.release_nowait(refs)


def error_row(request_id: str, error: PlugmeshError) -> pb.TokenRow:
    """The one row that ends a request with an error."""
    return pb.TokenRow(request_id=request_id, finish_reason=finish_to_pb(FinishReason.ERROR), error=error_to_pb(error), request_done=True)


def first_finish(
    token_id: int, sampling: SamplingParams, eos_token_ids: Sequence[int], num_prompt_tokens: int, max_model_len: int
) -> FinishReason | None:
    """Whether a sequence ends with its first token."""
    if token_id in sampling.stop_token_ids or (not sampling.ignore_eos and token_id in eos_token_ids):
        return FinishReason.STOP
    if sampling.max_tokens <= 1 or num_prompt_tokens + 1 >= max_model_len:
        return FinishReason.LENGTH
    return None
