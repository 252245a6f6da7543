"""The service over real gRPC with the real client."""

from __future__ import annotations

import asyncio
import pathlib
import secrets

import grpc
import pytest

from plugmesh import wire
from plugmesh.errors import FailedPrecondition, InvalidRequest, NotFound, StaleIncarnation
from plugmesh.kv import KvIndex
from plugmesh.kv.guard import Guard, guard_path
from plugmesh.kv.pieces import checksum
from plugmesh.mesh.hostid import host_id
from plugmesh_proto.v1 import kvstore_pb2 as pb
from plugmesh_proto.v1 import kvstore_pb2_grpc


def stub_of(store):
    return kvstore_pb2_grpc.KvStoreStub(store.mesh.direct_channel(store.mesh.self_info))


def ids_of(blocks):
    return [b[0] for b in blocks]


def assert_accounts(store):
    """Used is committed plus reserved plus quarantined, nothing leaks, nothing has two owners."""
    audit = store.core.audit()
    assert (audit.num_leaked, audit.num_doubled) == (0, 0)
    assert audit.used == store.core.used_bytes <= audit.capacity


@pytest.fixture(params=["arena", "stream"])
def path(request):
    """Every behaviour of the client holds on one host and between hosts."""
    return {"allow_arena": request.param == "arena"}


async def test_blocks_come_back_as_they_were_put(kit, layout, make_blocks, path):
    store = await kit.store()
    client = kit.client(layout, **path)
    blocks = make_blocks(layout, 40)

    assert await client.put(blocks) == 40
    refs = await client.match([*ids_of(blocks), b"x" * 32])

    assert [bytes(r.data) for r in refs] == [b[3] for b in blocks]
    assert all(r.is_local == path["allow_arena"] for r in refs)
    assert all(r.data.readonly for r in refs)
    await client.release(refs)
    assert store.core.audit().pinned == 0
    assert_accounts(store)


async def test_a_match_ends_at_the_first_unknown_block(kit, layout, make_blocks, path):
    await kit.store()
    client = kit.client(layout, **path)
    blocks = make_blocks(layout, 6)
    await client.put([b for i, b in enumerate(blocks) if i != 3])

    assert ids_of(blocks)[:3] == [r.block_id for r in await client.match(ids_of(blocks))]
    assert len(await client.match(ids_of(blocks), pin=False)) == 3


async def test_putting_again_stores_nothing_new(kit, layout, make_blocks, path):
    store = await kit.store()
    client = kit.client(layout, **path)
    blocks = make_blocks(layout, 5)
    await client.put(blocks)
    sequence = store.core.events.sequence

    assert await client.put(blocks) == 5
    assert store.core.events.sequence == sequence
    assert store.core.num_blocks == 5
    assert_accounts(store)


async def test_a_tail_block_keeps_its_size_and_hides_what_the_slot_held_before(kit, layout, make_blocks, path):
    await kit.store(arena_bytes=8192, disk_bytes=0)
    client = kit.client(layout, **path)
    [full] = make_blocks(layout, 1)
    tail = (secrets.token_bytes(32), full[0], 3, b"abc" * 100)
    await client.put([full])
    await client.put([tail])
    [ref] = await client.match([tail[0]])

    assert bytes(ref.data) == tail[3]


async def test_pinned_blocks_survive_pressure_and_a_full_arena_refuses(kit, layout, make_blocks):
    store = await kit.store(arena_bytes=8192 * 4, disk_bytes=0)
    client = kit.client(layout)
    pinned = make_blocks(layout, 4, seed=1)
    await client.put(pinned)
    refs = await client.match(ids_of(pinned))

    assert await client.put(make_blocks(layout, 2, seed=2)) == 0
    assert [bytes(r.data) for r in refs] == [b[3] for b in pinned]
    await client.release(refs)
    assert await client.put(make_blocks(layout, 2, seed=2)) == 2
    assert_accounts(store)


