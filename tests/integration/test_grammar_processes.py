"""The grammar service as a process of its own, with the real engines and the default model's vocabulary, over NATS and gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import grpc
import jsonschema
import psutil
import pytest
import pytest_asyncio

from plugmesh import models, wire
from plugmesh.errors import GrammarTimeout, InvalidRequest, PlugmeshError, Unavailable
from plugmesh.grammar.client import GrammarClient
from plugmesh.grammar.spec import GrammarSpec
from plugmesh.mesh.broker import EmbeddedBroker
from plugmesh.mesh.real import RealMesh
from plugmesh.testing.nats import mesh_config
from plugmesh_proto.v1 import grammar_pb2 as pb
from plugmesh_proto.v1 import grammar_pb2_grpc

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.nats, pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(240)]


class Processes:
    """A broker and some services, each a process, and this test as one more member of the mesh."""

    def __init__(self, folder: pathlib.Path, broker: EmbeddedBroker, mesh: RealMesh) -> None:
        self.folder, self.broker, self.mesh = folder, broker, mesh
        self.client = GrammarClient(mesh)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, role: str, **settings: object) -> None:
        credential = self.broker.credential(role)
        nats = {"url": credential.url, "user": role, "password_file": str(credential.password_file)}
        config = {
            "mesh": {"nats": nats, "data_dir": str(self.folder / "data"), "runtime_dir": str(self.folder / "run"), "model": str(models.find("smollm2")), "lease_ttl_s": 1.0},
            "services": {role: settings},
        }
        path = os.pathsep.join(str(ROOT / part) for part in ("shared", "services", "plugins"))
        with (self.folder / f"{role}.log").open("ab") as log:
            self.running[role] = subprocess.Popen(
                [sys.executable, "-m", f"plugmesh_{role}"], stdout=log, stderr=log, cwd=self.folder,
                env={**os.environ, "PYTHONPATH": path, "PLUGMESH_CONFIG_JSON": json.dumps(config)})

    async def ready(self, role: str) -> str:
        """The gRPC address once it has announced itself."""
        async with asyncio.timeout(60):
            while not (found := [i for i in self.mesh.instances(role) if i.state == "ready"]):
                assert self.running[role].poll() is None, (self.folder / f"{role}.log").read_text()[-3000:]
                await asyncio.sleep(0.05)
        return found[0].grpc_address

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.running["grammar"].pid).children()

    async def end(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, 10)
            process.kill()
            process.wait()


@pytest_asyncio.fixture
async def processes(tmp_path: pathlib.Path) -> AsyncIterator[Processes]:
    if models.find("smollm2") is None:
        pytest.skip("the default model is not here; plugmesh pull smollm2 fetches it")
    async with EmbeddedBroker(tmp_path / "broker") as broker:
        mesh = await RealMesh.connect(mesh_config(broker, "gateway"), "gateway", instance_id="gateway-test")
        found = Processes(tmp_path, broker, mesh)
        try:
            found.start("weightstore", pull=False)
            yield found
        finally:
            await found.end()
            await mesh.close()


SCHEMA = GrammarSpec("json_schema", json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}))


async def test_the_example_for_other_engines_writes_what_the_schema_wants(processes: Processes) -> None:
    processes.start("grammar")
    processes.start("tokenizer")
    addresses = [await processes.ready("grammar"), await processes.ready("tokenizer")]
    script = ROOT / "docs" / "examples" / "mask_other_engine.py"
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, script, "--grammar", addresses[0], "--tokenizer", addresses[1], "--sequences", "6", "--seed", "3"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT / "shared")}, check=False)
    assert done.returncode == 0, done.stderr
    example = runpy.run_path(str(script))
    values = [json.loads(line) for line in done.stdout.splitlines()]

    assert len(values) == 6
    for value in values:
        jsonschema.validate(value, example["SCHEMA"])
    assert len({json.dumps(v) for v in values}) == 6


async def test_kill_9_of_the_service_leaves_the_catalogue_and_its_successor_compiles_nothing(processes: Processes) -> None:
    processes.start("grammar")
    await processes.ready("grammar")
    first = await processes.client.compile(SCHEMA, "", timeout_s=30)
    workers = processes.workers()
    processes.running["grammar"].kill()
    processes.running["grammar"].wait()
    async with asyncio.timeout(10):
        while processes.mesh.instances("grammar", include_suspect=True):
            await asyncio.sleep(0.05)
    with pytest.raises(Unavailable) as caught:
        await processes.client.compile(SCHEMA, "", timeout_s=5)
    processes.start("grammar")
    address = await processes.ready("grammar")
    again = await processes.client.compile(SCHEMA, "", timeout_s=30)
    async with grpc.aio.insecure_channel(address) as channel:
        described = await grammar_pb2_grpc.GrammarStub(channel).Describe(pb.DescribeGrammarsRequest())

    assert caught.value.http_status == 503 and caught.value.retry_after_s > 0
    assert (first.key, True, 0) == (again.key, again.was_cached, described.num_compiled)
    assert all(not worker.is_running() for worker in workers), "processes of a killed service end by themselves"


def nested(depth: int) -> str:
    return '{"items":' * depth + "true" + "}" * depth


HOSTILE = {
    "deep recursion": GrammarSpec("json_schema", nested(10_000)),
    "deep but allowed": GrammarSpec("json_schema", nested(60)),
    "giant enum": GrammarSpec("json_schema", json.dumps({"enum": list(range(20_000))})),
    "enum at the limit": GrammarSpec("json_schema", json.dumps({"enum": [f"value {i}" for i in range(4096)]})),
    "nested repeats": GrammarSpec("regex", "((((a{0,100}){0,100}){0,100}){0,100}){0,100}"),
    "exponential": GrammarSpec("regex", "(a|a?b?c?)*" * 60 + "(.*a){25}"),
    "long repetition": GrammarSpec("regex", "(abc|de[f-z]){0,1000000}"),
    "repetition in EBNF": GrammarSpec("ebnf", 'root ::= ("a" | [b-z]{3,9}){0,1000000}'),
    "huge minItems": GrammarSpec("json_schema", json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000})),
    "huge minLength": GrammarSpec("json_schema", json.dumps({"type": "string", "minLength": 10_000_000})),
    "many rules": GrammarSpec("ebnf", "root ::= r0\n" + "\n".join(f'r{i} ::= "a{i}" r{(i * 7 + 1) % 4500} | r{(i + 1) % 4500} "b"' for i in range(4500))),
    "left recursion": GrammarSpec("ebnf", 'root ::= root "a" | root root | ""'),
    "hidden left recursion": GrammarSpec("ebnf", 'root ::= x root "a" | "b"\nx ::= "" | root'),
    "mutual references": GrammarSpec("json_schema", json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})),
    "mutual allOf": GrammarSpec("json_schema", json.dumps({"$ref": "#/$defs/a", "$defs": {
        "a": {"allOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/b"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}})),
    "doubling": GrammarSpec("json_schema", json.dumps({"$ref": "#/$defs/x40", "$defs": {
        "x0": {"type": "null"}, **{f"x{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/x{i - 1}"}] * 2, "minItems": 2} for i in range(1, 41)}}})),
    "products of anyOf": GrammarSpec("json_schema", json.dumps({"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(6)]} for i in range(24)]})),
    "many properties": GrammarSpec("json_schema", json.dumps({"type": "object", "properties": {f"p{i}": True for i in range(10_000)}})),
    "many required properties": GrammarSpec("json_schema", json.dumps({
        "type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}, "required": [f"p{i}" for i in range(0, 3000, 2)]})),
}  # fmt: skip


async def test_each_hostile_grammar_costs_one_request_while_normal_ones_go_on(processes: Processes) -> None:
    processes.start("grammar", compile_timeout_s=3.0, compile_memory_bytes=512 << 20)
    await processes.ready("grammar")
    stop = asyncio.Event()
    waits: list[float] = []

    async def normal() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            begin = time.monotonic()
            await processes.client.compile(GrammarSpec("choice", json.dumps([f"choice {number}", "other"])), "", timeout_s=30)
            waits.append(time.monotonic() - begin)
            await asyncio.sleep(0.02)

    other = asyncio.create_task(normal())
    outcomes: dict[str, str] = {}
    for name, spec in HOSTILE.items():
        begin = time.monotonic()
        try:
            info = await processes.client.compile(spec, "", timeout_s=30)
            outcome = f"compiled by {info.engine} in {info.compile_ms:.0f} ms, {info.num_bytes} bytes"
        except (InvalidRequest, GrammarTimeout) as e:  # UnsupportedGrammar and LimitExceeded are InvalidRequest
            outcome = f"{e.code}: {e.message[:80]}"
        except PlugmeshError as e:
            outcome = f"WRONG {e.code}: {e.message[:80]}"
        outcomes[name] = f"{time.monotonic() - begin:6.2f} s  {outcome}"
        assert time.monotonic() - begin < 12, outcomes
    stop.set()
    await other
    print("\n".join(f"{name:26} {outcome}" for name, outcome in outcomes.items()))
    print(f"{len(waits)} others meanwhile, the slowest {max(waits):.2f} s")
    memory = sum(p.memory_info().rss for p in [psutil.Process(processes.running["grammar"].pid), *processes.workers()])
    print(f"resident memory {memory >> 20} MiB")

    assert not [o for o in outcomes.values() if "WRONG" in o], outcomes
    assert len(waits) > 50
    assert max(waits) < 6, "a normal grammar waits for the start of a process at most"
    assert processes.running["grammar"].poll() is None


async def test_masks_validate_and_errors_over_nats(processes: Processes) -> None:
    processes.start("grammar")
    await processes.ready("grammar")
    stub = grammar_pb2_grpc.GrammarStub(processes.mesh.channel("grammar"))
    request = pb.CompileGrammarRequest(spec=wire.spec_to_pb(SCHEMA))
    stream = stub.Masks()
    await stream.write(pb.MaskRequest(sequence="a", open=pb.OpenMatcher(grammar=request)))
    reply = await stream.read()
    valid = await stub.Validate(pb.ValidateGrammarRequest(grammar=request, text='{"n": 12}'))
    beginning = await stub.Validate(pb.ValidateGrammarRequest(grammar=request, text='{"n": '))
    wrong = await stub.Validate(pb.ValidateGrammarRequest(grammar=request, text='{"m": 1}'))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Export(request):  # bulk bytes do not travel over NATS
            pass
    info, data = await processes.client.export(SCHEMA, "", timeout_s=30)
    stream.cancel()

    assert not reply.HasField("error") and len(reply.mask) == 49152 // 8
    assert (True, True, 9) == (valid.is_valid, valid.is_prefix, valid.num_valid_bytes)
    assert (False, True, 6) == (beginning.is_valid, beginning.is_prefix, beginning.num_valid_bytes)
    assert (False, False, 2) == (wrong.is_valid, wrong.is_prefix, wrong.num_valid_bytes)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert info.num_bytes == len(data)
