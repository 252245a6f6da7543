"""Prefill, kvstore and decode together, in one process over the in-process carrier, on a small random model in float32."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import random
import time

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from plugmesh.config import MeshConfig
from plugmesh.hookspecs import hookimpl
from plugmesh.mesh.api import Binding
from plugmesh.mesh.hostid import host_id
from plugmesh.records import HandOver, KvHandOverRecord, PrefillPolicyRecord
from plugmesh.testing.local_mesh import LocalMesh
from plugmesh.tracing import TRACING
from plugmesh.types import SamplingParams, block_chain
from plugmesh.wire import layout_to_pb, sampling_to_pb
from plugmesh_decode import config as decode_config
from plugmesh_decode import service as decode_service
from plugmesh_engine import EngineConfig, EngineRequest, build_engine
from plugmesh_engine.constrained import Constraint
from plugmesh_engine.speculate import Drafter
from plugmesh_engine.testing import random_weights, run_to_end, tiny_config, write_manifest
from plugmesh_engine.testing_grammar import PERSON, compile_small, small_vocabulary, text_of
from plugmesh_kvstore import config as kv_config
from plugmesh_kvstore import service as kv_service
from plugmesh_prefill import config as prefill_config
from plugmesh_prefill import service as prefill_service
from plugmesh_proto.v1 import decode_pb2 as pb
from plugmesh_proto.v1 import decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, weightstore_pb2, weightstore_pb2_grpc

CONFIG = tiny_config(vocab_size=311, max_position=2048)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("tiny"), CONFIG, random_weights(CONFIG))


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
        return [Binding(weightstore_pb2_grpc.add_WeightStoreServicer_to_server, self, "plugmesh_proto.v1.WeightStore")]

    async def start(self): ...
    async def drain(self, deadline_s): ...
    async def stop(self): ...
    def describe(self):
        return {"model": "tiny"}


class Rig:
    """The four services and how a test talks to them."""

    def __init__(self, mesh: LocalMesh, manifest) -> None:
        self.mesh = mesh
        self.manifest = manifest

    async def host(self, role: str, create, settings):
        return await self.mesh.host(role, create, settings=settings)

    async def add_prefill(self, **changes):
        settings = prefill_config.Settings(**{"max_tokens_per_step": 32, "num_kv_blocks": 128, "num_threads": 1, **changes})
        return await self.host("prefill", prefill_service.create, settings)

    async def add_decode(self, **changes):
        settings = decode_config.Settings(
            **{"num_kv_blocks": 256, "num_threads": 1, "remote_prefill_min_tokens": 64, "remote_prefill_timeout_s": 5.0, **changes}
        )
        return await self.host("decode", decode_service.create, settings)

    async def add_kvstore(self, tmp_path: pathlib.Path):
        return await self.host("kvstore", kv_service.create, kv_config.Settings(arena_bytes=1 << 22, arena_dir=tmp_path, disk_bytes=0))

    def request(self, request_id: str, ids, *, remote: bool = True, resume=(), **sampling) -> pb.GenerateRequest:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **sampling})
        return pb.GenerateRequest(
            request_id=request_id, token_ids=ids, sampling=sampling_to_pb(params), resume=resume,
            prefill_mode=pb.GenerateRequest.PREFILL_REMOTE if remote else pb.GenerateRequest.PREFILL_LOCAL,
        )

    async def generate(self, request: pb.GenerateRequest, decode=None) -> list[pb.TokenRow]:
        stub = decode_pb2_grpc.DecodeStub(self.mesh.channel("decode", decode.info.instance_id if decode else None))
        return [row async for frame in stub.Generate(request, timeout=60) for row in frame.rows]

    def alone(self, ids, **sampling) -> list[list[int]]:
        """Tokens of the same request in an engine of its own."""
        engine = build_engine(self.manifest, EngineConfig(executor="torch", dtype="float32", num_blocks=256))
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **sampling})
        return run_to_end(engine, EngineRequest("alone", tuple(ids), params))["alone"]

    async def baseline(self) -> None:
        """Waits until nothing is held anywhere."""
        until = time.monotonic() + 5
        while True:
            held = {}
            for name, instance in self.mesh.hosted.items():
                service = instance.service
                if isinstance(service, decode_service.DecodeService):
                    stats = await service.generator.driver.call(lambda e: e.stats())
                    held[name] = (stats.kv_blocks_used, stats.kv_blocks_leaked, service.generator.num_live)
                elif isinstance(service, prefill_service.PrefillService):
                    stats = await service._runner.driver.call(lambda e: e.stats())
                    held[name] = (stats.kv_blocks_used, stats.kv_blocks_leaked, service._runner.num_running)
                elif isinstance(service, kv_service.KvStoreService):
                    audit = service.store.audit()
                    held[name] = (audit.pinned, audit.reserved, audit.num_leaked, audit.num_doubled)
            if not any(any(v) for v in held.values()):
                return
            assert time.monotonic() < until, held
            await asyncio.sleep(0.02)


def tokens(rows: list[pb.TokenRow]) -> list[list[int]]:
    """Token ids by sequence; checks indices, and one end per request."""
    assert [False] * (len(rows) - 1) + [True] == [r.request_done for r in rows], rows
    assert not [r for r in rows if r.HasField("error")], rows
    out: dict[int, list[int]] = {}
    for row in rows:
        got = out.setdefault(row.sequence, [])
        assert len(got) == row.index or not row.tokens
        got.extend(t.token_id for t in row.tokens)
    return [out[i] for i in sorted(out)]


@pytest.fixture
async def rig(manifest, tmp_path):
    async with LocalMesh(MeshConfig(mesh={"data_dir": tmp_path, "cache_dir": tmp_path})) as mesh:
        rig = Rig(mesh, manifest)
        weights = Weights(manifest)
        await mesh.host("weightstore", lambda context: weights)
        await rig.add_kvstore(tmp_path)
        rig.decode = await rig.add_decode()
        rig.prefill = await rig.add_prefill()
        yield rig
        await rig.baseline()


def prompt(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{n}/{seed}")
    return [rng.randrange(3, CONFIG.vocab_size) for _ in range(n)]


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 100, 160, 400])
async def test_a_prompt_computed_elsewhere_gives_the_tokens_of_a_single_engine(rig, n):
    rows = await rig.generate(rig.request(f"r{n}", prompt(n)))

    assert rig.alone(prompt(n)) == tokens(rows)
    assert "remote" == rows[0].prefill
    assert n == rows[-1].usage.prompt_tokens
    stats = await rig.decode.service.generator.driver.call(lambda e: e.stats())
    assert n <= stats.num_imported_tokens + 1 + stats.prefix_hit_tokens  # its KV really came from there


async def test_drafted_tokens_leave_several_at_a_time_and_are_those_of_a_single_engine(rig, monkeypatch):
    """A draft method that knows the answer, and one wrong token behind it."""
    want = rig.alone(prompt(40), max_tokens=30)

    class Known:
        def propose(self, views, num_prompt_rows):
            return [[*want[0][(done := len(v.tokens) - v.num_prompt_tokens) : done + 4], 1] for v in views]

        def observe(self, outcome): ...

    engine = rig.decode.service._engine
    monkeypatch.setattr(engine, "_drafter", Drafter(Known(), "known", max_tokens=8, max_model_len=512, vocab_size=CONFIG.vocab_size))
    for remote in (True, False):
        rows = await rig.generate(rig.request(f"r{remote}", prompt(40), remote=remote, max_tokens=30))

        assert want == tokens(rows)
        assert max(len(r.tokens) for r in rows) == 5
        assert 30 == rows[-1].usage.completion_tokens
    assert engine.stats().num_draft_tokens > engine.stats().num_draft_tokens_accepted > 30


async def test_seeded_sampling_penalties_and_n_survive_the_hand_over(rig):
    params = {"temperature": 0.9, "seed": 7, "num_sequences": 3, "repetition_penalty": 1.2, "presence_penalty": 0.5, "top_p": 0.9, "max_tokens": 10}
    rows = await rig.generate(rig.request("r", prompt(50), **params))
    want = rig.alone(prompt(50), **params)

    assert want == tokens(rows)
    assert len({tuple(s) for s in want}) > 1


async def test_an_end_token_as_first_token_ends_the_request_without_the_engine(rig):
    first = rig.alone(prompt(40))[0][0]
    rows = await rig.generate(rig.request("r", prompt(40), stop_token_ids=(first,), max_tokens=5))

    assert [[first]] == tokens(rows)
    assert 1 == rows[-1].usage.completion_tokens


class OneGrammar:
    """Names of people: stands in for the compiled grammars of a mesh."""

    small = small_vocabulary()
    vocabulary = dataclasses.replace(small, token_bytes=[*small.token_bytes, *[None] * (CONFIG.vocab_size - small.vocab_size)], vocab_size=CONFIG.vocab_size)
    compiled = compile_small(PERSON, vocabulary)

    async def get(self, use):
        return Constraint(self.compiled, self.vocabulary)

    async def close(self): ...


@pytest.mark.parametrize("n", [1, 2])
async def test_the_first_token_that_a_prefill_instance_sampled_without_the_grammar_is_not_used(rig, monkeypatch, n):
    generator, first = rig.decode.service.generator, rig.alone(prompt(70), max_tokens=1)[0][0]
    monkeypatch.setattr(generator, "_constraints", OneGrammar())
    assert not OneGrammar.compiled.matcher().accept(first)
    compute, told = generator.remote.compute, []

    async def compute_and_tell(job, instance=""):
        event = await compute(job, instance)
        told.append([t.token_id for t in event.first_tokens])
        return event

    monkeypatch.setattr(generator.remote, "compute", compute_and_tell)
    outputs = []
    for remote in (True, False):
        request = rig.request(f"r{remote}", prompt(70), remote=remote, ignore_eos=False, max_tokens=80, num_sequences=n)
        request.grammar.key = "person"
        rows = await rig.generate(request)
        outputs.append(tokens(rows))
        assert "remote" == rows[0].prefill or not remote
        assert 0 == next(row.index for row in rows if row.tokens)

    assert [[first] * n] == told
    assert outputs[0] == outputs[1]
    assert n == len(outputs[0])
    for output in outputs[0]:
        text = text_of(OneGrammar.vocabulary, output)
        assert OneGrammar.compiled.matches(text), text


async def test_one_token_is_enough(rig):
    rows = await rig.generate(rig.request("r", prompt(40), max_tokens=1))

    assert [[rig.alone(prompt(40))[0][0]]] == tokens(rows)


async def test_a_second_prompt_with_the_same_beginning_finds_it_in_the_kvstore(rig):
    shared = prompt(96)
    await rig.generate(rig.request("first", [*shared, 5, 6, 7]))
    second = await rig.add_decode()
    rows = await rig.generate(rig.request("second", [*shared, 8, 9], remote=False), second)

    assert rig.alone([*shared, 8, 9]) == tokens(rows)
    assert 96 == rows[-1].usage.cached_tokens


async def test_without_a_prefill_instance_the_prompt_is_computed_locally_in_the_end(rig):
    await rig.mesh.remove(rig.prefill.info.instance_id)
    rig.decode.service.generator.remote._timeout_s = 0.3
    rows = await rig.generate(rig.request("r", prompt(70)))

    assert rig.alone(prompt(70)) == tokens(rows)
    assert "fallback" == rows[0].prefill


async def test_a_prefill_instance_killed_in_the_middle_costs_nothing_but_time(rig):
    task = asyncio.create_task(rig.generate(rig.request("r", prompt(1500))))
    while not rig.prefill.service._runner.num_running:
        await asyncio.sleep(0.001)
    await rig.mesh.kill(rig.prefill.info.instance_id)
    rows = await asyncio.wait_for(task, 30)

    assert rig.alone(prompt(1500)) == tokens(rows)
    assert "fallback" == rows[0].prefill


async def test_a_killed_kvstore_is_a_miss(rig, tmp_path):
    store = next(i for i in rig.mesh.hosted.values() if i.info.role == "kvstore")
    await rig.mesh.kill(store.info.instance_id)
    rows = await rig.generate(rig.request("r", prompt(70)))

    assert rig.alone(prompt(70)) == tokens(rows)
    assert "fallback" == rows[0].prefill


async def test_damaged_blocks_are_recomputed(rig):
    """Flips a byte of every stored block between the prefill's report and the import."""
    generator = rig.decode.service.generator
    store = next(i for i in rig.mesh.hosted.values() if i.info.role == "kvstore").service.store
    compute, num_damaged = generator.remote.compute, 0

    async def compute_then_damage(job, instance=""):
        nonlocal num_damaged
        event = await compute(job, instance)
        for partition in store.partitions.values():
            for block in partition.blocks.values():
                with partition.arena.view(block.slot, block.num_bytes) as view:
                    view[3] ^= 255
                num_damaged += 1
        return event

    generator.remote.compute = compute_then_damage
    rows = await rig.generate(rig.request("r", prompt(70)))

    assert 5 == num_damaged
    assert rig.alone(prompt(70)) == tokens(rows)
    stats = await generator.driver.call(lambda e: e.stats())
    assert 0 == stats.num_imported_tokens


