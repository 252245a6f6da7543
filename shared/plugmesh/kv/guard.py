"""A kernel-kept sign of life: a file that the process mapping an arena keeps locked.

The store makes one file per lease beside the arena. The client holds `flock` on it for as long as any of its
mappings may be written or read; the kernel drops the lock when the process dies, however it dies, and keeps it while
the process is merely paused. So "is the lock free?" answers "can this process still touch its slots?", which neither
a time-out nor a process id (reused, or of another pid namespace) can answer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib


def guard_path(arena_path: str, lease_id: str) -> pathlib.Path:
    """Where the guard of a lease lies; both sides derive it, so it is not on the wire."""
    return pathlib.Path(arena_path).with_name(f"lease-{lease_id}.lock")


class Guard:
    """Client side: a held guard. `hold` makes one, `close` (or death) gives it up; closing twice is harmless."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def try_hold(cls, path: pathlib.Path) -> Guard | None:
        """Locks the guard, or None when it is locked at this moment (the store probes it for an instant; try again).

        Raises:
            FileNotFoundError: The store has already taken the lease back, or is gone.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if not _lock(fd):
                os.close(fd)
                return None
            # The store removes a guard while it holds the lock: what we locked must still be what has the name.
            if os.fstat(fd).st_ino != os.stat(path).st_ino:
                raise FileNotFoundError(errno.ENOENT, "the guard was replaced", str(path))
        except OSError:
            os.close(fd)
            raise
        return cls(fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class GuardProbe:
    """Store side: creates the guard of a lease and asks whether somebody holds it."""

    __slots__ = ("_fd", "path", "seen_held")

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.seen_held = False  # whether a holder was ever observed
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def held(self) -> bool:
        """Whether a process holds the guard now. Never blocks."""
        if self._fd < 0:
            return False
        if not _lock(self._fd):
            self.seen_held = True
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    def retire(self) -> bool:
        """Removes the guard unless it is held; afterwards nobody can hold it. True when it is gone."""
        if self._fd < 0:
            return True
        if not _lock(self._fd):
            self.seen_held = True
            return False
        self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1
        return True

    def abandon(self) -> None:
        """Forgets the guard without a word to its holder: the store stops and the arena goes with it."""
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