async def test_evicted_blocks_come_back_from_disk(kit, layout, make_blocks, eventually, path):
    store = await kit.store(arena_bytes=8192 * 8, spill_above=0.0)
    client = kit.client(layout, **path)
    chains = [make_blocks(layout, 4, seed=s) for s in range(8)]
    for chain in chains:
        await client.put(chain)
        await eventually(lambda: all(b.place for p in store.core.partitions.values() for b in p.blocks.values()))

    assert store.core.counters.evicted_to_disk >= 24
    for chain in chains:
        refs = await client.match(ids_of(chain))
        assert [bytes(r.data) for r in refs] == [b[3] for b in chain]
        await client.release(refs)
    assert_accounts(store)


async def test_blocks_survive_a_restart_and_the_client_attaches_again(kit, layout, make_blocks, path):
    store = await kit.store()
    client = kit.client(layout, strict=False, **path)
    blocks = make_blocks(layout, 10)
    await client.put(blocks)
    old = await client.match(ids_of(blocks))
    await store.stop()

    assert [bytes(r.data) for r in old] == [b[3] for b in blocks]  # views stay right without the store
    assert await client.match(ids_of(blocks)) == []                # a miss, not an error
    store = await kit.store()
    client._not_before = 0.0
    refs = await client.match(ids_of(blocks))
    assert [bytes(r.data) for r in refs] == [b[3] for b in blocks]
    assert client.stats.num_attached == 2
    await client.release([*old, *refs])
    assert_accounts(store)


async def test_stopping_leaves_no_arena_behind(kit, layout, make_blocks):
    store = await kit.store()
    client = kit.client(layout)
    await client.put(make_blocks(layout, 3))
    base = kit.tmp_path / "arena"
    assert list(base.iterdir())
    assert oct(base.stat().st_mode & 0o777) == "0o700"
    assert [oct(p.stat().st_mode & 0o777) for p in base.rglob("*.arena")] == ["0o600"]
    await store.stop()

    assert not base.exists()


async def test_corrupt_bytes_on_disk_are_a_miss_and_are_dropped(kit, layout, make_blocks):
    store = await kit.store()
    client = kit.client(layout)
    blocks = make_blocks(layout, 4)
    await client.put(blocks)
    await client.close()
    await store.stop()
    for file in sorted((kit.tmp_path / "disk-kv-1").rglob("segment-*.kv")):
        data = bytearray(file.read_bytes())
        at = data.find(blocks[2][3])
        if at >= 0:
            data[at + 17] ^= 1
            file.write_bytes(data)
    store = await kit.store()
    client = kit.client(layout)
    refs = await client.match(ids_of(blocks))

    assert [bytes(r.data) for r in refs] == [b[3] for b in blocks[:2]]
    assert store.core.counters.corrupt == 1
    assert store.core.num_blocks == 3
    assert await client.put(blocks) == 4  # written again, good again
    assert len(await client.match(ids_of(blocks))) == 4
    assert_accounts(store)


@pytest.mark.parametrize("damage", ["truncate", "remove", "garbage_index", "other_version"])
async def test_a_damaged_disk_tier_never_stops_the_start(kit, layout, make_blocks, damage):
    store = await kit.store()
    client = kit.client(layout)
    blocks = make_blocks(layout, 4)
    await client.put(blocks)
    await client.close()
    await store.stop()
    [folder] = (kit.tmp_path / "disk-kv-1").iterdir()
    segments = list(folder.glob("segment-*.kv"))
    if damage == "truncate":
        segments[0].write_bytes(segments[0].read_bytes()[:100])
    elif damage == "remove":
        segments[0].unlink()
    elif damage == "garbage_index":
        (folder / "index.sqlite").write_bytes(secrets.token_bytes(5000))
    else:
        import sqlite3
        with sqlite3.connect(folder / "index.sqlite") as db:
            db.execute("update facts set value = '0'")
        db.close()
    store = await kit.store()
    client = kit.client(layout)

    assert await client.match(ids_of(blocks)) == []
    assert await client.put(blocks) == 4
    assert not list(folder.glob("segment-*.kv")) or store.core.disk.used_bytes == 0


