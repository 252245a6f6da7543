"""Keeps a set of child processes running: restart with back-off, giving up on a crash loop, orderly stop.

    starting --announced--> ready
       |                      |
       +----- exited ---------+--> waiting (back-off) --> starting
                              |--> failed   (too many crashes in a row, or exit status 2: bad configuration)
    stop(): stopping --> stopped
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import pathlib
import signal
import subprocess
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from plugmesh.errors import PlugmeshError
from plugmesh.supervisor import logfiles, spawn
from plugmesh.tasks import end

log = structlog.get_logger()

EXIT_CONFIG = 2          # a child that ends with this has a bad configuration: starting it again cannot help
MAX_EVENTS = 256         # remembered for the display
_LOG_CHECK_S = 5.0


class ChildState(enum.Enum):
    """Where a child is in its life; see the drawing in the module's docstring."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process to keep running. `stop_rank`: children are stopped rank by rank, lowest first.

    `start` replaces `argv` and `env` where a process is started by other means; the process must lead its own group, and
    a PlugmeshError or OSError from it counts as a crash.
    """

    name: str
    role: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log_path: pathlib.Path
    stop_rank: int = 0
    start: Callable[[], Awaitable[subprocess.Popen[bytes]]] | None = None


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Delay before the nth restart in a row: `first_delay_s * 2**(n - 1)`, at most `max_delay_s`.

    A child that lived for `stable_s` starts counting anew; after `max_in_a_row` crashes it is given up.
    """

    first_delay_s: float = 0.5
    max_delay_s: float = 15.0
    max_in_a_row: int = 6
    stable_s: float = 20.0

    def delay_s(self, num_crashes: int) -> float:
        """Seconds to wait after that many crashes in a row (1 or more)."""
        return min(self.max_delay_s, self.first_delay_s * 2 ** min(num_crashes - 1, 30))


@dataclass(frozen=True, slots=True)
class ChildStatus:
    """What the display shows of a child. `since` is a time.monotonic() value; `detail` says why it is down."""

    name: str
    role: str
    state: ChildState
    pid: int | None
    since: float
    num_restarts: int
    detail: str
    log_path: pathlib.Path


@dataclass(frozen=True, slots=True)
class ChildEvent:
    """Something worth a line on the screen: kind is "crashed", "gave_up", "restarted" or "ready"."""

    at_unix_s: float
    name: str
    kind: str
    text: str


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    state: ChildState = ChildState.STOPPED
    process: subprocess.Popen[bytes] | None = None
    since: float = field(default_factory=time.monotonic)
    num_restarts: int = 0
    num_crashes: int = 0     # in a row
    exit_status: int | None = None
    detail: str = ""
    task: asyncio.Task[None] | None = None


def exit_text(status: int) -> str:
    """An exit status in words: "killed by SIGKILL", "exit status 1"."""
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit status {status}"


