"""One lease of one client: the mapped arena, its guard, and the count of what still uses it."""

from __future__ import annotations

import asyncio
import mmap
import os
import pathlib
import stat
import time

import structlog

from plugmesh.errors import FailedPrecondition, Unavailable
from plugmesh.kv.guard import Guard, guard_path
from plugmesh.types import InstanceInfo
from plugmesh_proto.v1 import kvstore_pb2 as pb

log = structlog.get_logger()

_GUARD_TRIES = 100
_GUARD_WAIT_S = 0.01


class ArenaNotHere(Unavailable):
    """The arena's file is not visible to this process: another container, or another user."""


class BlockRef:
    """A block that was found: `data` stays valid and unchanged until the ref is released.

    `data` is a read-only view, on the arena of this host (no copy) or on bytes fetched from another host. Do not keep
    views of it beyond `KvClient.release`.
    """

    __slots__ = ("attachment", "block_id", "checksum", "data", "is_local", "released")

    def __init__(self, attachment: Attachment, block_id: bytes, data: memoryview, checksum: int, *, is_local: bool) -> None:
        self.attachment = attachment
        self.block_id = block_id
        self.data = data
        self.checksum = checksum
        self.is_local = is_local
        self.released = False

    @property
    def num_bytes(self) -> int:
        return len(self.data)


class Attachment:
    """A lease with what it maps.

    As long as the guard is held the store gives none of the slots that this lease had to anybody else, even after the
    lease ended; so refs stay right until they are released, whatever happens to the lease. `uses` counts refs and
    running writes; a retired attachment closes when it reaches 0.
    """

    def __init__(self, reply: pb.AttachReply, info: InstanceInfo) -> None:
        self.lease_id = reply.lease_id
        self.ttl_s = reply.lease_ttl_s
        self.slot_bytes = reply.slot_bytes
        self.info = info
        self.is_local = bool(reply.arena_path)
        self.valid_until = time.monotonic() + reply.lease_ttl_s
        self.lease_lost = False
        self.retired = False
        self.uses = 0
        self._guard: Guard | None = None
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._read_view: memoryview | None = None

    async def map_arena(self, reply: pb.AttachReply) -> None:
        """Takes the guard, then maps.

        Raises:
            ArenaNotHere: Bytes must go over gRPC.
            Unavailable: The store took the lease back meanwhile, or is gone.
            FailedPrecondition: The file is not a private file of this user, or not of the size announced.
        """
        try:
            path = pathlib.Path(reply.arena_path)
            if not os.access(path, os.R_OK | os.W_OK):
                raise ArenaNotHere("the arena's file is not visible here")
            guard = None
            for _ in range(_GUARD_TRIES):
                guard = Guard.try_hold(guard_path(reply.arena_path, reply.lease_id))
                if guard is not None:
                    break
                await asyncio.sleep(_GUARD_WAIT_S)
            if guard is None:
                raise Unavailable("the guard of the lease is held by somebody else")
            self._guard = guard
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                info = os.fstat(fd)
                if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_size != reply.arena_bytes:
                    raise FailedPrecondition("the arena is not the file that the store announced")
                self._map = mmap.mmap(fd, reply.arena_bytes)
            finally:
                os.close(fd)
        except OSError as e:
            self.close()
            raise Unavailable(f"cannot map the arena: {e.strerror}", retry_after_s=1.0) from e
        except BaseException:
            self.close()
            raise
        self._view = memoryview(self._map)
        self._read_view = self._view.toreadonly()

    def read(self, slot: int, num_bytes: int) -> memoryview:
        assert self._read_view is not None
        return self._read_view[slot * self.slot_bytes : slot * self.slot_bytes + num_bytes]

    def write(self, slot: int, num_bytes: int) -> memoryview:
        assert self._view is not None
        return self._view[slot * self.slot_bytes : slot * self.slot_bytes + num_bytes]

    @property
    def num_slots(self) -> int:
        return len(self._view) // self.slot_bytes if self._view is not None else 0

    @property
    def usable(self) -> bool:
        """For new work: not retired, and the lease lives by this process's clock."""
        return not self.retired and not self.lease_lost and time.monotonic() < self.valid_until

    def close(self) -> None:
        """Unmaps and gives up the guard, in this order. Views that somebody still has keep the pages alive."""
        for view in (self._read_view, self._view):
            if view is not None:
                view.release()
        self._read_view = self._view = None
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:
                log.debug("kv.views_left", lease=self.lease_id[:8])
            self._map = None
        if self._guard is not None:
            self._guard.close()
            self._guard = None
