"""Serves `/metrics` on the event loop: enough of HTTP for Prometheus, and no thread."""

from __future__ import annotations

import asyncio

import prometheus_client
from prometheus_client.exposition import generate_latest

_TIMEOUT_S = 5.0
_MAX_HEAD_BYTES = 16 << 10


class MetricsServer:
    """`GET /metrics` for one registry."""

    def __init__(self, registry: prometheus_client.CollectorRegistry) -> None:
        self.registry = registry
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int = 0) -> int:
        """Returns the port. Raises OSError when it is taken."""
        self._server = await asyncio.start_server(self._answer, host, port, limit=_MAX_HEAD_BYTES)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self.port

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
            method, path, *_ = head.split(b"\r\n", 1)[0].split(b" ")
            if method != b"GET":
                status, kind, body = b"405 Method Not Allowed", b"text/plain", b"GET only\n"
            elif path.split(b"?")[0] != b"/metrics":
                status, kind, body = b"404 Not Found", b"text/plain", b"see /metrics\n"
            else:
                status, kind, body = b"200 OK", prometheus_client.CONTENT_TYPE_LATEST.encode(), generate_latest(self.registry)
            writer.write(b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, kind, len(body), body))
            async with asyncio.timeout(_TIMEOUT_S):
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, ConnectionError):
            pass
        finally:
            writer.close()
