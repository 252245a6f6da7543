"""Decode instances tell what their prefix caches hold, and a follower's picture equals the engines' own, whatever was lost in between."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import pytest

from plugmesh.config import MeshConfig
from plugmesh.kv.feed import DECODE
from plugmesh.kv.index import KvIndex
from plugmesh.mesh.api import Binding
from plugmesh.mesh.hostid import host_id
from plugmesh.testing.local_mesh import LocalMesh
from plugmesh.types import SamplingParams, block_chain
from plugmesh.wire import sampling_to_pb
from plugmesh_decode import config as decode_config
from plugmesh_decode import service as decode_service
from plugmesh_engine.testing import random_weights, tiny_config, write_manifest
from plugmesh_proto.v1 import decode_pb2 as pb
from plugmesh_proto.v1 import decode_pb2_grpc, weightstore_pb2, weightstore_pb2_grpc

CONFIG = tiny_config(vocab_size=311, max_position=512)


class Weights(weightstore_pb2_grpc.WeightStoreServicer):
    """Resolves to one model that lies on this host."""

    def __init__(self, manifest) -> None:
        self.reply = weightstore_pb2.ModelManifest(
            model="tiny", version=manifest.version, architecture="llama", config_json=manifest.config_json, format="float32", host=host_id(),
            tensors=[
                weightstore_pb2.TensorEntry(name=t.name, dtype=t.dtype, shape=t.shape, num_bytes=t.num_bytes, path=t.path, offset=t.offset)
                for t in manifest.tensors
            ],
        )

    async def Resolve(self, request, context):
        return self.reply

    def bindings(self):
        return [Binding(weightstore_pb2_grpc.add_WeightStoreServicer_to_server, self, "plugmesh_proto.v1.WeightStore")]

    async def start(self): ...
    async def drain(self, deadline_s): ...
    async def stop(self): ...
    def describe(self):
        return {"model": "tiny"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("tiny"), CONFIG, random_weights(CONFIG))


@pytest.fixture
async def mesh(manifest, tmp_path):
    async with LocalMesh(MeshConfig(mesh={"data_dir": tmp_path, "cache_dir": tmp_path})) as mesh:
        weights = Weights(manifest)
        await mesh.host("weightstore", lambda context: weights)
        yield mesh


async def add_decode(mesh: LocalMesh, name: str, **changes):
    settings = decode_config.Settings(executor="torch", num_kv_blocks=24, num_threads=1, use_kvstore=False, **changes)
    return await mesh.host("decode", decode_service.create, settings=settings, instance_id=name)


def prompt(n: int, seed: object) -> list[int]:
    rng = random.Random(f"{n}/{seed}")
    return [rng.randrange(3, CONFIG.vocab_size) for _ in range(n)]


async def generate(mesh: LocalMesh, name: str, ids: list[int], max_tokens: int = 2) -> pb.TokenRow:
    stub = decode_pb2_grpc.DecodeStub(mesh.channel("decode", name))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    request = pb.GenerateRequest(request_id=f"r{random.random()}", token_ids=ids, sampling=sampling_to_pb(params))
    rows = [row async for frame in stub.Generate(request, timeout=60) for row in frame.rows]
    assert not rows[-1].HasField("error"), rows[-1]
    return rows[-1]


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def names(instance) -> set[bytes]:
    """What the engine's prefix cache really holds."""
    return set(instance.service._engine._pool.prefix.names())


async def test_the_picture_equals_the_caches_through_eviction_loss_restart_and_death(mesh):
    one, two = await add_decode(mesh, "one"), await add_decode(mesh, "two")
    await generate(mesh, "one", prompt(100, "before"))  # cached before anybody asked
    index = KvIndex(mesh, source=DECODE, check_s=0.1)
    await index.start()
    key = one.service._engine.layout.key()

    def right(*instances) -> bool:
        found = {name: ids for name, ids in index._ids.items() if ids}
        return sorted(index.stores()) == sorted(i.info.instance_id for i in instances) and found == {i.info.instance_id: names(i) for i in instances if names(i)}

    try:
        await until(lambda: right(one, two))
        assert index.prefix(block_chain(key, prompt(100, "before"))) == {"one": 6}
        for i in range(6):  # more than the 24 blocks of the pool: the first ones are evicted
            await generate(mesh, "one", prompt(100, i), 20)
        await generate(mesh, "two", prompt(60, 0))
        await until(lambda: right(one, two))
        assert index.num_gaps == 0
        assert index.prefix(block_chain(key, prompt(100, "before"))) == {}
        # A prompt that the index says is there is really found.
        row = await generate(mesh, "one", prompt(100, 5))
        assert row.usage.cached_tokens == 96 == 16 * index.prefix(block_chain(key, prompt(100, 5)))["one"]

        # Messages are lost: the next number shows it, or the sequence in the load does.
        snapshots = index.num_snapshots
        publish, one.mesh.publish = one.mesh.publish, lambda topic, data: asyncio.sleep(0)
        await generate(mesh, "one", prompt(90, "lost"))
        await asyncio.sleep(0.1)
        one.mesh.publish = publish
        await generate(mesh, "one", prompt(90, "after"))
        await until(lambda: index.num_snapshots > snapshots and right(one, two))

        # Changes come faster than the log may grow.
        log = one.service.kv_events._log
        log._max_waiting = 0
        await generate(mesh, "one", prompt(90, "overflow"))
        log._max_waiting = 1000
        await until(lambda: len(log) == 0)
        await generate(mesh, "one", prompt(90, "again"))
        await until(lambda: right(one, two))

        # A death, and another life under the same name.
        await mesh.kill("one")
        await until(lambda: index.stores() == ["two"] and "one" not in index._ids)
        one = await add_decode(mesh, "one")
        await generate(mesh, "one", prompt(40, "new life"))
        await until(lambda: right(one, two))
    finally:
        await index.close()


async def test_an_instance_that_nobody_asked_publishes_nothing(mesh):
    heard = []

    async def listen(event):
        heard.append(event)

    mesh.subscribe(DECODE.topic, listen)
    one = await add_decode(mesh, "one")
    await generate(mesh, "one", prompt(100, 0))
    await asyncio.sleep(0.1)

    assert heard == []
    assert one.service._engine._pool.prefix.observer is None
