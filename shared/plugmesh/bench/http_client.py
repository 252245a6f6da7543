"""The load generator's HTTP client: OpenAI streams over raw connections, at a few microseconds an event.

It shares the machine with the server it measures, so nothing is parsed that need not be: events are told apart by their bytes, and only
the one with `usage` is read as JSON. HTTP/1.1 with keep-alive; one request at a time on a connection.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plugmesh.bench.metrics import Record
from plugmesh.bench.workloads import Call
from plugmesh.errors import InvalidRequest, Unavailable

_USAGE = re.compile(rb'"usage":\s*\{')
_NO_CHOICES = re.compile(rb'"choices":\s*\[\]')
_OUTPUT = re.compile(rb'"(?:text|content|reasoning_content)":\s*"(?!")')
_EMPTY_TEXT = re.compile(rb'"text":\s*""')
_FINISHED = re.compile(rb'"finish_reason":\s*"')
_ERROR = re.compile(rb'^\{\s*"error"|^error:')
_MAX_HEAD = 1 << 16
_CLOSED = "the server closed the connection"


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a server calls the options that make lengths equal, beyond OpenAI's own."""

    name: str
    exact: Mapping[str, Any] = field(default_factory=dict)
    uncached: Mapping[str, Any] = field(default_factory=dict)

    def body(self, model: str, call: Call, *, use_cache: bool) -> bytes:
        """A streamed greedy completion of exactly `call.max_tokens` tokens. A constrained one ends as its schema says, which servers do not let be ignored."""
        exact = {k: v for k, v in self.exact.items() if k != "ignore_eos"} | {"response_format": response_format(call.schema)} if call.schema is not None else self.exact
        return json.dumps({
            "model": model, "prompt": call.prompt, "max_tokens": call.max_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **exact, **({} if use_cache else self.uncached),
        }).encode()  # fmt: skip


def response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """As OpenAI's clients send a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema), "strict": True}}


DIALECTS = {
    d.name: d
    for d in (
        Dialect("openai"),  # lengths may differ: it has no way to forbid the end of a text
        Dialect("plugmesh", {"ignore_eos": True}),
        Dialect("llama.cpp", {"ignore_eos": True, "cache_prompt": True}, {"cache_prompt": False}),
        Dialect("vllm", {"ignore_eos": True}),
        Dialect("transformers", {"ignore_eos": True}),
    )
}


def events_of(buffer: bytearray) -> list[bytes]:
    """Takes the complete SSE events out of a buffer; returns the data of each. Lines may end in LF or CR LF."""
    if b"\r" in buffer:
        keep = buffer.endswith(b"\r")  # its LF may be in the next piece
        text = bytes(buffer[: len(buffer) - keep]).replace(b"\r\n", b"\n")
        buffer[:] = text + b"\r" * keep
    end = buffer.rfind(b"\n\n")
    if end < 0:
        return []
    whole = bytes(buffer[:end])
    del buffer[: end + 2]
    found = []
    for event in whole.split(b"\n\n"):
        if event.startswith(b"data:") and b"\n" not in event:
            found.append(event[5:].lstrip(b" "))
        else:
            lines = [line[5:].lstrip(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines))
            elif event.startswith(b"error:"):
                found.append(event)
    return found


def has_output(event: bytes) -> bool:
    """Whether an event stands for generated tokens: text, or an empty text in a stream that goes on (bytes held back)."""
    if _OUTPUT.search(event):
        return True
    return bool(_EMPTY_TEXT.search(event)) and not _FINISHED.search(event) and not _NO_CHOICES.search(event)


class _Reply:
    """What one request has received so far."""

    __slots__ = ("body", "cached", "done", "error", "is_complete", "num_out", "num_prompt", "sse", "status", "times")

    def __init__(self) -> None:
        self.times: list[float] = []
        self.num_prompt = self.num_out = 0
        self.cached = -1
        self.error = ""
        self.status = 0
        self.sse = bytearray()
        self.body = bytearray()
        self.is_complete = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, piece: bytes | bytearray, now: float) -> None:
        if self.status != 200:
            self.body += piece
            return
        self.sse += piece
        for event in events_of(self.sse):
            if has_output(event):
                self.times.append(now)
            if _USAGE.search(event):
                self._usage(event)
            elif _ERROR.search(event):
                self.error = "error in the stream: " + _message(event)

    def _usage(self, event: bytes) -> None:
        usage = json.loads(event)["usage"]
        self.num_prompt, self.num_out = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        details = usage.get("prompt_tokens_details") or {}
        if details.get("cached_tokens") is not None:
            self.cached = int(details["cached_tokens"])

    def finish(self, error: str = "") -> None:
        if error:
            self.error = self.error or error
        elif self.status != 200:
            self.error = f"HTTP {self.status}: {_message(bytes(self.body))}"
        if not self.done.done():
            self.done.set_result(None)


def _message(raw: bytes) -> str:
    """The server's own words about an error, shortened; never a prompt."""
    try:
        value = json.loads(raw)
        error = value.get("error", value)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
    except (ValueError, AttributeError):
        return raw[:100].decode("utf-8", "replace")


