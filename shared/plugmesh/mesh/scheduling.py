"""How long a thread may wait for a processor that others use: Linux's slice of a thread, from version 6.12 on.

On the machine that serves, the engine's threads take every core. A thread that wakes to pass a message on would wait until the one
that runs has used up its slice, about 3 ms by default, at each of a request's seven or so hops. One with a shorter slice runs
at once; its share of the processor is the same, it only comes in smaller pieces. Needs no privilege.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator

SHORT_SLICE_NS = 100_000  # the shortest that Linux takes

_SCHED_OTHER = 0
_NUMBERS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # sched_setattr, sched_getattr
_FORMAT = "<IIQiIQQQ"  # size, policy, flags, nice, priority, runtime (the slice), deadline, period: struct sched_attr, first version


def shorten_slice(slice_ns: int = SHORT_SLICE_NS) -> bool:
    """Gives the calling thread this slice; threads that it starts afterwards inherit it. 0 is the default again.

    Returns:
        Whether the system took it; False leaves everything as it was (no Linux, an old one, another scheduling policy, a sandbox that forbids it).
    """
    try:
        attributes = list(struct.unpack(_FORMAT, _call_get()))
    except (OSError, struct.error):
        return False
    if attributes[1] != _SCHED_OTHER:
        return False
    attributes[5] = slice_ns
    try:
        _call_set(struct.pack(_FORMAT, *attributes))
        return slice_of_thread() == slice_ns or slice_ns == 0
    except OSError:
        return False


@contextlib.contextmanager
def short_slice() -> Iterator[None]:
    """Processes and threads that are started within have the short slice."""
    try:
        before = slice_of_thread()
    except OSError:
        before = 0
    was_shortened = shorten_slice()
    try:
        yield
    finally:
        if was_shortened:
            shorten_slice(before)


def slice_of_thread() -> int:
    """The calling thread's slice in nanoseconds as the system tells it; 0 where it tells none. Raises OSError where it cannot be asked."""
    return int(struct.unpack(_FORMAT, _call_get())[5])


def _call_get() -> bytes:
    buffer = ctypes.create_string_buffer(struct.calcsize(_FORMAT))
    _system_call(1, ctypes.byref(buffer), ctypes.c_uint(len(buffer)), ctypes.c_uint(0))
    return buffer.raw


def _call_set(attributes: bytes) -> None:
    _system_call(0, ctypes.c_char_p(attributes), ctypes.c_uint(0))


def _system_call(which: int, *arguments: object) -> None:
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None or not sys.platform.startswith("linux"):
        raise OSError("no such system call here")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(numbers[which]), ctypes.c_int(0), *arguments) < 0:  # 0: the calling thread
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
