"""The mesh within one process behaves as the real one where tests of services rely on it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from plugmesh import errors, wire
from plugmesh.mesh import subjects
from plugmesh.mesh.api import Binding, Event, ServiceContext
from plugmesh.testing.carriers import SERVICE, ProbeServicer, ProbeStub, add_probe, ask, failure, until
from plugmesh.testing.local_mesh import LocalMesh


class Probe:
    """A service that notes its life."""

    def __init__(self, context: ServiceContext) -> None:
        self.context = context
        self.probe = ProbeServicer()
        self.life: list[str] = ["create"]

    def bindings(self) -> list[Binding]:
        return [Binding(lambda s, server: add_probe(s, server), self.probe, SERVICE, frozenset({"Total"}))]

    async def start(self) -> None:
        self.life.append("start")
        self.context.mesh.set_load(num_running=1)

    async def drain(self, deadline_s: float) -> None:
        self.life.append("drain")

    async def stop(self) -> None:
        self.life.append("stop")

    def describe(self) -> dict[str, Any]:
        return {"model": "m", "roles": ["decode"]}


@pytest_asyncio.fixture
async def mesh() -> AsyncIterator[LocalMesh]:
    async with LocalMesh() as m:
        yield m


async def test_hosted_services_are_called_by_role_by_instance_and_directly(mesh: LocalMesh) -> None:
    one = await mesh.host("decode", Probe)
    two = await mesh.host("decode", Probe)
    events: list[str] = []
    mesh.watch(lambda event, i: events.append(event))
    stub = ProbeStub(mesh.channel("decode"))
    for _ in range(40):
        assert await stub.unary(ask(echo="x"), timeout=5) == b"x"
    assert one.server.num_calls > 0 and two.server.num_calls > 0
    before = two.server.num_calls
    assert await ProbeStub(mesh.channel("decode", two.info.instance_id)).unary(ask(echo="x"), timeout=5) == b"x"
    assert two.server.num_calls == before + 1

    e = await failure(ProbeStub(mesh.channel("decode")).total([b"1"], timeout=5))
    assert e.code() is grpc.StatusCode.UNIMPLEMENTED                         # bulk: not over the message carrier
    assert await ProbeStub(mesh.direct_channel(one.info)).total([b"1", b"2"], timeout=5) == b"3"
    assert len(await ProbeStub(mesh.direct_channel(one.info)).unary(ask(size=2 << 20), timeout=5)) == 2 << 20

    assert [i.load for i in mesh.instances("decode")] == [{"num_running": 1.0}] * 2
    await mesh.drain(one.info.instance_id)
    await mesh.remove(one.info.instance_id)
    assert one.service.life == ["create", "start", "drain", "stop"]
    assert events == ["updated", "left"]
    assert [i.instance_id for i in mesh.instances("decode")] == [two.info.instance_id]


async def test_a_killed_service_is_unavailable_to_its_callers_at_once(mesh: LocalMesh) -> None:
    hosted = await mesh.host("decode", Probe)
    call = ProbeStub(mesh.channel("decode")).count(ask(n=9, hang_at=1), timeout=30)
    await call.read()
    began = time.monotonic()
    await mesh.kill(hosted.info.instance_id)

    assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE
    assert (await failure(ProbeStub(mesh.channel("decode")).unary(ask(echo=""), timeout=5))).code() is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - began < 2.0


async def test_a_lost_broker_refuses_new_work_and_keeps_the_table(mesh: LocalMesh) -> None:
    hosted = await mesh.host("decode", Probe)
    call = ProbeStub(mesh.channel("decode")).count(ask(n=2000, pad=100), timeout=30)
    got = [await call.read()]
    mesh.set_connected(False)
    assert not hosted.mesh.connected and len(mesh.instances("decode")) == 1
    e = await failure(ProbeStub(mesh.channel("decode")).unary(ask(echo=""), timeout=5))
    assert isinstance(wire.error_from_rpc(e), errors.Unavailable)
    with pytest.raises(errors.Unavailable):
        await mesh.queue("prefill").put(b"x")
    with pytest.raises(errors.Unavailable):
        await mesh.publish("kv.events", b"x")
    mesh.set_connected(True)

    assert len(got + [m async for m in call]) == 2000


async def test_queue_keeps_the_contract(mesh: LocalMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(subjects.QUEUES, "prefill", dataclasses.replace(subjects.QUEUES["prefill"], max_jobs=3))
    queue = mesh.queue("prefill")
    for i in (1, 2, 2, 3):
        await queue.put(b"%d" % i, dedup_id=str(i))
    with pytest.raises(errors.Overloaded):
        await queue.put(b"4")
    taking = queue.take(max_in_flight=2, ack_wait_s=0.2)
    first, second = [await asyncio.wait_for(anext(taking), 5) for _ in range(2)]
    third = asyncio.ensure_future(anext(taking))
    for _ in range(4):
        await asyncio.sleep(0.1)
        await first.in_progress()
        await second.in_progress()
    assert not third.done() and await queue.depth() == 3
    await first.done()
    assert (await asyncio.wait_for(third, 5)).data == b"3"
    await third.result().drop()
    await second.retry(0.05)
    again = await asyncio.wait_for(anext(taking), 5)
    assert (again.data, again.num_deliveries) == (b"2", 2)
    late = await asyncio.wait_for(anext(taking), 5)                          # nobody ended `again` in time
    assert (late.data, late.num_deliveries) == (b"2", 3)
    await again.done()                                                       # too late to count
    assert await queue.depth() == 1
    await late.done()

    assert await queue.depth() == 0


async def test_bus_reaches_every_subscriber_in_order(mesh: LocalMesh) -> None:
    got: list[list[bytes]] = [[], []]

    def listener(i: int) -> Any:
        async def hear(event: Event) -> None:
            got[i].append(event.data)

        return hear

    hosted = await mesh.host("kvstore", Probe)
    undo = [mesh.subscribe("kv.events", listener(0)), hosted.mesh.subscribe("kv.events", listener(1))]
    for i in range(10):
        await hosted.mesh.publish("kv.events", b"%d" % i)
    await until(lambda: len(got[0]) == len(got[1]) == 10)
    undo[0]()
    await mesh.publish("kv.events", b"last")
    await until(lambda: len(got[1]) == 11)

    assert got[0] == got[1][:10] == [b"%d" % i for i in range(10)]


async def test_a_service_that_fails_to_start_is_stopped_and_not_announced(mesh: LocalMesh) -> None:
    made: list[Probe] = []

    class Failing(Probe):
        async def start(self) -> None:
            raise errors.Unavailable("told to")

    def create(context: ServiceContext) -> Probe:
        made.append(Failing(context))
        return made[-1]

    with pytest.raises(errors.Unavailable, match="told to"):
        await mesh.host("decode", create)

    assert made[0].life == ["create", "stop"] and mesh.instances("decode", include_suspect=True) == []
