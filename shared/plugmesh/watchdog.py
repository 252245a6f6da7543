"""Ends a plugin's call that does not come back: an exception is raised within it, so that it costs one request or step and not the process.

In the main thread, where event loops run, a signal interrupts what can be interrupted: Python code and calls that wait. In other threads
(the engine's) only Python code can be, and only at its next instruction. What is stuck in C code goes on; the log then says whose it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import structlog

log = structlog.get_logger()
T = TypeVar("T")
SIGNAL = signal.SIGUSR2
CHECK_S = 0.1


class Hung(Exception):
    """A call took too long and was ended."""


class _Interrupt(BaseException):
    """Raised within a late call; not an Exception, so that what the call catches does not swallow it."""


class _Call:
    """One call in progress. `is_over` and `is_fired` change under `lock`, so that nothing is raised in a thread that has left the call."""

    __slots__ = ("deadline", "is_fired", "is_over", "limit_s", "lock", "thread", "what")

    def __init__(self, what: str, limit_s: float) -> None:
        self.what = what
        self.limit_s = limit_s
        self.deadline = time.monotonic() + limit_s
        self.thread = threading.get_ident()
        self.lock = threading.Lock()
        self.is_over = self.is_fired = False


class Watchdog:
    """One thread that looks every CHECK_S whether a call is late, as long as calls are made; without calls it sleeps."""

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}   # by thread; the innermost one
        self._thread: threading.Thread | None = None
        self._work = threading.Event()
        self._starting = threading.Lock()
        self._asked_for_signal = False

    def call(self, what: str, limit_s: float, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """The function's result, or what it raises.

        Args:
            what: Named in the log and in the error.

        Raises:
            Hung: It took longer than `limit_s`.
        """
        self._start()
        call = _Call(what, limit_s)
        outer = self._calls.get(call.thread)
        try:
            self._calls[call.thread] = call
            if not self._work.is_set():
                self._work.set()
            try:
                return function(*args, **kwargs)
            finally:
                self._leave(call, outer)
        except _Interrupt as e:
            self._leave(call, outer)
            raise Hung(f"{what} took longer than {limit_s:g} s") from e

    @contextlib.contextmanager
    def tell(self, what: str, after_s: float) -> Iterator[None]:
        """Says in the log that something takes long and whose it is, and leaves it alone: for what runs once, at start."""
        timer = threading.Timer(after_s, lambda: log.warning("plugin.slow", what=what, after_s=after_s))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _leave(self, call: _Call, outer: _Call | None) -> None:
        with call.lock:
            call.is_over = True
        if outer is None:
            self._calls.pop(call.thread, None)
        else:
            self._calls[call.thread] = outer
        if call.is_fired:  # raised already, or about to be: not in what comes next
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(call.thread), None)

    def _start(self) -> None:
        if not self._asked_for_signal and threading.current_thread() is threading.main_thread():
            self._asked_for_signal = True  # once: looking at the handler takes longer than all the rest of a call
            if signal.getsignal(SIGNAL) == signal.SIG_DFL:
                signal.signal(SIGNAL, self._on_signal)
        if self._thread is None or not self._thread.is_alive():
            with self._starting:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._watch, name="plugin-watchdog", daemon=True)
                    self._thread.start()

    def _on_signal(self, number: int, frame: object) -> None:
        call = self._calls.get(threading.get_ident())
        if call is not None and not call.is_over and time.monotonic() >= call.deadline:
            raise _Interrupt

    def _watch(self) -> None:
        while True:
            if not self._calls:
                self._work.clear()
                if not self._calls:
                    self._work.wait()
            time.sleep(CHECK_S)
            now = time.monotonic()
            for call in list(self._calls.values()):
                if now >= call.deadline and not call.is_fired:
                    self._interrupt(call)

    def _interrupt(self, call: _Call) -> None:
        is_main = call.thread == threading.main_thread().ident
        with call.lock:
            if call.is_over:
                return
            call.is_fired = True
            if is_main and signal.getsignal(SIGNAL) == self._on_signal:
                signal.pthread_kill(call.thread, SIGNAL)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(call.thread), ctypes.py_object(_Interrupt))
        log.error("plugin.hung", what=call.what, limit_s=call.limit_s)


WATCHDOG = Watchdog()  # one per process: it owns a signal
