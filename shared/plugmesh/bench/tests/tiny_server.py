"""A real HTTP server with OpenAI's completions route and no model, for tests of the load generator."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable


class TinyServer:
    """Streams `max_tokens` events `gap_s` apart. `mangle` turns the bytes of the whole answer into the pieces that are written."""

    def __init__(self, *, first_s: float = 0.0, gap_s: float = 0.0, mangle: Callable[[bytes], list[bytes]] | None = None, fail_status: int = 0,
                 wrong_by: int = 0, close_after: int = 0) -> None:
        self.first_s, self.gap_s, self.mangle, self.fail_status, self.wrong_by, self.close_after = first_s, gap_s, mangle, fail_status, wrong_by, close_after
        self.in_flight = self.most_in_flight = self.num_connections = 0
        self.bodies: list[dict] = []
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        served = 0
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(next((h.split(":")[1] for h in head.split("\r\n") if h.startswith("content-length")), "0"))
                body = json.loads(await reader.readexactly(length)) if length else {}
                if head.startswith("get"):
                    self._json(writer, 200, {"data": [{"id": "tiny"}]})
                elif self.fail_status:
                    self._json(writer, self.fail_status, {"error": {"message": "no"}})
                elif not body.get("stream"):
                    self._json(writer, 200, {"choices": [{"text": " Paris"}]})
                else:
                    self.bodies.append(body)
                    await self._stream(writer, body)
                served += 1
                if self.close_after and served >= self.close_after:
                    break
        writer.close()

    def _json(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data)

    async def _stream(self, writer: asyncio.StreamWriter, body: dict) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        num = body["max_tokens"] + self.wrong_by
        events = [{"choices": [{"text": f"t{i}", "finish_reason": None}], "usage": None} for i in range(num)]
        events += [{"choices": [{"text": "", "finish_reason": "length"}]}]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": num, "prompt_tokens_details": {"cached_tokens": 3}}
        events += [{"choices": [], "usage": usage}]
        try:
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            chunks = [chunk(b"data: " + json.dumps(e).encode() + b"\n\n") for e in events] + [chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"]
            if self.mangle is not None:
                for piece in self.mangle(head + b"".join(chunks)):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                return
            writer.write(head)
            await asyncio.sleep(self.first_s)
            for i, piece in enumerate(chunks):
                writer.write(piece)
                if self.gap_s and 0 < i < num:
                    await asyncio.sleep(self.gap_s)
        finally:
            self.in_flight -= 1


def chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


@contextlib.asynccontextmanager
async def serving(server: TinyServer) -> AsyncIterator[TinyServer]:
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()
