"""The state of one running request: attempts at decode instances, texts coming back, one terminal state.

Everything here runs in the event loop and is called by the links, so nothing waits; what must wait (for another instance)
is a task that the run owns.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from plugmesh.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    PayloadTooLarge,
    PlugmeshError,
    Unavailable,
)
from plugmesh.mesh.api import Mesh
from plugmesh.records import RouteRequest
from plugmesh.types import FinishReason, InstanceInfo
from plugmesh.wire import error_from_pb, finish_from_pb, sampling_to_pb, spec_to_pb
from plugmesh_proto.v1 import decode_pb2

from .config import Settings
from .decode_links import DecodeLinks
from .links import Link
from .local_texts import LocalSequence, LocalTexts
from .measure import GatewayMetrics
from .request import Prepared
from .route import SafeRouter
from .text_links import TextLinks, TextSequence

log = structlog.get_logger()

_MAX_SUBMIT_BYTES = 240 * 1024  # a message of the bus holds 256 KiB
_CLOSING_S = 2.0  # for decode to say its last word on a request whose sequences all ended
_MODES = {
    "auto": decode_pb2.GenerateRequest.PREFILL_AUTO,
    "local": decode_pb2.GenerateRequest.PREFILL_LOCAL,
    "remote": decode_pb2.GenerateRequest.PREFILL_REMOTE,
}


@dataclass(slots=True)
class Event:
    """New text of one choice. `tokens` are protobuf TokenInfos whose text is in this event or before it."""

    index: int
    text: str
    tokens: list[Any]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Engine:
    """What all runs of a gateway share."""

    mesh: Mesh
    settings: Settings
    decode: DecodeLinks
    texts: TextLinks
    router: SafeRouter
    metrics: GatewayMetrics
    outbox: Outbox
    local_texts: LocalTexts


class Outbox:
    """Generations with new events for a reader that takes them on the spot; all of one turn of the loop, or of one frame, go together.

    While `is_held`, they go at the next `flush`.
    """

    def __init__(self) -> None:
        self.is_held = False
        self._waiting: dict[Generation, None] = {}

    def add(self, generation: Generation) -> None:
        if not self._waiting and not self.is_held:
            asyncio.get_running_loop().call_soon(self.flush)
        self._waiting[generation] = None

    def flush(self) -> None:
        self.is_held = False
        waiting, self._waiting = self._waiting, {}
        for generation in waiting:
            generation.deliver()


class Generation:
    """A request in flight: one run per prompt, one buffer of events, one terminal state.

    Ends exactly once: with `error` None when all choices finished, else with the error. Every end cancels what still runs
    at decode and tokenizer instances and calls `on_end`.

    Args:
        deadline: Of time.monotonic().
    """

    def __init__(self, engine: Engine, *, request_id: str, route: str, arrived: float, deadline: float, on_end: Callable[[Generation], None]) -> None:
        self.engine = engine
        self.request_id = request_id
        self.route = route
        self.arrived = arrived
        self.deadline = deadline
        self.error: PlugmeshError | None = None
        self.is_ended = False
        self.first_token_at = 0.0
        self.ended_at = 0.0
        self.num_migrations = 0
        self.detail: Mapping[str, Any] = {}  # what a strategy tells of its answer
        self.runs: list[Run] = []
        self._on_end = on_end
        self._events: collections.deque[Event] = collections.deque()
        self._wake = asyncio.Event()
        self._take: Callable[[list[Event]], bool] | None = None  # while the reader waits
        self._timer: asyncio.TimerHandle | None = None

    def start(self, prompts: list[Prepared], instances: frozenset[str], *, counts_exactly: bool = False) -> None:
        """Submits every prompt. `instances` are the decode instances that serve the model at this moment; `counts_exactly` is `Run`'s."""
        self.start_timer()
        self.runs = [Run(self, prompt, instances, counts_exactly=counts_exactly) for prompt in prompts]
        for run in self.runs:
            if not self.is_ended:
                run.submit_first()

    @property
    def num_buffered(self) -> int:
        return len(self._events)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(r.request.token_ids) for r in self.runs)

    @property
    def num_completion_tokens(self) -> int:
        return sum(s.num_counted for r in self.runs for s in r.sequences)

    @property
    def num_cached_tokens(self) -> int:
        return sum(r.num_cached_tokens for r in self.runs)

    @property
    def finish_reasons(self) -> set[FinishReason]:
        return {s.finish_reason for r in self.runs for s in r.sequences if s.finish_reason is not None}

    async def batches(self, take: Callable[[list[Event]], bool] | None = None) -> AsyncIterator[list[Event]]:
        """Events as they come, all that wait at once. Raises the terminal error after the last of them.

        Args:
            take: Offered events while the reader waits here, so that it need not be woken for them. Returns False when it
                cannot take them now; then they come out of the iterator. Must neither wait nor raise.
        """
        while True:
            if self._events:
                batch = list(self._events)
                self._events.clear()
                yield batch
            elif self.is_ended:
                if self.error is not None:
                    raise self.error
                return
            else:
                self._wake.clear()
                self._take = take
                try:
                    await self._wake.wait()
                finally:
                    self._take = None

    def deliver(self) -> None:
        """Gives new events to a waiting reader, or wakes it. An end is always the reader's own affair."""
        if not self._events or self._take is None:
            return
        try:
            if not self.is_ended and self._take(list(self._events)):
                self._events.clear()
                return
        except Exception as e:  # it is not the other generations' fault; the reader meets the same fault and answers for it
            log.exception("request.failed", request_id=self.request_id, error=type(e).__name__)
        self._wake.set()

    def cancel(self, reason: str = "the client went away") -> None:
        """Ends the request as cancelled, unless it ended already."""
        self.end(Cancelled(reason))

    def emit(self, event: Event) -> None:
        if len(self._events) >= self.engine.settings.max_buffered_events:
            self.engine.metrics.slow_readers.inc()
            self._events.clear()
            self.end(Overloaded(f"the client left {self.engine.settings.max_buffered_events} events unread"))
            return
        self._events.append(event)
        if self._take is not None:
            self.engine.outbox.add(self)
        else:
            self._wake.set()

    def on_run_done(self) -> None:
        if all(run.is_done for run in self.runs):
            self.end(None)

    def end(self, error: PlugmeshError | None) -> None:
        """The one way into a terminal state; later calls change nothing."""
        if self.is_ended:
            return
        self.is_ended = True
        self.error = error
        self.ended_at = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        for run in self.runs:
            run.release()
        self.engine.texts.flush()
        self._wake.set()
        self._on_end(self)

    def start_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(max(0.0, self.deadline - time.monotonic()), self._on_deadline)

    def _on_deadline(self) -> None:
        self.end(DeadlineExceeded(f"the request did not finish within {self.deadline - self.arrived:.0f} s"))


