"""Fork, hold, score and tap of the real decode service, over the in-process carrier, gRPC and a real NATS broker."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import random
import time
from collections.abc import AsyncIterator

import grpc.aio
import numpy as np
import pytest

from plugmesh.client import DecodeClient, Origin
from plugmesh.config import MeshConfig
from plugmesh.errors import AlreadyExists, InvalidRequest, LimitExceeded, NotFound
from plugmesh.ledger import Ledger
from plugmesh.mesh import subjects
from plugmesh.mesh.broker import EmbeddedBroker
from plugmesh.mesh.hostid import host_id
from plugmesh.mesh.rpc import CarrierChannel, ErrorInterceptor, NatsCarrier, Patience, PeerWatch, RpcServer
from plugmesh.testing.local_mesh import LocalMesh
from plugmesh.types import FinishReason, SamplingParams
from plugmesh.wire import sampling_to_pb
from plugmesh_decode import config as decode_config
from plugmesh_decode import service as decode_service
from plugmesh_engine import EngineConfig, EngineRequest, build_engine
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.testing import random_weights, run_to_end, tiny_config, write_manifest
from plugmesh_proto.v1 import decode_pb2 as pb
from plugmesh_proto.v1 import decode_pb2_grpc, weightstore_pb2, weightstore_pb2_grpc

CONFIG = tiny_config(vocab_size=311, max_position=1024)
WEIGHTS = random_weights(CONFIG)
GREEDY = {"temperature": 0.0, "ignore_eos": True}


class Weights(weightstore_pb2_grpc.WeightStoreServicer):
    """The weightstore's Resolve for one model that lies on this host."""

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
        from plugmesh.mesh.api import Binding

        return [Binding(weightstore_pb2_grpc.add_WeightStoreServicer_to_server, self, "plugmesh_proto.v1.WeightStore")]

    async def start(self): ...
    async def drain(self, deadline_s): ...
    async def stop(self): ...
    def describe(self):
        return {"model": "tiny"}


class Rig:
    """The service, a channel to it, and a client on that."""

    def __init__(self, service, channel, manifest) -> None:
        self.service, self.channel, self.manifest = service, channel, manifest
        self.client = DecodeClient(channel, timeout_s=60)

    def alone(self, ids, **sampling) -> list[list[int]]:
        """Tokens of the same request in an engine of its own."""
        engine = build_engine(self.manifest, EngineConfig(executor="torch", dtype="float32", num_blocks=256))
        return run_to_end(engine, EngineRequest("alone", tuple(ids), SamplingParams(**{**GREEDY, **sampling})))["alone"]

    async def stats(self):
        return await self.service.generator.driver.call(lambda e: e.stats())

    async def baseline(self) -> None:
        """Waits until nothing is held."""
        until = time.monotonic() + 5
        while True:
            stats = await self.stats()
            held = (stats.kv_blocks_used, stats.kv_blocks_leaked, stats.num_held, len(self.service.generator.held), self.service.generator.num_live)
            if not any(held):
                return
            assert time.monotonic() < until, held
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("tiny"), CONFIG, WEIGHTS)


@contextlib.asynccontextmanager
async def channel_to(service, mesh: LocalMesh, carrier: str, folder: pathlib.Path) -> AsyncIterator[grpc.aio.Channel]:
    if carrier == "local":
        yield mesh.channel("decode")
    elif carrier == "grpc":
        server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
        decode_pb2_grpc.add_DecodeServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
        await server.stop(None)
    else:
        async with EmbeddedBroker(folder) as broker:
            serving, calling = await connect(broker, "decode"), await connect(broker, "gateway")
            watches = [PeerWatch(c, Patience(ping_s=0.5, silence_s=10.0, grace_s=2.0)) for c in (serving, calling)]
            server = RpcServer(serving, watches[0], instance="decode-1", incarnation="1")
            decode_pb2_grpc.add_DecodeServicer_to_server(service, server)
            for watch in watches:
                watch.start()
            subject = subjects.rpc_any(broker.mesh, "decode")
            await server.listen(subject, "decode")
            await serving.flush()
            yield CarrierChannel(calling, watches[1], subject, target="decode")
            await server.stop()
            for watch in watches:
                await watch.stop()
            await serving.close()
            await calling.close()


