"""The service as its clients see it: over real gRPC, with its ledger."""

from __future__ import annotations

import asyncio
import time

import grpc.aio
import numpy as np
import pytest

from plugmesh.client.rollout import RolloutClient, Row
from plugmesh.errors import AlreadyExists, InvalidRequest, LimitExceeded, NotFound, Overloaded, StaleIncarnation
from plugmesh_proto.v1 import rollout_pb2 as pb


def rows(num: int, start: int = 0, size: int = 3) -> list[Row]:
    return [Row(f"r{i}", {"a": np.full(size, i, np.int32), "text": f"t{i}"}) for i in range(start, start + num)]


async def topic(client, name: str = "t", **changes) -> None:
    await client.create_topic(name, ["a", "text", "score"], ["x", "y"], **changes)


async def test_rows_go_through_their_tasks_and_leave(kit):
    table = await kit.table()
    client = kit.client(table)
    await topic(client)
    assert await client.create_topic("t", ["a", "text", "score"], ["x", "y"]) is False
    with pytest.raises(AlreadyExists):
        await topic(client, group_size=2)
    assert await client.put("t", rows(5)) == [0, 1, 2, 3, 4]
    assert await client.put("t", rows(5)) == [0, 1, 2, 3, 4]

    batch = await client.get("t", "x", ["a", "text"], 3)
    assert [r.id for r in batch.rows] == ["r0", "r1", "r2"] and batch.column("text") == ["t0", "t1", "t2"]
    assert all((a == i).all() and a.dtype == np.int32 for i, a in enumerate(batch.column("a")))
    await client.ack(batch, {"score": [0.5, 1.5, 2.5]}, version=4)
    await client.ack(batch, {"score": [0.5, 1.5, 2.5]}, version=4)
    scored = await client.get("t", "y", ["score"], 5, min_rows=1)
    assert scored.column("score") == [0.5, 1.5, 2.5] and [r.version for r in scored.rows] == [4, 4, 4]
    await client.ack(scored)

    state = await client.status("t")
    assert (state.num_rows, state.num_put, state.num_leases) == (2, 5, 0)
    assert (state.tasks["x"].num_done, state.tasks["y"].num_done, state.tasks["x"].num_free) == (3, 3, 2)
    assert await client.put("t", rows(5)) == [0, 1, 2, 3, 4], "those that have left are remembered"
    assert (await client.status("t")).num_rows == 2
    assert not await client.get("t", "y", ["score"], 1, wait_s=0.05)


async def test_large_batches_go_in_pieces_and_a_row_has_a_limit(kit):
    client = kit.client(await kit.table())
    await topic(client, capacity_bytes=128 << 20)
    big = [Row(f"b{i}", {"a": np.full(1 << 18, i, np.int32), "text": "x" * i}) for i in range(20)]
    await client.put("t", big)
    batch = await client.get("t", "x", ["a", "text"], 20)
    assert [int(a[7]) for a in batch.column("a")] == list(range(20)) and batch.column("text") == ["x" * i for i in range(20)]
    await client.ack(batch, {"score": [float(i) for i in range(20)]})
    again = await client.get("t", "y", ["a", "score"], 20)
    await client.put_fields("t", again.indexes, {"score": again.column("score")})
    with pytest.raises(LimitExceeded):
        await client.put("t", [Row("huge", {"a": np.zeros(2 << 20, np.int32)})])


async def test_a_dead_consumers_rows_come_back_and_it_is_told(kit):
    table = await kit.table()
    client, other = kit.client(table), kit.client(table)
    await topic(client)
    await client.put("t", rows(2))
    mine = await client.get("t", "x", ["a"], 2, lease_s=0.2)
    kept = await client.get("t", "y", ["a"], 2, lease_s=0.3)
    async with client.keep(kept):
        theirs = await other.get("t", "x", ["a"], 2, wait_s=3.0)
        assert theirs.indexes == mine.indexes
        for outputs in (None, {"score": [1.0, 2.0]}):
            with pytest.raises(StaleIncarnation):
                await client.ack(mine, outputs)
        await asyncio.sleep(0.4)
        assert not await other.get("t", "y", ["a"], 1, wait_s=0.0)
        await client.ack(kept)
    await other.ack(theirs, {"score": [3.0, 4.0]})
    assert (await client.status("t")).tasks["x"].num_done == 2