class Sequence:
    """One choice: tokens from decode, text from the tokenizer."""

    __slots__ = (
        "decode_reason", "finish_reason", "index", "infos", "last_text_at", "num_chars", "num_consumed", "num_late", "run", "stopped_at", "text",
        "tokens", "visible",
    )

    def __init__(self, run: Run, index: int) -> None:
        self.run = run
        self.index = index
        self.tokens: list[int] = []               # everything decode delivered
        self.visible: list[int] = []              # what has text: without a final end token
        self.infos: list[Any] = []                # of visible tokens not reported yet
        self.decode_reason: FinishReason | None = None
        self.finish_reason: FinishReason | None = None
        self.stopped_at: int | None = None        # tokens until the stop string was complete
        self.text: TextSequence | LocalSequence | None = None
        self.num_chars = 0
        self.num_consumed = 0
        self.num_late = 0                         # tokens that came after the end was decided here
        self.last_text_at = 0.0

    @property
    def num_counted(self) -> int:
        """Tokens for the usage: up to and with those of a stop string or the end token."""
        return len(self.tokens) if self.stopped_at is None else self.stopped_at

    def on_text(self, text: Any) -> None:
        self.run.on_text(self, text)

    def on_text_lost(self) -> None:
        self.text = None
        self.run.on_text_lost(self)


