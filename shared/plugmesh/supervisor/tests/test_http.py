"""The small HTTP client against a real socket that cuts answers wherever it likes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh import errors
from plugmesh.supervisor import http


@contextlib.asynccontextmanager
async def answering(raw: bytes, cuts: list[int] | None = None, *, keep_open: bool = False) -> AsyncIterator[str]:
    """A server that answers every request with `raw`, in pieces that end at `cuts`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                await reader.readexactly(int(line.split(b":")[1]))
        edges = [0, *sorted({c % (len(raw) + 1) for c in cuts or []}), len(raw)]
        for a, b in itertools.pairwise(edges):
            writer.write(raw[a:b])
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(0)
        if keep_open:
            await reader.read()  # until the client goes away
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


def chunked(body: bytes, sizes: list[int]) -> bytes:
    out, at = b"", 0
    for size in [*sizes, len(body)]:
        piece = body[at : at + size]
        at += size
        if piece:
            out += f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
    return out + b"0\r\n\r\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(max_size=20), max_size=6),
    sizes=st.lists(st.integers(1, 30), max_size=20),
    cuts=st.lists(st.integers(0, 2000), max_size=8),
    is_chunked=st.booleans(),
)
def test_events_arrive_whole_however_the_answer_is_cut(texts: list[str], sizes: list[int], cuts: list[int], is_chunked: bool) -> None:
    body = b"".join(b"data: " + json.dumps({"t": t}).encode() + b"\n\n: a comment\n" for t in texts) + b"data: [DONE]\n\n"
    raw = HEAD + (b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, sizes) if is_chunked else f"Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def read() -> list[str]:
        async with answering(raw, cuts) as url, http.request("POST", url, {"x": 1}, timeout_s=5) as answer:
            return [event["t"] async for event in answer.events()]

    assert asyncio.run(read()) == texts


@pytest.mark.parametrize(
    ("raw", "error", "says"),
    [
        (b"HTTP/1.1 429 Too Many\r\n\r\n" + json.dumps({"error": {"message": "full", "code": "overloaded"}}).encode(), errors.Overloaded, "full"),
        (b"HTTP/1.1 401 No\r\n\r\n", errors.Unauthenticated, "answered 401"),
        (b"HTTP/1.1 500 Oops\r\n\r\n<html>", errors.InternalError, "answered 500"),
        (b"garbage\r\n\r\n", errors.Unavailable, "cannot reach"),
        (b"", errors.Unavailable, "cannot reach"),
        (HEAD + b"\r\ndata: 1\n\n", errors.Unavailable, "too early"),
        (HEAD + b"Content-Length: 100\r\n\r\ndata: 1\n\n", errors.Unavailable, "middle"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", errors.Unavailable, "middle"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n", errors.Unavailable, "middle"),
        (HEAD + b"\r\n" + b'data: {"error": {"message": "gone", "code": "unavailable"}}\n\n', errors.Unavailable, "gone"),
    ],
)
async def test_a_bad_answer_is_a_typed_error(raw: bytes, error: type[errors.PlugmeshError], says: str) -> None:
    with pytest.raises(error, match=says):
        async with answering(raw) as url, http.request("GET", url, timeout_s=5) as answer:
            _ = [event async for event in answer.events()]


async def test_silence_ends_in_time() -> None:
    async with answering(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", keep_open=True) as url:
        with pytest.raises(errors.DeadlineExceeded, match="nothing for"):
            async with http.request("GET", url, timeout_s=0.1) as answer:
                _ = [piece async for piece in answer.pieces()]


async def test_nobody_there_and_bad_input() -> None:
    async with answering(b"") as url:
        pass
    with pytest.raises(errors.Unavailable, match="cannot reach"):
        async with http.request("GET", url, timeout_s=5):
            pass
    with pytest.raises(errors.InvalidRequest):
        async with http.request("GET", url, api_key="a\r\nX: y", timeout_s=5):
            pass
