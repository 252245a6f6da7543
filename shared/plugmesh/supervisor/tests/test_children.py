"""The supervisor keeps real processes running, and nothing it started outlives it."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh.supervisor import logfiles, runs
from plugmesh.supervisor.children import ChildEvent, ChildSpec, ChildState, RestartPolicy, Supervisor, exit_text

FAST = RestartPolicy(first_delay_s=0.02, max_delay_s=0.2, max_in_a_row=4, stable_s=60)
FOREVER = "import signal, time\nprint('up', flush=True)\ntime.sleep(600)"
STUBBORN = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)"
POLITE = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nprint('up', flush=True)\nsignal.pause()"


def child(tmp_path: pathlib.Path, name: str, code: str, stop_rank: int = 0) -> ChildSpec:
    return ChildSpec(name, name, (sys.executable, "-I", "-S", "-c", textwrap.dedent(code)), os.environ, tmp_path / f"{name}.log", stop_rank)


def exists(pid: int) -> bool:
    return runs.process_start(pid) != 0


async def until(condition, timeout_s: float = 10.0, supervisor: Supervisor | None = None) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await (supervisor.changed(0.02) if supervisor else asyncio.sleep(0.02))


def status(supervisor: Supervisor, name: str):
    return next(s for s in supervisor.snapshot() if s.name == name)


@given(st.integers(1, 10_000), st.floats(0.01, 5), st.floats(5, 60))
def test_delays_double_and_never_exceed_the_cap(num_crashes: int, first_s: float, max_s: float) -> None:
    policy = RestartPolicy(first_delay_s=first_s, max_delay_s=max_s)
    delay_s = policy.delay_s(num_crashes)

    assert first_s <= delay_s <= max_s
    if policy.delay_s(num_crashes + 1) < max_s:
        assert policy.delay_s(num_crashes + 1) == pytest.approx(2 * delay_s)


async def test_a_crashed_child_is_started_again_and_reported(tmp_path: pathlib.Path) -> None:
    events: list[ChildEvent] = []
    supervisor = Supervisor(FAST, events.append)
    supervisor.start([child(tmp_path, "a", FOREVER)])
    await until(lambda: status(supervisor, "a").pid)
    first = status(supervisor, "a").pid
    supervisor.mark_ready([first])
    os.kill(first, signal.SIGKILL)
    await until(lambda: status(supervisor, "a").pid not in (None, first) and status(supervisor, "a").state is ChildState.STARTING)
    second = status(supervisor, "a").pid
    supervisor.mark_ready([second])
    assert status(supervisor, "a").state is ChildState.READY
    assert status(supervisor, "a").num_restarts == 1
    assert [(e.kind, e.name) for e in events] == [("ready", "a"), ("crashed", "a"), ("restarted", "a")]
    assert "SIGKILL" in events[1].text
    await supervisor.stop(5)

    assert not exists(second)


async def test_a_crash_loop_is_given_up_and_leaves_the_others_running(tmp_path: pathlib.Path) -> None:
    supervisor = Supervisor(FAST)
    supervisor.start([child(tmp_path, "bad", "print('boom'); raise SystemExit(3)"), child(tmp_path, "good", FOREVER)])
    await until(lambda: status(supervisor, "bad").state is ChildState.FAILED)

    assert status(supervisor, "bad").num_restarts == FAST.max_in_a_row - 1
    assert logfiles.tail(tmp_path / "bad.log") == ["boom"] * FAST.max_in_a_row
    assert supervisor.events[-1].kind == "gave_up"
    assert "exit status 3" in supervisor.events[-1].text
    assert exists(status(supervisor, "good").pid)
    await supervisor.stop(5)


async def test_exit_status_2_is_a_bad_configuration_and_not_tried_again(tmp_path: pathlib.Path) -> None:
    supervisor = Supervisor(FAST)
    supervisor.start([child(tmp_path, "a", "raise SystemExit(2)")])
    await until(lambda: status(supervisor, "a").state is ChildState.FAILED)

    assert [s.name for s in supervisor.config_failures] == ["a"]
    assert status(supervisor, "a").num_restarts == 0
    await supervisor.stop(1)


async def test_a_program_that_cannot_be_executed_is_a_crash_with_a_reason(tmp_path: pathlib.Path) -> None:
    supervisor = Supervisor(FAST)
    supervisor.start([ChildSpec("a", "a", ("/nonexistent/program",), os.environ, tmp_path / "a.log")])
    await until(lambda: status(supervisor, "a").state is ChildState.FAILED)

    assert "cannot execute /nonexistent/program" in logfiles.tail(tmp_path / "a.log")[0]
    await supervisor.stop(1)


async def test_stop_goes_rank_by_rank_and_kills_what_does_not_drain(tmp_path: pathlib.Path) -> None:
    supervisor = Supervisor(FAST)
    supervisor.start([child(tmp_path, "later", POLITE, 1), child(tmp_path, "first", STUBBORN, 0)])
    await until(lambda: all(logfiles.tail(tmp_path / f"{n}.log") == ["up"] for n in ("first", "later")))
    pids = [s.pid for s in supervisor.snapshot()]
    seen: list[tuple[str, str]] = []

    async def watch() -> None:
        while True:
            await supervisor.changed(1)
            seen.append(tuple(s.state.value for s in supervisor.snapshot()))

    watcher = asyncio.create_task(watch())
    orderly = await supervisor.stop(0.3)
    watcher.cancel()

    assert not orderly
    assert not any(exists(p) for p in pids)
    assert ("starting", "stopping") in seen, "the later rank still runs while the first one drains"
    assert [s.state for s in supervisor.snapshot()] == [ChildState.STOPPED, ChildState.STOPPED]


async def test_kill_ends_a_running_stop_at_once(tmp_path: pathlib.Path) -> None:
    supervisor = Supervisor(FAST)
    supervisor.start([child(tmp_path, "a", STUBBORN)])
    await until(lambda: logfiles.tail(tmp_path / "a.log") == ["up"])
    stopping = asyncio.create_task(supervisor.stop(60))
    await until(lambda: status(supervisor, "a").state is ChildState.STOPPING)
    started = time.monotonic()
    supervisor.kill()
    await asyncio.wait_for(stopping, 5)

    assert time.monotonic() - started < 5


async def test_what_a_child_started_goes_with_it(tmp_path: pathlib.Path) -> None:
    supervisor = Supervisor(FAST)
    code = f"""
        import subprocess, sys
        p = subprocess.Popen([{sys.executable!r}, "-c", "import time; time.sleep(600)"])
        print(p.pid, flush=True)
        raise SystemExit(1)
    """
    supervisor.start([child(tmp_path, "a", code)])
    await until(lambda: status(supervisor, "a").state is ChildState.FAILED)
    await supervisor.stop(1)
    grandchildren = [int(line) for line in logfiles.tail(tmp_path / "a.log")]

    assert len(grandchildren) == FAST.max_in_a_row
    await until(lambda: not any(exists(p) for p in grandchildren))


def test_no_child_outlives_a_supervisor_that_is_killed(tmp_path: pathlib.Path) -> None:
    code = f"""
        import asyncio, os, pathlib, sys
        from plugmesh.supervisor.children import ChildSpec, Supervisor
        async def main():
            supervisor = Supervisor()
            argv = (sys.executable, "-I", "-S", "-c", {STUBBORN!r})
            supervisor.start([ChildSpec(n, n, argv, os.environ, pathlib.Path({str(tmp_path)!r}) / (n + ".log")) for n in "abc"])
            while not all(s.pid and s.log_path.read_text() for s in supervisor.snapshot()):
                await asyncio.sleep(0.02)
            print(*[s.pid for s in supervisor.snapshot()], flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    supervisor = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(p) for p in supervisor.stdout.readline().split()]
        assert len(pids) == 3
        assert all(exists(p) for p in pids)
    finally:
        supervisor.kill()
        supervisor.wait(10)
    deadline = time.monotonic() + 5
    while any(exists(p) for p in pids) and time.monotonic() < deadline:
        time.sleep(0.02)

    assert not any(exists(p) for p in pids)


def test_a_log_is_cut_while_its_writer_goes_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"old\n" * 1000)
        assert logfiles.cap(path, max_bytes=100)
        writer.write(b"new\n")

        assert path.read_bytes() == b"new\n"
        assert (tmp_path / "x.log.1").read_bytes() == b"old\n" * 25
        assert not logfiles.cap(path, max_bytes=100)


def test_exit_statuses_are_told_in_words() -> None:
    assert [exit_text(0), exit_text(7), exit_text(-11), exit_text(-200)] == [
        "exit status 0", "exit status 7", "killed by SIGSEGV", "killed by signal 200",
    ]  # fmt: skip
