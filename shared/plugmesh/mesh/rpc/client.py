"""The caller's end: call objects that behave like those of `grpc.aio`.

`ClientPipe` does the work and is what the carrier's routes hold; the call objects of the four shapes are thin and only
the application holds them, so that a call nobody can reach any more is cancelled (as gRPC does).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_status import rpc_status

from plugmesh import wire
from plugmesh.errors import DeadlineExceeded, InternalError, PayloadTooLarge, PlugmeshError, Unavailable
from plugmesh.mesh import trace
from plugmesh.mesh.rpc import frames
from plugmesh.mesh.rpc.carrier import Carrier
from plugmesh.mesh.rpc.frames import Packet
from plugmesh.mesh.rpc.peers import PeerWatch
from plugmesh.mesh.rpc.pipe import Pipe

log = structlog.get_logger()

CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_OK = grpc.StatusCode.OK
CANCELLED_BY_CALLER = "cancelled by the caller"
TOMBSTONE_S = 30.0


class ClientPipe(Pipe):
    """A call in progress: its status is None until it is over."""

    def __init__(self, carrier: Carrier, watch: PeerWatch, token: str, loop: asyncio.AbstractEventLoop, subject: str, target: str) -> None:
        super().__init__(carrier, watch, token, loop)
        self.subject = subject
        self.target = target
        self.status: tuple[grpc.StatusCode, str, frames.Metadata] | None = None
        self.initial: frames.Metadata | None = None
        self.locally_cancelled = False
        self.deadline: float | None = None           # loop time
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: list[asyncio.Future[None]] = []   # for the status
        self._waiting_initial: list[asyncio.Future[None]] = []
        self.done_callbacks: list[Callable[[], None]] = []
        self.sender: asyncio.Task[None] | None = None
        self.half_closed = False

    # --- opening --------------------------------------------------------------------------------------------------

    def open(self, method: str, caller: str, metadata: frames.Metadata, timeout: float | None, request: bytes | None) -> None:
        """Sends the first packet; `request` is the only message of a unary-request call, which it closes."""
        if timeout is not None:
            self.deadline = self.loop.time() + timeout
            if timeout <= 0:
                self.finish_with(DeadlineExceeded("the deadline had passed before the call was made"))
                return
            self._timer = self.loop.call_later(timeout, self._deadline_passed)
        if not self.carrier.connected:
            self.finish_with(Unavailable("the broker is away", retry_after_s=1.0))
            return
        if frames.metadata_bytes(metadata) > frames.MAX_METADATA_BYTES:
            self.finish_with(PayloadTooLarge(f"metadata is over the limit of {frames.MAX_METADATA_BYTES} bytes"))
            return
        p = Packet(frames.OPEN | frames.CREDIT, method=method, caller=caller, metadata=metadata)
        p.timeout_ms = -1 if timeout is None else max(1, int(timeout * 1000))
        p.credit = self.receive_window.first_grant()
        if request is not None:
            try:
                self.check_size(request)
            except PayloadTooLarge as e:
                self.finish_with(e)
                return
            p.flags |= frames.DATA | frames.CLOSE
            p.messages = (request,)
            self.half_closed = True
        self.watch.opened(self)
        self.emit(p, subject=self.subject)

    # --- what arrives ---------------------------------------------------------------------------------------------

    def deliver(self, message: Any) -> None:
        if self.closed:
            self._after_the_end(message)
            return
        super().deliver(message)

    def _after_the_end(self, message: Any) -> None:
        """We gave the call up before the server said where it is: tell it as soon as it does."""
        try:
            p = frames.decode(message.data) if message.data else Packet()
        except PlugmeshError:
            p = Packet()
        if p.flags & frames.PEER and not p.flags & frames.STATUS:
            self._expected = p.sequence + 1
            self.peer = p.peer_subject
            self.emit(Packet(frames.CANCEL, reason=CANCELLED_BY_CALLER))
        elif p.flags & frames.SYNC_REQUEST and message.reply:
            self.carrier.publish(message.reply, frames.encode(Packet(frames.RESET)))
        self.forget()

    def on_packet(self, p: Packet) -> None:
        if p.flags & frames.PEER and self.closed:  # whoever took this packet's messages has ended the call
            self.peer = p.peer_subject
            if not p.flags & frames.STATUS:
                self.emit(Packet(frames.CANCEL, reason=CANCELLED_BY_CALLER))
            self.forget()
            return
        if p.flags & frames.PEER:
            self.peer_known(p.peer_subject)
            self.watch.join(self, p.peer_subject, p.peer_instance, p.peer_incarnation)
        if p.flags & frames.INITIAL:
            self._set_initial(p.initial)
        if p.flags & frames.STATUS:
            self._finish(CODES.get(p.code, grpc.StatusCode.UNKNOWN), p.details, p.trailing)

    def on_broken(self, error: PlugmeshError) -> None:
        if self.status is None:
            self._send_cancel(error.message)
            self.finish_with(error)

    def on_nobody(self) -> None:
        if self.peer_state is None and not self.peer:
            self.finish_with(Unavailable(f"no instance of {self.target} is serving", retry_after_s=1.0))
        elif not self.resyncing and not self.watch.in_grace():
            self.finish_with(Unavailable(f"the instance of {self.target} that ran the call is gone", retry_after_s=1.0))

    def on_reset(self) -> None:
        if self.status is None:
            self.finish_with(Unavailable("the call did not survive an interruption of the connection", retry_after_s=0.5))

    # --- the end --------------------------------------------------------------------------------------------------

    def _deadline_passed(self) -> None:
        if self.status is None:
            self._send_cancel("deadline")
            self.finish_with(DeadlineExceeded("the deadline passed"))

    def cancel(self, reason: str = CANCELLED_BY_CALLER) -> bool:
        if self.status is not None:
            return False
        self._send_cancel(reason)
        self.locally_cancelled = True
        self._finish(grpc.StatusCode.CANCELLED, reason, ())
        return True

    def _send_cancel(self, reason: str) -> None:
        if self.peer and not self.closed:
            self.add_batched(Packet())               # what waits for a flush is of no interest any more
            self.emit(Packet(frames.CANCEL, reason=reason))

    def finish_with(self, error: PlugmeshError) -> None:
        """Ends the call here with a typed error, as if the server had sent it."""
        if self.status is None:
            status = rpc_status.to_status(wire.rpc_status_of(error))
            self._finish(status.code, status.details, tuple(status.trailing_metadata))

    def _finish(self, code: grpc.StatusCode, details: str, trailing: frames.Metadata) -> None:
        if self.status is not None:
            return
        self.status = (code, details, trailing)
        self.remote_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        by_server = self.peer != "" or code is _OK
        opened = self._next > 0
        self.close()
        if self.sender is not None:
            self.sender.cancel()
        if by_server or not opened or not self.carrier.connected:
            self.forget()
        else:
            # The server's first packet may still come; its address is what we need to cancel it.
            self.watch.leave(self)
            self.loop.call_later(TOMBSTONE_S, self.forget)
        self._set_initial(())
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()
        for callback in self.done_callbacks:
            callback()
        self.done_callbacks.clear()

    def _set_initial(self, metadata: frames.Metadata) -> None:
        if self.initial is None:
            self.initial = metadata
            for future in self._waiting_initial:
                if not future.done():
                    future.set_result(None)
            self._waiting_initial.clear()

    # --- waiting --------------------------------------------------------------------------------------------------

    async def wait_done(self) -> tuple[grpc.StatusCode, str, frames.Metadata]:
        if self.status is None:
            future = self.loop.create_future()
            self._waiting.append(future)
            await future
        assert self.status is not None
        return self.status

    async def wait_initial(self) -> frames.Metadata:
        if self.initial is None:
            future = self.loop.create_future()
            self._waiting_initial.append(future)
            await future
        return self.initial or ()

    def error(self) -> grpc.aio.AioRpcError:
        assert self.status is not None
        code, details, trailing = self.status
        return grpc.aio.AioRpcError(code, grpc.aio.Metadata(*(self.initial or ())), grpc.aio.Metadata(*trailing), details)

    def raise_for_status(self) -> None:
        """Raises what grpc.aio raises: CancelledError for our own cancel, AioRpcError for any other failure."""
        assert self.status is not None
        if self.status[0] is _OK:
            return
        if self.locally_cancelled:
            raise asyncio.CancelledError
        raise self.error()


def call_metadata(metadata: Any) -> frames.Metadata:
    """Invocation metadata as pairs, with the current traceparent added."""
    pairs = tuple((k, v) for k, v in metadata) if metadata is not None else ()
    current = trace.traceparent.get()
    if current and not any(k == trace.KEY for k, _ in pairs):
        pairs += ((trace.KEY, current),)
    return pairs


class _Call(grpc.aio.Call):
    """What the four shapes share. Cancels the call when it is garbage-collected."""

    def __init__(self, pipe: ClientPipe, serialize: Callable[[Any], bytes], deserialize: Callable[[bytes], Any]) -> None:
        self._pipe = pipe
        self._serialize = serialize
        self._deserialize = deserialize

    def __del__(self) -> None:
        pipe = getattr(self, "_pipe", None)
        if pipe is not None and pipe.status is None and not pipe.loop.is_closed():
            pipe.cancel("cancelled upon garbage collection")

    def cancelled(self) -> bool:
        status = self._pipe.status
        return status is not None and status[0] is grpc.StatusCode.CANCELLED

    def done(self) -> bool:
        return self._pipe.status is not None

    def time_remaining(self) -> float | None:
        deadline = self._pipe.deadline
        return None if deadline is None else max(0.0, deadline - self._pipe.loop.time())

    def cancel(self) -> bool:
        return self._pipe.cancel()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        if self._pipe.status is not None:
            callback(self)
        else:
            self._pipe.done_callbacks.append(lambda: callback(self))

    async def initial_metadata(self) -> grpc.aio.Metadata:
        return grpc.aio.Metadata(*await self._pipe.wait_initial())

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        return grpc.aio.Metadata(*(await self._pipe.wait_done())[2])

    async def code(self) -> grpc.StatusCode:
        return (await self._pipe.wait_done())[0]

    async def details(self) -> str:
        return (await self._pipe.wait_done())[1]

    async def wait_for_connection(self) -> None:
        await self._pipe.wait_initial()
        status = self._pipe.status
        if status is not None and status[0] is not _OK:
            self._pipe.raise_for_status()


class _UnaryResponse(_Call):
    _response: Any = None
    _has_response = False

    def __await__(self) -> Generator[Any, None, Any]:
        return self._result().__await__()

    async def _result(self) -> Any:
        pipe = self._pipe
        try:
            await pipe.wait_done()
        except asyncio.CancelledError:
            pipe.cancel()
            raise
        pipe.raise_for_status()
        if not self._has_response:
            if not pipe.has_inbound():
                raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "the server sent no response")
            self._response = self._deserialize(pipe.take())
            self._has_response = True
        return self._response


class _StreamResponse(_Call):
    async def read(self) -> Any:
        pipe = self._pipe
        try:
            raw = await pipe.read_message()
        except asyncio.CancelledError:
            pipe.cancel()
            raise
        if raw is None:
            pipe.raise_for_status()
            return grpc.aio.EOF
        if pipe.locally_cancelled:
            raise asyncio.CancelledError
        return self._deserialize(raw)

    async def hand_over_to(self, callback: Callable[[Any], None]) -> None:
        """Calls `callback` with each message while it arrives, without a wake-up of any task; returns at the call's end.

        Instead of reading, and without its flow control's effect: the callback is done with a message when it returns. Raises
        as reading does. A callback that raises ends the call.
        """
        pipe, deserialize = self._pipe, self._deserialize

        def take(raw: bytes) -> None:
            try:
                callback(deserialize(raw))
            except Exception as e:
                log.exception("rpc.callback_failed", error=type(e).__name__)
                pipe.on_broken(InternalError("the receiver of a stream failed"))

        pipe.hand_over_to(take)
        try:
            await pipe.wait_done()
        except asyncio.CancelledError:
            pipe.cancel()
            raise
        pipe.raise_for_status()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages()

    async def _messages(self) -> AsyncIterator[Any]:
        while True:
            message = await self.read()
            if message is grpc.aio.EOF:
                return
            yield message


class _StreamRequest(_Call):
    def _start_sender(self, requests: AsyncIterable[Any] | Iterable[Any] | None) -> None:
        if requests is not None:
            pipe = self._pipe
            if pipe.status is None:
                pipe.sender = pipe.loop.create_task(_send_all(pipe, requests, self._serialize))
        self._uses_iterator = requests is not None

    async def write(self, request: Any) -> None:
        if self._uses_iterator:
            raise grpc.aio.UsageError("The iterator and read/write APIs may not be mixed on a single RPC.")
        pipe = self._pipe
        if pipe.status is not None:
            pipe.raise_for_status()
            raise asyncio.InvalidStateError("RPC already finished.")
        if pipe.half_closed:
            raise asyncio.InvalidStateError('RPC is half closed after calling "done_writing".')
        try:
            sent = await pipe.write_message(self._serialize(request))
        except asyncio.CancelledError:
            pipe.cancel()
            raise
        except PayloadTooLarge as e:
            pipe.on_broken(e)
            raise pipe.error() from None
        if not sent:
            pipe.raise_for_status()
            raise asyncio.InvalidStateError("RPC already finished.")

    async def done_writing(self) -> None:
        if self._uses_iterator:
            raise grpc.aio.UsageError("The iterator and read/write APIs may not be mixed on a single RPC.")
        _half_close(self._pipe)


def _half_close(pipe: ClientPipe) -> None:
    if pipe.status is None and not pipe.half_closed:
        pipe.half_closed = True
        pipe.emit(pipe.add_batched(Packet(frames.CLOSE)))


async def _send_all(pipe: ClientPipe, requests: AsyncIterable[Any] | Iterable[Any], serialize: Callable[[Any], bytes]) -> None:
    """Owns the request iterator of a call; ends with the call."""
    try:
        if isinstance(requests, AsyncIterable):
            async for request in requests:
                if not await pipe.write_message(serialize(request)):
                    return
        else:
            for request in requests:
                if not await pipe.write_message(serialize(request)):
                    return
        _half_close(pipe)
    except PayloadTooLarge as e:
        pipe.on_broken(e)
    except asyncio.CancelledError:
        raise
    except Exception as e:
        # As in gRPC: a request iterator that raises cancels the call. Its text stays here.
        pipe.cancel(f"the request iterator raised {type(e).__name__}")
    finally:
        if inspect.isasyncgen(requests):
            await requests.aclose()


class UnaryUnaryCall(_UnaryResponse, grpc.aio.UnaryUnaryCall):
    """A unary call in progress."""


class UnaryStreamCall(_StreamResponse, grpc.aio.UnaryStreamCall):
    """A server-streaming call in progress."""


class StreamUnaryCall(_StreamRequest, _UnaryResponse, grpc.aio.StreamUnaryCall):
    """A client-streaming call in progress."""


class StreamStreamCall(_StreamRequest, _StreamResponse, grpc.aio.StreamStreamCall):
    """A bidirectional call in progress."""
