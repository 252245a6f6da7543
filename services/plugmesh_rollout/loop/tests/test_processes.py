"""Runs as processes, killed at will."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal

import numpy as np
import pytest
from typer.testing import CliRunner

from plugmesh.cli.app import app
from plugmesh_rollout.loop import curves
from plugmesh_rollout.loop.folder import RunFolder
from plugmesh_rollout.loop.run import Progress, run_in_process, run_processes
from plugmesh_rollout.loop.settings import checked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def settings(folder, **parts):
    base = {
        "run": {"folder": str(folder), "steps": 12, "eval_every": 0, "eval_examples": 10, "plugins": ["asyncflow"]},
        "model": {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_position": 64},
        "task": {"name": "copy"}, "reward": {"name": "partial"}, "workflow": {"name": "asyncflow", "options": {"preset": "one_step_off"}},
        "rollout": {"group_size": 3, "groups_per_step": 4, "groups_at_once": 3, "max_tokens": 6, "slow_s": 0.02, "workers": 2, "lease_s": 2.0},
        "trainer": {"pause_s": 0.1},
    }  # fmt: skip
    for part, values in parts.items():
        base[part] = {**base.get(part, {}), **values}
    return checked(base)


async def test_workers_and_trainer_may_be_killed_and_the_run_ends_with_the_same_weights(tmp_path):
    """kill -9, again and again, of a process chosen by chance; every row is trained once, by the step that it belongs to."""
    rng = np.random.default_rng(3)
    straight = await run_in_process(settings(tmp_path / "a"))
    progress = Progress(12)
    running = asyncio.create_task(run_processes(settings(tmp_path / "b"), progress))
    folder, num_killed = RunFolder(tmp_path / "b"), 0
    while not running.done():
        await asyncio.sleep(0.1)
        done = len(curves.by_step(folder.read_figures().get("trainer-0", [])))
        if num_killed < 4 and done >= 2 * num_killed + 1:
            name = ["train:0", "rollout:0", "reward:0", "rollout:1"][num_killed]
            with contextlib.suppress(ProcessLookupError):
                os.kill(progress.processes[name], signal.SIGKILL)
            num_killed += 1
            await asyncio.sleep(float(rng.uniform(0, 0.3)))
    assert 12 == await running

    assert 4 == num_killed == progress.num_restarts
    final, tensors = folder.load_weights(12)
    assert final == straight.model.config
    assert all(np.array_equal(a, tensors[n]) for n, a in straight.model.arrays().items())


async def test_staleness_holds_after_the_run_was_stopped_and_gone_on_with(tmp_path):
    """Streams, whose rows are not pinned to a version; every token of both halves is within the bound, and every group is trained."""
    s = settings(tmp_path, workflow={"options": {"staleness": 2, "policy": "weight_fifo"}})
    stop = asyncio.Event()
    running = asyncio.create_task(run_processes(s, Progress(12), stop=stop))
    folder = RunFolder(tmp_path)
    while len(curves.by_step(folder.read_figures().get("trainer-0", []))) < 5:
        await asyncio.sleep(0.05)
    stop.set()
    done = await running
    assert 5 <= done < 12
    assert 12 == await run_processes(s, Progress(12))

    steps = curves.by_step(folder.read_figures()["trainer-0"])
    assert list(range(1, 13)) == [x["step"] for x in steps]
    assert max(curves.lag_histogram(steps)) <= 2
    assert 12 * s.batch_rows == sum(x["rows"] for x in steps)


def test_the_command_runs_a_file_writes_its_pages_and_goes_on(tmp_path):
    (tmp_path / "run.toml").write_text("""
[run]
folder = "out"
steps = 3
eval_every = 2
eval_examples = 10
[model]
hidden_size = 64
intermediate_size = 64
num_layers = 1
num_heads = 2
num_kv_heads = 1
[task]
name = "copy"
[rollout]
group_size = 2
groups_per_step = 2
max_tokens = 6
""")
    first = CliRunner().invoke(app, ["rl", "run", str(tmp_path / "run.toml"), "--plain"])
    again = CliRunner().invoke(app, ["rl", "run", str(tmp_path / "run.toml"), "--plain", "--json", "--steps", "5"])

    assert (0, 0) == (first.exit_code, again.exit_code), first.output + again.output
    assert {"steps": 5, "last_step": 5}.items() <= json.loads((tmp_path / "out" / "summary.json").read_text())["out"].items()
    assert b"\x89PNG" == (tmp_path / "out" / "curves.png").read_bytes()[:4]
    assert "held-out accuracy" in (tmp_path / "out" / "curves.html").read_text()
