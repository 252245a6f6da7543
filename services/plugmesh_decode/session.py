"""Rows on their way to one consumer: one frame per step, with a cap on what a slow consumer may leave unread."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Sequence

from plugmesh.errors import Overloaded, PlugmeshError
from plugmesh.mesh.rpc.frames import MAX_MESSAGE_BYTES
from plugmesh_proto.v1 import decode_pb2 as pb

MERGE_ABOVE_FRAMES = 32                     # a consumer this far behind gets later steps merged into its last frame
MAX_MERGED_BYTES = MAX_MESSAGE_BYTES // 2   # of such a frame: no carrier may have to refuse what was merged, rows with many log-probabilities neither


class Session:
    """The outgoing half of one consumer's stream.

    Not thread-safe: everything runs in the service's event loop.

    Args:
        comes_back: It carries many requests, so what it holds is of no use to anybody once it has ended.
        send_at_once: Sends a frame before it returns, or says False when it cannot; then the frame goes by `frames`.
    """

    def __init__(self, max_rows: int, send_at_once: Callable[[pb.TokenFrame], bool] | None = None, *, comes_back: bool = True) -> None:
        self.request_ids: set[str] = set()
        self.comes_back = comes_back
        self._frames: collections.deque[pb.TokenFrame] = collections.deque()
        self._num_rows = 0
        self._last_bytes = 0      # of the last frame, as soon as something was merged into it
        self._max_rows = max_rows
        self._ready = asyncio.Event()
        self._closed = False
        self._error: PlugmeshError | None = None
        self._send_at_once = send_at_once
        self._is_sending = False  # a frame that `frames` gave out is still on its way

    @property
    def overflowed(self) -> bool:
        """The consumer left more than the cap unread; its stream ends with Overloaded."""
        return self._error is not None

    def put(self, step: int, rows: Sequence[pb.TokenRow]) -> None:
        """Queues the rows of one step. Rows for a closed session are dropped: nobody is left to read them."""
        if not self._closed and rows:
            self.put_frame(pb.TokenFrame(step=step, rows=rows))

    def put_frame(self, frame: pb.TokenFrame) -> None:
        """As `put`; the frame belongs to the session from now on."""
        num_rows = len(frame.rows)
        if self._closed or not num_rows:
            return
        if self._send_at_once is not None and not self._frames and not self._is_sending and self._send_at_once(frame):
            return
        self._num_rows += num_rows
        if self._num_rows > self._max_rows:
            self.close(Overloaded(f"the consumer left {self._num_rows} rows unread, more than {self._max_rows}", retry_after_s=1))
            return
        if len(self._frames) < MERGE_ABOVE_FRAMES or not self._merge(frame):
            self._frames.append(frame)
            self._last_bytes = 0
        self._ready.set()

    def _merge(self, frame: pb.TokenFrame) -> bool:
        """Adds the rows to the last frame, unless that would become too large."""
        last = self._frames[-1]
        num_bytes = (self._last_bytes or last.ByteSize()) + frame.ByteSize()
        if num_bytes > MAX_MERGED_BYTES:
            return False
        last.MergeFrom(frame)
        self._last_bytes = num_bytes
        return True

    def wake(self) -> None:
        """Has `frames` give an empty frame, for a reader with something else to fetch."""
        if not self._closed and not self._frames:
            self._frames.append(pb.TokenFrame())
            self._ready.set()

    def close(self, error: PlugmeshError | None = None) -> None:
        """Ends `frames` after what is queued; with an error, at once."""
        if error is not None:
            self._error = error
            self._frames.clear()
        self._closed = True
        self._ready.set()

    async def frames(self) -> AsyncIterator[pb.TokenFrame]:
        """Frames in order until `close`. Raises the error that `close` was given."""
        while True:
            if self._error is not None:
                raise self._error
            if self._frames:
                frame = self._frames.popleft()
                self._num_rows -= len(frame.rows)
                self._is_sending = True
                yield frame
                self._is_sending = False
            elif self._closed:
                return
            else:
                self._ready.clear()
                await self._ready.wait()
