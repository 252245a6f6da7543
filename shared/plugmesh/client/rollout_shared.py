"""The client's side of shared memory with an experience table: values move through a file that both map, and calls say where in it they are.

It is an offer that the table may decline: one on another host, of another user, in another container or without memory to share does, and values then go with the
calls as ever. A part of the area is used by one call at a time. After a call that did not end well nobody knows whether the table still writes there, so the whole
area is given up and another one asked for.
"""

from __future__ import annotations

import asyncio
import bisect
import mmap
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import grpc

from plugmesh_proto.v1 import rollout_pb2 as pb

_FIRST = 64          # values begin behind the nonce
_ALIGN = 64
_LIMIT_S = 5.0       # for the table to answer the offer


class SharedArea:
    """A mapped area and which parts of it are free."""

    def __init__(self, name: str, memory: mmap.mmap, call: Any) -> None:
        self.name = name
        self.num_bytes = len(memory)
        self._memory = memory
        self._call = call
        self._free: list[tuple[int, int]] = [(_FIRST, len(memory))]  # from, to; by offset

    @classmethod
    async def ask(cls, stub: Any, num_bytes: int) -> SharedArea | None:
        """One that the table made for this caller, or None."""
        boot_id = _boot_id()
        if not boot_id:
            return None
        call = stub.Share(pb.ShareRequest(boot_id=boot_id, num_bytes=num_bytes))
        memory = None
        try:
            async with asyncio.timeout(_LIMIT_S):
                reply = await call.read()
            if reply is not grpc.aio.EOF and reply.path:
                memory = _map(reply.path, reply.num_bytes, reply.nonce)
                if memory is not None:
                    return cls(reply.area, memory, call)
        except (grpc.RpcError, TimeoutError):
            pass
        finally:
            if memory is None:
                call.cancel()
        return None

    @property
    def is_open(self) -> bool:
        """False when the table has ended the call, so that the area has gone."""
        return not self._call.done()

    def take(self, num_bytes: int) -> tuple[int, int] | None:
        """The first free part of that size: offset and end; None when there is none."""
        num_bytes += -num_bytes % _ALIGN
        for i, (start, end) in enumerate(self._free):
            if end - start >= num_bytes:
                if end - start == num_bytes:
                    del self._free[i]
                else:
                    self._free[i] = (start + num_bytes, end)
                return start, start + num_bytes
        return None

    def give(self, part: tuple[int, int]) -> None:
        """The part is free again."""
        i = bisect.bisect(self._free, part)
        self._free.insert(i, part)
        for k in (i, i - 1):  # neighbours become one
            if 0 <= k < len(self._free) - 1 and self._free[k][1] == self._free[k + 1][0]:
                self._free[k : k + 2] = [(self._free[k][0], self._free[k + 1][1])]

    def write(self, at: int, cells: Sequence[bytes]) -> list[int]:
        """Offset and length of each, from `at` on."""
        spans: list[int] = []
        for cell in cells:
            self._memory[at : at + len(cell)] = cell
            spans += (at, len(cell))
            at += len(cell)
        return spans

    def read(self, spans: Sequence[int]) -> list[bytes]:
        """Copies: the part is used again."""
        return [self._memory[at : at + length] for at, length in zip(spans[::2], spans[1::2], strict=True)]

    def close(self) -> None:
        """The table takes the memory back when the call ends; calls that are under way still have what they mapped. Idempotent."""
        self._call.cancel()


def _map(path: str, num_bytes: int, nonce: bytes) -> mmap.mmap | None:
    """None where this is not the table's file: another container's, or not to be opened by this user."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(fd).st_size != num_bytes:
            return None
        memory = mmap.mmap(fd, num_bytes)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
    if not nonce or memory[: len(nonce)] != nonce:
        memory.close()
        return None
    return memory


def _boot_id() -> str:
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
