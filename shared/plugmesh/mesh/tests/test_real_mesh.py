"""The mesh over a real broker: permissions, queues, bus, discovery, and a broker that goes away."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import pytest_asyncio

from plugmesh import errors, wire
from plugmesh.config import ALL_SERVICES
from plugmesh.mesh import subjects
from plugmesh.mesh.api import Binding, Event
from plugmesh.mesh.broker import EmbeddedBroker
from plugmesh.mesh.real import RealMesh
from plugmesh.mesh.rpc.peers import Patience
from plugmesh.testing.carriers import SERVICE, ProbeServicer, ProbeStub, add_probe, ask, failure, soon, until
from plugmesh.testing.nats import mesh_config

pytestmark = pytest.mark.nats
PATIENCE = Patience(ping_s=0.2, silence_s=2.0, grace_s=2.0)


@pytest_asyncio.fixture
async def broker(tmp_path: Any) -> AsyncIterator[EmbeddedBroker]:
    async with EmbeddedBroker(tmp_path / "broker") as b:
        yield b


@asynccontextmanager
async def member(broker: EmbeddedBroker, role: str, *, lease_ttl_s: float = 2.0, probe: ProbeServicer | None = None) -> AsyncIterator[RealMesh]:
    """An instance of a role, with the role's own credential; serves `probe` when it is given."""
    async with await RealMesh.connect(mesh_config(broker, role, lease_ttl_s=lease_ttl_s), role, patience=PATIENCE) as mesh:
        if probe is not None:
            mesh.bind(Binding(lambda s, server: add_probe(s, server), probe, SERVICE, frozenset({"Total"})))
        await mesh.serve()
        await mesh.announce(grpc_address=f"127.0.0.1:{hash(role) % 1000 + 1}")
        yield mesh


# --- permissions -------------------------------------------------------------------------------------------------------


async def test_permissions_cover_all_traffic_of_every_role(broker: EmbeddedBroker) -> None:
    """Every role does everything it may do, as itself; the broker must not complain once."""
    probes = {role: ProbeServicer() for role in ALL_SERVICES}
    heard: list[Event] = []

    async def hear(event: Event) -> None:
        heard.append(event)

    stack = [member(broker, role, probe=probes[role]) for role in ALL_SERVICES]
    meshes = dict(zip(ALL_SERVICES, [await m.__aenter__() for m in stack], strict=True))
    operator = await RealMesh.connect(mesh_config(broker, lease_ttl_s=2.0), patience=PATIENCE)
    try:
        for mesh in meshes.values():
            for topic in subjects.TOPICS:
                mesh.subscribe(topic, hear)
        await until(lambda: all(len(m.instances("")) == len(ALL_SERVICES) for m in [*meshes.values(), operator]))
        for caller, mesh in [*meshes.items(), (subjects.OPERATOR, operator)]:
            for callee in subjects.CALLS.get(caller, ALL_SERVICES):
                for channel in (mesh.channel(callee), mesh.channel(callee, meshes[callee].self_info.instance_id)):
                    stub = ProbeStub(channel)
                    assert await stub.unary(ask(echo="x"), timeout=5) == b"x"
                    assert len([m async for m in stub.count(ask(n=600), timeout=5)]) == 600      # needs credit to flow
                    assert await stub.total_reading([b"1"] * 300, timeout=5) == b"300"
                    call = stub.chat(timeout=5)
                    await call.write(b"a")
                    await call.read()
                    call.cancel()                                                                 # cancels travel, too
        await asyncio.sleep(0.5)                                                                  # pings and renewals
        for spec in subjects.QUEUES.values():
            for producer in spec.producers:
                await meshes[producer].queue(spec.name).put(b"job", dedup_id=producer)
            for consumer in spec.consumers:
                taking = meshes[consumer].queue(spec.name).take(max_in_flight=2)
                for _ in spec.producers:
                    job = await asyncio.wait_for(anext(taking), 5)
                    await job.in_progress()
                    await job.done()
                await taking.aclose()
                await until_async(meshes[consumer].queue(spec.name).depth, 0)
        for topic, roles in subjects.TOPICS.items():
            for role in roles:
                await meshes[role].publish(topic, b"event")
        await until(lambda: len(heard) == len(ALL_SERVICES) * sum(map(len, subjects.TOPICS.values())))
        for verb in ("PING", "INFO", "STATS"):
            for role, mesh in meshes.items():
                name = subjects.srv_name(mesh.name, role)
                for tail in (name, f"{name}.{mesh.self_info.instance_id}"):
                    reply = json.loads((await operator.carrier.client.request(f"$SRV.{verb}.{tail}", timeout=2)).data)
                    assert reply["name"] == name and reply["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
        complaints = {role: list(m.carrier.errors) for role, m in [*meshes.items(), (subjects.OPERATOR, operator)] if m.carrier.errors}
    finally:
        await operator.close()
        for m in reversed(stack):
            await m.__aexit__(None, None, None)

    assert complaints == {}
    assert "violation" not in (broker.directory / "nats-server.log").read_text().lower()


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        ("decode", subjects.bus("default", "kv.events")),
        ("tokenizer", subjects.rpc_any("default", "decode")),
        ("tokenizer", subjects.queue_subject("default", "prefill")),
        ("gateway", subjects.lease_subject("default", "decode.x")),
        ("kvstore", "$JS.API.STREAM.DELETE.pm_default_q_prefill"),
        ("gateway", "pm.other.in.decode.x.y"),
    ],
)
async def test_the_broker_refuses_what_a_role_may_not_publish(broker: EmbeddedBroker, role: str, subject: str) -> None:
    async with member(broker, role) as mesh:
        mesh.carrier.publish(subject, b"x")
        await mesh.carrier.flush()

        await until(lambda: any("permissions violation" in e for e in mesh.carrier.errors))


