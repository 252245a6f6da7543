"""What a plugin that raises, hangs or returns garbage costs: the start, one request, or one step; never the process or somebody else's tokens.

By tier: hook, building, per request, per step, observer. Decode, prefill and kvstore are the real services on a small random model.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from structlog.testing import capture_logs

from plugmesh import host as hosts
from plugmesh import wire
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError, PluginError
from plugmesh.hookspecs import hookimpl
from plugmesh.host import PluginHost
from plugmesh.mesh.api import Binding
from plugmesh.mesh.hostid import host_id
from plugmesh.records import (
    DraftRecord,
    HandOver,
    KvHandOverRecord,
    PrefillPolicyRecord,
    Route,
    RouteRequest,
    RouterRecord,
    SchedulerRecord,
)
from plugmesh.testing.conformance.loads import Arrival, check_idle, fake_engine, play
from plugmesh.testing.conformance.router import instance
from plugmesh.testing.local_mesh import LocalMesh
from plugmesh.types import SamplingParams
from plugmesh.watchdog import WATCHDOG, Hung
from plugmesh.wire import sampling_to_pb
from plugmesh_decode import config as decode_config
from plugmesh_decode import service as decode_service
from plugmesh_engine.testing import random_weights, tiny_config, write_manifest
from plugmesh_gateway.route import SafeRouter
from plugmesh_kvstore import config as kv_config
from plugmesh_kvstore import service as kv_service
from plugmesh_prefill import config as prefill_config
from plugmesh_prefill import service as prefill_service
from plugmesh_proto.v1 import decode_pb2 as pb
from plugmesh_proto.v1 import decode_pb2_grpc, weightstore_pb2, weightstore_pb2_grpc

CONFIG = tiny_config(vocab_size=311, max_position=2048)
LOAD = [Arrival(20, 6, seed=1), Arrival(40, 8, seed=2, gap=1), Arrival(5, 4, seed=3)]


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(hosts, "REQUEST_LIMIT_S", 0.25)
    monkeypatch.setattr(hosts, "STEP_LIMIT_S", 0.25)
    monkeypatch.setattr(hosts, "SLOW_START_S", 0.05)


def boom(*args: Any) -> Any:
    raise ValueError("text of a prompt")


def hang(*args: Any) -> Any:
    while True:
        time.sleep(0.01)


def spin(*args: Any) -> Any:
    """Hangs and swallows whatever it can."""
    while True:
        try:
            while True:
                pass
        except Exception:
            continue


def plugin(hook: str, answer: Any) -> object:
    """An object with one hook that calls `answer`."""

    def implementation(self, context):
        return answer()

    implementation.__name__ = hook
    return type("Plugin", (), {hook: hookimpl(implementation)})()


def host_of(hook: str, answer: Any, service: str = "decode") -> PluginHost:
    host = PluginHost(service, MeshConfig())
    host.register("odd", plugin(hook, answer))
    return host


# -- a hook, and building what it registered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (boom, "raised ValueError"),
        (lambda: 7, "returned int, not a list"),
        (lambda: "scheduler", "returned str, not a list"),
        (lambda: [object()], "returned a object where a SchedulerRecord belongs"),
        (lambda: [DraftRecord("d", boom)], "returned a DraftRecord where a SchedulerRecord belongs"),
        (lambda: [SchedulerRecord("", boom)], "without a name"),
        (lambda: [SchedulerRecord("same", boom), SchedulerRecord("same", boom)], "two schedulers are named 'same'"),
    ],
)
def test_a_hook_that_fails_stops_the_start_with_the_plugins_name(answer, message):
    with pytest.raises(ConfigError, match=r"odd|same") as info:
        host_of("register_schedulers", answer).records("schedulers")

    assert message in info.value.message


def test_a_hook_that_takes_long_is_named_in_the_log():
    with capture_logs() as logs:
        host_of("register_schedulers", lambda: time.sleep(0.3) or []).records("schedulers")

    assert [e["what"] for e in logs if e["event"] == "plugin.slow"] == ["plugin odd: register_schedulers"]


@pytest.mark.parametrize(
    ("build", "message"),
    [(boom, "building 'odd-one' raised ValueError"), (lambda _: None, "gave nothing"), (lambda _: object(), "without a method 'schedule'")],
)
def test_a_record_that_cannot_be_built_stops_the_start_with_the_plugins_name(build, message):
    record = host_of("register_schedulers", lambda: [SchedulerRecord("odd-one", build)]).last("schedulers")
    with pytest.raises(ConfigError, match="plugin 'odd'") as info:
        fake_engine(scheduler=record)

    assert message in info.value.message


# -- per step, in the engine ---------------------------------------------------------------------------------------------


class Odd:
    """A scheduler and a draft method whose methods do what they are told, at first as they should."""

    def __init__(self, do: Any, after: int = 3) -> None:
        self.do, self.left, self.num_calls = do, after, 0

    def _act(self, fine: Any) -> Any:
        self.num_calls += 1
        self.left -= 1
        return fine if self.left >= 0 else self.do()

    def schedule(self, waiting, running, kv):
        return self._act([(s, 1) for s in running if s.is_decode])  # prompts wait until it fails

    def propose(self, views, num_prompt_rows):
        return self._act([[] for _ in views])

    def observe(self, outcome):
        pass


@pytest.mark.parametrize("do", [boom, hang, spin, lambda: None, lambda: [(1, 2, 3)], lambda: 5], ids=["raises", "hangs", "spins", "none", "tuples", "number"])
def test_a_step_without_its_scheduler_is_planned_by_the_engines_own(do):
    odd = Odd(do)
    engine = fake_engine(scheduler=host_of("register_schedulers", lambda: [SchedulerRecord("odd-one", lambda _: odd)]).last("schedulers"))
    began = time.monotonic()

    assert play(engine, LOAD) == play(fake_engine(), LOAD)
    assert engine.stats().num_scheduler_errors > 0
    assert time.monotonic() - began < 5
    if do in (hang, spin):
        assert odd.num_calls == 4  # after it hung it is not asked again


@pytest.mark.parametrize("do", [boom, hang, spin, lambda: None, lambda: [[10**9]] * 99, lambda: 5], ids=["raises", "hangs", "spins", "none", "too many", "number"])
def test_a_step_without_its_draft_method_goes_on_without_drafts(do):
    odd = Odd(do)
    engine = fake_engine(drafts=host_of("register_drafts", lambda: [DraftRecord("odd-one", lambda _: odd)]).last("drafts"))

    assert play(engine, LOAD) == play(fake_engine(), LOAD)
    assert engine.stats().num_draft_errors > 0
    assert engine.stats().kv_blocks_leaked == 0


def test_what_does_as_it_should_is_not_disturbed_by_the_watch():
    odd = Odd(boom, after=10**9)
    engine = fake_engine(drafts=host_of("register_drafts", lambda: [DraftRecord("fine", lambda _: odd)]).last("drafts"))

    assert play(engine, LOAD) == play(fake_engine(), LOAD)
    check_idle(engine)
    assert odd.num_calls > 0


# -- per request ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "do", [boom, hang, spin, lambda *_: None, lambda *_: "d0", lambda *_: Route("nobody"), lambda *_: Route("d0", "nobody")],
    ids=["raises", "hangs", "spins", "none", "name", "unknown decode", "unknown prefill"],
)  # fmt: skip
async def test_a_route_that_fails_costs_its_request_and_the_next_one_is_routed(do):
    class Router:
        def __init__(self):
            self.is_odd = True

        def route(self, request, decode, prefill):
            return do(request) if self.is_odd else Route("d0")

        def on_progress(self, request_id, num_tokens): ...
        def on_finished(self, request_id): ...

    host = host_of("register_routers", lambda: [RouterRecord("odd-one", Router)], "gateway")
    router = SafeRouter.choose(host)
    decode = [instance("decode", "d0")]
    with pytest.raises(PluginError) as info:
        router.route(RouteRequest("r", 1, 1), decode, [])
    router.router.is_odd = False

    assert "odd" in info.value.message and "prompt" not in info.value.message
    assert router.route(RouteRequest("s", 1, 1), decode, []) == Route("d0")


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


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("tiny"), CONFIG, random_weights(CONFIG))


async def generate(mesh: LocalMesh, name: str, ids: range, mode: int) -> list[int]:
    sampling = sampling_to_pb(SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    request = pb.GenerateRequest(request_id=name, token_ids=ids, sampling=sampling, prefill_mode=mode)
    stub = decode_pb2_grpc.DecodeStub(mesh.channel("decode"))
    tokens: list[int] = []
    async for frame in stub.Generate(request, timeout=30):
        for row in frame.rows:
            if row.HasField("error"):
                raise wire.error_from_pb(row.error)
            tokens += [t.token_id for t in row.tokens]
    return tokens


@pytest.mark.parametrize("do", [boom, hang, lambda *_: "banana", lambda *_: None], ids=["raises", "hangs", "word", "none"])
async def test_a_prefill_policy_that_fails_costs_its_request_and_the_instance_serves_on(manifest, tmp_path, do):
    is_odd = [True]
    policy = PrefillPolicyRecord("odd-one", lambda *a: do(*a) if is_odd[0] else "local")
    settings = decode_config.Settings(num_kv_blocks=64, num_threads=1, executor="torch", dtype="float32", remote_prefill_min_tokens=8)
    async with LocalMesh() as mesh:
        await mesh.host("weightstore", lambda _: Weights(manifest))
        await mesh.host("kvstore", kv_service.create, settings=kv_config.Settings(arena_bytes=1 << 20, arena_dir=tmp_path, disk_bytes=0))
        prefill = prefill_config.Settings(max_tokens_per_step=32, num_kv_blocks=64, num_threads=1, executor="torch", dtype="float32")
        await mesh.host("prefill", prefill_service.create, settings=prefill)
        await mesh.host("decode", decode_service.create, settings=settings, plugins=host_of("register_prefill_policies", lambda: [policy]))
        with pytest.raises(PluginError, match="odd") as info:
            await generate(mesh, "r", range(3, 40), pb.GenerateRequest.PREFILL_AUTO)
        is_odd[0] = False

        assert info.value.fields["plugin"] == "odd"
        assert "text of a prompt" not in info.value.message
        assert len(await generate(mesh, "s", range(3, 40), pb.GenerateRequest.PREFILL_AUTO)) == 6


@pytest.mark.parametrize("do", [boom, hang, lambda *_: None, lambda *_: True], ids=["raises", "hangs", "none", "bool"])
async def test_a_hand_over_that_fails_costs_its_request_the_detour_and_no_token(manifest, tmp_path, do):
    """Decode computes the prompt itself, as whenever prefill fails."""
    hand_over = KvHandOverRecord("odd-one", do)
    executor = {"executor": "torch", "dtype": "float32", "num_kv_blocks": 64, "num_threads": 1}
    async with LocalMesh() as mesh:
        await mesh.host("weightstore", lambda _: Weights(manifest))
        await mesh.host("kvstore", kv_service.create, settings=kv_config.Settings(arena_bytes=1 << 20, arena_dir=tmp_path, disk_bytes=0))
        plugins = host_of("register_kv_hand_overs", lambda: [hand_over], "prefill")
        await mesh.host("prefill", prefill_service.create, settings=prefill_config.Settings(max_tokens_per_step=32, **executor), plugins=plugins)
        await mesh.host("decode", decode_service.create, settings=decode_config.Settings(remote_prefill_timeout_s=3.0, **executor))
        remote = await generate(mesh, "r", range(3, 60), pb.GenerateRequest.PREFILL_REMOTE)

        assert remote == await generate(mesh, "s", range(3, 60), pb.GenerateRequest.PREFILL_LOCAL)
        assert len(remote) == 6


@pytest.mark.parametrize("do", [boom, hang, spin], ids=["raises", "hangs", "spins"])
def test_an_observer_that_fails_is_counted_and_the_next_one_hears_of_the_request(do):
    seen: list[str] = []
    host = PluginHost("decode", MeshConfig())

    class Bad:
        @hookimpl
        def on_request_finished(self, request_id):
            do()

    class Good:
        @hookimpl
        def on_request_finished(self, request_id):
            seen.append(request_id)

    host.register("bad", Bad())
    host.register("good", Good())
    host.observe("on_request_finished", request_id="r", finish_reason="stop", num_prompt_tokens=1, num_generated_tokens=1)

    assert (seen, host.num_observer_errors) == (["r"], 1)


def test_records_that_are_right_are_answered_as_they_were_registered():
    host = host_of("register_kv_hand_overs", lambda: [KvHandOverRecord("fine", lambda n, layout: HandOver(n > 3))], "prefill")
    record = host.last("kv_hand_overs")

    assert [host.guard("fine", record.plan, n, None) for n in (3, 4)] == [HandOver(False), HandOver(True)]


# -- the watchdog itself ---------------------------------------------------------------------------------------------------


def test_calls_within_calls_and_in_many_threads_are_ended_each_by_its_own_limit():
    results: list[str] = []

    def outer() -> str:
        try:
            WATCHDOG.call("inner", 0.2, spin)
        except Hung:
            return "outer goes on"
        return "inner came back"

    def in_thread() -> None:
        results.append(WATCHDOG.call("outer", 5.0, outer))

    threads = [threading.Thread(target=in_thread) for _ in range(3)]
    for t in threads:
        t.start()
    results.append(WATCHDOG.call("outer", 5.0, outer))
    for t in threads:
        t.join(10)

    assert results == ["outer goes on"] * 4


def test_a_call_that_ends_near_its_limit_gives_its_result_or_hung_and_nothing_is_raised_later():
    outcomes = set()
    for i in range(12):
        try:
            outcomes.add(WATCHDOG.call("edge", 0.1, time.sleep, 0.06 + 0.012 * i) is None)
        except Hung:
            outcomes.add(False)
        for _ in range(2000):  # where something raised too late would land
            pass

    assert outcomes == {True, False}


async def test_an_event_loop_goes_on_after_a_call_was_ended():
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    task = asyncio.create_task(tick())
    with pytest.raises(Hung):
        WATCHDOG.call("hang", 0.2, hang)
    before = ticks
    await asyncio.sleep(0.1)
    task.cancel()

    assert ticks > before