async def test_a_block_damaged_in_the_arena_is_a_miss_and_is_dropped(kit, layout, make_blocks, eventually):
    store = await kit.store(disk_bytes=0)
    client = kit.client(layout)
    blocks = make_blocks(layout, 3)
    await client.put(blocks)
    block = next(iter(store.core.partitions.values())).blocks[blocks[1][0]]
    with store.core.view(block) as view:
        view[5] ^= 0xFF
    refs = await client.match(ids_of(blocks))

    assert [r.block_id for r in refs] == ids_of(blocks)[:1]
    assert client.stats.num_corrupt == 1
    await eventually(lambda: store.core.num_blocks == 2)
    assert await client.put(blocks) == 3
    assert len(await client.match(ids_of(blocks))) == 3
    assert_accounts(store)


async def test_a_dead_client_gives_everything_back_before_its_lease_ends(kit, layout, make_blocks, eventually):
    store = await kit.store(lease_ttl_s=60.0)
    client = kit.client(layout)
    blocks = make_blocks(layout, 3)
    await client.put(blocks)
    await client.match(ids_of(blocks))
    attachment = client._current
    await eventually(lambda: all(x.guard.seen_held for x in store.core.leases))
    assert store.core.audit().pinned == 3 * 8192
    attachment._guard.close()  # what the kernel does when the process dies

    await eventually(lambda: store.core.audit().pinned == 0)
    assert len(store.core.leases) == 0
    assert_accounts(store)


async def test_discovery_ends_the_leases_of_a_holder_on_another_host(kit, layout):
    store = await kit.store(lease_ttl_s=60.0)
    stub = stub_of(store)
    request = pb.AttachRequest(layout=wire.layout_to_pb(layout), holder="d", incarnation="a", host="elsewhere")
    lease = await stub.Attach(request)
    assert lease.arena_path == ""
    info = kit.client(layout)._mesh.self_info
    import dataclasses
    kit.bus.tell("left", dataclasses.replace(info, instance_id="d", incarnation="a"))

    assert len(store.core.leases) == 0
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await stub.Renew(pb.RenewRequest(lease_id=lease.lease_id))
    assert isinstance(wire.error_from_rpc(e.value), StaleIncarnation)


async def test_a_newer_incarnation_fences_the_older_for_good(kit, layout, make_blocks):
    store = await kit.store()
    old = kit.client(layout, incarnation="a")
    [block, other] = make_blocks(layout, 2)
    await old.put([block])
    new = kit.client(layout, incarnation="b")
    await new.put([block])

    with pytest.raises(StaleIncarnation):
        await old.put([other])
    assert await new.put([other]) == 1
    with pytest.raises(StaleIncarnation):
        await old.match([block[0]])
    assert store.core.counters.fenced == 1


async def test_a_holder_that_got_a_new_incarnation_from_discovery_goes_on_under_it(kit, layout, make_blocks):
    import dataclasses

    store = await kit.store()
    client = kit.client(layout, holder="test")
    blocks = make_blocks(layout, 2)
    assert await client.put(blocks) == 2
    refs = await client.match(ids_of(blocks))
    client._mesh.self_info = dataclasses.replace(client._mesh.self_info, incarnation="later")
    kit.bus.tell("updated", client._mesh.self_info)

    assert len(store.core.leases) == 0
    assert len(await client.match(ids_of(blocks))) == 2
    assert [x.incarnation for x in store.core.leases] == ["later"]
    assert [bytes(r.data) for r in refs] == [b[3] for b in blocks]