async def test_a_role_cannot_listen_to_the_inboxes_of_another(broker: EmbeddedBroker) -> None:
    async with member(broker, "tokenizer") as mesh:
        await mesh.carrier.subscribe("pm.default.in.decode.>", lambda m: None)

        await until(lambda: any("permissions violation" in e for e in mesh.carrier.errors))


async def test_wrong_password_is_refused(broker: EmbeddedBroker, tmp_path: Any) -> None:
    (tmp_path / "wrong").write_text("wrong")
    config = mesh_config(broker, "decode")
    nats = config.mesh.nats.model_copy(update={"password_file": tmp_path / "wrong"})
    config = config.model_copy(update={"mesh": config.mesh.model_copy(update={"nats": nats})})

    with pytest.raises(errors.Unavailable, match="broker"):
        await RealMesh.connect(config, "decode", timeout_s=1.0)


def test_broker_files_are_private(tmp_path: Any) -> None:
    async def run() -> None:
        async with EmbeddedBroker(tmp_path / "b") as b:
            assert b.directory.stat().st_mode & 0o777 == 0o700
            files = [*b.directory.glob("*.password"), b.directory / "nats-server.conf"]
            assert len(files) == len(subjects.all_roles()) + 1
            assert {f.stat().st_mode & 0o777 for f in files} == {0o600}

    asyncio.run(run())


# --- calls, discovery --------------------------------------------------------------------------------------------------


async def test_bulk_methods_are_not_offered_over_nats(broker: EmbeddedBroker) -> None:
    async with member(broker, "decode", probe=ProbeServicer()), member(broker, "gateway") as gateway:
        e = await failure(ProbeStub(gateway.channel("decode")).total([b"1"], timeout=5))

        assert e.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_lease_carries_facts_and_load(broker: EmbeddedBroker) -> None:
    async with member(broker, "decode") as decode, member(broker, "gateway") as gateway:
        decode.set_load(num_running=3)
        await decode.flush_load()
        await until(lambda: bool(gateway.instances("decode")) and gateway.instances("decode")[0].load == {"num_running": 3.0})

        assert gateway.instances("decode")[0].incarnation == decode.self_info.incarnation
        assert gateway.instances("prefill") == []


async def test_a_clean_end_is_seen_at_once_and_is_no_death(broker: EmbeddedBroker) -> None:
    async with member(broker, "gateway") as gateway:
        async with member(broker, "decode") as decode:
            await until(lambda: len(gateway.instances("decode")) == 1)
            caller = f"{decode.self_info.instance_id}/{decode.self_info.incarnation}"
        await until(lambda: not gateway.instances("decode", include_suspect=True), 1.0)

        assert not gateway.discovery.table.is_fenced(caller)


async def test_draining_is_told_and_new_calls_go_elsewhere(broker: EmbeddedBroker) -> None:
    probes = [ProbeServicer(), ProbeServicer()]
    async with member(broker, "decode", probe=probes[0]) as one, member(broker, "decode", probe=probes[1]), member(broker, "gateway") as gateway:
        running = ProbeStub(gateway.channel("decode", one.self_info.instance_id)).count(ask(n=3, hang_at=2), timeout=20)
        await running.read()
        began = time.monotonic()
        await one.set_draining()
        assert time.monotonic() - began < 1.0
        await until(lambda: any(i.state == "draining" for i in gateway.instances("decode")))
        await one.carrier.flush()
        before = one.server.num_calls
        stub = ProbeStub(gateway.channel("decode"))
        assert [await stub.unary(ask(echo="x"), timeout=5) for _ in range(30)] == [b"x"] * 30

        assert one.server.num_calls == before
        assert await running.read() == b"1"                                                       # what ran goes on
        assert await ProbeStub(gateway.channel("decode", one.self_info.instance_id)).unary(ask(echo="y"), timeout=5) == b"y"