async def test_consumers_wait_their_turn_and_put_waits_for_room(kit):
    client = kit.client(await kit.table())
    await topic(client, capacity_rows=4, capacity_bytes=1 << 20)
    getters = [asyncio.create_task(client.get("t", "x", ["a"], 2, wait_s=5.0)) for _ in range(3)]
    await asyncio.sleep(0.1)
    await client.put("t", rows(4))
    with pytest.raises(Overloaded):
        await client.put("t", rows(1, start=4), wait_s=0.2)
    first, second = await getters[0], await getters[1]
    assert first.indexes == [0, 1] and second.indexes == [2, 3]
    waiting = asyncio.create_task(client.put("t", rows(2, start=4), wait_s=5.0))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    for batch in (first, await client.get("t", "y", ["a"], 2)):
        await client.ack(batch)
    assert await waiting == [4, 5]
    assert (await getters[2]).indexes == [4, 5]
    with pytest.raises(LimitExceeded):
        await client.put("t", rows(5, start=10))


async def test_a_caller_that_goes_away_while_it_waits_takes_nothing(kit):
    table = await kit.table()
    client = kit.client(table)
    await topic(client)
    gone = asyncio.create_task(client.get("t", "x", ["a"], 1, wait_s=20.0))
    await asyncio.sleep(0.1)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    async with asyncio.timeout(5):
        while (await client.status("t")).num_waiting_gets:
            await asyncio.sleep(0.02)
    await client.put("t", rows(1))
    assert (await client.get("t", "x", ["a"], 1)).indexes == [0]


async def test_admission_and_the_version_window(kit):
    client = kit.client(await kit.table())
    with pytest.raises(InvalidRequest, match="capacity_rows"):
        await topic(client, staleness=1, batch_rows=2, capacity_rows=3)
    await topic(client, staleness=0, batch_rows=2, capacity_rows=2, admission_task="y")
    await client.publish_version("t", 0)
    await client.put("t", rows(2))
    blocked = asyncio.create_task(client.put("t", rows(2, start=2)))
    batch = await client.get("t", "x", ["a"], 2, stamp_version=0)
    await client.ack(batch, {"score": [1.0, 2.0]})
    trained = await client.get("t", "y", ["score"], 2, sampler="version_window")
    assert [r.version for r in trained.rows] == [0, 0] and trained.latest_version == 0
    assert not blocked.done()
    await client.publish_version("t", 1)
    await client.ack(trained)
    assert await blocked == [2, 3]
    with pytest.raises(InvalidRequest):
        await client.publish_version("t", 0)
    late = await client.get("t", "x", ["a"], 2, stamp_version=0)
    await client.ack(late, {"score": [3.0, 4.0]})
    assert not await client.get("t", "y", ["score"], 1, wait_s=0.1)
    state = await client.status("t")
    assert state.num_stale == 2 and state.tasks["y"].lags == {0: 2}
    assert await client.clear("t", older_than=1) == 2