async def test_a_lease_that_is_not_renewed_ends_and_fences_its_writes(kit, layout, eventually):
    store = await kit.store(lease_ttl_s=0.2)
    stub = stub_of(store)
    attach = pb.AttachRequest(layout=wire.layout_to_pb(layout), holder="d", incarnation="a", host=host_id())
    lease = await stub.Attach(attach)
    guard = Guard.try_hold(guard_path(lease.arena_path, lease.lease_id))
    reply = await stub.Reserve(pb.ReserveRequest(lease_id=lease.lease_id, block_ids=[b"x" * 32]))
    assert store.core.audit().reserved == 8192
    await eventually(lambda: store.core.audit().reserved == 0)

    assert store.core.audit().quarantined == 8192  # we are alive and could still write
    commit = pb.CommitBlock(block_id=b"x" * 32, slot=reply.slots[0], checksum=1, num_tokens=16, num_bytes=8192)
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await stub.Commit(pb.CommitRequest(lease_id=lease.lease_id, blocks=[commit]))
    assert isinstance(wire.error_from_rpc(e.value), StaleIncarnation)
    guard.close()
    await eventually(lambda: store.core.audit().used == 0)
    assert not pathlib.Path(guard_path(lease.arena_path, lease.lease_id)).exists()
    assert_accounts(store)


async def test_cancelling_puts_and_matches_at_random_leaves_nothing_pinned_or_reserved(kit, layout, make_blocks, eventually):
    import random

    rng = random.Random(7)
    store = await kit.store(arena_bytes=8192 * 64, spill_above=0.2)
    client = kit.client(layout, strict=False)
    await client.match([b"x" * 32])

    async def one(seed):
        blocks = make_blocks(layout, 5, seed=seed % 20)
        await client.put(blocks)
        refs = await client.match(ids_of(blocks))
        try:
            await asyncio.sleep(rng.random() / 100)
        finally:
            client.release_nowait(refs)

    tasks = []
    for seed in range(200):
        tasks.append(asyncio.create_task(one(seed)))
        if rng.random() < 0.9:
            asyncio.get_running_loop().call_later(rng.random() / 20, tasks[-1].cancel)
        await asyncio.sleep(rng.random() / 300)
    await asyncio.wait(tasks, timeout=20)
    assert sum(t.cancelled() for t in tasks) > 20

    await eventually(lambda: not client._tasks)
    audit = store.core.audit()
    assert (audit.pinned, audit.reserved, audit.quarantined) == (0, 0, 0)
    assert client.stats.failures == {}
    assert_accounts(store)


async def test_pull_copies_blocks_between_two_stores(kit, layout, make_blocks):
    one, two = await kit.store("kv-1"), await kit.store("kv-2")
    client = kit.client(layout, store_instance="kv-1")
    reader = kit.client(layout, holder="decode-2", store_instance="kv-2")
    blocks = make_blocks(layout, 8)
    await client.put(blocks)
    request = pb.PullRequest(from_address=one.mesh.self_info.grpc_address, layout=wire.layout_to_pb(layout), block_ids=ids_of(blocks))
    reply = await stub_of(two).Pull(request)

    assert (reply.num_pulled, reply.num_bytes) == (8, 8 * 8192)
    assert [bytes(r.data) for r in await reader.match(ids_of(blocks))] == [b[3] for b in blocks]
    assert (await stub_of(two).Pull(request)).num_pulled == 0
    assert len(one.core.leases) == 1  # only the client's
    request.from_address = "127.0.0.1:1"
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await stub_of(two).Pull(request)
    assert isinstance(wire.error_from_rpc(e.value), NotFound)


async def test_the_index_follows_the_stores_and_repairs_gaps(kit, layout, make_blocks, eventually):
    one = await kit.store("kv-1", arena_bytes=8192 * 8, disk_bytes=0)
    client = kit.client(layout, store_instance="kv-1")
    first = make_blocks(layout, 3, seed=1)
    await client.put(first)
    index = KvIndex(client._mesh, check_s=0.1)
    await index.start()
    try:
        def right():
            have = {b for p in one.core.partitions.values() for b in p.blocks}
            return index.stores() == ["kv-1"] and index._ids["kv-1"] == have and len(have) > 0

        await eventually(right)
        assert index.prefix(ids_of(first)) == {"kv-1": 3}
        await client.put(make_blocks(layout, 7, seed=2))  # evicts some of the first
        await eventually(right)
        assert index.num_gaps == 0
        kit.bus.lose = 2
        await client.put(make_blocks(layout, 5, seed=3))
        await eventually(right)
        assert index.num_gaps == 1
        kit.bus.lose = 100  # the last events are lost: only the load tells
        await client.put(make_blocks(layout, 2, seed=4))
        await eventually(lambda: kit.bus.lose <= 96)
        await eventually(right)
        kit.bus.lose = 0
        await stub_of(one).Clear(pb.ClearRequest())
        await eventually(lambda: not index._ids.get("kv-1"))
        await one.stop()
        assert index.stores() == []
    finally:
        await index.close()


