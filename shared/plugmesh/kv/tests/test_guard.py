"""The kernel's word on whether a client can still touch its slots."""

from __future__ import annotations

import subprocess
import sys

import pytest

from plugmesh.kv.guard import Guard, GuardProbe, guard_path


def test_a_guard_is_held_until_it_is_closed(tmp_path):
    probe = GuardProbe(tmp_path / "g")
    assert not probe.held()
    assert not probe.seen_held
    guard = Guard.try_hold(probe.path)
    assert probe.held()
    assert not probe.retire()
    guard.close()
    assert not probe.held()
    assert probe.seen_held
    assert probe.retire()
    assert not probe.path.exists()


def test_nobody_can_hold_a_retired_guard(tmp_path):
    probe = GuardProbe(tmp_path / "g")
    assert probe.retire()
    with pytest.raises(FileNotFoundError):
        Guard.try_hold(tmp_path / "g")


def test_a_guard_that_is_probed_at_this_instant_is_tried_again(tmp_path):
    probe = GuardProbe(tmp_path / "g")
    first = Guard.try_hold(probe.path)
    assert Guard.try_hold(probe.path) is None
    first.close()
    assert Guard.try_hold(probe.path) is not None


def test_the_kernel_frees_the_guard_of_a_killed_process(tmp_path):
    probe = GuardProbe(guard_path(str(tmp_path / "x.arena"), "abc"))
    script = f"import sys; sys.path[:] = {sys.path!r}\nimport pathlib\nfrom plugmesh.kv.guard import Guard\n"
    script += f"guard = Guard.try_hold(pathlib.Path({str(probe.path)!r}))\nprint('held', flush=True)\nsys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        assert probe.held()
    finally:
        child.kill()
        child.wait(10)

    assert not probe.held()