async def connect(broker: EmbeddedBroker, role: str) -> NatsCarrier:
    address = broker.credential(role)
    return await NatsCarrier.connect(address.url, mesh=broker.mesh, role=role, user=address.user, password_file=address.password_file)


@contextlib.asynccontextmanager
async def a_rig(manifest, folder: pathlib.Path, carrier: str, **changes) -> AsyncIterator[Rig]:
    async with LocalMesh(MeshConfig(mesh={"data_dir": folder, "cache_dir": folder})) as mesh:
        weights = Weights(manifest)
        await mesh.host("weightstore", lambda context: weights)
        settings = decode_config.Settings(**{"executor": "torch", "num_kv_blocks": 256, "num_threads": 1, "use_kvstore": False, **changes})
        service = (await mesh.host("decode", decode_service.create, settings=settings)).service
        (folder / "broker").mkdir(mode=0o700)
        async with channel_to(service, mesh, carrier, folder / "broker") as channel:
            rig = Rig(service, channel, manifest)
            yield rig
            await rig.baseline()


@pytest.fixture
async def rig(manifest, tmp_path):
    async with a_rig(manifest, tmp_path, "local") as rig:
        yield rig


def prompt(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{n}/{seed}")
    return [rng.randrange(3, CONFIG.vocab_size) for _ in range(n)]


@pytest.mark.parametrize("carrier", ["local", "grpc", pytest.param("nats", marks=pytest.mark.nats)])
async def test_all_four_over_every_carrier(manifest, tmp_path, carrier):
    """Forks continue as fresh requests would, scores and hidden states are the textbook's, the budget is met to the token, and nothing stays."""
    reference = ReferenceLlama(CONFIG, WEIGHTS)
    async with a_rig(manifest, tmp_path, carrier) as rig:
        c, ids = rig.client, prompt(37)
        parent = await c.generate(ids, hold=True, max_tokens=9, **GREEDY)
        whole = [*ids, *parent.token_ids()]
        tries = await asyncio.gather(*(c.fork(parent, [t], max_tokens=6, **GREEDY) for t in (7, 8, 9)))
        earlier = await c.fork(Origin(parent.request_id, 0, 40), max_tokens=6, **GREEDY)
        continuations = [prompt(n, 5) for n in (1, 20, 90)]
        scores = await c.score(ids, continuations, top_logprobs=1)
        forked = await c.score([5, 6], continuations[:1], origin=parent)
        hidden = await c.tap(ids, [0, 2], [3, 30, 36])
        behind = await c.tap([4], [1], [45, 46], origin=parent)
        bounded = await c.generate(ids, max_tokens=10, num_sequences=4, max_total_tokens=23, seed=1, ignore_eos=True)

        for t, one in zip((7, 8, 9), tries, strict=True):
            assert [one.token_ids()] == rig.alone([*whole, t], max_tokens=6)
            assert (one.usage.prompt_tokens, one.usage.cached_tokens, one.finish_reasons) == (47, 45, (FinishReason.LENGTH,))
        assert [earlier.token_ids()] == rig.alone(whole[:40], max_tokens=6)
        for continuation, score in zip(continuations, scores, strict=True):
            assert [t.token_id for t in score.tokens] == continuation
            assert np.allclose([t.logprob for t in score.tokens], textbook(reference, ids, continuation), atol=2e-3)
        assert not scores[2].is_greedy
        assert np.allclose(forked[0].logprob, sum(textbook(reference, [*whole, 5, 6], continuations[0])), atol=2e-3)
        for layer in (0, 2):
            assert hidden[layer].positions == (3, 30, 36)
            assert np.allclose(hidden[layer].array(), reference.stream(ids, layer)[[3, 30, 36]], atol=1e-3)
        assert np.allclose(behind[1].array(), reference.stream([*whole, 4], 1)[[45, 46]], atol=1e-3)
        assert sum(map(len, bounded.sequences)) == bounded.usage.completion_tokens == 23
        assert await c.release(parent)
        assert not await c.release(parent)
        with pytest.raises(NotFound):
            await c.fork(parent, [1], max_tokens=1, **GREEDY)


def textbook(reference: ReferenceLlama, ids: list[int], continuation: list[int]) -> list[float]:
    logits = reference.logits([*ids, *continuation]).astype(np.float64)
    logp = logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)) - logits.max(axis=1, keepdims=True)
    return [float(logp[len(ids) - 1 + i, t]) for i, t in enumerate(continuation)]