async def test_calls_of_a_dead_incarnation_are_refused(broker: EmbeddedBroker) -> None:
    async with member(broker, "decode", probe=ProbeServicer()) as decode, member(broker, "gateway") as gateway:
        stub = ProbeStub(gateway.channel("decode"))
        assert await stub.unary(ask(echo="x"), timeout=5) == b"x"
        decode.discovery.table.fence(gateway.self_info.incarnation)
        e = await failure(stub.unary(ask(echo="x"), timeout=5))

        assert isinstance(wire.error_from_rpc(e), errors.StaleIncarnation)


async def test_an_instance_whose_lease_ran_out_takes_a_new_incarnation(broker: EmbeddedBroker) -> None:
    told: list[str] = []
    async with member(broker, "decode") as decode, member(broker, "gateway") as gateway:
        decode.on_new_incarnation = told.append
        old = decode.self_info.incarnation
        await until(lambda: len(gateway.instances("decode")) == 1)
        decode.discovery._last_renewal -= 60  # as after a SIGSTOP of a minute; the real one is in test_process.py
        await until(lambda: decode.self_info.incarnation != old)
        await until(lambda: [i.incarnation for i in gateway.instances("decode")] == [decode.self_info.incarnation])

        assert told == [decode.self_info.incarnation]
        assert gateway.discovery.table.is_fenced(f"x/{old}")


# --- queues and bus ----------------------------------------------------------------------------------------------------


async def test_jobs_come_again_until_they_are_done(broker: EmbeddedBroker) -> None:
    async with member(broker, "decode") as decode, member(broker, "prefill") as prefill:
        await decode.queue("prefill").put(b"a")
        taking = prefill.queue("prefill").take(max_in_flight=1, ack_wait_s=1.0)
        job = await asyncio.wait_for(anext(taking), 5)
        assert (job.data, job.num_deliveries) == (b"a", 1)
        await job.retry()
        job = await asyncio.wait_for(anext(taking), 5)
        assert job.num_deliveries == 2
        for _ in range(4):
            await asyncio.sleep(0.4)                                                              # longer than ack_wait_s
            await job.in_progress()
        await job.done()

        await until_async(prefill.queue("prefill").depth, 0)
        await taking.aclose()


async def test_job_of_a_worker_that_vanished_goes_to_another(broker: EmbeddedBroker) -> None:
    async with member(broker, "decode") as decode, member(broker, "prefill") as one, member(broker, "prefill") as two:
        await decode.queue("prefill").put(b"a")
        lost = await asyncio.wait_for(anext(one.queue("prefill").take(max_in_flight=1, ack_wait_s=1.0)), 5)
        assert lost.num_deliveries == 1
        again = await asyncio.wait_for(anext(two.queue("prefill").take(max_in_flight=1, ack_wait_s=1.0)), 10)

        assert (again.data, again.num_deliveries) == (b"a", 2)
        await again.drop()
        await until_async(decode.queue("prefill").depth, 0)


async def test_workers_share_jobs_within_their_limits(broker: EmbeddedBroker) -> None:
    async with member(broker, "decode") as decode, member(broker, "prefill") as prefill:
        for i in range(6):
            await decode.queue("prefill").put(b"%d" % i)
        taking = prefill.queue("prefill").take(max_in_flight=2)
        held = [await asyncio.wait_for(anext(taking), 5) for _ in range(2)]
        third = asyncio.ensure_future(anext(taking))
        await asyncio.sleep(0.2)
        assert not third.done()
        await held[0].done()

        assert (await asyncio.wait_for(third, 5)).data == b"2"


async def test_equal_dedup_ids_make_one_job(broker: EmbeddedBroker) -> None:
    async with member(broker, "decode") as decode:
        queue = decode.queue("prefill")
        for _ in range(3):
            await queue.put(b"a", dedup_id="same")
        await queue.put(b"b", dedup_id="other")

        assert await queue.depth() == 2