@pytest.mark.parametrize("durability", ["commit", "batch"])
async def test_a_restart_loses_nothing_that_was_answered(kit, durability):
    table = await kit.table(durability=durability)
    client = kit.client(table)
    await topic(client, group_size=1, staleness=2)
    await client.put("t", rows(6))
    await client.publish_version("t", 3)
    done = await client.get("t", "x", ["a"], 2, stamp_version=3)
    await client.ack(done, {"score": [0.0, 1.0]})
    await client.ack(await client.get("t", "y", ["score"], 1))
    held = await client.get("t", "x", ["a"], 2)
    await client.clear("t", [5])
    await table.stop()
    table = await kit.table(durability=durability, port=int(table.address.rpartition(":")[2]))

    state = await client.status("t")
    assert (state.num_rows, state.num_put, state.latest_version) == (4, 6, 3), "r0 had left after its last task, r5 was cleared"
    assert (state.tasks["x"].num_done, state.tasks["x"].num_free) == (2, 3)
    await client.ack(done, {"score": [0.0, 1.0]})
    await client.ack(held)
    assert (await client.status("t")).tasks["x"].num_done == 4, "nobody else had got the rows"
    last = await client.get("t", "x", ["a", "text"], 9, min_rows=1)
    assert [(r.id, r.fields["text"]) for r in last.rows] == [("r4", "t4")]
    assert await client.put("t", rows(6)) == [0, 1, 2, 3, 4, 5]
    scored = await client.get("t", "y", ["score", "a"], 1)
    assert [(r.version, float(r.fields["score"]), int(r.fields["a"][0])) for r in scored.rows] == [(3, 1.0, 1)]
    await client.checkpoint()
    assert await client.drop_topic("t")
    with pytest.raises(NotFound):
        await client.status("t")


async def test_memory_is_bounded_over_all_topics(kit):
    client = kit.client(await kit.table(memory_bytes=1 << 20, durability="none"))
    await topic(client, capacity_bytes=1 << 19)
    with pytest.raises(LimitExceeded, match="memory_bytes"):
        await topic(client, "u", capacity_bytes=(1 << 19) + 1)
    await topic(client, "u", capacity_bytes=1 << 19)


async def test_watchers_hear_of_changes_by_grpc_and_on_the_bus(kit):
    table = await kit.table()
    client = kit.client(table)
    await topic(client)
    events = client.watch("t")
    assert (await anext(events)).num_rows == 0
    await client.put("t", rows(3))
    async with asyncio.timeout(5):
        while (event := await anext(events)).num_rows < 3:
            pass
        assert event.num_ready == {"x": 3, "y": 3}
        while not table.mesh.published:
            await asyncio.sleep(0.01)
    heard = pb.TableEvent.FromString(table.mesh.published[-1][1])
    assert table.mesh.published[-1][0] == "rollout.events" and heard.num_rows == 3
    await events.aclose()


async def test_what_cannot_be_is_an_error_that_names_it(kit):
    client = kit.client(await kit.table())
    await topic(client)
    for wrong in (
        client.get("t", "z", ["a"], 1), client.get("t", "x", ["z"], 1), client.get("t", "x", ["a"], 1, sampler="z"), client.get("t", "x", ["a"], 0, wait_s=0),
        client.get("t", "x", ["a"], 1, sampler_options={"z": 1}), client.put("t", [Row("r", {"z": 1})]), client.put("t", [Row("", {"a": 1})]),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest):
            await wrong
    with pytest.raises(NotFound):
        await client.get("u", "x", ["a"], 1)
    began = time.monotonic()
    assert len(await client.get("t", "x", ["a"], 1, wait_s=0.2)) == 0
    assert 0.15 < time.monotonic() - began < 2
    assert await client.put("t", []) == []
    assert await client.clear("t", [99]) == 0


async def test_a_call_that_nobody_answered_in_time_is_repeated(kit, monkeypatch):
    """As after a machine that slept, or a process that was stopped for a while."""
    monkeypatch.setattr("plugmesh.client.rollout._GRACE_S", 0.3)
    table = await kit.table()
    mute = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    asked = []

    def channel():
        asked.append(f"127.0.0.1:{mute.sockets[0].getsockname()[1]}" if len(asked) < 2 else table.address)
        return grpc.aio.insecure_channel(asked[-1])

    async with RolloutClient(channel, retry_s=2.0) as patient:
        with pytest.raises(NotFound):
            await patient.status("none")
    assert len(set(asked)) == 2
    mute.close()
