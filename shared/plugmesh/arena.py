"""Shared memory that clients map: one sparse file of equal slots per layout, in a folder private to this process."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import pathlib
import secrets
import shutil
import time

import structlog

from plugmesh.errors import ConfigError

log = structlog.get_logger()

PAGE = mmap.PAGESIZE
_STALE_UNFINISHED_S = 60.0


class Arena:
    """The slots of one layout.

    Pages are allocated when a slot is first handed out, so that a full tmpfs shows here as "no room" and not as
    SIGBUS in whoever writes.
    """

    def __init__(self, path: pathlib.Path, slot_bytes: int, num_slots: int) -> None:
        self.path = path
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.num_bytes = slot_bytes * num_slots
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, self.num_bytes)
        self._map = mmap.mmap(self._fd, self.num_bytes)
        self._view = memoryview(self._map)
        self._backed: set[int] = set()
        self._free: list[int] = []
        self._fresh = 0  # slots from here on were never handed out

    def take(self) -> int | None:
        """A slot with memory behind it, or None: all are taken or the file system is full."""
        slot = self._free.pop() if self._free else self._fresh
        if slot >= self.num_slots:
            return None
        if slot not in self._backed:
            try:
                os.posix_fallocate(self._fd, slot * self.slot_bytes, self.slot_bytes)
            except OSError as e:
                if slot != self._fresh:
                    self._free.append(slot)
                if e.errno not in (errno.ENOSPC, errno.ENOMEM):
                    raise
                log.warning("arena.full", path=str(self.path), num_slots=len(self._backed))
                return None
            self._backed.add(slot)
        if slot == self._fresh:
            self._fresh += 1
        return slot

    def give(self, slot: int, *, trim: bool = False) -> None:
        """The slot is free; with `trim` its memory goes back to the system."""
        self._free.append(slot)
        if trim:
            self._unback(slot)

    def trim(self) -> None:
        """Returns the memory of all free slots to the system; their bytes read as zero afterwards."""
        for slot in self._free:
            self._unback(slot)

    def _unback(self, slot: int) -> None:
        if slot in self._backed:
            self._map.madvise(mmap.MADV_REMOVE, slot * self.slot_bytes, self.slot_bytes)
            self._backed.discard(slot)

    def view(self, slot: int, num_bytes: int) -> memoryview:
        """The first `num_bytes` of a slot, writable. Release it before `close`."""
        start = slot * self.slot_bytes
        return self._view[start : start + num_bytes]

    def free_slots(self) -> set[int]:
        """For the audit: free slots among those handed out at least once."""
        return set(self._free)

    @property
    def num_touched(self) -> int:
        """Slots 0 to this one were handed out at least once."""
        return self._fresh

    @property
    def resident_bytes(self) -> int:
        return len(self._backed) * self.slot_bytes

    def close(self) -> None:
        """Unmaps and removes the file. Clients keep what they mapped until they let go."""
        self.path.unlink(missing_ok=True)
        self._view.release()
        try:
            self._map.close()
        except BufferError:
            log.warning("arena.view_left", path=str(self.path))
        os.close(self._fd)


class ArenaFolder:
    """`<base>/kv-<random>/`, mode 0700, with a lock that lives exactly as long as this process.

    The lock, not a process id, tells later processes whether the folder is stale: it works across pid namespaces that
    share /dev/shm.
    """

    def __init__(self, base: pathlib.Path) -> None:
        self.base = base
        token = secrets.token_hex(8)
        unfinished = base / f"new-{token}"
        for _ in range(100):
            _private_dir(base)
            try:
                self.num_swept = sweep(base)
                unfinished.mkdir(mode=0o700)
                break
            except FileNotFoundError:
                continue  # another process stopped and removed the empty base
        else:
            raise ConfigError(f"{base} keeps vanishing")
        self._lock_fd = os.open(unfinished / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = base / f"kv-{token}"
        unfinished.rename(self.path)  # it becomes visible to sweepers only now, locked

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)
        try:
            self.base.rmdir()
        except OSError:
            pass  # others use it


def default_base(runtime_dir: pathlib.Path | None) -> pathlib.Path:
    """The system's shared-memory file system when it is there and writable, else the runtime folder."""
    shm = pathlib.Path("/dev/shm")  # noqa: S108  the folder below is private and checked
    name = f"plugmesh-{os.getuid()}"
    if shm.is_dir() and os.access(shm, os.W_OK):
        return shm / name
    return (runtime_dir or pathlib.Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp")) / name) / "kv"  # noqa: S108  as above


def sweep(base: pathlib.Path) -> int:
    """Removes folders whose process is dead; returns how many."""
    num = 0
    for folder in base.iterdir():
        if folder.name.startswith("new-"):
            stale = time.time() - folder.stat().st_mtime > _STALE_UNFINISHED_S
        elif folder.name.startswith("kv-"):
            stale = _unowned(folder / "owner.lock")
        else:
            continue
        if stale:
            shutil.rmtree(folder, ignore_errors=True)
            num += 1
    if num:
        log.info("arena.stale_removed", num=num)
    return num


def _unowned(lock: pathlib.Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # half removed
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _private_dir(path: pathlib.Path) -> None:
    """Raises ConfigError when somebody else could have prepared the folder."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if path.is_symlink() or info.st_uid != os.getuid():
        raise ConfigError(f"{path} must be a folder that belongs to this user")
    if info.st_mode & 0o077:
        path.chmod(0o700)
