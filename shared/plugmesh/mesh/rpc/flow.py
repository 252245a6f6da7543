"""Credit: how many messages and bytes a sender may have under way before its reader took them.

The reader grants; the sender waits when it has nothing left. So a slow reader holds at most one window of messages, and
a sender that produces faster than that blocks in `write`.
"""

from __future__ import annotations

from plugmesh.errors import DataLoss

WINDOW_MESSAGES = 256
WINDOW_BYTES = 1 << 20


class SendWindow:
    """What this side may still send. Starts at nothing; the reader's first grant opens it."""

    __slots__ = ("bytes", "messages")

    def __init__(self) -> None:
        self.messages = 0
        self.bytes = 0

    def is_open(self) -> bool:
        """True when one more message may go, whatever its size: the last one may overdraw the bytes."""
        return self.messages > 0 and self.bytes > 0

    def spend(self, num_bytes: int) -> None:
        assert self.is_open()
        self.messages -= 1
        self.bytes -= num_bytes

    def grant(self, messages: int, num_bytes: int) -> None:
        self.messages += messages
        self.bytes += num_bytes


class ReceiveWindow:
    """What the other side may still send, and what to grant it once messages were taken by the application."""

    __slots__ = ("_bytes_out", "_messages_out", "_taken_bytes", "_taken_messages", "window_bytes", "window_messages")

    def __init__(self, window_messages: int = WINDOW_MESSAGES, window_bytes: int = WINDOW_BYTES) -> None:
        self.window_messages = window_messages
        self.window_bytes = window_bytes
        self._messages_out = window_messages
        self._bytes_out = window_bytes
        self._taken_messages = 0
        self._taken_bytes = 0

    def first_grant(self) -> tuple[int, int]:
        return self.window_messages, self.window_bytes

    def arrived(self, num_bytes: int) -> None:
        """Raises DataLoss when the sender overran its credit."""
        if self._messages_out <= 0 or self._bytes_out <= 0:
            raise DataLoss("the sender exceeded its credit")
        self._messages_out -= 1
        self._bytes_out -= num_bytes

    def taken(self, num_bytes: int) -> tuple[int, int] | None:
        """The application took a message. Returns a grant when half the window has been used up, else None."""
        self._taken_messages += 1
        self._taken_bytes += num_bytes
        if self._taken_messages * 2 < self.window_messages and self._taken_bytes * 2 < self.window_bytes:
            return None
        grant = (self._taken_messages, self._taken_bytes)
        self._messages_out += self._taken_messages
        self._bytes_out += self._taken_bytes
        self._taken_messages = self._taken_bytes = 0
        return grant
