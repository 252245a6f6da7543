"""The service as the runtime hosts it: the in-process mesh, and a process of its own on a real broker."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from plugmesh import wire
from plugmesh.config import dump_json
from plugmesh.kv import KvClient, KvIndex
from plugmesh.mesh.real import RealMesh
from plugmesh.testing.local_mesh import LocalMesh
from plugmesh_kvstore.config import Settings
from plugmesh_kvstore.service import create
from plugmesh_proto.v1 import kvstore_pb2 as pb
from plugmesh_proto.v1 import kvstore_pb2_grpc

pytest_plugins = ["plugmesh.testing.nats"]


def settings(tmp_path, name, **changes):
    defaults = {"arena_dir": tmp_path / "arena", "disk_dir": tmp_path / name, "arena_bytes": 1 << 20, "disk_bytes": 4 << 20}
    return Settings(**defaults | {"sweep_s": 0.05} | changes)


@pytest.mark.nats
async def test_a_process_of_its_own_serves_over_a_real_broker_and_leaves_nothing(broker, broker_config, tmp_path, layout, make_blocks, eventually):
    config = broker_config("kvstore", data_dir=str(tmp_path / "data"))
    service = {"arena_dir": str(tmp_path / "arena"), "arena_bytes": 1 << 20, "instance_id": "kv-1"}
    config = config.model_copy(update={"services": {"kvstore": service}})
    env = os.environ | {"PLUGMESH_CONFIG_JSON": dump_json(config), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "plugmesh_kvstore", env=env, stderr=(tmp_path / "log").open("wb")
    )
    try:
        async with await RealMesh.connect(broker_config("decode"), "decode", instance_id="decode-1") as mesh:
            await eventually(lambda: mesh.instances("kvstore"), 30.0)
            index = KvIndex(mesh)
            await index.start()
            clients = [
                KvClient(mesh, layout, holder=h, incarnation="i", strict=True, allow_arena=a, rpc_timeout_s=10.0)
                for h, a in (("decode-1", True), ("other", False))
            ]
            try:
                for seed, client in enumerate(clients):
                    blocks = make_blocks(layout, 20, seed=seed)
                    ids = [b[0] for b in blocks]
                    assert await client.put(blocks) == 20
                    refs = await client.match(ids)
                    assert [bytes(r.data) for r in refs] == [b[3] for b in blocks]
                    await client.release(refs)
                    await eventually(lambda ids=ids: index.prefix(ids) == {"kv-1": 20}, 15.0)
            finally:
                await index.close()
                for client in clients:
                    await client.close()
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

    assert not (tmp_path / "arena").exists()


@pytest.mark.parametrize("allow_arena", [True, False])
async def test_client_index_and_pull_work_in_the_local_mesh(tmp_path, layout, make_blocks, eventually, allow_arena):
    async with LocalMesh() as mesh:
        one = await mesh.host("kvstore", create, settings=settings(tmp_path, "1"), instance_id="kv-1")
        two = await mesh.host("kvstore", create, settings=settings(tmp_path, "2"), instance_id="kv-2")
        me = mesh.self_info
        client = KvClient(
            mesh, layout, holder=me.instance_id, incarnation=me.incarnation, store_instance="kv-1", strict=True, allow_arena=allow_arena
        )
        index = KvIndex(mesh, check_s=0.1)
        await index.start()
        try:
            blocks = make_blocks(layout, 20)
            ids = [b[0] for b in blocks]
            assert await client.put(blocks) == 20
            refs = await client.match(ids)
            assert [bytes(r.data) for r in refs] == [b[3] for b in blocks]
            assert all(r.is_local == allow_arena for r in refs)
            await eventually(lambda: index.prefix(ids) == {"kv-1": 20})
            pull = pb.PullRequest(from_address=one.info.grpc_address, layout=wire.layout_to_pb(layout), block_ids=ids)
            reply = await kvstore_pb2_grpc.KvStoreStub(mesh.channel("kvstore", "kv-2")).Pull(pull)
            assert reply.num_pulled == 20
            await eventually(lambda: index.prefix(ids) == {"kv-1": 20, "kv-2": 20})
            await client.release(refs)
            await eventually(lambda: one.service.store.audit().pinned == 0)
            await mesh.kill("kv-2")
            await eventually(lambda: index.prefix(ids) == {"kv-1": 20})
            assert two.service.store.used_bytes == 0 or two.service.store.num_blocks == 20
        finally:
            await index.close()
            await client.close()


async def test_a_killed_holder_in_the_mesh_is_fenced_by_discovery(tmp_path, layout, make_blocks, eventually):
    """The store hears of it long before the lease would end."""
    async with LocalMesh() as mesh:
        store = await mesh.host("kvstore", create, settings=settings(tmp_path, "1", lease_ttl_s=60.0), instance_id="kv-1")
        peer = await mesh.host("kvstore", create, settings=settings(tmp_path, "2"), instance_id="kv-2")
        client = KvClient(
            mesh, layout, holder=peer.info.instance_id, incarnation=peer.info.incarnation, store_instance="kv-1", allow_arena=False
        )
        await client.put(make_blocks(layout, 2))
        assert len(store.service.store.leases) == 1
        await mesh.kill("kv-2")

        await eventually(lambda: len(store.service.store.leases) == 0)
        await client.close()


async def test_requests_in_flight_at_the_stop_end_and_nothing_is_left(tmp_path, layout, make_blocks):
    async with LocalMesh() as mesh:
        await mesh.host("kvstore", create, settings=settings(tmp_path, "1"), instance_id="kv-1")
        client = KvClient(mesh, layout, holder="h", incarnation="i", rpc_timeout_s=0.5)
        await client.put(make_blocks(layout, 4))
        work = [asyncio.create_task(client.put(make_blocks(layout, 30, seed=s))) for s in range(1, 8)]
        await asyncio.sleep(0)
        await mesh.remove("kv-1")
        done = await asyncio.wait_for(asyncio.gather(*work), 20)

        assert all(0 <= num <= 30 for num in done)
        assert not (tmp_path / "arena").exists()
        await client.close()