async def test_a_full_queue_refuses_and_forgets_nothing(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(subjects.QUEUES, "prefill", dataclasses.replace(subjects.QUEUES["prefill"], max_jobs=3))
    async with member(broker, "decode") as decode:
        for i in range(3):
            await decode.queue("prefill").put(b"%d" % i)
        with pytest.raises(errors.Overloaded) as caught:
            await decode.queue("prefill").put(b"x")

        assert caught.value.retry_after_s > 0 and await decode.queue("prefill").depth() == 3


async def test_unknown_queue_and_oversized_job_are_typed_errors(broker: EmbeddedBroker) -> None:
    async with member(broker, "decode") as decode:
        with pytest.raises(errors.NotFound, match="prefill"):
            decode.queue("nope")
        with pytest.raises(errors.PayloadTooLarge):
            await decode.queue("prefill").put(b"x" * (300 << 10))
        with pytest.raises(errors.PayloadTooLarge):
            await decode.publish("kv.events", b"x" * (300 << 10))


async def test_a_slow_subscriber_loses_and_counts(broker: EmbeddedBroker) -> None:
    got: list[bytes] = []
    go = asyncio.Event()

    async def slow(event: Event) -> None:
        await go.wait()
        got.append(event.data)

    async with member(broker, "kvstore") as kvstore, member(broker, "gateway") as gateway:
        undo = gateway.subscribe("kv.events", slow, max_pending=10)
        await asyncio.sleep(0.2)
        for i in range(100):
            await kvstore.publish("kv.events", b"%d" % i)
        await until(lambda: gateway.bus.num_dropped >= 85)  # all have arrived but for what waits, is being handled, or fills a batch
        go.set()
        await until(lambda: len(got) + gateway.bus.num_dropped == 100)
        undo()

        assert 10 <= len(got) <= 15
        assert got == [b"%d" % i for i in range(len(got))]                                        # the newest are dropped


# --- the broker goes away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [pytest.param("stop", marks=pytest.mark.slow), "kill"])
async def test_full_function_returns_after_the_broker_does(broker: EmbeddedBroker, how: str) -> None:
    probe = ProbeServicer()
    left: list[str] = []
    async with (
        member(broker, "decode", probe=probe, lease_ttl_s=1.5) as decode,
        member(broker, "gateway", lease_ttl_s=1.5) as gateway,
        member(broker, "prefill", lease_ttl_s=1.5) as prefill,
    ):
        gateway.watch(lambda event, i: left.append(event) if event == "left" else None)
        await until(lambda: len(gateway.instances("decode")) == 1)
        await decode.queue("prefill").put(b"before")
        taking = prefill.queue("prefill").take(max_in_flight=4)
        stub = ProbeStub(gateway.channel("decode"))
        stream = stub.count(ask(n=3000, pad=1000), timeout=60)                                    # more than a window
        got = [await stream.read() for _ in range(3)]
        waiting = stub.unary(ask(wait=1, echo="late"), timeout=60)
        chat = stub.chat(timeout=60)
        await chat.write(b"a")
        assert await chat.read() == b"re:a"
        old = decode.self_info.incarnation

        await (broker.stop() if how == "stop" else broker.kill())
        await until(lambda: not gateway.connected and not decode.connected)
        began = time.monotonic()
        e = await failure(stub.unary(ask(echo="x"), timeout=5))
        assert e.code() is grpc.StatusCode.UNAVAILABLE and wire.error_from_rpc(e).retry_after_s > 0
        with pytest.raises(errors.Unavailable):
            await decode.queue("prefill").put(b"x")
        with pytest.raises(errors.Unavailable):
            await gateway.publish("kv.events", b"x")
        assert time.monotonic() - began < 1.0
        probe.go.set()
        await asyncio.sleep(decode.discovery.ttl_s * 1.5)                                         # longer than a lease
        assert len(gateway.instances("decode")) == 1                                              # the last table stays

        await broker.start()
        back = time.monotonic()
        await until(lambda: gateway.connected and decode.connected and prefill.connected)
        assert await waiting == b"late"
        got += [m async for m in stream]
        await chat.write(b"b")
        assert await chat.read() == b"re:b"
        assert await stub.unary(ask(echo="x"), timeout=5) == b"x"
        await decode.queue("prefill").put(b"after")
        jobs = [await asyncio.wait_for(anext(taking), 10) for _ in range(2)]
        assert time.monotonic() - back < 10.0
        await asyncio.sleep(decode.discovery.ttl_s * 1.5)
        instances, gone = gateway.instances("decode"), list(left)

    assert [int(m.rstrip(b".")) for m in got] == list(range(3000))
    assert [j.data for j in jobs] == [b"before", b"after"]
    assert gone == [] and [i.incarnation for i in instances] == [old]


async def test_a_paused_broker_delays_and_loses_nothing(broker: EmbeddedBroker) -> None:
    probe = ProbeServicer()
    async with member(broker, "decode", probe=probe, lease_ttl_s=5.0), member(broker, "gateway", lease_ttl_s=5.0) as gateway:
        stub = ProbeStub(gateway.channel("decode"))
        call = stub.unary(ask(wait=1, echo="late"), timeout=30)
        await soon(probe.started)
        broker.pause()
        try:
            await until(lambda: all(pathlib.Path(t, "stat").read_text().split()[2] == "T" for t in pathlib.Path(f"/proc/{broker.pid}/task").iterdir()))
            probe.go.set()
            await asyncio.sleep(1.0)
            assert not call.done()
        finally:
            broker.resume()

        assert await call == b"late"


async def until_async(get: Any, want: Any, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while await get() != want:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