class Run:
    """One prompt at one decode instance at a time.

    An attempt is named `<request>#<number>`: rows of an attempt that was given up name another one and are dropped by the link.

    Args:
        counts_exactly: Ends only when decode has said its last word, so that tokens computed while a cancellation was on its way are counted.
    """

    def __init__(self, generation: Generation, request: Prepared, instances: frozenset[str], *, counts_exactly: bool = False) -> None:
        self.generation = generation
        self.engine = generation.engine
        self.request = request
        self.sequences = [Sequence(self, i) for i in range(request.sampling.num_sequences)]
        self.num_cached_tokens = 0
        self.attempt = 0
        self.is_done = False
        self._instances = instances
        self._link: Link | None = None
        self._last_info: InstanceInfo | None = None
        self._is_routed = False
        self._failures = 0          # attempts that failed since the last row
        self._text_losses = 0       # and tokenizers since the last text
        self._tasks: set[asyncio.Task[None]] = set()
        self._texts_wanted = False
        self._counts_exactly = counts_exactly
        self._closing: asyncio.TimerHandle | None = None  # all ended, decode's last row is still to come

    @property
    def attempt_id(self) -> str:
        return f"{self.request.request_id}#{self.attempt}"

    def submit_first(self) -> None:
        """Opens texts and submits; where an instance is missing, a task of this run waits for one."""
        for sequence in self.sequences:
            self._open_text(sequence)
        self.engine.texts.flush()
        if not self._submit():
            self._recover("absent")

    # Decode.

    def on_row(self, row: Any) -> None:
        """One row of the current attempt."""
        generation = self.generation
        if generation.is_ended:
            return
        try:
            self._take_row(row)
        except PlugmeshError as e:
            generation.end(e)
        except Exception as e:
            log.exception("request.failed", request_id=self.request.request_id, error=type(e).__name__)
            generation.end(InternalError("the gateway failed on this request"))

    def _take_row(self, row: Any) -> None:
        # Nearly all rows: another token of a sequence that goes on, where it is expected.
        if not row.finish_reason and not row.request_done and row.sequence < len(self.sequences):
            sequence = self.sequences[row.sequence]
            tokens = row.tokens
            if (tokens and row.index == len(sequence.tokens) and sequence.decode_reason is None and sequence.finish_reason is None
                    and not row.HasField("error")):
                self._take_next(sequence, tokens)
                return
        if row.HasField("usage"):
            self.num_cached_tokens = row.usage.cached_tokens
        reason = finish_from_pb(row.finish_reason)
        if reason is FinishReason.ERROR or row.HasField("error"):
            self._on_decode_error(error_from_pb(row.error))
            return
        if row.tokens or reason is not None:
            if not 0 <= row.sequence < len(self.sequences):
                raise DataLoss(f"decode sent sequence {row.sequence} of {len(self.sequences)}")
            sequence = self.sequences[row.sequence]
            if sequence.decode_reason is None and sequence.finish_reason is None:
                if reason is FinishReason.CANCELLED:
                    self._lost("cancelled", Unavailable("the decode instance gave the request up", retry_after_s=1))
                    return
                if not self._take_tokens(sequence, row, reason):
                    return
            else:
                sequence.num_late += len(row.tokens)
        if row.request_done and not self.generation.is_ended:
            self._link = None
            self._drop_attempt()
            if self._closing is not None:
                self._finish()
            elif any(s.decode_reason is None and s.finish_reason is None for s in self.sequences):
                self._lost("incomplete", DataLoss("decode ended the request before its sequences"))

    def _take_next(self, sequence: Sequence, tokens: Any) -> None:
        """As `_take_tokens`, for a row that neither repeats nor ends anything."""
        ids = [tokens[0].token_id] if len(tokens) == 1 else [t.token_id for t in tokens]
        sequence.tokens += ids
        sequence.visible += ids
        sequence.infos += tokens
        generation, text = self.generation, sequence.text
        if not generation.first_token_at:
            generation.first_token_at = time.monotonic()
        if isinstance(text, LocalSequence):
            self.engine.local_texts.add(text, ids, False)
        elif text is not None:
            self.engine.texts.add(text, ids, False)
        self._failures = 0
        self.engine.router.progress(self.request.request_id, len(ids))

    def _take_tokens(self, sequence: Sequence, row: Any, reason: FinishReason | None) -> bool:
        tokens = row.tokens
        if row.index != len(sequence.tokens):
            if row.index > len(sequence.tokens):
                self._lost("gap", DataLoss(f"decode skipped tokens {len(sequence.tokens)} to {row.index}"))
                return False
            tokens = tokens[len(sequence.tokens) - row.index :]
        ids = [t.token_id for t in tokens]
        num_new = len(ids)
        sequence.tokens.extend(ids)
        if reason is FinishReason.STOP and ids and ids[-1] in self.request.end_token_ids:
            ids.pop()  # the end token itself is no text
            tokens = tokens[:-1]
        sequence.visible.extend(ids)
        sequence.infos.extend(tokens)
        sequence.decode_reason = reason
        if not self.generation.first_token_at:
            self.generation.first_token_at = time.monotonic()
        text = sequence.text
        if isinstance(text, LocalSequence):
            self.engine.local_texts.add(text, ids, reason is not None)
        elif text is not None:
            self.engine.texts.add(text, ids, reason is not None)
        if num_new:
            self._failures = 0
            self.engine.router.progress(self.request.request_id, num_new)
        return True

    def on_decode_lost(self, cause: str, error: PlugmeshError) -> None:
        if not self.generation.is_ended:
            self._link = None
            self._lost(cause, error)

    def _on_decode_error(self, error: PlugmeshError) -> None:
        self._drop_attempt()
        if self._closing is not None:
            self._finish()
            return
        # Others may have room, or are not shutting down.
        if isinstance(error, Unavailable | Overloaded):
            link_info = self._last_info
            others = [i for i in self._candidates() if link_info is None or i.instance_id != link_info.instance_id]
            if others or isinstance(error, Unavailable):
                if link_info is not None:
                    self.engine.decode.peers.suspect(link_info, 0.5)
                self._lost(error.code, error)
                return
        self.generation.end(error)

    def _lost(self, cause: str, error: PlugmeshError) -> None:
        """The attempt is over before the request; goes on elsewhere with what was delivered."""
        self._drop_attempt()
        if all(s.decode_reason is not None or s.finish_reason is not None for s in self.sequences):
            if self._closing is not None:
                self._finish()
            return  # only texts are missing
        self._failures += 1
        if self._failures >= self.engine.settings.max_attempts:
            self.generation.end(error if isinstance(error, Unavailable) else Unavailable(
                f"the request failed {self._failures} times in a row at decode instances", retry_after_s=1))
            return
        self.generation.num_migrations += 1
        self.engine.metrics.migrated.labels(cause).inc()
        log.info("request.migrating", request_id=self.request.request_id, attempt=self.attempt, cause=cause)
        self._recover(cause)

    def _recover(self, cause: str) -> None:
        task = asyncio.create_task(self._resubmit(cause), name=f"migrate:{self.request.request_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _resubmit(self, cause: str) -> None:
        until = min(self.generation.deadline, time.monotonic() + self.engine.settings.recovery_wait_s)
        try:
            await asyncio.sleep(0)  # the link tells the other runs first
            while not self.generation.is_ended:
                if self._submit():
                    return
                left = until - time.monotonic()
                if left <= 0:
                    self.generation.end(Unavailable("no decode instance took the request over", retry_after_s=2))
                    return
                await self.engine.decode.peers.changed(min(left, 0.25))
        except PlugmeshError as e:
            self.generation.end(e)
        except Exception as e:
            log.exception("request.failed", request_id=self.request.request_id, error=type(e).__name__)
            self.generation.end(InternalError("the gateway failed on this request"))

    def _candidates(self) -> list[InstanceInfo]:
        live = self.engine.decode.peers.live()
        same = [i for i in live if i.instance_id in self._instances]
        # A restarted instance has another id; it serves the model when its lease says so, or when it says nothing.
        return same or [i for i in live if not i.model or i.model == self.request.model]

    def _submit(self) -> bool:
        """Routes and starts an attempt. False when nobody is there. Raises PluginError."""
        candidates = self._candidates()
        if not candidates:
            return False
        engine, request = self.engine, self.request
        prefill = [i for i in engine.mesh.instances("prefill") if i.state == "ready"]
        done = sum(len(s.tokens) for s in self.sequences)
        num_left = sum(request.sampling.max_tokens - len(s.tokens) for s in self.sequences if s.decode_reason is None and s.finish_reason is None)
        try:
            route = engine.router.route(
                RouteRequest(
                    request.request_id, len(request.token_ids) + done, num_left, request.priority, request.block_ids, request.client),
                candidates, prefill)
        except PlugmeshError as e:
            self.generation.end(e)
            return True
        self._is_routed = True
        self.attempt += 1
        message = decode_pb2.GenerateRequest(
            request_id=self.attempt_id, model=request.model, token_ids=request.token_ids, sampling=sampling_to_pb(request.sampling),
            priority=request.priority, deadline_unix_s=time.time() + (self.generation.deadline - time.monotonic()),
            prefill_mode=_MODES[route.prefill_mode], prefill_instance=route.prefill_instance, trace=request.trace,
        )
        if request.grammar is not None:
            message.grammar.CopyFrom(decode_pb2.GrammarUse(key=request.grammar.key, spec=spec_to_pb(request.grammar.spec)))
        if done or any(s.finish_reason is not None for s in self.sequences):
            for s in self.sequences:
                message.resume.add(
                    sequence=s.index, token_ids=s.tokens, finished=s.decode_reason is not None or s.finish_reason is not None)
        if message.ByteSize() > _MAX_SUBMIT_BYTES:
            # The bus would refuse it and with it the stream that all other requests share.
            self.generation.end(PayloadTooLarge(f"the request has {message.ByteSize()} bytes, at most {_MAX_SUBMIT_BYTES} can be sent"))
            return True
        info = next(i for i in candidates if i.instance_id == route.decode_instance)
        self._last_info = info
        self._link = engine.decode.submit(info, message, self)
        return True

    def _drop_attempt(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            self.engine.decode.cancel(link, self.attempt_id)
        if self._is_routed:
            self._is_routed = False
            self.engine.router.finished(self.request.request_id)

    # Text.

    def on_text(self, sequence: Sequence, text: Any) -> None:
        if self.generation.is_ended or sequence.finish_reason is not None:
            return
        if text.error:
            log.warning("tokenizer.sequence_failed", request_id=self.request.request_id)
            self.generation.end(InternalError("the tokenizer failed on this request"))
            return
        self._text_losses = 0
        # `infos` starts at token `num_consumed`; what is consumed now belongs to this event.
        num_new = text.num_tokens_consumed - sequence.num_consumed
        if num_new >= len(sequence.infos):
            infos, sequence.infos = sequence.infos, []
        else:
            infos = sequence.infos[: max(0, num_new)]
            del sequence.infos[: len(infos)]
        sequence.num_consumed += len(infos)
        sequence.num_chars += len(text.text)
        reason: FinishReason | None = None
        if text.stopped:
            reason = FinishReason.STOP
            sequence.stopped_at = text.num_tokens_consumed
        elif text.is_final:
            reason = sequence.decode_reason
        if text.text:
            now = time.monotonic()
            if sequence.last_text_at:
                self.engine.metrics.itl.add(now - sequence.last_text_at)
            sequence.last_text_at = now
        if reason is not None:
            sequence.finish_reason = reason
            sequence.text = None
        if text.text or infos or reason is not None:
            self.generation.emit(Event(self.request.base_index + sequence.index, text.text, infos, reason))
        if reason is not None and not self.generation.is_ended:
            self._on_sequence_finished(sequence)

    def cancel_sequence(self, index: int) -> None:
        """Ends one sequence as cancelled, now; its siblings go on. Of one that ended, nothing changes."""
        sequence = self.sequences[index]
        if self.generation.is_ended or sequence.finish_reason is not None:
            return
        sequence.finish_reason = FinishReason.CANCELLED
        self._close_text(sequence)
        self.generation.emit(Event(self.request.base_index + index, "", [], FinishReason.CANCELLED))
        if not self.generation.is_ended:
            self._on_sequence_finished(sequence)

    def _on_sequence_finished(self, sequence: Sequence) -> None:
        if any(s.finish_reason is None for s in self.sequences):
            if sequence.decode_reason is None and self._link is not None:
                self.engine.decode.cancel_sequence(self._link, self.attempt_id, sequence.index)
        elif self._counts_exactly and self._link is not None:
            self.engine.decode.cancel_and_listen(self._link, self.attempt_id)
            self._closing = asyncio.get_running_loop().call_later(_CLOSING_S, self._finish)
        else:
            self._finish()

    def _finish(self) -> None:
        self.is_done = True
        self.release()
        self.generation.on_run_done()

    def on_text_lost(self, sequence: Sequence) -> None:
        if self.generation.is_ended or sequence.finish_reason is not None:
            return
        self.engine.metrics.replayed.inc()
        self._text_losses += 1
        if self._text_losses > self.engine.settings.max_attempts * len(self.sequences):
            self.generation.end(Unavailable("the request failed several times in a row at tokenizer instances", retry_after_s=1))
            return
        self._open_text(sequence)

    def _open_text(self, sequence: Sequence) -> None:
        """Opens a sequence, the first time or again with its tokens so far; waits in a task when no tokenizer lives."""
        if self.request.table is not None:  # opened once: nobody else can lose it
            sequence.text = self.engine.local_texts.open(sequence, self.request.table, stop=self.request.stop)
            return
        sequence.text = self.engine.texts.open(
            sequence, model=self.request.model, stop=self.request.stop, replay=sequence.visible, num_chars=sequence.num_chars)
        if sequence.text is not None:
            if sequence.visible or sequence.decode_reason is not None:
                self.engine.texts.add(sequence.text, (), sequence.decode_reason is not None)
        elif not self._texts_wanted:
            self._texts_wanted = True
            task = asyncio.create_task(self._await_tokenizer(), name=f"tokenizer:{self.request.request_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _await_tokenizer(self) -> None:
        until = min(self.generation.deadline, time.monotonic() + self.engine.settings.recovery_wait_s)
        peers = self.engine.texts.peers
        while not self.generation.is_ended and not peers.live():
            left = until - time.monotonic()
            if left <= 0:
                self.generation.end(Unavailable("no tokenizer instance took the request over", retry_after_s=2))
                return
            await peers.changed(min(left, 0.25))
        self._texts_wanted = False
        if not self.generation.is_ended:
            for sequence in self.sequences:
                if sequence.text is None and sequence.finish_reason is None:
                    self._open_text(sequence)
            self.engine.texts.flush()

    def _close_text(self, sequence: Sequence) -> None:
        text, sequence.text = sequence.text, None
        if isinstance(text, LocalSequence):
            self.engine.local_texts.close(text)
        elif text is not None:
            self.engine.texts.close(text)

    def release(self) -> None:
        """Gives up everything that is held elsewhere; safe to call again."""
        self._drop_attempt()
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.cancel()
        for sequence in self.sequences:
            self._close_text(sequence)
        current = _current_task()
        for task in list(self._tasks):
            if task is not current:
                task.cancel()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
