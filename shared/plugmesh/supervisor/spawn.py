"""Starting one child process so that it can never outlive the supervisor, and noticing its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

# Runs in the child before the real program: asks the kernel for SIGKILL when the parent dies, then replaces itself. An exec'ed
# shim rather than subprocess's preexec_fn, which runs Python between fork and exec and can deadlock beside other threads.
# The parent may have died before prctl took effect, so its id is compared afterwards.
_SHIM = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as e:
    print(f"cannot execute {sys.argv[2]}: {e.strerror}", file=sys.stderr)
    os._exit(127)
"""


def bound_command(argv: Sequence[str]) -> list[str]:
    """`argv` wrapped so that the process dies with the one that starts it, kill -9 included.

    The kernel ties this to the *thread* that forks: call Popen from a thread that lives as long as the process (the main one).
    Elsewhere than on Linux the command is returned as it is.
    """
    if sys.platform != "linux":
        return list(argv)
    return [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), *argv]


def spawn(argv: Sequence[str], env: Mapping[str, str], log_path: pathlib.Path) -> subprocess.Popen[bytes]:
    """Starts `argv` bound to this process, in a process group of its own, appending both outputs to `log_path`.

    The own group keeps the terminal's Ctrl-C away from the child: the supervisor alone decides when it ends.

    Raises:
        OSError: The log file cannot be opened or no process can be made.
    """
    with open(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as sink:
        return subprocess.Popen(
            bound_command(argv),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            process_group=0,
            close_fds=True,
        )


async def wait_exit(process: subprocess.Popen[bytes]) -> int:
    """Waits for the end of a process, sweeps what is left of its group, reaps it and returns its exit status.

    The sweep happens while the leader is still a zombie, so its group id cannot belong to anybody else.
    """
    if process.returncode is not None:
        return process.returncode
    try:
        fd = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, or an old kernel
        while (status := process.poll()) is None:  # noqa: ASYNC110  nothing tells us
            await asyncio.sleep(0.05)
        return status
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        loop.add_reader(fd, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    signal_group(process, signal.SIGKILL)
    return process.wait()


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Sends a signal to the process and all that it started; does nothing once it has been reaped."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