class _Connection(asyncio.Protocol):
    """Parses one HTTP/1.1 answer after another."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.reply: _Reply | None = None
        self._buffer = bytearray()
        self._in_body = False
        self._left = 0  # bytes left of a body with a length, or of a chunk
        self._chunked = False
        self._until_close = False
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self.reply is not None:
            reply, self.reply = self.reply, None
            reply.finish("" if self._until_close and exc is None else _CLOSED)

    def send(self, head: bytes, body: bytes) -> _Reply:
        assert self.transport is not None and self.reply is None
        self.reply = _Reply()
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        return self.reply

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._buffer += data
        while self._buffer and self.reply is not None:
            before = len(self._buffer), self._in_body
            self._advance(now)
            if (len(self._buffer), self._in_body) == before:
                return

    def _advance(self, now: float) -> None:
        if not self._in_body:
            self._head()
        elif self._chunked:
            self._chunk(now)
        else:
            assert self.reply is not None
            piece = self._buffer if self._until_close else self._buffer[: self._left]
            self.reply.take(piece, now)
            self._left -= len(piece)
            del self._buffer[: len(piece)]
            if not self._until_close and self._left <= 0:
                self._end()

    def _head(self) -> None:
        assert self.reply is not None
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD:
                self._fail("the answer has no end of its head")
            return
        lines = bytes(self._buffer[:end]).lower().split(b"\r\n")
        del self._buffer[: end + 4]
        try:
            status = int(lines[0].split(b" ", 2)[1])
        except (IndexError, ValueError):
            return self._fail("the answer is not HTTP")
        if status < 200:  # 100 Continue
            return
        self.reply.status = status
        headers = dict(line.split(b":", 1) for line in lines[1:] if b":" in line)
        self._chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        self._until_close = not self._chunked and b"content-length" not in headers
        self._left = 0 if self._chunked else int(headers.get(b"content-length", b"0"))
        self._in_body = True
        if not self._chunked and not self._until_close and self._left == 0:
            self._end()

    def _chunk(self, now: float) -> None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return
        try:
            size = int(bytes(self._buffer[:end]).split(b";", 1)[0], 16)
        except ValueError:
            return self._fail("the answer's chunks are broken")
        if len(self._buffer) < end + 2 + size + 2:
            return
        if size:
            assert self.reply is not None
            self.reply.take(self._buffer[end + 2 : end + 2 + size], now)
        del self._buffer[: end + 2 + size + 2]
        if not size:
            self._end()

    def _end(self) -> None:
        reply, self.reply = self.reply, None
        self._in_body = False
        if reply is not None:
            reply.finish()

    def _fail(self, why: str) -> None:
        if self.reply is not None:
            reply, self.reply = self.reply, None
            reply.finish(why)
        self.close()


class Client:
    """Sends calls to one OpenAI endpoint and gives a Record for each; keeps connections between calls. One event loop.

    Args:
        base_url: With or without "/v1" at its end.
        model: Name to ask for.
        dialect: What the server understands beyond OpenAI's options.
        timeout_s: Per request; a slower one is a failed record.
    """

    def __init__(self, base_url: str, model: str, dialect: Dialect, *, api_key: str = "", timeout_s: float = 600.0) -> None:
        parts = urllib.parse.urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequest(f"{base_url!r} is not an http or https address", param="url")
        self.base_url = base_url
        self.model, self.dialect, self._timeout_s = model, dialect, timeout_s
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        path = parts.path.rstrip("/")
        path = path if path.endswith("/v1") else path + "/v1"
        lines = [f"POST {path}/completions HTTP/1.1", f"host: {parts.netloc}", "content-type: application/json", "accept: text/event-stream"]
        if api_key:
            lines.append(f"authorization: Bearer {api_key}")
        self._head = ("\r\n".join(lines) + "\r\n").encode()
        self._idle: list[_Connection] = []

    async def connect(self, num: int) -> None:
        """Opens connections ahead, so that no request pays for it. Raises Unavailable."""
        while len(self._idle) < num:
            self._idle.append(await self._open())

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(30):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except (OSError, TimeoutError) as e:
            raise Unavailable(f"{self.base_url} does not answer: {e or 'timeout'}") from e
        return connection

    def encode(self, call: Call, *, use_cache: bool = True) -> bytes:
        """The request's body, made before the clock starts."""
        return self.dialect.body(self.model, call, use_cache=use_cache)

    async def send(self, call: Call, body: bytes, due_s: float = float("nan")) -> Record:
        """Sends one request and waits for its end; a failure is a record with an error, never an exception."""
        record = await self._send_once(call, body, due_s)
        if record.error == _CLOSED and not record.times_s:  # kept alive on this side only; a fresh connection tells whether the server is well
            self.close()
            record = await self._send_once(call, body, due_s)
        return record

    async def _send_once(self, call: Call, body: bytes, due_s: float) -> Record:
        connection = None
        while self._idle and connection is None:
            candidate = self._idle.pop()
            connection = candidate if candidate.is_open else None
        try:
            connection = connection or await self._open()
        except Unavailable as e:
            now = time.perf_counter()
            return Record(now, (), 0, 0, len(call.prompt), call.max_tokens, due_s=due_s, error=e.message)
        sent = time.perf_counter()
        reply = connection.send(self._head, body)
        try:
            async with asyncio.timeout(self._timeout_s):
                await reply.done
        except TimeoutError:
            reply.error = f"no end within {self._timeout_s:g} s"
        finally:
            if connection.reply is not None:  # cancelled or timed out: what still comes belongs to nobody
                connection.close()
            elif connection.is_open:
                self._idle.append(connection)
        if not reply.error and reply.num_out == 0:
            reply.error = "the stream ended without usage"
        return Record(
            sent, tuple(reply.times), reply.num_prompt, reply.num_out, len(call.prompt), call.max_tokens, reply.cached, due_s, reply.error
        )

    def close(self) -> None:
        """Closes the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
