"""The NATS carrier: one connection, one inbox subscription, a table of routes.

A callback only looks up a route and calls it (those of the inbox at once, while the connection is read); a handler that
takes time runs in a task of its own. Publishing never waits: a message goes to the connection on the spot. Where something is
in front of it or the broker has to catch up, the client's `publish` coroutine is started instead, and only if it has to wait,
too, a task finishes it, with later messages queued behind it.
"""

from __future__ import annotations

import asyncio
import pathlib
import secrets
import ssl
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import nats
import nats.errors
import structlog

from plugmesh.errors import ConfigError, Unavailable
from plugmesh.mesh import subjects
from plugmesh.mesh.rpc.carrier import UNKNOWN, OnMessage, Undo
from plugmesh.mesh.rpc.frames import MAX_MESSAGE_BYTES, MAX_METADATA_BYTES
from plugmesh.mesh.rpc.nats_wire import Rest, WireClient, start

log = structlog.get_logger()

HEAD_ROOM_BYTES = MAX_METADATA_BYTES + 4096
MAX_BACKLOG_BYTES = 64 << 20    # publishing fails beyond; the credit windows keep it far below


class NatsCarrier:
    """Implements `carrier.Carrier` over a NATS connection that reconnects for ever. Make it with `connect`."""

    def __init__(self, client: WireClient, mesh: str, role: str) -> None:
        self.client = client
        self.inbox = subjects.inbox(mesh, role, secrets.token_hex(8))
        self.routes: dict[str, OnMessage] = {}
        self.max_message_bytes: int | None = MAX_MESSAGE_BYTES
        self.errors: deque[str] = deque(maxlen=64)      # asynchronous errors the broker reported, newest last
        self.num_disconnects = 0
        self._connected = False
        self._closed = False
        self._state: list[Callable[[bool], None]] = []
        self._backlog: deque[tuple[str, bytes, str]] = deque()
        self._backlog_bytes = 0
        self._finisher: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls, url: str, *, mesh: str, role: str, user: str = "", password: str = "",
        password_file: pathlib.Path | None = None, tls_ca_file: pathlib.Path | None = None, name: str = "", timeout_s: float = 10.0,
    ) -> NatsCarrier:
        """Connects, trying for `timeout_s`.

        Raises:
            ConfigError: The password file cannot be read.
            Unavailable: No broker, or it refused the credentials.
        """
        if password_file is not None:
            try:
                password = password_file.read_text().strip()  # noqa: ASYNC240 - a few bytes, before anything runs
            except OSError as e:
                raise ConfigError(f"cannot read mesh.nats.password_file {password_file}: {e.strerror}") from e
        client = WireClient()
        self = cls(client, mesh, role)
        options: dict[str, Any] = {}
        if user:
            options.update(user=user, password=password)
        if tls_ca_file is not None:
            options["tls"] = ssl.create_default_context(cafile=str(tls_ca_file))
        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(
                    url, name=name or f"{mesh}.{role}", inbox_prefix=subjects.client_inbox_prefix(mesh, role),
                    max_reconnect_attempts=-1, reconnect_time_wait=0.2, connect_timeout=2, ping_interval=5, max_outstanding_pings=2,
                    error_cb=self._on_error, disconnected_cb=self._on_disconnected, reconnected_cb=self._on_reconnected,
                    closed_cb=self._on_closed, **options,
                )
        except (TimeoutError, nats.errors.Error, OSError) as e:
            reason = self.errors[-1] if self.errors else type(e).__name__
            await client.close()
            raise Unavailable(f"cannot reach the broker at {url}: {reason}", retry_after_s=1.0) from e
        self._connected = True
        # A broker with a lower cap of its own lowers ours: a packet is a message, its head and its metadata.
        self.max_message_bytes = min(MAX_MESSAGE_BYTES, max(1024, client.max_payload - HEAD_ROOM_BYTES))
        client.take_directly(await client.subscribe(f"{self.inbox}.*", cb=_nothing), self._on_inbox)
        await client.flush(5)
        return self

    @property
    def connected(self) -> bool:
        return self._connected

    # --- sending --------------------------------------------------------------------------------------------------

    def publish(self, subject: str, data: bytes, reply: str = "") -> bool:
        if not self._connected:
            return False
        if self._finisher is not None:
            if self._backlog_bytes + len(data) > MAX_BACKLOG_BYTES:
                log.warning("nats.backlog_full", num_bytes=self._backlog_bytes)
                return False
            self._backlog.append((subject, data, reply))
            self._backlog_bytes += len(data)
            return True
        try:
            if self.client.publish_at_once(subject, data, reply):
                return True
        except (OSError, RuntimeError) as e:  # RuntimeError: the event loop's, of a socket that is closed
            self._note(e)
            return False
        rest = start(self.client.publish(subject, data, reply))
        if rest is not None:
            self._finisher = asyncio.get_running_loop().create_task(self._finish(rest))
        return True

    async def _finish(self, rest: Rest) -> None:
        try:
            await rest
            while self._backlog:
                subject, data, reply = self._backlog.popleft()
                self._backlog_bytes -= len(data)
                await self.client.publish(subject, data, reply)
        except nats.errors.Error as e:
            self._note(e)
        finally:
            self._backlog.clear()
            self._backlog_bytes = 0
            self._finisher = None

    async def publish_now(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        """Raises Unavailable when there is no connection."""
        if not self._connected:
            raise Unavailable("the broker is away", retry_after_s=1.0)
        try:
            await self.client.publish(subject, data, headers=headers)
        except nats.errors.Error as e:
            raise Unavailable(f"cannot publish: {e}", retry_after_s=1.0) from e

    # --- receiving ------------------------------------------------------------------------------------------------

    def _on_inbox(self, message: Any) -> None:
        route = self.routes.get(message.subject.rpartition(".")[2]) or self.routes.get(UNKNOWN)
        if route is not None:
            route(message)

    async def subscribe(self, subject: str, callback: OnMessage, queue: str = "", *, max_pending: int = 65536) -> Undo:
        async def deliver(message: Any) -> None:
            callback(message)

        try:
            subscription = await self.client.subscribe(subject, queue=queue, cb=deliver, pending_msgs_limit=max_pending, pending_bytes_limit=0)
        except nats.errors.Error as e:
            raise Unavailable(f"cannot subscribe: {e}", retry_after_s=1.0) from e
        undone = False

        def undo() -> None:
            nonlocal undone
            if undone or self._closed or self.client.is_closed:
                return
            undone = True
            # What the broker has already sent us is still worked on: only new messages stop.
            task = asyncio.get_running_loop().create_task(_quietly(subscription.drain() if self._connected else subscription.unsubscribe()))
            _undo_tasks.add(task)
            task.add_done_callback(_undo_tasks.discard)

        return undo

    # --- state ----------------------------------------------------------------------------------------------------

    def on_state(self, callback: Callable[[bool], None]) -> Undo:
        self._state.append(callback)
        return lambda: self._state.remove(callback) if callback in self._state else None

    def _tell(self, connected: bool) -> None:
        if connected != self._connected:
            self._connected = connected
            for callback in list(self._state):
                try:
                    callback(connected)
                except Exception:
                    log.exception("nats.state_callback_failed")

    async def _on_error(self, e: Exception) -> None:
        self._note(e)

    def _note(self, e: Exception) -> None:
        text = str(e) or type(e).__name__
        self.errors.append(text)
        if not self._connected or isinstance(e, OSError):
            log.debug("nats.error", error=text)
        else:
            log.warning("nats.error", error=text)

    async def _on_disconnected(self) -> None:
        if self._connected and not self._closed:
            self.num_disconnects += 1
            log.warning("nats.disconnected")
        self._tell(False)

    async def _on_reconnected(self) -> None:
        log.info("nats.reconnected")
        self._tell(True)

    async def _on_closed(self) -> None:
        self._tell(False)

    @property
    def server_id(self) -> str:
        """Which life of the broker this is: a restarted one has another id."""
        return str(self.client._server_info.get("server_id", ""))

    async def flush(self, timeout_s: float = 2.0) -> None:
        """Returns when the broker has everything published so far. Best effort when it is away."""
        if self._finisher is not None:
            await asyncio.wait([self._finisher], timeout=timeout_s)
        if self._connected:
            await _quietly(self.client.flush(timeout_s))  # type: ignore[arg-type]

    async def close(self) -> None:
        """Flushes and closes. Idempotent."""
        if self._closed:
            return
        await self.flush()
        self._closed = True
        self._connected = False
        if self._finisher is not None:
            self._finisher.cancel()
        await _quietly(self.client.close())


async def _nothing(message: Any) -> None:
    """For a subscription whose messages are taken directly; without a callback nats-py would keep them."""


_undo_tasks: set[asyncio.Task[None]] = set()


async def _quietly(what: Coroutine[Any, Any, Any]) -> None:
    try:
        async with asyncio.timeout(5.0):
            await what
    except (nats.errors.Error, OSError, TimeoutError):
        pass
