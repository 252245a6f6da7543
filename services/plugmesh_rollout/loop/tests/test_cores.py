"""Cores of a run's processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading

import pytest

from plugmesh_rollout.loop.cores import set_apart, shares


def test_the_trainer_has_the_last_cores_and_others_the_rest():
    assert shares({0, 1}, 1) == ({1}, {0})
    assert shares({2, 3, 5, 8}, 3) == ({3, 5, 8}, {2})


@pytest.mark.parametrize(("cores", "num_threads"), [({4}, 1), ({0, 1}, 2), ({0, 1}, 5)])
def test_too_few_cores_are_everybodys(cores, num_threads):
    assert shares(cores, num_threads) == (cores, cores)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core, or no affinity")
def test_threads_that_were_there_and_threads_to_come_keep_to_their_share():
    seen: dict[str, set[int]] = {}
    go = threading.Event()

    def look(name):
        go.wait(10)
        seen[name] = os.sched_getaffinity(0)

    before = os.sched_getaffinity(0)
    old = threading.Thread(target=look, args=("old",))
    old.start()
    with set_apart(1) as trainers:
        child = subprocess.run([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], capture_output=True, text=True, check=True)
        new = threading.Thread(target=look, args=("new",))
        new.start()
        go.set()
        old.join()
        new.join()

    assert seen == {"old": shares(before, 1)[1], "new": shares(before, 1)[1]}
    assert ast.literal_eval(child.stdout) == shares(before, 1)[1] == before - trainers
    assert os.sched_getaffinity(0) == before