async def test_events_wait_for_the_broker_in_order_and_within_their_cap(kit, layout, make_blocks, eventually):
    store = await kit.store(event_buffer=16)
    client = kit.client(layout)
    kit.bus.away = True
    await client.put(make_blocks(layout, 40))
    assert store.core.events.num_waiting <= 16
    kit.bus.away = False
    await eventually(lambda: store.core.events.num_waiting == 0)

    sequences = [pb.KvEvent.FromString(d).sequence for d in kit.bus.published]
    assert sequences == list(range(40 - len(sequences) + 1, 41))


async def test_two_layouts_share_the_arena_and_a_cap_on_layouts_holds(kit, make_layout, make_blocks):
    store = await kit.store(arena_bytes=1 << 17, max_layouts=2, disk_bytes=0)
    layouts = [make_layout(8192, "a"), make_layout(16384, "b"), make_layout(8192, "c")]
    for number, layout in enumerate(layouts):
        client = kit.client(layout, holder=f"h{number}", incarnation="i")
        blocks = make_blocks(layout, 12, seed=number)
        num = await client.put(blocks)
        refs = await client.match(ids_of(blocks))
        assert num > 0
        assert [bytes(r.data) for r in refs] == [b[3] for b in blocks][: len(refs)]
        assert store.core.used_bytes <= 1 << 17
        assert_accounts(store)
        await client.close()
    assert sum(p.arena is not None for p in store.core.partitions.values()) == 2


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"slot": 999}, InvalidRequest),
        ({"num_tokens": 0}, InvalidRequest),
        ({"num_tokens": 17}, InvalidRequest),
        ({"num_bytes": 0}, InvalidRequest),
        ({"num_bytes": 1 << 40 >> 10}, InvalidRequest),
        ({"parent_id": b"short"}, InvalidRequest),
        ({"block_id": b"short"}, InvalidRequest),
    ],
)
async def test_a_malformed_commit_is_refused_and_changes_nothing(kit, layout, change, error):
    store = await kit.store()
    stub = stub_of(store)
    lease = await stub.Attach(pb.AttachRequest(layout=wire.layout_to_pb(layout), holder="d", incarnation="a", host=host_id()))
    guard = Guard.try_hold(guard_path(lease.arena_path, lease.lease_id))
    reply = await stub.Reserve(pb.ReserveRequest(lease_id=lease.lease_id, block_ids=[b"x" * 32]))
    facts = {"block_id": b"x" * 32, "slot": reply.slots[0], "checksum": checksum(bytes(8192)), "num_tokens": 16, "num_bytes": 8192}
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await stub.Commit(pb.CommitRequest(lease_id=lease.lease_id, blocks=[pb.CommitBlock(**facts | change)]))

    assert type(wire.error_from_rpc(e.value)) is error
    assert store.core.num_blocks == 0
    facts["checksum"] ^= 1
    wrong = await stub.Commit(pb.CommitRequest(lease_id=lease.lease_id, blocks=[pb.CommitBlock(**facts)]))
    assert wrong.num_committed == 0
    assert store.core.counters.corrupt == 1
    assert_accounts(store)
    guard.close()