async def test_a_running_request_is_forked_and_cancelled_and_the_fork_goes_on(rig):
    stub, ids = decode_pb2_grpc.DecodeStub(rig.channel), prompt(20)
    request = pb.GenerateRequest(request_id="p", token_ids=ids, sampling=sampling_to_pb(SamplingParams(**GREEDY, max_tokens=600)))
    call, seen = stub.Generate(request, timeout=60), []
    async for frame in call:
        seen += [t.token_id for row in frame.rows for t in row.tokens]
        if len(seen) >= 4:
            break
    child = asyncio.create_task(rig.client.fork(Origin("p", 0, 23), [9], max_tokens=40, **GREEDY))
    while (await rig.stats()).num_forks == 0:
        await asyncio.sleep(0.001)
    call.cancel()

    assert [(await child).token_ids()] == rig.alone([*ids, *seen[:3], 9], max_tokens=40)


async def test_more_continuations_than_the_engine_runs_at_once_come_back_in_one_call(manifest, tmp_path):
    async with a_rig(manifest, tmp_path, "local", max_num_sequences=4) as rig:
        ids, continuations = prompt(33), [prompt(3 + i % 5, i) for i in range(11)]
        together = await rig.client.score(ids, continuations)
        alone = [(await rig.client.score(ids, [c]))[0] for c in continuations]
        stub = decode_pb2_grpc.DecodeStub(rig.channel)
        request = pb.ScoreRequest(request_id="r", token_ids=ids, continuations=[pb.TokenList(token_ids=c) for c in continuations])
        rows = [row async for frame in stub.Score(request, timeout=60) for row in frame.rows]

        assert np.allclose([s.logprob for s in together], [s.logprob for s in alone], atol=1e-3)
        assert [r.request_done for r in rows].count(True) == 1 and rows[-1].request_done
        assert rows[-1].usage.prompt_tokens == 33 + sum(map(len, continuations))
        assert {r.request_id for r in rows} == {"r"}


async def test_the_end_of_a_session_releases_what_its_requests_held(rig):
    stub = decode_pb2_grpc.DecodeStub(rig.channel)
    call = stub.Session(timeout=60)
    for name in "ab":
        sampling = sampling_to_pb(SamplingParams(**GREEDY, max_tokens=3))
        await call.write(pb.DecodeCommand(submit=pb.GenerateRequest(request_id=name, token_ids=prompt(20), sampling=sampling, hold=True)))
    done = 0
    while done < 2:
        done += sum(row.request_done for row in (await call.read()).rows)
    assert (await rig.stats()).num_held == 2
    await call.write(pb.DecodeCommand(release=pb.ReleaseHoldRequest(request_id="a")))
    while (await rig.stats()).num_held == 2:
        await asyncio.sleep(0.005)
    assert len(rig.service.generator.held) == 1
    await call.done_writing()
    await rig.baseline()


