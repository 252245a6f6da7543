"""Weights published to the real weightstore and swapped by a running decode instance under load: no request is lost, every token is its version's."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import time
import uuid
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

import plugmesh_kernels
from plugmesh.client import DecodeClient
from plugmesh.client import weights as weights_client
from plugmesh.config import MeshConfig
from plugmesh.errors import DeadlineExceeded, FailedPrecondition, InvalidRequest, NotFound
from plugmesh.testing.local_mesh import LocalMesh
from plugmesh.types import SamplingParams
from plugmesh.wire import error_from_pb, sampling_to_pb
from plugmesh_decode import config as decode_config
from plugmesh_decode import service as decode_service
from plugmesh_engine import EngineConfig, EngineRequest, build_engine
from plugmesh_engine.testing import run_to_end
from plugmesh_proto.v1 import decode_pb2 as pb
from plugmesh_proto.v1 import decode_pb2_grpc, weightstore_pb2, weightstore_pb2_grpc
from plugmesh_weightstore import config as store_config
from plugmesh_weightstore import service as store_service
from plugmesh_weightstore.testing import hf_weights, write_hf

pytestmark = pytest.mark.skipif(not plugmesh_kernels.available(), reason="no native kernels")

Row = tuple[str, int]  # version, token
MODES = ("finish", "continue", "abort")


class Rig:
    def __init__(self, mesh: LocalMesh, decode) -> None:
        self.mesh, self.service = mesh, decode.service
        self.decode = decode_pb2_grpc.DecodeStub(mesh.channel("decode"))
        self.store = weightstore_pb2_grpc.WeightStoreStub(mesh.channel("weightstore"))
        self.num_rows = 0
        self.epochs: dict[str, int] = {}

    async def publish(self, seed: int, base: str = "base") -> weights_client.Published:
        published = await weights_client.publish(self.mesh, "policy", hf_weights(seed), base_version=base, metadata={"train_step": str(seed)})
        await self.store.Resolve(weightstore_pb2.ResolveRequest(model=published.version, format="native"))  # packed now, so that a swap comes soon
        return published

    async def swap(self, version: str, mode: str = "finish", timeout_s: float = 0.0) -> pb.SwapWeightsReply:
        return await DecodeClient(self.mesh.channel("decode"), timeout_s=60).swap_weights(version, mode, finish_s=timeout_s)

    async def generate(self, prompt: tuple[int, ...], sampling: SamplingParams, model: str = "") -> tuple[list[Row], pb.TokenRow]:
        """(version, token) in order, and the last row."""
        request = pb.GenerateRequest(request_id=uuid.uuid4().hex, model=model, token_ids=prompt, sampling=sampling_to_pb(sampling))
        rows: list[Row] = []
        version = ""
        async for frame in self.decode.Generate(request, timeout=60):
            for row in frame.rows:
                if row.HasField("error"):
                    raise error_from_pb(row.error)
                self.num_rows += 1
                assert row.index == len(rows)
                assert row.weight_version != version, "told where it had not changed"
                version = row.weight_version or version
                if row.weight_version:
                    self.epochs[row.weight_version] = row.weight_epoch
                rows += [(version, t.token_id) for t in row.tokens]
        return rows, row

    async def alone(self, version: str, prompt: tuple[int, ...], sampling: SamplingParams, before: tuple[int, ...] = ()) -> list[int]:
        """What an engine that never knew other weights says."""
        manifest = await self.store.Resolve(weightstore_pb2.ResolveRequest(model=version, format="native"))
        engine = build_engine(manifest, EngineConfig(executor="native", num_blocks=64, num_threads=1))
        try:
            return run_to_end(engine, EngineRequest("x", prompt, sampling, resume=(before,) if before else ()))["x"][0]
        finally:
            engine.close()

    @contextlib.contextmanager
    def slow(self, step_s: float) -> Iterator[None]:
        """A step takes at least so long, so that a long answer still runs when something else, on a busy machine, comes about."""
        engine = self.service._engine
        step = engine.step
        engine.step = lambda: (time.sleep(step_s), step())[1]
        try:
            yield
        finally:
            del engine.step

    async def check_nothing_is_left(self) -> None:
        for _ in range(200):
            stats = await self.service.generator.driver.call(lambda e: e.stats())
            if not (stats.kv_blocks_used or stats.kv_blocks_leaked or self.service.generator.num_live):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(stats)


@contextlib.asynccontextmanager
async def a_rig(folder: pathlib.Path, **settings) -> AsyncIterator[Rig]:
    async with LocalMesh(MeshConfig(mesh={"data_dir": folder / "data", "cache_dir": folder / "cache", "model": "base"})) as mesh:
        write_hf(folder / "model")
        await mesh.host("weightstore", store_service.create, settings=store_config.Settings(allowed_roots=(folder,), pull=False))
        stub = weightstore_pb2_grpc.WeightStoreStub(mesh.channel("weightstore"))
        async for _ in stub.Import(weightstore_pb2.ImportRequest(path=str(folder / "model"), model="base", make_default=True)):
            pass
        chosen = {"executor": "native", "num_kv_blocks": 256, "num_threads": 1, "use_kvstore": False, "max_num_sequences": 16, **settings}
        decode = await mesh.host("decode", decode_service.create, settings=decode_config.Settings(**chosen))
        rig = Rig(mesh, decode)
        yield rig
        await rig.check_nothing_is_left()


def prompt(i: int, length: int = 0) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(i).integers(3, 40, length or 5 + i % 30))


def sampling(i: int, max_tokens: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens or 60 + i % 20, temperature=0.0 if i % 2 else 0.9, seed=i, ignore_eos=True)


@pytest.mark.parametrize("mode", MODES)
async def test_a_swap_under_load_drops_nothing_and_every_token_is_its_versions(tmp_path, mode):
    async with a_rig(tmp_path) as rig:
        old = rig.service.describe()["weight_version"]
        published = await rig.publish(1)
        with rig.slow(0.02):
            streams = [asyncio.create_task(rig.generate(prompt(i), sampling(i))) for i in range(32)]
            while rig.num_rows < 100:
                await asyncio.sleep(0.002)
            reply = await rig.swap("policy", mode)
        assert (reply.old_version, reply.new_version, reply.weight_epoch) == (old, published.version, published.number)
        assert reply.num_restarted == (reply.num_running if mode == "abort" else 0)
        assert (reply.num_running > 0) == (mode != "finish") and reply.num_bytes > 1 << 20
        results = await asyncio.gather(*streams)
        spans = 0
        for i, (rows, last) in enumerate(results):
            assert last.request_done and len(rows) == sampling(i).max_tokens
            before, after = ([t for v, t in rows if v == version] for version in (old, published.version))
            assert rows == [(old, t) for t in before] + [(published.version, t) for t in after]
            spans += bool(before and after)
            if before:
                assert (await rig.alone(old, prompt(i), sampling(i)))[: len(before)] == before
            if after and (mode == "abort" or not before):
                assert await rig.alone(published.version, prompt(i), sampling(i), tuple(before)) == after
        assert (spans == 0) == (mode == "finish")
        assert rig.epochs == {old: 0, published.version: published.number}
        status = await rig.decode.Status(pb.DecodeStatusRequest())
        assert (status.weight_version, status.layout.model, status.weight_epoch) == (published.version, published.version, published.number)


async def test_names_lease_and_cache_after_a_swap(tmp_path):
    async with a_rig(tmp_path) as rig:
        old = rig.service.describe()["weight_version"]
        published = await rig.publish(1)
        long = prompt(1, 50)
        assert (await rig.generate(long, sampling(1), old))[0][0][0] == old
        assert (await rig.generate(long, sampling(1)))[1].usage.cached_tokens == 48
        with pytest.raises(NotFound):
            await rig.generate(long, sampling(1), published.version)
        await rig.swap(published.version)
        [info] = rig.mesh.instances("decode")
        assert (info.weight_version, info.model) == (published.version, "base")
        with pytest.raises(NotFound):
            await rig.generate(long, sampling(1), old)
        for name in ("", "base", "policy", published.version):
            rows, last = await rig.generate(long, sampling(1), name)
            assert {v for v, _ in rows} == {published.version}
            assert last.usage.cached_tokens == (48 if name else 0)
        again = await rig.swap("policy")
        assert (again.old_version, again.new_version, again.num_bytes) == (published.version, published.version, 0)
        back = await rig.swap(old, "abort")
        assert back.new_version == old and back.weight_epoch == 0
        assert (await rig.generate(long, sampling(1), old))[1].usage.cached_tokens == 48


async def test_refused_swaps_change_nothing(tmp_path):
    async with a_rig(tmp_path) as rig:
        old = rig.service.describe()["weight_version"]
        published = await rig.publish(1)
        write_hf(tmp_path / "other", config={"rope_theta": 99.0})
        async for _ in rig.store.Import(weightstore_pb2.ImportRequest(path=str(tmp_path / "other"), model="other")):
            pass
        with pytest.raises(FailedPrecondition, match="rope_theta"):
            await rig.swap("other")
        with pytest.raises(NotFound):
            await rig.swap("nobody")
        with pytest.raises(InvalidRequest):
            await rig.swap("")
        with rig.slow(0.005):
            stream = asyncio.create_task(rig.generate(prompt(3), sampling(3, 1500), old))
            while rig.num_rows < 5:
                await asyncio.sleep(0.002)
            with pytest.raises(DeadlineExceeded):
                await rig.swap("policy", "finish", 0.05)
            rows, _ = await rig.generate(prompt(4), sampling(4), old)  # the queue moves, and the old name is served again
            assert {v for v, _ in rows} == {old}
            waiting = asyncio.create_task(rig.swap("policy", "finish"))
            while rig.service._engine._swap is None:
                await asyncio.sleep(0.002)
            assert not waiting.done() and not stream.done()
            with pytest.raises(NotFound):  # it would be served by other weights than it asks for
                await rig.generate(prompt(5), sampling(5), old)
            queued = asyncio.create_task(rig.generate(prompt(5), sampling(5)))
        rows, _ = await stream
        assert len(rows) == 1500 and {v for v, _ in rows} == {old}
        assert (await waiting).new_version == published.version
        assert {v for v, _ in (await queued)[0]} == {published.version}


async def test_an_instance_follows_what_is_published(tmp_path):
    async with a_rig(tmp_path, follow_model="policy", follow_mode="continue") as rig:
        first = await rig.publish(1)
        stream = asyncio.create_task(rig.generate(prompt(1), sampling(1, 1800)))
        second = await rig.publish(2, "policy")
        for _ in range(500):
            if rig.mesh.instances("decode")[0].weight_version == second.version:
                break
            await asyncio.sleep(0.01)
        rows, _ = await rig.generate(prompt(2), sampling(2))
        assert {v for v, _ in rows} == {second.version} and first.version != second.version
        rows, _ = await stream
        assert len(rows) == 1800
        # One that joins later begins with what it follows.
        late = await rig.mesh.host("decode", decode_service.create, settings=rig.service._settings)
        assert late.service.describe()["weight_version"] == second.version
