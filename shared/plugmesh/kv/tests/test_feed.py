"""The feed of changes against an instance that does what it likes and a bus that loses, doubles and reorders."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.kv.feed import KvFeed, Source
from plugmesh.mesh.api import Event
from plugmesh.records import KvEvent
from plugmesh.types import InstanceInfo
from plugmesh_proto.v1 import kvstore_pb2 as pb

BLOCKS = [bytes([i]) * 32 for i in range(8)]


class Instance:
    """A cache that numbers its changes, in one of its lives."""

    def __init__(self, name: str, life: int) -> None:
        self.info = InstanceInfo("decode", name, f"{name}-{life}", "", "", 1)
        self.sequence = 0
        self.ids: set[bytes] = set()

    def change(self, block_id: bytes) -> pb.KvEvent:
        is_stored = block_id not in self.ids
        (self.ids.add if is_stored else self.ids.remove)(block_id)
        self.sequence += 1
        return pb.KvEvent(
            sequence=self.sequence, store_instance=self.info.instance_id, incarnation=self.info.incarnation,
            kind=pb.KvEvent.STORED if is_stored else pb.KvEvent.REMOVED, block_ids=[block_id],
        )


class Mesh:
    """Discovery, the bus and snapshots of some instances; only what a feed uses."""

    def __init__(self) -> None:
        self.live: dict[str, Instance] = {}
        self.num_snapshots = 0
        self.snapshot_fails = False
        self.listener = None
        self.watcher = lambda kind, info: None

    def subscribe(self, topic, callback, *, max_pending=1024):
        self.listener = callback
        return lambda: None

    def watch(self, callback):
        self.watcher = callback
        return lambda: None

    def instances(self, role, *, include_suspect=False):
        return [
            InstanceInfo("decode", i.info.instance_id, i.info.incarnation, "", "", 1, load={"kv_event_sequence": i.sequence})
            for i in self.live.values()
        ]

    def channel(self, role, name):
        return name

    def snapshot(self, name):
        async def call(request, timeout):
            self.num_snapshots += 1
            instance = self.live.get(name)
            if instance is None or self.snapshot_fails:
                from plugmesh.errors import Unavailable

                raise Unavailable("gone")
            sequence, ids = instance.sequence, sorted(instance.ids)
            await asyncio.sleep(0)
            for start in range(0, max(1, len(ids)), 3):
                yield pb.SnapshotPage(as_of_sequence=sequence, incarnation=instance.info.incarnation, block_ids=ids[start : start + 3])

        return call

    def start(self, name: str, life: int) -> Instance:
        old = self.live.pop(name, None)
        if old is not None:
            self.watcher("left", old.info)
        instance = self.live[name] = Instance(name, life)
        self.watcher("joined", instance.info)
        return instance

    def end(self, name: str) -> None:
        self.watcher("left", self.live.pop(name).info)

    async def say(self, e: pb.KvEvent) -> None:
        await self.listener(Event("decode.kv_events", e.SerializeToString()))


class Follower:
    """Applies the feed and checks its promise at every step."""

    def __init__(self) -> None:
        self.ids: dict[str, set[bytes]] = {}
        self.at: dict[str, tuple[str, int]] = {}

    def on_event(self, e: KvEvent) -> None:
        if e.kind == "cleared":
            self.ids.pop(e.instance_id, None)
            self.at.pop(e.instance_id, None)
            return
        life, sequence = self.at.get(e.instance_id, (e.incarnation, -1))
        assert life == e.incarnation, "another life without a clearing"
        assert sequence == -1 or e.sequence == sequence + 1, "a hole or a repetition"
        self.at[e.instance_id] = (e.incarnation, e.sequence)
        ids = self.ids.setdefault(e.instance_id, set())
        (ids.update if e.kind == "stored" else ids.difference_update)(e.block_ids)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["change", "change", "change", "lose", "double", "late", "restart", "end", "wait", "zombie"]),
        st.sampled_from(["a", "b"]), st.sampled_from(BLOCKS),
    ),
    max_size=40,
)  # fmt: skip


async def play(actions) -> None:
    mesh, follower = Mesh(), Follower()
    feed = KvFeed(mesh, Source("decode", "decode.kv_events", mesh.snapshot), follower.on_event, check_s=0.01)  # type: ignore[arg-type]
    lives, held, dead = 0, [], []
    mesh.start("a", lives)
    feed.start()
    try:
        for kind, name, block_id in actions:
            if kind == "restart" or name not in mesh.live:
                lives += 1
                dead += [mesh.live[name]] if name in mesh.live else []
                mesh.start(name, lives)
                continue
            match kind:
                case "end":
                    dead.append(mesh.live[name])
                    mesh.end(name)
                case "wait":
                    await asyncio.sleep(0.002)
                case "zombie":  # a life that was declared dead goes on talking
                    if dead:
                        await mesh.say(dead[-1].change(block_id))
                case "lose":
                    mesh.live[name].change(block_id)
                case "late":
                    held.append(mesh.live[name].change(block_id))
                case _:
                    event = mesh.live[name].change(block_id)
                    await mesh.say(event)
                    if kind == "double":
                        await mesh.say(event)
        for event in held:
            await mesh.say(event)
        end = time.monotonic() + 5
        while sorted(feed.complete()) != sorted(mesh.live) or any(follower.ids.get(n, set()) != i.ids for n, i in mesh.live.items()):
            assert time.monotonic() < end, (feed.complete(), follower.ids)
            await asyncio.sleep(0.002)

        assert set(follower.ids) == set(mesh.live)
    finally:
        await feed.close()


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(ACTIONS)
def test_whatever_is_lost_doubled_late_or_dead_the_followers_picture_becomes_the_truth(actions):
    asyncio.run(play(actions))


@pytest.mark.parametrize("num_turns", range(6))
async def test_a_feed_that_wakes_up_while_it_is_closed_ends(num_turns):
    """An event and `close` a few turns of the loop apart: the request to end must not get lost between them."""
    asked = []

    class Counted(asyncio.Task):
        def cancel(self, *args, **kw):
            asked.append(self.get_name())
            return super().cancel(*args, **kw)

    asyncio.get_running_loop().set_task_factory(lambda loop, work, **kw: Counted(work, loop=loop, **kw))
    mesh = Mesh()
    feed = KvFeed(mesh, Source("decode", "t", mesh.snapshot), Follower().on_event, check_s=60)  # type: ignore[arg-type]
    one = mesh.start("a", 0)
    feed.start()
    await asyncio.wait_for(_complete(feed, "a"), 5)
    one.change(BLOCKS[0])
    await mesh.say(one.change(BLOCKS[1]))  # a hole: the feed is to ask for a snapshot
    for _ in range(num_turns):
        await asyncio.sleep(0)
    await asyncio.wait_for(feed.close(), 5)

    assert asked.count("kv.feed:decode") == 1


async def test_a_dead_life_that_goes_on_talking_costs_no_snapshot_and_changes_nothing():
    mesh, follower = Mesh(), Follower()
    feed = KvFeed(mesh, Source("decode", "t", mesh.snapshot), follower.on_event, check_s=60)  # type: ignore[arg-type]
    old = mesh.start("a", 0)
    new = mesh.start("a", 1)
    new.change(BLOCKS[0])
    feed.start()
    try:
        await asyncio.wait_for(_complete(feed, "a"), 5)
        before = mesh.num_snapshots
        for block_id in BLOCKS:
            await mesh.say(old.change(block_id))
        await asyncio.sleep(0.02)

        assert follower.ids == {"a": {BLOCKS[0]}}
        assert (mesh.num_snapshots, feed.num_gaps) == (before, 0)
    finally:
        await feed.close()


async def test_a_gap_clears_at_once_even_when_no_snapshot_comes():
    mesh, follower = Mesh(), Follower()
    feed = KvFeed(mesh, Source("decode", "t", mesh.snapshot), follower.on_event, check_s=60)  # type: ignore[arg-type]
    one = mesh.start("a", 0)
    feed.start()
    try:
        await asyncio.wait_for(_complete(feed, "a"), 5)
        await mesh.say(one.change(BLOCKS[0]))
        assert follower.ids == {"a": {BLOCKS[0]}}
        mesh.snapshot_fails = True
        one.change(BLOCKS[1])
        await mesh.say(one.change(BLOCKS[2]))

        assert follower.ids == {}
        assert feed.complete() == []
        for block_id in BLOCKS * 300:  # what is kept meanwhile is bounded
            await mesh.say(one.change(block_id))
        assert len(feed._views["a"].early) <= 1024
        mesh.snapshot_fails = False
        await asyncio.wait_for(_complete(feed, "a"), 5)
        assert follower.ids == {"a": one.ids}
    finally:
        await feed.close()


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b""])
async def test_garbage_on_the_bus_is_ignored(data):
    mesh, follower = Mesh(), Follower()
    feed = KvFeed(mesh, Source("decode", "t", mesh.snapshot), follower.on_event, check_s=60)  # type: ignore[arg-type]
    mesh.start("a", 0)
    feed.start()
    try:
        await asyncio.wait_for(_complete(feed, "a"), 5)
        await mesh.listener(Event("t", data))

        assert feed.complete() == ["a"]
    finally:
        await feed.close()


async def _complete(feed: KvFeed, name: str) -> None:
    while name not in feed.complete():
        await asyncio.sleep(0.002)
