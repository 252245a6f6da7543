"""Child processes that are measured: started in a group of their own, paused while others run, watched for memory, and always ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from plugmesh.errors import Unavailable

_STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of processes in bytes; `pss` counts a page that n processes share as 1/n of it in each, so its sum is what they take."""

    rss: int = 0
    pss: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.rss + other.rss, self.pss + other.pss)


class Child:
    """A process with its descendants, and its log."""

    def __init__(self, name: str, command: Sequence[str], log: pathlib.Path, env: Mapping[str, str] | None = None, *, pipes: bool = False) -> None:
        self.name, self.command, self.log = name, tuple(command), log
        log.parent.mkdir(parents=True, exist_ok=True)
        pipe = subprocess.PIPE if pipes else None
        with log.open("ab") as f:
            self.process = subprocess.Popen(
                self.command, env={**os.environ, **(env or {})}, stdin=pipe or subprocess.DEVNULL, stdout=pipe or f, stderr=f, start_new_session=True
            )
        self._is_paused = False

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def log_tail(self, num_lines: int = 12) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])
        return ""

    def pids(self) -> list[int]:
        """The process and its descendants."""
        try:
            top = psutil.Process(self.process.pid)
            return [top.pid, *(p.pid for p in top.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def pause(self) -> None:
        """Stops all of its processes, so that what idles does not take part in others' figures."""
        if not self._is_paused:
            self._is_paused = True
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """Ends it and everything it started; blocks for at most some twenty seconds."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        self.resume()
        family = [psutil.Process(p) for p in self.pids() if psutil.pid_exists(p)]
        if self.is_alive:
            self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_S)
        _, alive = psutil.wait_procs(family, timeout=1)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def memory_of(pids: Iterable[int]) -> Memory:
    """Of processes that may end meanwhile. PSS falls back to RSS where the kernel does not tell."""
    total = Memory()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            info = psutil.Process(pid).memory_full_info()
            total += Memory(info.rss, getattr(info, "pss", info.rss))
    return total


def cpu_s_of(pids: Iterable[int]) -> float:
    """CPU seconds that these processes have used so far."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def wait_until_served(url: str, child: Child, timeout_s: float) -> None:
    """Polls a URL until it answers 200. Raises Unavailable, with the end of the log, when the process ends or the time is over."""
    until = time.monotonic() + timeout_s
    while True:
        if not child.is_alive:
            raise Unavailable(f"{child.name} ended with status {child.process.returncode} while it started:\n{child.log_tail()}")
        if await asyncio.to_thread(_answers, url):
            return
        if time.monotonic() > until:
            raise Unavailable(f"{child.name} did not answer within {timeout_s:g} s:\n{child.log_tail()}")
        await asyncio.sleep(0.25)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310 - an address of our own making
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False
