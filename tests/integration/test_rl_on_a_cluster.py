"""`plugmesh rl run` on a mesh of processes: export, `plugmesh up` with the exported model, a run whose decode instance is killed, and what the mesh serves then."""

from __future__ import annotations

import asyncio
import json
import pathlib
import signal
import time

import pytest

import plugmesh_kernels
from plugmesh.client import DecodeClient
from plugmesh.testing.cluster import Cluster, running, wait_until
from plugmesh_rollout.loop.export import export_run
from plugmesh_rollout.loop.folder import RunFolder
from plugmesh_rollout.loop.policy import Policy
from plugmesh_rollout.loop.publish import published_of
from plugmesh_rollout.loop.settings import Settings

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.skipif(not plugmesh_kernels.available(), reason="no native kernels"),
]  # fmt: skip

STEPS, ROWS = 8, 16
RUN = """
[run]
folder = "run"
steps = 8
eval_every = 0
eval_examples = 5
plugins = ["asyncflow"]
[model]
hidden_size = 128
intermediate_size = 256
num_layers = 6
num_heads = 2
num_kv_heads = 1
max_position = 192
[task]
name = "copy"
[reward]
name = "partial"
[workflow]
name = "asyncflow"
options = { staleness = 1, policy = "weight_fifo" }
[rollout]
backend = "mesh"
swap = "continue"
group_size = 4
groups_per_step = 4
groups_at_once = 4
max_tokens = 160
[trainer]
lr = 1e-3
"""
DECODE = {"executor": "native", "num_threads": 1, "num_kv_blocks": 512, "replicas": 2}


def trained(folder: RunFolder) -> list[dict]:
    return [line for line in folder.read_figures().get("trainer-0", []) if "step" in line]


def test_a_run_on_a_mesh_ends_with_its_weights_served_although_decode_was_killed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    settings = Settings.read(tmp_path / "run.toml")
    folder = RunFolder(settings.run.folder)
    export_run(settings, tmp_path / "model")
    config = {
        "mesh": {"model": str(tmp_path / "model")},
        "services": {"decode": DECODE, "prefill": {"replicas": 0}, "kvstore": {"replicas": 0}, "grammar": {"replicas": 0}},
    }
    with running(tmp_path / "mesh", config) as cluster:
        command = cluster.command("rl", "run", str(tmp_path / "run.toml"), "--plain", "--json")
        try:
            wait_until(lambda: command.poll() is not None or len(trained(folder)) >= 2, 240, cluster.log)
            assert command.poll() is None, command.communicate()[0].decode() + cluster.log()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and not any(i["load"].get("num_running") for i in cluster.instances("decode")):
                time.sleep(0.02)
            cluster.kill("decode", signal.SIGKILL)
            output, _ = command.communicate(timeout=300)
        finally:
            if command.poll() is None:
                command.kill()
                command.wait()
        assert command.returncode == 0, output.decode()

        steps = trained(folder)
        assert list(range(1, STEPS + 1)) == [x["step"] for x in steps]
        assert STEPS * ROWS == sum(x["rows"] for x in steps)
        assert max(int(lag) for x in steps for lag in x["lags"]) <= 1
        assert json.loads((folder.root / "summary.json").read_text())["run"]["steps"] == STEPS
        newest = published_of(folder).newest()
        assert newest is not None and newest.number == STEPS

        wait_until(lambda: len(cluster.instances("decode")) == 2, 60)
        check_served(cluster, folder, newest.name)


def check_served(cluster: Cluster, folder: RunFolder, name: str) -> None:
    """An instance that serves the newest weights says greedily what the trainer's say; one that began after the last step has those of the start."""
    model, tensors = folder.load_weights(STEPS)
    policy = Policy(model, max_sequences=4, max_len=192)
    policy.load(STEPS, tensors)
    prompts = [[1, 5, 8, 30], [1, 40, 41, 42, 43]]
    expected = policy.greedy(prompts, 24)
    policy.close()

    async def said(address: str) -> list[list[int]]:
        async with DecodeClient.connect(address) as client:
            found = [await client.generate(p, temperature=0.0, max_tokens=24) for p in prompts]
        assert {name} == {v for g in found for v in g.weight_versions[0]}
        return [g.token_ids() for g in found]

    served = [i for i in cluster.instances("decode") if i["weight_version"] == name]
    assert served
    for info in served:
        assert expected == asyncio.run(said(info["grpc_address"]))
