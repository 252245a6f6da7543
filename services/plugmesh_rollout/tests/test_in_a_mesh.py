"""The service as the runtime hosts it: a process of its own on a real broker, killed and started anew elsewhere; and when a mesh starts one."""

from __future__ import annotations

import asyncio
import os
import sys
import time

import pytest

from plugmesh import config as configuration
from plugmesh.client.rollout import RolloutClient, Row
from plugmesh.config import dump_json
from plugmesh.mesh.real import RealMesh
from plugmesh.supervisor import plan

pytest_plugins = ["plugmesh.testing.nats"]


@pytest.mark.nats
@pytest.mark.slow
async def test_members_of_the_mesh_find_the_table_also_after_it_was_killed(broker, broker_config, tmp_path):
    config = broker_config("rollout", data_dir=str(tmp_path / "data"))
    config = config.model_copy(update={"services": {"rollout": {"replicas": 1}}})
    env = os.environ | {"PLUGMESH_CONFIG_JSON": dump_json(config), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    async def start() -> asyncio.subprocess.Process:
        with (tmp_path / "log").open("ab") as log:
            return await asyncio.create_subprocess_exec(sys.executable, "-m", "plugmesh_rollout", env=env, stdout=log, stderr=log)

    process = await start()
    heard: list[bytes] = []

    async def hear(event) -> None:
        heard.append(event.data)

    try:
        async with await RealMesh.connect(broker_config("decode"), "decode", instance_id="decode-1") as mesh, RolloutClient.of_mesh(mesh, retry_s=30.0) as table:
            mesh.subscribe("rollout.events", hear)
            assert await table.create_topic("t", ["a"], ["x"])
            assert await table.put("t", [Row("1", {"a": 1}), Row("2", {"a": 2})]) == [0, 1]
            await table.ack(await table.get("t", "x", ["a"], 1))
            deadline = time.monotonic() + 5
            while not heard and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            assert heard
            process.kill()
            await process.wait()
            process = await start()
            batch = await table.get("t", "x", ["a"], 1)
            assert batch.column("a") == [2]
            await table.ack(batch)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_a_mesh_starts_a_table_only_where_it_is_asked_for(tmp_path):
    def roles(services: dict) -> set[str]:
        config = configuration.MeshConfig(services=services)
        specs = plan.specs(config, plan.check(config), nats=lambda role: {}, run_dir=tmp_path, gateway_port=0, arena_dir=None, environ={})
        return {spec.role for spec in specs}

    assert roles({}) == roles({"rollout": {"durability": "batch"}}) == set(configuration.SERVICE_NAMES)
    assert roles({"rollout": {"replicas": 1}}) == {*configuration.SERVICE_NAMES, "rollout"}
