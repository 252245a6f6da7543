"""Weights in large pages that all engines of a host share.

A page cache hands out pages of 4 KiB, and walking their tables costs a virtual machine a third of its memory bandwidth. So the first engine that loads a model
copies its tensors into a file in shared memory and gathers that into pages of 2 MiB; others map the same pages. Every user holds a shared lock on the file,
the last one removes it, and what a killed process left is found unlocked and removed by the next one that looks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import structlog

log = structlog.get_logger()

FOLDER = pathlib.Path("/dev/shm")  # noqa: S108 - tmpfs, where large pages can be shared
_DONE = b"plugmesh-weights-1"
_ALIGN = 64
_COLLAPSE_BYTES = 4 << 20
_MAX_SHARE = 0.25  # of the memory that is available: larger models stay mapped from their files


def load(kernels: Any, version: str, tensors: Mapping[str, np.ndarray], folder: pathlib.Path = FOLDER) -> tuple[dict[str, np.ndarray], str]:
    """The tensors (uint8, C order) in large pages.

    Args:
        kernels: `plugmesh_kernels.native()`.
        version: Names the values: the same version and names always hold the same bytes.

    Returns:
        The tensors, read only, and how they are held: "shared", "private" (shared memory is too small: in this process only) or "mapped" (as given: no large
        pages here, or the model is too large to be copied).
    """
    offsets, size = {}, 0
    for name, data in tensors.items():
        offsets[name] = size
        size += -(-data.nbytes // _ALIGN) * _ALIGN
    if size > _MAX_SHARE * _available():
        return dict(tensors), "mapped"
    key = hashlib.sha256(repr((version, [(n, t.nbytes) for n, t in tensors.items()])).encode()).hexdigest()[:24]
    prefix = f"plugmesh-weights-{os.getuid()}-"
    try:
        _remove_left_behind(folder, prefix)
        memory, held = _shared(kernels, folder / (prefix + key), tensors, offsets, size), "shared"
    except OSError as e:
        log.debug("weights.not_shared", error=e.strerror or type(e).__name__)
        try:
            memory, held = kernels.large_pages(size), "private"
        except OSError:
            return dict(tensors), "mapped"
        _fill(memory, tensors, offsets)
    memory.flags.writeable = False
    return {name: memory[offsets[name] : offsets[name] + data.nbytes] for name, data in tensors.items()}, held


def _shared(kernels: Any, path: pathlib.Path, tensors: Mapping[str, np.ndarray], offsets: Mapping[str, int], size: int) -> np.ndarray:
    """The file's memory, filled by whoever comes first. Raises OSError when it can't be had."""
    whole = size + len(_DONE)
    for _ in range(100):  # a file that vanishes while its lock is awaited was the last user's; seldom twice
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)  # waits for one that is filling it
            if not _is_filled(fd, size):
                fcntl.flock(fd, fcntl.LOCK_EX)
                if _is(path, fd) and not _is_filled(fd, size):
                    _fill_file(kernels, path, fd, tensors, offsets, size)
                fcntl.flock(fd, fcntl.LOCK_SH)
            if not _is(path, fd):  # it was removed, perhaps between two locks: changing one is not atomic
                os.close(fd)
                continue
            memory: np.ndarray = kernels.map_file(fd, whole, False)
        except BaseException:
            os.close(fd)
            raise
        for at in range(0, size, _COLLAPSE_BYTES):  # in pieces: a call keeps the interpreter's lock, which an engine at work beside this one needs
            kernels.collapse(memory[at : at + _COLLAPSE_BYTES])
        weakref.finalize(memory, _leave, path, fd)  # its views keep it alive
        return memory
    raise OSError("the shared weights keep vanishing")


def _is_filled(fd: int, size: int) -> bool:
    return os.fstat(fd).st_size == size + len(_DONE) and os.pread(fd, len(_DONE), size) == _DONE


def _fill_file(kernels: Any, path: pathlib.Path, fd: int, tensors: Mapping[str, np.ndarray], offsets: Mapping[str, int], size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size + len(_DONE))  # a full tmpfs says so here, not with a signal later
        _fill(kernels.map_file(fd, size, True), tensors, offsets)
    except OSError:
        path.unlink()
        raise
    os.pwrite(fd, _DONE, size)


def _fill(memory: np.ndarray, tensors: Mapping[str, np.ndarray], offsets: Mapping[str, int]) -> None:
    for name, data in tensors.items():
        memory[offsets[name] : offsets[name] + data.nbytes] = data


def _is(path: pathlib.Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _leave(path: pathlib.Path, fd: int) -> None:
    """Gives up the lock; the last user removes the file."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(path, fd):
            path.unlink()
    os.close(fd)


def _remove_left_behind(folder: pathlib.Path, prefix: str) -> None:
    """Removes files that nobody has locked: of processes that were killed."""
    for path in folder.glob(prefix + "*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(path, fd):
                    path.unlink()
            finally:
                os.close(fd)


def _available() -> int:
    """Bytes of memory that can be had without swapping; 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