class Supervisor:
    """Owns the children and the tasks that watch them. One event loop, and Popen in its thread: see `spawn.bound_command`."""

    def __init__(self, policy: RestartPolicy | None = None, on_event: Callable[[ChildEvent], None] | None = None) -> None:
        self.policy = policy or RestartPolicy()
        self.events: deque[ChildEvent] = deque(maxlen=MAX_EVENTS)
        self._on_event = on_event
        self._children: dict[str, _Child] = {}
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._log_task: asyncio.Task[None] | None = None

    def start(self, specs: Sequence[ChildSpec]) -> None:
        """Starts all of them at once. Call within the running loop."""
        for spec in specs:
            child = self._children[spec.name] = _Child(spec)
            child.state = ChildState.STARTING
            child.task = asyncio.create_task(self._keep(child), name=f"keep-{spec.name}")
        if self._log_task is None:
            self._log_task = asyncio.create_task(self._cap_logs(), name="cap-logs")

    def snapshot(self) -> list[ChildStatus]:
        """All children in the order of their specs."""
        return [
            ChildStatus(
                c.spec.name, c.spec.role, c.state, c.process.pid if c.process else None, c.since, c.num_restarts, c.detail, c.spec.log_path
            )
            for c in self._children.values()
        ]

    def pids(self, name: str) -> set[int]:
        """The process id of a child that runs now; empty when there is none."""
        process = self._children[name].process if name in self._children else None
        return {process.pid} if process is not None and process.returncode is None else set()

    @property
    def config_failures(self) -> list[ChildStatus]:
        """Children that ended because of their configuration."""
        return [s for s in self.snapshot() if s.state is ChildState.FAILED and self._children[s.name].exit_status == EXIT_CONFIG]

    def mark_ready(self, pids: Iterable[int]) -> None:
        """Children with these process ids have announced themselves in the mesh."""
        known = set(pids)
        for child in self._children.values():
            if child.state is ChildState.STARTING and child.process and child.process.pid in known:
                self._set(child, ChildState.READY)
                if child.num_restarts:
                    self._emit(child, "restarted", f"is serving again after {child.num_restarts} restart(s)")
                else:
                    self._emit(child, "ready", "is serving")

    async def changed(self, timeout_s: float) -> None:
        """Returns at the next change of any child's state, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        self._changed.clear()

    async def stop(self, drain_s: float, *, in_order: bool = True) -> bool:
        """Stops rank by rank: SIGTERM, up to `drain_s` seconds to drain, then SIGKILL. May be called once.

        Args:
            in_order: False stops all but the last rank (the broker) together: for a mesh that serves nothing yet.

        Returns:
            Whether every child ended by itself.
        """
        self._stopping.set()
        orderly = True
        ranks = sorted({c.spec.stop_rank for c in self._children.values()})
        for wave in [{r} for r in ranks] if in_order else [set(ranks[:-1]), set(ranks[-1:])]:
            group = [c for c in self._children.values() if c.spec.stop_rank in wave]
            for child in group:
                if child.process is not None and child.process.returncode is None:
                    self._set(child, ChildState.STOPPING)
                    child.process.send_signal(signal.SIGTERM)  # the service alone: it still needs its own workers to drain
            keepers = [c.task for c in group if c.task is not None]
            if keepers:
                _, late = await asyncio.wait(keepers, timeout=drain_s)
                if late:
                    orderly = False
                    for child in group:
                        if child.task in late and child.process is not None:
                            log.warning("supervisor.drain_overrun", child=child.spec.name, drain_s=drain_s)
                            spawn.signal_group(child.process, signal.SIGKILL)
                    await asyncio.wait(late, timeout=10)
        if self._log_task is not None:
            await end(self._log_task)
        return orderly

    def kill(self) -> None:
        """SIGKILL to everything now; a running `stop` then returns at once."""
        self._stopping.set()
        for child in self._children.values():
            if child.process is not None:
                spawn.signal_group(child.process, signal.SIGKILL)

    async def _keep(self, child: _Child) -> None:
        while not self._stopping.is_set():
            self._set(child, ChildState.STARTING)
            started = time.monotonic()
            try:
                spec = child.spec
                child.process = await spec.start() if spec.start else spawn.spawn(spec.argv, spec.env, spec.log_path)
                if self._stopping.is_set():  # `stop` or `kill` looked while there was no process yet
                    spawn.signal_group(child.process, signal.SIGKILL)
                child.exit_status = await spawn.wait_exit(child.process)
                child.detail = exit_text(child.exit_status)
            except OSError as e:
                child.exit_status, child.detail = 127, f"cannot start: {e.strerror}"
            except PlugmeshError as e:
                child.exit_status, child.detail = 127, e.message
            if self._stopping.is_set():
                break
            if child.exit_status == EXIT_CONFIG:
                self._set(child, ChildState.FAILED)
                self._emit(child, "gave_up", "cannot start with this configuration")
                return
            if time.monotonic() - started >= self.policy.stable_s:
                child.num_crashes = 0
            child.num_crashes += 1
            if child.num_crashes >= self.policy.max_in_a_row:
                self._set(child, ChildState.FAILED)
                self._emit(child, "gave_up", f"crashed {child.num_crashes} times in a row ({child.detail}); not started again")
                return
            delay_s = self.policy.delay_s(child.num_crashes)
            self._set(child, ChildState.WAITING)
            self._emit(child, "crashed", f"{child.detail}; restart in {delay_s:.1f} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()
            if not self._stopping.is_set():
                child.num_restarts += 1
        self._set(child, ChildState.STOPPED)

    async def _cap_logs(self) -> None:
        while True:
            await asyncio.sleep(_LOG_CHECK_S)
            for child in self._children.values():
                try:
                    await asyncio.to_thread(logfiles.cap, child.spec.log_path)
                except OSError as e:
                    log.warning("supervisor.log_not_capped", child=child.spec.name, error=e.strerror)

    def _set(self, child: _Child, state: ChildState) -> None:
        child.state, child.since = state, time.monotonic()
        self._changed.set()

    def _emit(self, child: _Child, kind: str, text: str) -> None:
        event = ChildEvent(time.time(), child.spec.name, kind, text)
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)