async def test_a_hold_ends_a_while_after_its_last_use_and_a_name_in_use_is_refused(manifest, tmp_path):
    async with a_rig(manifest, tmp_path, "local", hold_ttl_s=2.0) as rig:
        parent = await rig.client.generate(prompt(20), request_id="p", hold=True, max_tokens=3, **GREEDY)
        with pytest.raises(AlreadyExists):
            await rig.client.generate(prompt(20), request_id="p", max_tokens=3, **GREEDY)
        for _ in range(4):  # longer than its time, were it not that each use begins it anew
            await asyncio.sleep(0.6)
            await rig.client.fork(parent, [5], max_tokens=1, **GREEDY)
        assert (await rig.stats()).num_held == 1
        await asyncio.sleep(2.5)
        with pytest.raises(NotFound):
            await rig.client.fork(parent, [5], max_tokens=1, **GREEDY)


async def test_what_cannot_be_is_refused_with_a_typed_error(manifest, tmp_path):
    async with a_rig(manifest, tmp_path, "local", max_tap_bytes=1 << 16) as rig:
        c = rig.client
        for call, error, param in [
            (c.score(prompt(5), []), InvalidRequest, "continuations"),
            (c.score(prompt(5), [[]]), InvalidRequest, "score"),
            (c.score(prompt(5), [[1]], top_logprobs=21), InvalidRequest, "top_logprobs"),
            (c.tap(prompt(5), []), InvalidRequest, "layers"),
            (c.tap(prompt(5), [3]), InvalidRequest, "taps"),
            (c.tap(prompt(5), [1], [5]), InvalidRequest, "positions"),
            (c.tap(prompt(500), [1]), LimitExceeded, "positions"),
            (c.tap([1], [1], origin="nobody"), NotFound, ""),
            (c.generate(prompt(5), colour="blue"), InvalidRequest, "sampling"),
        ]:
            with pytest.raises(error) as caught:
                await call
            assert caught.value.param == param


async def test_children_of_one_ledger_together_never_use_one_token_more_than_its_budget(rig):
    """Each child runs with what it was granted, and gives back what it did not use; the engine stops it to the token."""
    rng, ledger, spent = random.Random(3), Ledger(150, 1000), []
    parent = await rig.client.generate(prompt(20), hold=True, max_tokens=4, **GREEDY)

    async def child(i: int) -> None:
        await asyncio.sleep(rng.random() / 50)
        granted = ledger.reserve(rng.randrange(1, 25))
        if granted:
            wanted = {"num_sequences": rng.randrange(1, 4), "seed": i, "stop_token_ids": tuple(range(0, 311, 5))}
            answer = await rig.client.fork(parent, [i % 200 + 3], max_tokens=granted, max_total_tokens=granted, **wanted)
            spent.append(answer.usage.completion_tokens)
            ledger.settle(granted, answer.usage.completion_tokens)
        assert sum(spent) <= 150

    while ledger.num_left:
        await asyncio.gather(*(child(len(spent) + i) for i in range(8)))
    await rig.client.release(parent)

    assert sum(spent) == ledger.num_tokens == 150 and ledger.num_reserved == 0
    assert len(spent) > 8


async def test_clients_that_go_away_in_the_middle_leave_nothing_behind(rig):
    async def one(i: int) -> None:
        rng = random.Random(i)
        calls = [
            lambda: rig.client.generate(prompt(40, i), hold=True, request_id=f"h{i}", max_tokens=30, **GREEDY),
            lambda: rig.client.score(prompt(60, i), [prompt(30, j) for j in range(6)]),
            lambda: rig.client.tap(prompt(200, i), [0, 1, 2]),
            lambda: rig.client.fork(f"h{i - 4}", [1, 2], max_tokens=30, **GREEDY),
        ]
        with contextlib.suppress(TimeoutError, NotFound):
            async with asyncio.timeout(rng.random() / 2):
                await calls[i % 4]()

    await asyncio.gather(*map(one, range(40)))
    for i in range(40):
        await rig.client.release(f"h{i}")

    assert len((await rig.client.score(prompt(60), [prompt(30, 1)]))[0].tokens) == 30  # and it serves on
