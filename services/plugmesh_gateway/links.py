"""One bidirectional stream to one instance, kept open and shared by all requests that use this instance."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import structlog

from plugmesh.errors import Overloaded, PlugmeshError, Unavailable
from plugmesh.types import InstanceInfo
from plugmesh.wire import error_from_rpc

log = structlog.get_logger()


def was_cancelled() -> bool:
    """In `except CancelledError`: whether this task was cancelled, and not just an RPC in it.

    A stub raises CancelledError also when the peer ended the call with the status CANCELLED, or when its channel closed.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class Link:
    """A stream that starts at once and ends by `close` or by being lost, once.

    Args:
        open_call: The stub's stream-stream method; gets an async iterator of messages to send.
        on_message: Called for each message; must not raise.
        on_lost: Called once when the stream ends other than by `close`.
        max_unsent: Messages that the peer has not taken yet; above it the link counts as lost.

    Attributes:
        last_alive: time.monotonic() of the last sign of life.
    """

    def __init__(
        self, info: InstanceInfo, open_call: Callable[[AsyncIterator[Any]], Any], *, on_message: Callable[[Link, Any], None],
        on_lost: Callable[[Link, PlugmeshError], None], max_unsent: int = 4096,
    ) -> None:
        self.info = info
        self.is_open = True
        self.last_alive = time.monotonic()
        self._open_call = open_call
        self._on_message = on_message
        self._on_lost = on_lost
        self._max_unsent = max_unsent
        self._unsent: collections.deque[Any] = collections.deque()
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._read(), name=f"link:{info.instance_id}")

    @property
    def num_unsent(self) -> int:
        return len(self._unsent)

    def send(self, message: Any) -> None:
        """Queues one message; never blocks."""
        if not self.is_open:
            return
        if len(self._unsent) >= self._max_unsent:
            # Not within the caller's turn: it may be in the middle of changing the state that `on_lost` reads.
            asyncio.get_running_loop().call_soon(self.lose, Overloaded(f"{self.info.role} {self.info.instance_id} does not read its stream"))
            return
        self._unsent.append(message)
        self._wake.set()

    def close(self) -> None:
        """Ends the stream; the peer cancels what still runs on it."""
        if self.is_open:
            self.is_open = False
            self._unsent.clear()
            self._wake.set()  # the sender ends by itself
            self._task.cancel()

    def lose(self, error: PlugmeshError) -> None:
        """Gives the stream up and tells the owner."""
        if self.is_open:
            self.close()
            self._on_lost(self, error)

    async def wait_closed(self) -> None:
        await asyncio.gather(self._task, return_exceptions=True)

    async def _messages(self) -> AsyncIterator[Any]:
        while self.is_open:
            while self._unsent:
                yield self._unsent.popleft()
            self._wake.clear()
            await self._wake.wait()

    def _take(self, message: Any) -> None:
        if self.is_open:
            self.last_alive = time.monotonic()
            self._on_message(self, message)

    async def _read(self) -> None:
        error: PlugmeshError
        call = None
        try:
            call = self._open_call(self._messages())
            hand_over_to = getattr(call, "hand_over_to", None)
            if hand_over_to is not None:  # the mesh's own calls have it, gRPC's have not
                await hand_over_to(self._take)
            else:
                async for message in call:
                    self._take(message)
            error = Unavailable(f"{self.info.role} {self.info.instance_id} ended its stream", retry_after_s=1)
        except grpc.RpcError as e:
            error = error_from_rpc(e)
        except asyncio.CancelledError:
            if was_cancelled():
                raise
            error = Unavailable(f"{self.info.role} {self.info.instance_id} cancelled its stream", retry_after_s=1)
        except Exception as e:
            log.exception("link.failed", peer=self.info.instance_id, error=type(e).__name__)
            error = Unavailable(f"the stream to {self.info.role} {self.info.instance_id} failed", retry_after_s=1)
        finally:
            if call is not None:
                call.cancel()
        # From outside of this task: `lose` cancels it.
        asyncio.get_running_loop().call_soon(self.lose, error)
