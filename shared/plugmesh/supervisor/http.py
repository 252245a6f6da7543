"""As much HTTP/1.1 as asking a gateway needs: one request per connection, answers read as they come."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from plugmesh import errors

MAX_HEAD_BYTES = 64 << 10
MAX_BODY_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and headers (names in lower case) of an answer whose body is still to be read."""

    status: int
    headers: Mapping[str, str]
    reader: asyncio.StreamReader
    timeout_s: float

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises Unavailable when the connection breaks, DeadlineExceeded when nothing comes for `timeout_s`."""
        try:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                while True:
                    async with asyncio.timeout(self.timeout_s):
                        size = int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16)
                        piece = await self.reader.readexactly(size + 2) if size <= MAX_BODY_BYTES else b""
                    if size == 0:
                        return
                    yield piece[:-2]
            else:
                left = int(self.headers.get("content-length", MAX_BODY_BYTES))
                while left > 0:
                    async with asyncio.timeout(self.timeout_s):
                        piece = await self.reader.read(min(left, 65536))
                    if not piece:
                        if "content-length" in self.headers:
                            raise errors.Unavailable("the gateway closed the connection in the middle of its answer")
                        return
                    left -= len(piece)
                    yield piece
        except TimeoutError:
            raise errors.DeadlineExceeded(f"the gateway sent nothing for {self.timeout_s:.0f} s") from None
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ValueError) as e:
            raise errors.Unavailable("the gateway closed the connection in the middle of its answer") from e

    async def json(self) -> Any:
        """The whole body as JSON. Raises Unavailable when it is none or too large."""
        body = b""
        async for piece in self.pieces():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise errors.Unavailable("the gateway's answer is too large")
        try:
            return json.loads(body)
        except ValueError as e:
            raise errors.Unavailable("the gateway's answer is not JSON") from e

    async def events(self) -> AsyncIterator[Any]:
        """`data:` lines of a server-sent event stream as JSON, until `[DONE]`.

        Raises:
            PlugmeshError: The stream holds an error event, or ends without `[DONE]`.
        """
        pending = b""
        async for piece in self.pieces():
            pending += piece
            *lines, pending = pending.split(b"\n")
            if len(pending) > MAX_BODY_BYTES:
                raise errors.Unavailable("an event of the gateway is too large")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if isinstance(event, dict) and event.get("error"):
                    raise error_of(500, event)
                yield event
        raise errors.Unavailable("the gateway's answer ended too early")


@contextlib.asynccontextmanager
async def request(
    method: str, url: str, body: Any = None, *, api_key: str | None = None, timeout_s: float = 60.0
) -> AsyncIterator[Answer]:
    """Sends one request and yields the answer; leaving the block closes the connection, which cancels the work behind it.

    Raises:
        Unavailable: Nobody listens there.
        DeadlineExceeded: No answer within `timeout_s`.
        PlugmeshError: Any status from 400 on, with the gateway's own message.
    """
    parts = urllib.parse.urlsplit(url)
    secure = parts.scheme == "https"
    host, port = parts.hostname or "127.0.0.1", parts.port or (443 if secure else 80)
    payload = b"" if body is None else json.dumps(body).encode()
    head = [f"{method} {parts.path or '/'} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close", "Accept: */*", "User-Agent: plugmesh"]
    if body is not None:
        head += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
    if api_key:
        head.append(f"Authorization: Bearer {api_key}")
    if any("\r" in line or "\n" in line for line in head):
        raise errors.InvalidRequest("a line break in a URL or key")
    writer = None
    try:
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(
                    host, port, limit=MAX_HEAD_BYTES, ssl=ssl.create_default_context() if secure else None
                )
                writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + payload)
                await writer.drain()
                lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                status = int(lines[0].split(" ", 2)[1])
        except TimeoutError:
            raise errors.DeadlineExceeded(f"no answer from {parts.netloc} within {timeout_s:.0f} s") from None
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, IndexError) as e:
            raise errors.Unavailable(f"cannot reach the gateway at {parts.netloc}") from e
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
        answer = Answer(status, headers, reader, timeout_s)
        if status >= 400:
            raise error_of(status, await _maybe_json(answer))
        yield answer
    finally:
        if writer is not None:
            writer.close()


async def _maybe_json(answer: Answer) -> Any:
    try:
        return await answer.json()
    except errors.PlugmeshError:
        return None


def error_of(status: int, body: Any) -> errors.PlugmeshError:
    """The typed error behind an answer in OpenAI's error shape."""
    detail = body.get("error") if isinstance(body, dict) else None
    detail = detail if isinstance(detail, dict) else {}
    message = str(detail.get("message") or f"the gateway answered {status}")
    known = errors.by_code().get(str(detail.get("code")))
    if known is not None and known not in (errors.CorruptModelFile, errors.PluginError):
        return known(message)
    by_status: dict[int, type[errors.PlugmeshError]] = {
        400: errors.InvalidRequest, 401: errors.Unauthenticated, 403: errors.PermissionDenied, 404: errors.NotFound,
        429: errors.Overloaded, 503: errors.Unavailable, 504: errors.DeadlineExceeded,
    }  # fmt: skip
    return by_status.get(status, errors.InternalError)(message)