async def test_a_resumed_request_goes_on_where_the_other_instance_stopped(rig):
    whole = rig.alone(prompt(60), max_tokens=20)[0]
    second = await rig.add_decode()
    resume = [pb.GeneratedPrefix(sequence=0, token_ids=whole[:7])]
    rows = await rig.generate(rig.request("r", prompt(60), max_tokens=20, resume=resume), second)

    assert whole[7:] == [t.token_id for r in rows for t in r.tokens]
    assert 7 == next(r.index for r in rows if r.tokens)
    assert 20 == rows[-1].usage.completion_tokens


async def test_cancelling_200_requests_at_random_moments_leaves_nothing_behind(rig):
    rng = random.Random(3)

    async def one(i: int) -> None:
        request = rig.request(f"r{i}", prompt(rng.randrange(1, 300), i), remote=i % 2 == 0, max_tokens=60)
        task = asyncio.create_task(rig.generate(request))
        await asyncio.sleep(rng.random() * 0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for start in range(0, 200, 25):
        await asyncio.gather(*(one(i) for i in range(start, start + 25)))
    await rig.baseline()


async def test_a_session_multiplexes_requests_and_its_end_cancels_them(rig):
    stub = decode_pb2_grpc.DecodeStub(rig.mesh.channel("decode"))
    call = stub.Session()
    for i in range(4):
        await call.write(pb.DecodeCommand(submit=rig.request(f"s{i}", prompt(20, i), remote=False, max_tokens=400)))
    frames, seen = 0, set()
    async for frame in call:
        frames += 1
        seen.update(r.request_id for r in frame.rows)
        if len(seen) == 4 and len(frame.rows) == 4:  # one frame carries the rows of all
            break
    await call.write(pb.DecodeCommand(cancel=pb.CancelRequest(request_id="s0")))
    async for frame in call:
        done = [r for r in frame.rows if r.request_id == "s0" and r.request_done]
        if done:
            assert done[0].usage.completion_tokens > 0
            break
    call.cancel()
    await rig.baseline()


async def test_one_sequence_can_be_cancelled_and_the_others_go_on(rig):
    stub = decode_pb2_grpc.DecodeStub(rig.mesh.channel("decode"))
    call = stub.Session()
    await call.write(pb.DecodeCommand(submit=rig.request("r", prompt(20), remote=False, temperature=1.0, seed=1, num_sequences=2, max_tokens=300)))
    await call.read()
    await call.write(pb.DecodeCommand(cancel=pb.CancelRequest(request_id="r", sequence=1, one_sequence=True)))
    num = {0: 1, 1: 1}
    async for frame in call:
        for row in frame.rows:
            num[row.sequence] += len(row.tokens)
        if frame.rows[-1].request_done:
            break
    call.cancel()

    assert 300 == num[0]
    assert num[1] < 300


async def test_a_deadline_ends_a_request_with_its_error_and_frees_its_blocks(rig):
    request = rig.request("late", prompt(20), remote=False, max_tokens=1500)
    request.deadline_unix_s = time.time() + 0.4
    started = time.monotonic()
    rows = await rig.generate(request)

    assert "deadline_exceeded" == rows[-1].error.code
    assert time.monotonic() - started < 2.4


async def test_a_request_id_in_use_and_a_bad_prompt_are_refused_and_change_nothing(rig):
    stub = decode_pb2_grpc.DecodeStub(rig.mesh.channel("decode"))
    first = stub.Generate(rig.request("same", prompt(10), remote=False, max_tokens=1500))
    await first.read()
    again = await rig.generate(rig.request("same", prompt(10), remote=False))
    empty = await rig.generate(rig.request("empty", []))
    outside = await rig.generate(rig.request("outside", [CONFIG.vocab_size]))
    long = await rig.generate(rig.request("long", prompt(10), remote=False, max_tokens=CONFIG.max_position))
    first.cancel()

    assert ["already_exists", "invalid_request", "invalid_request"] == [r[-1].error.code for r in (again, empty, outside)]
    assert "context_length_exceeded" == long[-1].error.code


async def test_a_job_of_another_layout_is_refused_by_prefill(rig):
    layout = dataclasses.replace(rig.decode.service.generator.layout, dtype="bfloat16")
    job = prefill_pb2.PrefillJob(job_id="j", token_ids=prompt(20), layout=layout_to_pb(layout), sampling=sampling_to_pb(SamplingParams()))
    import grpc

    with pytest.raises(grpc.aio.AioRpcError) as info:
        async for _ in prefill_pb2_grpc.PrefillStub(rig.mesh.channel("prefill")).Run(job):
            pass
    assert grpc.StatusCode.FAILED_PRECONDITION == info.value.code()


async def test_blocks_are_stored_while_the_prompt_is_still_being_computed(rig):
    layout = rig.decode.service.generator.layout
    ids = prompt(200)
    job = prefill_pb2.PrefillJob(job_id="j", token_ids=ids, layout=layout_to_pb(layout), sampling=sampling_to_pb(SamplingParams(temperature=0)))
    events = [e async for e in prefill_pb2_grpc.PrefillStub(rig.mesh.channel("prefill")).Run(job)]

    assert len(events) > 1
    assert block_chain(layout.key(), ids, tail=True) == [b for e in events for b in e.block_ids]
    assert [False] * (len(events) - 1) + [True] == [e.done for e in events]
    assert sorted(e.num_tokens_done for e in events) == [e.num_tokens_done for e in events]
    assert 200 == events[-1].num_tokens_done


class Plugin:
    """Chooses the other way than the core: everything remote, handed over at the end."""

    @hookimpl
    def register_prefill_policies(self):
        return [PrefillPolicyRecord("always", lambda uncached, running, instances: "remote")]

    @hookimpl
    def register_kv_hand_overs(self):
        return [KvHandOverRecord("serial", lambda num_tokens, layout: HandOver(overlap=False))]


class BadPlugin:
    @hookimpl
    def register_prefill_policies(self):
        return [PrefillPolicyRecord("bad", lambda uncached, running, instances: 1 // 0)]


async def test_plugins_decide_where_and_how_a_prompt_is_computed(rig):
    rig.decode.service.generator.policy = Plugin().register_prefill_policies()[0]
    rig.prefill.service._runner._hand_over = Plugin().register_kv_hand_overs()[0]
    request = rig.request("auto", prompt(100))
    request.prefill_mode = pb.GenerateRequest.PREFILL_AUTO
    rows = await rig.generate(request)

    assert "remote" == rows[0].prefill
    assert rig.alone(prompt(100)) == tokens(rows)


async def test_a_prefill_policy_that_raises_costs_its_request_a_typed_error(rig):
    rig.decode.service.generator.policy = BadPlugin().register_prefill_policies()[0]
    request = rig.request("auto", prompt(100))
    request.prefill_mode = pb.GenerateRequest.PREFILL_AUTO
    rows = await rig.generate(request)
    fine = await rig.generate(rig.request("fine", prompt(30), remote=False))

    assert ("plugin_error", "bad") == (rows[-1].error.code, rows[-1].error.fields["plugin"])
    assert rig.alone(prompt(30)) == tokens(fine)


PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@pytest.fixture
def exported():
    exporter = InMemorySpanExporter()
    TRACING.configure("", service="test", instance="t0", exporter=exporter)
    yield exporter
    TRACING.close()


async def test_a_request_leaves_linked_spans_in_decode_and_prefill(rig, exported):
    request = rig.request("traced", prompt(70))
    request.trace["traceparent"] = PARENT
    await rig.generate(request)
    await rig.baseline()
    spans = {s.name: s for s in exported.get_finished_spans()}

    assert {"decode.request", "prefill.job"} == set(spans)
    decode, prefill = spans["decode.request"], spans["prefill.job"]
    assert PARENT[3:35] == f"{decode.context.trace_id:032x}" == f"{prefill.context.trace_id:032x}"
    assert PARENT[36:52] == f"{decode.parent.span_id:016x}"
    assert decode.context.span_id == prefill.parent.span_id
    assert decode.start_time <= prefill.start_time < prefill.end_time
    assert (70, "remote") == (decode.attributes["plugmesh.num_prompt_tokens"], decode.attributes["plugmesh.prefill"])


async def test_a_failed_request_ends_its_span_with_the_error_code(rig, exported):
    request = rig.request("late", prompt(20), remote=False, max_tokens=1500)
    request.deadline_unix_s = time.time() + 0.2
    await rig.generate(request)
    (span,) = exported.get_finished_spans()

    assert "deadline_exceeded" == span.status.description
