"""The in-process carrier: the same packets, moved through memory."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from plugmesh.mesh.rpc.carrier import UNKNOWN, OnMessage, Undo
from plugmesh.mesh.rpc.frames import MAX_MESSAGE_BYTES

NO_RESPONDERS = {"Status": "503"}


@dataclass(slots=True)
class LocalMessage:
    """See `carrier.Message`."""

    subject: str
    data: bytes
    reply: str = ""
    headers: dict[str, str] | None = None


@dataclass(slots=True)
class _Subscription:
    callback: OnMessage
    queue: str
    carrier: LocalCarrier
    active: bool = True


@dataclass(slots=True)
class _State:
    callbacks: list[Callable[[bool], None]] = field(default_factory=list)


class LocalHub:
    """Stands where the broker stands: subjects without wildcards, queue groups, "nobody listens". One event loop only."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, list[_Subscription]] = {}
        self._inboxes: dict[str, LocalCarrier] = {}
        self._backlog: deque[tuple[OnMessage, LocalMessage, LocalCarrier]] = deque()
        self._scheduled = False
        self._numbers = itertools.count()
        self.drop: Callable[[str, bytes], bool] | None = None    # fault injection: lose these messages

    def carrier(self, name: str = "local", *, max_message_bytes: int | None = MAX_MESSAGE_BYTES) -> LocalCarrier:
        """A connection of its own."""
        c = LocalCarrier(self, f"local.in.{name}.{next(self._numbers)}", max_message_bytes)
        self._inboxes[c.inbox] = c
        return c

    def publish(self, subject: str, data: bytes, reply: str) -> None:
        if self.drop is not None and self.drop(subject, data):
            return
        message = LocalMessage(subject, data, reply)
        found = False
        root, _, token = subject.rpartition(".")
        owner = self._inboxes.get(root)
        if owner is not None:
            found = True
            route = owner.routes.get(token) or owner.routes.get(UNKNOWN)
            if route is not None:
                self._post(route, message, owner)
        groups: dict[str, list[_Subscription]] = {}
        for s in self._subscriptions.get(subject, ()):
            if s.queue:
                groups.setdefault(s.queue, []).append(s)
            else:
                found = True
                self._post(s.callback, message, s.carrier)
        for members in groups.values():
            found = True
            chosen = random.choice(members)
            self._post(chosen.callback, message, chosen.carrier)
        if not found and reply:
            root, _, token = reply.rpartition(".")
            asker = self._inboxes.get(root)
            route = asker.routes.get(token) if asker is not None else None
            if route is not None and asker is not None:
                self._post(route, LocalMessage(reply, b"", headers=NO_RESPONDERS), asker)

    def _post(self, callback: OnMessage, message: LocalMessage, owner: LocalCarrier) -> None:
        self._backlog.append((callback, message, owner))
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._deliver)

    def _deliver(self) -> None:
        # Only what is there now: what these callbacks publish comes in the next round, so that nobody starves.
        for _ in range(len(self._backlog)):
            callback, message, owner = self._backlog.popleft()
            if owner.connected:
                try:
                    callback(message)
                except Exception as e:
                    asyncio.get_running_loop().call_exception_handler({"message": "carrier callback failed", "exception": e})
        self._scheduled = bool(self._backlog)
        if self._scheduled:
            asyncio.get_running_loop().call_soon(self._deliver)


class LocalCarrier:
    """Implements `carrier.Carrier`. `kill` makes it look like a process that died, `set_connected` like a lost broker."""

    def __init__(self, hub: LocalHub, inbox: str, max_message_bytes: int | None) -> None:
        self.hub = hub
        self.inbox = inbox
        self.routes: dict[str, OnMessage] = {}
        self.max_message_bytes = max_message_bytes
        self._connected = True
        self._state = _State()
        self._mine: list[tuple[str, _Subscription]] = []

    @property
    def connected(self) -> bool:
        return self._connected

    def publish(self, subject: str, data: bytes, reply: str = "") -> bool:
        if not self._connected:
            return False
        self.hub.publish(subject, data, reply)
        return True

    async def subscribe(self, subject: str, callback: OnMessage, queue: str = "") -> Undo:
        s = _Subscription(callback, queue, self)
        self.hub._subscriptions.setdefault(subject, []).append(s)
        self._mine.append((subject, s))

        def undo() -> None:
            if s.active:
                s.active = False
                self.hub._subscriptions[subject].remove(s)
                self._mine.remove((subject, s))

        return undo

    def on_state(self, callback: Callable[[bool], None]) -> Undo:
        self._state.callbacks.append(callback)
        return lambda: self._state.callbacks.remove(callback) if callback in self._state.callbacks else None

    def set_connected(self, connected: bool) -> None:
        """Fault injection: a broker that went away or is back. Subscriptions come back with it."""
        if connected == self._connected:
            return
        self._connected = connected
        if connected:
            self.hub._inboxes[self.inbox] = self
            for subject, s in self._mine:
                self.hub._subscriptions.setdefault(subject, []).append(s)
        else:
            self._vanish()
        for callback in list(self._state.callbacks):
            callback(connected)

    def kill(self) -> None:
        """Fault injection: gone without a word."""
        self._connected = False
        self._vanish()
        self._mine.clear()

    def _vanish(self) -> None:
        self.hub._inboxes.pop(self.inbox, None)
        for subject, s in self._mine:
            self.hub._subscriptions[subject].remove(s)
