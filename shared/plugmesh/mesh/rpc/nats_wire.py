"""The bytes of a NATS connection: a protocol that hands messages over while they arrive, and a client that writes at once.

nats-py reads with a task behind a StreamReader, matches every line against seven expressions and writes from another task
behind a queue: at one message in and one out per step of an engine, three wake-ups and as many turns of the event loop.
Here a message of a subscription that is taken directly goes from the socket's callback to its receiver, and a message that
is published goes to the socket before `publish_at_once` returns. Everything else (connecting, TLS, credentials,
reconnecting, JetStream, other subscriptions) stays with nats-py, which sees a transport and a reading task as ever.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any
from urllib.parse import ParseResult

import structlog
from nats import errors
from nats.aio.client import Client
from nats.aio.transport import Transport

from plugmesh.mesh.rpc.carrier import OnMessage

log = structlog.get_logger()

MAX_LINE_BYTES = 1 << 20      # INFO lists the servers of a cluster; nothing else comes near
MAX_SUBJECTS = 4096           # subjects that are known to be well-formed
_CRLF = b"\r\n"
_BAD_SUBJECT = re.compile(r"[\s\x00]")


@dataclass(frozen=True, slots=True)
class Received:
    """Implements `carrier.Message`."""

    subject: str
    data: bytes
    reply: str
    headers: dict[str, str] | None


class Wire(asyncio.Protocol):
    """One TCP connection. Bytes go to `sink` when there is one, else they wait to be read."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.transport: Any = None
        self.paused = False
        self.at_eof = False
        self.error: Exception | None = None
        self.closed: asyncio.Future[None] = loop.create_future()
        self.sink: Callable[[bytes], None] | None = None
        self.on_end: Callable[[], None] | None = None
        self._buffer = bytearray()
        self._readers: list[asyncio.Future[None]] = []
        self._writers: list[asyncio.Future[None]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.sink is not None:
            self.sink(data)
        else:
            self._buffer += data
            _wake(self._readers)

    def eof_received(self) -> bool:
        self._ended()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = self.error or exc
        self.paused = False
        if not self.closed.done():
            self.closed.set_result(None)
        _wake(self._writers)
        self._ended()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        _wake(self._writers)

    def take(self) -> bytes:
        """What arrived while there was no sink."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    async def readline(self) -> bytes:
        """A line with its end, or what there is at the end of the connection."""
        while (end := self._buffer.find(b"\n")) < 0 and not self.at_eof:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise errors.ProtocolError("nats: a line without an end")
            await _wait(self._readers)
        size = len(self._buffer) if end < 0 else end + 1
        line = bytes(self._buffer[:size])
        del self._buffer[:size]
        return line

    async def drained(self) -> None:
        """Returns when the peer has taken enough. Raises what broke the connection."""
        if self.error is not None:
            raise self.error
        while self.paused:
            await _wait(self._writers)
        if self.closed.done():
            raise self.error or ConnectionResetError("connection lost")

    def _ended(self) -> None:
        self.at_eof = True
        _wake(self._readers)
        if self.on_end is not None:
            self.on_end()


class WireTransport(Transport):
    """A `Wire` as nats-py wants it; the same object serves one connection after another."""

    def __init__(self) -> None:
        self.wire: Wire | None = None

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(connect_timeout):
            _, self.wire = await loop.create_connection(Wire, uri.hostname or "127.0.0.1", uri.port or 4222)

    async def connect_tls(self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int) -> None:
        wire = self._wire
        host = uri if isinstance(uri, str) else uri.hostname
        async with asyncio.timeout(connect_timeout):
            wire.transport = await asyncio.get_running_loop().start_tls(wire.transport, wire, ssl_context, server_hostname=host)

    @property
    def _wire(self) -> Wire:
        assert self.wire is not None, "connect comes first"
        return self.wire

    def write(self, payload: bytes) -> None:
        self._wire.transport.write(payload)

    def writelines(self, payload: list[bytes]) -> None:
        if self.wire is not None:  # a client that is closed before it ever connected writes what it has, too
            self.wire.transport.write(b"".join(payload))

    async def read(self, buffer_size: int) -> bytes:
        raise NotImplementedError("see WireClient._read_loop")

    async def readline(self) -> bytes:
        return await self._wire.readline()

    async def drain(self) -> None:
        if self.wire is not None:
            await self.wire.drained()

    async def wait_closed(self) -> None:
        if self.wire is not None:
            await asyncio.shield(self.wire.closed)
            if self.wire.error is not None:
                raise self.wire.error

    def close(self) -> None:
        if self.wire is not None and self.wire.transport is not None:
            self.wire.transport.close()

    def abort(self) -> None:
        """Breaks the connection, as if the process had died."""
        self._wire.transport.abort()

    def at_eof(self) -> bool:
        return self.wire is None or self.wire.at_eof

    def __bool__(self) -> bool:
        return True  # nats-py would replace a transport that says no, before it connects


class Reader:
    """The protocol's lines and payloads, as they arrive in pieces.

    Messages for a sid in `direct` go to its callback at once. All else becomes a coroutine of `handle`, which is run on the
    spot; should it have to wait, what comes after it waits, too. `failed` is told what ends the reading.
    """

    def __init__(self, handle: Handler, direct: dict[int, OnMessage], failed: Callable[[BaseException], None], stats: dict[str, int]) -> None:
        self._handle = handle
        self._direct = direct
        self._failed = failed
        self._stats = stats                              # the client's counts; nats-py raises them for what `handle` gets
        self._parts: list[bytes] = []
        self._num_waiting = 0
        self._needed = 0                                 # before it can go on
        self._task: asyncio.Task[None] | None = None
        self._is_feeding = False
        self.is_over = False

    def feed(self, data: bytes) -> None:
        """Never raises: an error goes to `failed`, and later bytes are ignored."""
        if self.is_over:
            return
        self._parts.append(data)
        self._num_waiting += len(data)
        if self._is_feeding or self._task is not None or self._num_waiting < self._needed:
            return
        self._is_feeding = True
        try:
            whole = data if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            self._num_waiting = self._needed = 0
            at = self._parse(whole)
            if at < len(whole):
                rest = whole[at:]
                self._parts.insert(0, rest)
                self._num_waiting += len(rest)
        except Exception as e:
            self._fail(e)
        finally:
            self._is_feeding = False

    def stop(self) -> None:
        self.is_over = True
        self._parts.clear()
        if self._task is not None:
            self._task.cancel()

    def _fail(self, e: BaseException) -> None:
        if not self.is_over:
            self.is_over = True
            self._parts.clear()
            self._failed(e)

    def _parse(self, buffer: bytes) -> int:
        """Works on whole lines and payloads; returns where the first incomplete one begins. Sets `_needed`."""
        at, size = 0, len(buffer)
        while at < size and not self.is_over and self._task is None:
            end = buffer.find(_CRLF, at)
            if end < 0:
                if size - at > MAX_LINE_BYTES:
                    raise errors.ProtocolError("nats: a line without an end")
                break
            start = end + 2
            if buffer.startswith(b"MSG ", at):
                words = buffer[at + 4 : end].split()
                if not 3 <= len(words) <= 4:
                    raise errors.ProtocolError("nats: malformed MSG")
                stop = start + int(words[-1])
                if size < stop + 2:
                    self._needed = stop + 2 - at
                    break
                if buffer[stop : stop + 2] != _CRLF:
                    raise errors.ProtocolError("nats: malformed MSG")
                self._message(words, buffer[start:stop], b"")
                at = stop + 2
            elif buffer.startswith(b"HMSG ", at):
                words = buffer[at + 5 : end].split()
                if not 4 <= len(words) <= 5:
                    raise errors.ProtocolError("nats: malformed HMSG")
                body, stop = start + int(words[-2]), start + int(words[-1])
                if not start <= body <= stop:
                    raise errors.ProtocolError("nats: malformed HMSG")
                if size < stop + 2:
                    self._needed = stop + 2 - at
                    break
                if buffer[stop : stop + 2] != _CRLF:
                    raise errors.ProtocolError("nats: malformed HMSG")
                del words[-2]
                self._message(words, buffer[body:stop], buffer[start:body])
                at = stop + 2
            else:
                self._control(buffer[at:end])
                at = start
        return at

    def _message(self, words: list[bytes], data: bytes, headers: bytes) -> None:
        if len(data) + len(headers) != int(words[-1]):
            raise errors.ProtocolError("nats: malformed MSG")  # a negative length
        sid = int(words[1])
        reply = words[2] if len(words) == 4 else b""
        callback = self._direct.get(sid)
        if callback is None:
            self._run(self._handle.message(sid, words[0], reply, data, headers))
            return
        self._stats["in_msgs"] += 1
        self._stats["in_bytes"] += len(data)
        if headers:
            self._run(self._with_headers(callback, words[0], reply, data, headers))
        else:
            _call(callback, Received(words[0].decode(), data, reply.decode(), None))

    async def _with_headers(self, callback: OnMessage, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        _call(callback, Received(subject.decode(), data, reply.decode(), await self._handle.headers(headers)))

    def _control(self, line: bytes) -> None:
        if line == b"PING":
            self._run(self._handle.ping())
        elif line == b"PONG":
            self._run(self._handle.pong())
        elif line.startswith(b"INFO "):
            self._run(self._handle.info(line[5:]))
        elif line.startswith(b"-ERR"):
            self._run(self._handle.error(line[4:].strip().decode("utf-8", "replace").lower()))
        elif line.strip() not in (b"+OK", b""):
            word = line.split(None, 1)[0]
            if word == line or not word.isalpha():
                raise errors.ProtocolError("nats: unknown protocol")
            raise errors.ProtocolError(f"nats: unknown operation {word[:16].decode('ascii', 'replace')}")

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        rest = start(coroutine)
        if rest is not None:
            self._task = asyncio.get_running_loop().create_task(self._finish(rest))

    async def _finish(self, rest: Rest) -> None:
        try:
            await rest
        except Exception as e:
            self._fail(e)
        finally:
            self._task = None
        self.feed(b"")


class Handler:
    """What the reader has others do. Each coroutine may wait; it should not often."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def message(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        await self._client._process_msg(sid, subject, reply, data, headers)

    async def headers(self, raw: bytes) -> dict[str, str] | None:
        return await self._client._process_headers(raw)

    async def ping(self) -> None:
        await self._client._process_ping()

    async def pong(self) -> None:
        await self._client._process_pong()

    async def info(self, raw: bytes) -> None:
        await self._client._process_info(json.loads(raw))

    async def error(self, text: str) -> None:
        await self._client._process_err(text)


class WireClient(Client):
    """nats-py's client on a `WireTransport`; over websockets it is what it always was."""

    _transport: Transport | None

    def __init__(self) -> None:
        super().__init__()
        self._direct: dict[int, OnMessage] = {}
        self._subjects: dict[str, bytes] = {}    # well-formed, with their bytes

    def take_directly(self, subscription: Any, callback: OnMessage) -> None:
        """From now on `callback` gets what arrives for this subscription. It must neither wait nor raise."""
        self._direct[subscription._id] = callback

    def publish_at_once(self, subject: str, data: bytes, reply: str = "") -> bool:
        """Writes a message to the connection; False when that would have to wait, or overtake others: then `publish`.

        Only while the connection stands (the caller knows by the callbacks). Raises BadSubjectError.
        """
        transport = self._transport
        if self._status != Client.CONNECTED or self._pending or len(data) > self._max_payload or not isinstance(transport, WireTransport):
            return False
        wire = transport.wire
        if wire is None or wire.paused or wire.at_eof:
            return False
        subjects = self._subjects
        to = subjects.get(subject) or self._check(subject)
        back = (subjects.get(reply) or self._check(reply)) if reply else b""
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(data)
        wire.transport.write(b"PUB %b %b %d\r\n%b\r\n" % (to, back, len(data), data))
        return True

    def _check(self, subject: str) -> bytes:
        if not subject or _BAD_SUBJECT.search(subject):
            raise errors.BadSubjectError
        if len(self._subjects) >= MAX_SUBJECTS:
            self._subjects.clear()
        raw = self._subjects[subject] = subject.encode()
        return raw

    async def _connect_to_server(self, s: Any) -> None:
        if not self._transport and s.uri.scheme not in ("ws", "wss"):
            self._transport = WireTransport()
        await super()._connect_to_server(s)

    async def _read_loop(self) -> None:
        transport = self._transport
        if not isinstance(transport, WireTransport) or transport.wire is None:
            await super()._read_loop()
            return
        wire = transport.wire
        over: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

        def end(error: BaseException | None) -> None:
            if not over.done():
                over.set_result(error)

        reader = Reader(Handler(self), self._direct, end, self.stats)

        def sink(data: bytes) -> None:
            if self.is_closed or self.is_reconnecting:
                return  # as nats-py: what a connection that was given up still brings is not read
            reader.feed(data)

        wire.sink = sink
        wire.on_end = lambda: end(wire.error)
        try:
            sink(wire.take())
            if wire.at_eof:
                end(wire.error)
            error = await over
        except asyncio.CancelledError:
            return
        finally:
            wire.sink = lambda data: None
            wire.on_end = None
            reader.stop()
        if self.is_closed or self.is_reconnecting:
            return
        if error is None:
            error = errors.UnexpectedEOF()
            await self._error_cb(error)
        elif not isinstance(error, OSError | errors.Error):
            log.error("nats.reading_failed", error=type(error).__name__)
            error = errors.ProtocolError()
        assert isinstance(error, Exception)
        await self._process_op_err(error)


class Rest:
    """A coroutine that has already run up to its first wait, made awaitable from there."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, None, Any]:
        coroutine, waits_for = self._coroutine, self._waits_for
        while True:
            try:
                value = yield waits_for
            except BaseException as e:
                try:
                    waits_for = coroutine.throw(e)
                except StopIteration as stop:
                    return stop.value
            else:
                try:
                    waits_for = coroutine.send(value)
                except StopIteration as stop:
                    return stop.value


def start(coroutine: Coroutine[Any, Any, Any]) -> Rest | None:
    """Runs a coroutine up to its first wait. None when it came to its end without one."""
    try:
        return Rest(coroutine, coroutine.send(None))
    except StopIteration:
        return None


def _call(callback: OnMessage, message: Received) -> None:
    try:
        callback(message)
    except Exception as e:  # an error here would end the reading of the connection
        log.exception("nats.callback_failed", error=type(e).__name__)


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    for future in waiters:
        if not future.done():
            future.set_result(None)
    waiters.clear()


async def _wait(waiters: list[asyncio.Future[None]]) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters.append(future)
    await future
