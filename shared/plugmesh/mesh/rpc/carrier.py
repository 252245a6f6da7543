"""The seam between RPC and what moves its packets: NATS, or memory within one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Message(Protocol):
    """What arrived. `headers` is None for most; a broker's "nobody listens" has {"Status": "503"} and no data."""

    subject: str
    data: bytes
    reply: str
    headers: dict[str, str] | None


OnMessage = Callable[[Any], None]  # gets a Message; must not block
UNKNOWN = ""    # no token is empty
Undo = Callable[[], None]


class Carrier(Protocol):
    """One connection. Delivers a connection's messages to one subject in order; may lose some when it breaks.

    Messages to `<inbox>.<token>` reach the callback in `routes[token]`, else that in `routes[UNKNOWN]`.
    """

    inbox: str
    routes: dict[str, OnMessage]
    max_message_bytes: int | None

    @property
    def connected(self) -> bool: ...

    def publish(self, subject: str, data: bytes, reply: str = "") -> bool:
        """Hands a message over without waiting; False when there is no connection. With `reply`, the answer "nobody
        listens" comes back to that subject."""

    async def subscribe(self, subject: str, callback: OnMessage, queue: str = "") -> Undo:
        """With `queue`, one of the group's members gets each message."""

    def on_state(self, callback: Callable[[bool], None]) -> Undo:
        """Called with False when the connection breaks and True when it is there again."""


def is_no_responders(message: Message) -> bool:
    """Whether the broker says that nobody listens to a subject we published to."""
    return bool(message.headers) and not message.data and (message.headers or {}).get("Status") == "503"