async def test_two_writers_of_one_block_both_succeed_and_one_slot_goes_back(kit, layout, make_blocks):
    store = await kit.store()
    clients = [kit.client(layout, holder=h) for h in ("p", "q")]
    blocks = make_blocks(layout, 8)
    assert await asyncio.gather(*[c.put(blocks) for c in clients]) == [8, 8]
    # And in the order that races make rare: both have reserved before the first commits.
    one, two = [c._current for c in clients]
    stub, wanted = stub_of(store), b"w" * 32
    slots = []
    for attachment in (one, two):
        reply = await stub.Reserve(pb.ReserveRequest(lease_id=attachment.lease_id, block_ids=[wanted]))
        attachment.write(reply.slots[0], 8192)[:] = bytes(8192)
        slots.append(reply.slots[0])
    assert slots[0] != slots[1]
    for attachment, slot in zip((one, two), slots, strict=True):
        commit = pb.CommitBlock(block_id=wanted, slot=slot, checksum=checksum(bytes(8192)), num_tokens=16, num_bytes=8192)
        request = pb.CommitRequest(lease_id=attachment.lease_id, blocks=[commit])
        assert [(await stub.Commit(request)).num_committed for _ in range(2)] == [1, 1]  # twice is harmless

    assert store.core.audit().reserved == 0
    assert store.core.used_bytes == 9 * 8192
    assert_accounts(store)


async def test_layouts_that_cannot_be_are_refused(kit, make_layout):
    import dataclasses

    store = await kit.store()
    good = make_layout()
    for change in ({"block_bytes": 0}, {"block_bytes": 8191}, {"block_tokens": 0}, {"block_bytes": 1 << 60, "codec": "x"}):
        layout = dataclasses.replace(good, **change)
        with pytest.raises(InvalidRequest):
            await kit.client(layout, holder=str(change), allow_arena=False).match([b"x" * 32])
    assert not store.core.partitions


async def test_reserving_without_the_guard_is_refused(kit, layout):
    store = await kit.store()
    stub = stub_of(store)
    for host in (host_id(), ""):
        lease = await stub.Attach(pb.AttachRequest(layout=wire.layout_to_pb(layout), holder="d", incarnation="a", host=host))
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await stub.Reserve(pb.ReserveRequest(lease_id=lease.lease_id, block_ids=[b"x" * 32]))
        assert isinstance(wire.error_from_rpc(e.value), FailedPrecondition)
    assert store.core.used_bytes == 0


async def test_without_a_store_everything_is_a_miss(kit, layout, make_blocks):
    client = kit.client(layout, strict=False)
    blocks = make_blocks(layout, 2)

    assert await client.match(ids_of(blocks)) == []
    assert await client.put(blocks) == 0
    assert client.stats.failures == {"unavailable": 2}


async def test_a_client_that_cannot_see_the_arena_streams_instead(kit, layout, make_blocks, monkeypatch):
    await kit.store()
    client = kit.client(layout)
    monkeypatch.setattr("plugmesh.kv.attachment.os.access", lambda *_: False)
    blocks = make_blocks(layout, 3)

    assert await client.put(blocks) == 3
    refs = await client.match(ids_of(blocks))
    assert [bytes(r.data) for r in refs] == [b[3] for b in blocks]
    assert not any(r.is_local for r in refs)


async def test_metrics_tell_states_and_leaks(kit, layout, make_blocks, eventually):
    store = await kit.store()
    client = kit.client(layout)
    blocks = make_blocks(layout, 3)
    await client.put(blocks)
    await client.match(ids_of(blocks)[:2])

    def value(name, **labels):
        return store.registry.get_sample_value(f"plugmesh_kv_{name}", labels)

    await eventually(lambda: value("arena_bytes", state="pinned") == 2 * 8192)
    assert value("arena_bytes", state="committed") == 3 * 8192
    assert value("blocks_leaked") == 0
    assert value("hits_total") == 2
    partition = next(iter(store.core.partitions.values()))
    partition.arena.take()  # a slot that nobody owns
    await eventually(lambda: value("blocks_leaked") == 1)
    stats = await stub_of(store).Stats(pb.KvStatsRequest())
    assert (stats.num_blocks, stats.num_hits, stats.arena_pinned_bytes) == (3, 2, 2 * 8192)
