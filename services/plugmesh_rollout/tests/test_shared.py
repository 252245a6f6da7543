"""Values through shared memory: the same as over gRPC, never trusted, and nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import pathlib
import subprocess
import sys
import time

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from plugmesh.arena import default_base
from plugmesh.client import rollout
from plugmesh.client.rollout import RolloutClient, Row
from plugmesh.client.rollout_shared import SharedArea
from plugmesh.errors import InvalidRequest, NotFound
from plugmesh_proto.v1 import rollout_pb2 as pb
from plugmesh_rollout.alone import Alone
from plugmesh_rollout.config import Settings

VALUES = st.binary(max_size=2000) | st.text(max_size=50) | st.floats(allow_nan=False) | hnp.arrays(np.int32, st.integers(0, 300))


@pytest.fixture(autouse=True)
def small_values_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "_SHARE_FROM", 1 << 15)


async def shared(client: RolloutClient, topic: str = "t") -> RolloutClient:
    """Once it has an area, which it asks for with its first large call."""
    async with asyncio.timeout(10):
        while client._area is None:
            client._part(1 << 16)
            await asyncio.sleep(0.005)
    return client


def files() -> list[pathlib.Path]:
    return list(default_base(None).glob("kv-*/*.values"))


@given(st.lists(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6), min_size=1, max_size=4))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_values_come_out_as_over_grpc(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, batches: list) -> None:
    monkeypatch.setattr(rollout, "_SHARE_FROM", 0)

    async def main() -> None:
        table = await Alone.start(tmp_path_factory.mktemp("t"), Settings(durability="none"))
        try:
            async with RolloutClient(table.address) as near, RolloutClient(table.address, shared_bytes=0) as far:
                await shared(near)
                area, whole = near._area, list(near._area._free)
                for n, batch in enumerate(batches):
                    await near.create_topic(f"t{n}", [f"{i}{f}" for i in range(6) for f in "ab"] + ["c"], ["x", "y", "z"])
                    rows = [Row(f"r{i}", {f"{i}a": a, f"{i}b": b, "c": i}) for i, (a, b) in enumerate(batch)]
                    await (near if n % 2 else far).put(f"t{n}", rows)
                    got = [await client.get(f"t{n}", task, ["c"], len(rows)) for client, task in ((near, "x"), (far, "y"))]
                    assert [b.column("c") for b in got] == [list(range(len(rows)))] * 2
                    for i, row in enumerate(rows):
                        names = [f"{i}a", f"{i}b"]
                        one = await near.get(f"t{n}", "z", names, 1)
                        await near.release(one)
                        other = await far.get(f"t{n}", "z", names, 1)
                        await far.ack(other)
                        for name in names:
                            for value in (one.rows[0].fields[name], other.rows[0].fields[name]):
                                assert type(value) is type(row.fields[name]) and np.array_equal(value, row.fields[name])
                assert near._area is area and area._free == whole, "one area did for all, and every part of it was given back"
        finally:
            await table.stop()

    asyncio.run(main())


async def test_large_batches_go_through_it_and_what_does_not_fit_goes_with_the_call(kit) -> None:
    table = await kit.table()
    client = await shared(kit.client(table, shared_bytes=1 << 20))
    await client.create_topic("t", ["a"], ["x", "y"], capacity_bytes=64 << 20)
    sent: list[bool] = []
    find = table.service._areas.find
    table.service._areas.find = lambda name: (sent.append(True), find(name))[1]
    rows = [Row(f"r{i}", {"a": np.full(100_000, i, np.uint8)}) for i in range(30)]
    for start in range(0, 30, 5):
        await client.put("t", rows[start : start + 5])
    assert len(sent) == 6, "each put went through it"
    for size, ways in ((5, 1), (30, 0)):
        sent.clear()
        client._batch_bytes[("t", "x")] = size * 110_000
        batch = await client.get("t", "x", ["a"], size)
        assert [(a == i).all() and len(a) == 100_000 for i, a in enumerate(batch.column("a"))] == [True] * size and len(sent) == ways
        await client.release(batch)
    client._batch_bytes[("t", "x")] = 1 << 16
    began = time.monotonic()
    one = await client.get("t", "x", ["a"], 1)
    assert len(one.column("a")[0]) == 100_000 and time.monotonic() - began < 5, "no place for even one row"
    await client.release(one)
    client._batch_bytes[("t", "y")] = 250_000
    assert [int(a[-1]) for a in (await client.get("t", "y", ["a"], 12)).column("a")] == list(range(12)), "the rest of a batch is read"


async def test_a_caller_cannot_reach_beyond_its_area_and_a_lost_one_does_no_harm(kit) -> None:
    table = await kit.table()
    client = await shared(kit.client(table))
    await client.create_topic("t", ["a"], ["x"])
    for spans in ([0, 100], [client._area.num_bytes - 10, 100], [-64, 10], [64, -1], [64]):
        put = pb.PutRequest(topic="t", fields=["a"], rows=[pb.TableRow(id="r", spans=spans)], area=client._area.name)
        with pytest.raises(InvalidRequest):
            await client._call("Put", put)
    with pytest.raises(NotFound):
        await client._call("Put", pb.PutRequest(topic="t", fields=["a"], rows=[pb.TableRow(id="r", spans=[64, 1])], area="nobody's"))
    table.service._areas.drop(client._area.name)
    value = np.arange(1 << 16, dtype=np.uint8)
    await client.put("t", [Row("r", {"a": value})])
    await shared(client)
    table.service._areas.drop(client._area.name)
    client._batch_bytes[("t", "x")] = 1 << 17
    assert np.array_equal((await client.get("t", "x", ["a"], 1)).rows[0].fields["a"], value)


async def test_calls_go_on_when_another_one_makes_the_client_give_its_area_up(kit) -> None:
    client = await shared(kit.client(await kit.table()))
    await client.create_topic("t", ["a"], ["x"])
    waiting = asyncio.create_task(client.get("t", "x", ["a"], 1, wait_s=20.0))
    other = asyncio.create_task(client.get("t", "x", ["a"], 99, wait_s=20.0))
    await asyncio.sleep(0.1)
    area = client._area
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    assert client._area is not area
    await client.put("t", [Row("r", {"a": np.arange(1 << 16, dtype=np.uint8)})])
    assert len((await waiting).column("a")[0]) == 1 << 16


async def test_who_is_elsewhere_or_finds_no_memory_left_does_without(kit, monkeypatch) -> None:
    table = await kit.table(shared_bytes=3 << 16)
    client = kit.client(table)
    stub = client._stubs()
    first = await SharedArea.ask(stub, 2 << 16)
    second = await SharedArea.ask(stub, 2 << 16)
    assert first and second and (first.num_bytes, second.num_bytes) == (2 << 16, 1 << 16)
    assert await SharedArea.ask(stub, 1 << 16) is None, "the table shares no more than it was told to"
    first.close()
    async with asyncio.timeout(5):
        while (again := await SharedArea.ask(stub, 1 << 16)) is None:
            await asyncio.sleep(0.01)
    again.close()
    monkeypatch.setattr("plugmesh.client.rollout_shared._boot_id", lambda: "another host")
    assert await SharedArea.ask(stub, 1 << 16) is None
    monkeypatch.undo()
    monkeypatch.setattr("plugmesh.client.rollout_shared.os.open", lambda *a, **k: (_ for _ in ()).throw(PermissionError()))
    assert await SharedArea.ask(stub, 1 << 16) is None, "a file of another user"


HOLD = """
import asyncio, sys, numpy as np
from plugmesh.client.rollout import RolloutClient, Row
async def main():
    client = RolloutClient(sys.argv[1])
    while client._area is None:
        client._part(1 << 20)
        await asyncio.sleep(0.01)
    await client.put("t", [Row("dead", {"a": np.zeros(1 << 17, np.uint8)})])
    print("ready", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_nothing_is_left_of_a_client_that_was_killed_nor_of_a_table_that_stopped(kit) -> None:
    before = set(files())
    table = await kit.table()
    client = kit.client(table)
    await client.create_topic("t", ["a"], ["x"])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, table.address], env=env, stdout=subprocess.PIPE)
    try:
        assert (await asyncio.to_thread(process.stdout.readline)).strip() == b"ready"
        assert len(set(files()) - before) == 1 and table.service._areas.num_bytes == 16 << 20
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    async with asyncio.timeout(10):
        while set(files()) - before:
            await asyncio.sleep(0.02)
    assert table.service._areas.num_bytes == 0 and (await client.status("t")).num_rows == 1
    await shared(client)
    assert len(set(files()) - before) == 1
    await table.stop()
    assert not set(files()) - before
