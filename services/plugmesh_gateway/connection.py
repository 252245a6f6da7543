"""Bytes of a running answer straight to its connection, past the tasks and middleware that its beginning went through.

An answer's head, its first bytes and its end go through ASGI, like any answer. In between each step of the engine has a few
bytes for every stream, and there the way through ASGI (a wake-up of the request's task, a timeout, five coroutines) costs
several times what the bytes themselves cost.
"""

from __future__ import annotations

from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_KEY = "plugmesh.cycle"


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which lets the application reach the connection of a request."""

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # The application starts in a task of its own, so it always finds this.
        self.scope["extensions"] = {_KEY: self.cycle}  # type: ignore[dict-item] # an object of ours, not of the specification's


class Connection:
    """Where the chunks of one answer go. Use from the event loop, after the answer's head was sent, until its last part.

    Never waits: while `is_ready` says no (the client has to catch up, or is gone) the caller goes the long way, which waits.
    """

    __slots__ = ("_cycle", "_flow", "_transport")

    def __init__(self, cycle: Any) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport

    @classmethod
    def of(cls, scope: Scope) -> Connection | None:
        """The connection of a request; None under another server, or for HTTP/1.0, whose answers have no chunks."""
        cycle = (scope.get("extensions") or {}).get(_KEY)
        if cycle is None or scope.get("http_version") != "1.1" or scope["method"] == "HEAD":
            return None
        return cls(cycle)

    def is_ready(self) -> bool:
        """Whether `write` may be called: the head is out, and the client keeps up."""
        cycle = self._cycle
        return bool(cycle.chunked_encoding) and not self._flow.write_paused and not cycle.disconnected and not cycle.response_complete

    def write(self, data: bytes) -> None:
        """Sends one chunk; nothing for no bytes, since an empty chunk ends an answer. Only when `is_ready`."""
        if data:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
