"""The serving end: runs servicers written for `grpc.aio` on a carrier.

`RpcServer` takes what `add_XServicer_to_server` hands to a gRPC server and serves it at carrier subjects.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog
from grpc_status import rpc_status

from plugmesh import wire
from plugmesh.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    PlugmeshError,
    StaleIncarnation,
    Unavailable,
)
from plugmesh.mesh import trace
from plugmesh.mesh.rpc import frames
from plugmesh.mesh.rpc.carrier import Carrier, Undo
from plugmesh.mesh.rpc.frames import Packet
from plugmesh.mesh.rpc.interceptor import where
from plugmesh.mesh.rpc.peers import PeerWatch
from plugmesh.mesh.rpc.pipe import Pipe

log = structlog.get_logger()

ACCEPT_DELAY_S = 0.003      # a call answered faster than this costs no packet of its own for "I have it"
LINGER_S = 2.0              # how long an answer is kept in case the connection broke under it
LINGER_BYTES = 16 << 20
_OK = grpc.StatusCode.OK
_tokens = itertools.count()


class RpcServer:
    """Serves servicers on one carrier. Implements the part of `grpc.Server` that generated code uses to register.

    Args:
        max_concurrent: Calls that run at once; further ones are refused with RESOURCE_EXHAUSTED.
        is_fenced: Given a caller "<instance>/<incarnation>", whether that incarnation was declared dead. Its calls are
            refused with StaleIncarnation.
        excluded: Full method names ("/package.Service/Method") that this carrier does not offer.
    """

    def __init__(
        self,
        carrier: Carrier,
        watch: PeerWatch,
        *,
        instance: str = "",
        incarnation: str | Callable[[], str] = "",
        max_concurrent: int = 1024,
        is_fenced: Callable[[str], bool] | None = None,
        excluded: Iterable[str] = (),
    ) -> None:
        self.carrier = carrier
        self.watch = watch
        self.instance = instance
        self._incarnation = incarnation
        self.max_concurrent = max_concurrent
        self.is_fenced = is_fenced
        self.excluded = set(excluded)
        self.calls: set[ServerPipe] = set()
        self.num_calls = 0
        self.num_failed = 0
        self.num_refused = 0
        self.stopping = False
        self._methods: dict[str, Any] = {}
        self._generic: list[Any] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._lingering: deque[tuple[float, int, ServerPipe]] = deque()
        self._lingering_bytes = 0
        self._undo_state = carrier.on_state(self._on_state)

    @property
    def incarnation(self) -> str:
        return self._incarnation if isinstance(self._incarnation, str) else self._incarnation()

    # --- registration ---------------------------------------------------------------------------------------------

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._generic.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        for name, handler in handlers.items():
            self._methods[f"/{service}/{name}"] = handler

    def find(self, method: str, metadata: frames.Metadata = ()) -> grpc.RpcMethodHandler | None:
        if method in self.excluded:
            return None
        handler = self._methods.get(method)
        if handler is None:
            details = _CallDetails()
            details.method = method
            details.invocation_metadata = metadata
            for generic in self._generic:
                handler = generic.service(details)
                if handler is not None:
                    break
        return handler

    async def listen(self, subject: str, queue: str = "") -> Undo:
        """Takes calls sent to this subject until the returned function is called."""
        return await self.carrier.subscribe(subject, self.on_call, queue)

    # --- calls ----------------------------------------------------------------------------------------------------

    def on_call(self, message: Any) -> None:
        """A packet on a subject we listen to: the first one of a call."""
        try:
            p = frames.decode(message.data)
        except DataLoss as e:
            log.warning("rpc.bad_packet", error=e.message, num_bytes=len(message.data))
            return
        if not p.flags & frames.OPEN or not message.reply or p.sequence != 0:
            log.warning("rpc.bad_packet", error="no opening packet", num_bytes=len(message.data))
            return
        self.num_calls += 1
        handler = self.find(p.method, p.metadata)
        if handler is None:
            self._refuse(message.reply, grpc.StatusCode.UNIMPLEMENTED, "Method not found!", ())
            return
        problem: PlugmeshError | None = None
        if self.stopping:
            problem = Unavailable("the instance is stopping", retry_after_s=0.5)
        elif len(self.calls) >= self.max_concurrent:
            problem = Overloaded(f"{self.max_concurrent} calls are running", retry_after_s=0.5)
        elif self.is_fenced is not None and p.caller and self.is_fenced(p.caller):
            problem = StaleIncarnation(f"caller {p.caller} was declared dead", caller=p.caller)
        if problem is not None:
            status = rpc_status.to_status(wire.rpc_status_of(problem))
            self._refuse(message.reply, status.code, status.details, tuple(status.trailing_metadata))
            return
        pipe = ServerPipe(self, f"s{next(_tokens)}", message.reply, p, handler)
        self.calls.add(pipe)
        self._idle.clear()
        pipe.begin(p)

    def _refuse(self, reply: str, code: grpc.StatusCode, details: str, trailing: frames.Metadata) -> None:
        self.num_refused += 1
        p = Packet(frames.STATUS, 0, 1, code=code.value[0], details=details, trailing=trailing)
        self.carrier.publish(reply, frames.encode(p))

    def finished(self, pipe: ServerPipe) -> None:
        self.calls.discard(pipe)
        if not self.calls:
            self._idle.set()
        if pipe.code is not _OK:
            self.num_failed += 1
        self._linger(pipe)

    def _linger(self, pipe: ServerPipe) -> None:
        """Keeps an answer for a while: if the connection breaks now, the caller can still have it afterwards."""
        now = pipe.loop.time()
        size = pipe.num_kept_bytes
        self._lingering.append((now, size, pipe))
        self._lingering_bytes += size
        while self._lingering and (
            (self.carrier.connected and now - self._lingering[0][0] > LINGER_S) or self._lingering_bytes > LINGER_BYTES
        ):
            _, size, old = self._lingering.popleft()
            self._lingering_bytes -= size
            old.forget()

    def _on_state(self, connected: bool) -> None:
        """Answers given just before a break may not have arrived: the watch asks for them when the connection is back."""
        if not connected:
            for _, _, pipe in self._lingering:
                pipe.resyncing = True
                self.watch.keep(pipe)
        else:
            now = asyncio.get_running_loop().time()
            self._lingering = deque((now, size, pipe) for _, size, pipe in self._lingering)

    async def drained(self, timeout_s: float) -> bool:
        """Waits until no call runs; False when that took too long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return self._idle.is_set()
        return True

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuses new calls, gives running ones `grace_s`, ends the rest with UNAVAILABLE."""
        self.stopping = True
        if grace_s and self.calls:
            await self.drained(grace_s)
        tasks = [pipe.task for pipe in self.calls if pipe.task is not None]
        for pipe in list(self.calls):
            pipe.end_with(Unavailable("the instance is stopping", retry_after_s=0.5))
        if tasks:
            await asyncio.wait(tasks, timeout=5.0)
        self._undo_state()
        for _, _, pipe in self._lingering:
            pipe.forget()
        self._lingering.clear()


class _CallDetails(grpc.HandlerCallDetails):
    method = ""
    invocation_metadata: Any = ()


class ServerPipe(Pipe):
    """One call being served."""

    def __init__(self, server: RpcServer, token: str, reply: str, opening: Packet, handler: Any) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server.carrier, server.watch, token, loop)
        self.server = server
        self.handler = handler
        self.method = opening.method
        self.caller = opening.caller
        self.metadata = opening.metadata
        self.peer = reply
        self._expected = 1
        self.send_window.grant(*opening.credit)
        self.deadline = None if opening.timeout_ms < 0 else loop.time() + opening.timeout_ms / 1000
        self.initial: frames.Metadata | None = None
        self.initial_sent = False
        self.introduced = False
        self.cancelled = False
        self.code = _OK
        self.ended = False
        self.callbacks: list[Callable[[Any], None]] = []
        self.task: asyncio.Task[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._watched = False

    def begin(self, opening: Packet) -> None:
        """Starts the handler. Unary requests arrive with the opening."""
        if opening.flags & frames.CLOSE:
            self.remote_closed = True
        self._inbound.extend(opening.messages)
        for m in opening.messages:
            self.receive_window.arrived(len(m))
        if self.deadline is not None:
            self._timers.append(self.loop.call_later(max(0.0, self.deadline - self.loop.time()), self._deadline_passed))
        if self.handler.request_streaming:
            self.emit(self.decorate(Packet(frames.CREDIT, credit=self.receive_window.first_grant())))
        else:
            self._timers.append(self.loop.call_later(ACCEPT_DELAY_S, self._introduce))
        self.task = self.loop.create_task(self._run())

    def _introduce(self) -> None:
        """Tells the caller who has its call, so that it can cancel it and knows whom to watch."""
        if not self.introduced and not self.ended:
            self.emit(self.decorate(Packet()))

    def decorate(self, p: Packet) -> Packet:
        if not self.introduced:
            self.introduced = True
            p.flags |= frames.PEER
            p.peer_subject = self.address
            p.peer_instance = self.server.instance
            p.peer_incarnation = self.server.incarnation
            self.watch.join(self, self.peer, self.caller.partition("/")[0], self.caller.partition("/")[2])
        if self.initial is not None and not self.initial_sent:
            self.initial_sent = True
            p.flags |= frames.INITIAL
            p.initial = self.initial
        return p

    # --- what arrives ---------------------------------------------------------------------------------------------

    def on_packet(self, p: Packet) -> None:
        if p.flags & frames.CLOSE:
            self.remote_closed = True
            self._wake(self._readers)
        if p.flags & frames.CANCEL:
            self._cancel()

    def on_broken(self, error: PlugmeshError) -> None:
        if not self.ended:
            if not isinstance(error, Unavailable):
                log.warning("rpc.call_broken", method=self.method, caller=self.caller, error=error.message)
                self.end_with(error)
            else:
                self._cancel()

    def on_nobody(self) -> None:
        if not self.resyncing and not self.watch.in_grace():
            self._cancel()

    def on_reset(self) -> None:
        self._cancel()
        self.forget()

    def check(self, now: float) -> None:
        pass  # the client asks

    def on_checked(self) -> None:
        self.send_check()

    def resync(self) -> None:
        if self.resyncing:
            self._introduce()     # kept like any packet, and sent once both ends know where they are
            super().resync()

    def on_resynced(self) -> None:
        if self.ended:
            self.watch.leave(self)

    def _cancel(self) -> None:
        """The caller gave up or is gone."""
        if not self.ended:
            self.cancelled = True
            self.end_with(Cancelled("the caller cancelled the call"))

    def _deadline_passed(self) -> None:
        if not self.ended:
            self.cancelled = True
            self.end_with(DeadlineExceeded("the deadline passed"))

    # --- the handler ----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        context = Context(self)
        for key, value in self.metadata:
            if key == trace.KEY and isinstance(value, str) and trace.is_valid(value):
                trace.traceparent.set(value)
        try:
            response = await self._call_handler(context)
        except asyncio.CancelledError:
            if not self.ended:
                self.end_with(Cancelled("the call was cancelled"))
            return
        except grpc.aio.AbortError:
            self._end(context.code_set or grpc.StatusCode.UNKNOWN, context.details_set, context.trailing)
        except PlugmeshError as e:
            self.end_with(e, context.trailing)
        except Exception as e:
            if self.ended:
                return
            if context.code_set not in (None, _OK):
                self._end(context.code_set, context.details_set, context.trailing)
            else:
                # Neither the peer nor the log gets the exception's text: it may quote a prompt.
                log.error("rpc.handler_failed", method=self.method, error=type(e).__name__, where=where(e))
                self.end_with(InternalError("internal error"), context.trailing)
        else:
            self._end(context.code_set or _OK, context.details_set, context.trailing, response)

    async def _call_handler(self, context: Context) -> bytes | None:
        h = self.handler
        request: Any
        if h.request_streaming:
            request = self._requests()
            behavior = h.stream_stream if h.response_streaming else h.stream_unary
        else:
            raw = await self.read_message()
            if raw is None:
                raise InternalError("the request is missing")
            request = self.deserialize(raw)
            behavior = h.unary_stream if h.response_streaming else h.unary_unary
        result = behavior(request, context)
        if h.response_streaming:
            if hasattr(result, "__aiter__"):
                try:
                    async for message in result:
                        await context.write(message)
                finally:
                    if hasattr(result, "aclose"):
                        await result.aclose()
            else:
                await result
            return None
        if inspect.isawaitable(result):
            result = await result
        response = self.serialize(result) if result is not None else None
        if response is None:
            if context.code_set in (None, _OK):
                raise InternalError("the handler returned nothing")
            return None
        self.check_size(response)
        return response

    async def _requests(self) -> AsyncIterator[Any]:
        while (raw := await self.read_message()) is not None:
            yield self.deserialize(raw)

    def deserialize(self, raw: bytes) -> Any:
        f = self.handler.request_deserializer
        try:
            return f(raw) if f else raw
        except Exception as e:
            raise InternalError("the request could not be decoded") from e

    def serialize(self, message: Any) -> bytes:
        f = self.handler.response_serializer
        return f(message) if f else message

    # --- the end --------------------------------------------------------------------------------------------------

    def end_with(self, error: PlugmeshError, trailing: frames.Metadata = ()) -> None:
        status = rpc_status.to_status(wire.rpc_status_of(error))
        self._end(status.code, status.details, trailing + tuple(status.trailing_metadata))

    def _end(self, code: grpc.StatusCode, details: str, trailing: frames.Metadata, response: bytes | None = None) -> None:
        """Sends the status, once, and stops the handler if it still runs."""
        if self.ended:
            return
        self.ended = True
        self.code = code
        for timer in self._timers:
            timer.cancel()
        p = self.add_batched(Packet())
        if response is not None:
            p.flags |= frames.DATA
            p.messages = (response,)
        p.flags |= frames.STATUS
        p.code, p.details, p.trailing = code.value[0], details, trailing
        if self.initial is not None and not self.initial_sent:
            self.initial_sent = True
            p.flags |= frames.INITIAL
            p.initial = self.initial
        self.emit(p)
        self.remote_closed = True
        self.close()
        if self.resyncing:
            self.watch.keep(self)
        else:
            self.watch.leave(self)
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
        for callback in self.callbacks:
            callback(None)
        self.server.finished(self)

    def deliver(self, message: Any) -> None:
        if not self.ended:
            super().deliver(message)
            return
        # Only a caller that did not get our answer still matters.
        try:
            p = frames.decode(message.data) if message.data else Packet()
        except DataLoss:
            return
        if p.flags & (frames.SYNC_REQUEST | frames.SYNC_ACK):
            self._on_sync(p, message.reply)
        elif p.flags & frames.CHECK:
            self.send_check()


class Context(grpc.aio.ServicerContext):
    """What a servicer sees of its call. As in gRPC, but for compression and transport security, which do not exist here."""

    def __init__(self, pipe: ServerPipe) -> None:
        self._pipe = pipe
        self.code_set: grpc.StatusCode | None = None
        self.details_set = ""
        self.trailing: frames.Metadata = ()

    async def read(self) -> Any:
        raw = await self._pipe.read_message()
        return grpc.aio.EOF if raw is None else self._pipe.deserialize(raw)

    async def write(self, message: Any) -> None:
        pipe = self._pipe
        if not await pipe.write_message(pipe.serialize(message)):
            raise asyncio.CancelledError

    def write_at_once(self, message: Any) -> bool:
        """Sends a message before it returns; False when that would have to wait or the call is over: nothing was sent, use `write`."""
        return self._pipe.write_at_once(self._pipe.serialize(message))

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        pipe = self._pipe
        if pipe.initial_sent:
            raise grpc.aio.UsageError("Initial metadata has already been sent.")
        pipe.initial = tuple((k, v) for k, v in initial_metadata)
        pipe.emit(pipe.decorate(pipe.add_batched(Packet())))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        if code is _OK:
            raise ValueError("abort needs a status other than OK")
        self.code_set = code
        self.details_set = details
        if trailing_metadata:
            self.trailing = tuple((k, v) for k, v in trailing_metadata)
        raise grpc.aio.AbortError("Locally aborted.")

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        await self.abort(status.code, status.details, status.trailing_metadata)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self.trailing = tuple((k, v) for k, v in trailing_metadata)

    def invocation_metadata(self) -> Any:
        return self._pipe.metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code_set = code

    def set_details(self, details: str) -> None:
        self.details_set = details

    def set_compression(self, compression: grpc.Compression) -> None:
        pass

    def disable_next_message_compression(self) -> None:
        pass

    def peer(self) -> str:
        return f"mesh:{self._pipe.caller or self._pipe.peer}"

    def peer_identities(self) -> Any:
        return None

    def peer_identity_key(self) -> str | None:
        return None

    def auth_context(self) -> Mapping[str, Any]:
        return {}

    def time_remaining(self) -> Any:
        deadline = self._pipe.deadline
        return None if deadline is None else max(0.0, deadline - self._pipe.loop.time())

    def trailing_metadata(self) -> Any:
        return self.trailing

    def code(self) -> Any:
        return self.code_set or _OK

    def details(self) -> Any:
        return self.details_set

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        if self._pipe.ended:
            callback(self)
        else:
            self._pipe.callbacks.append(lambda _: callback(self))

    def cancelled(self) -> bool:
        return self._pipe.cancelled

    def done(self) -> bool:
        return self._pipe.ended
