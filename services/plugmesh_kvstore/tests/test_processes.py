"""Paused and killed processes, for real: the store and its clients as separate processes.

Run as a script this file is such a process: `store` serves a kvstore, `writer` and `reader` are clients that act on
lines of standard input.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pathlib
import random
import signal
import sys

import grpc
import pytest

from plugmesh import wire
from plugmesh.types import BLOCK_TOKENS, KvLayout

LAYOUT = KvLayout("m", "raw", "float32", 1, 1, 512, BLOCK_TOKENS, 65536)
WAIT_S = 20.0


def block_of(number):
    """Id, parent, tokens and bytes of block `number`, the same in every process."""
    block_id = hashlib.sha256(b"%d" % number).digest()
    return block_id, b"", BLOCK_TOKENS, hashlib.shake_128(block_id).digest(LAYOUT.block_bytes)


class Child:
    """A process that talks in JSON lines."""

    def __init__(self, process):
        self.process = process

    @classmethod
    async def start(cls, *args):
        env = os.environ | {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(
            sys.executable, __file__, *args, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env=env))

    async def hear(self):
        async with asyncio.timeout(WAIT_S):
            return json.loads(await self.process.stdout.readline() or '"the child ended"')

    def say(self, word):
        self.process.stdin.write(word.encode() + b"\n")

    def signal(self, number):
        self.process.send_signal(number)

    async def stopped(self):
        """Waits until the kernel reports the process as stopped."""
        async with asyncio.timeout(WAIT_S):
            while pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ")[-1][0] != "T":
                await asyncio.sleep(0.005)

    async def end(self):
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@pytest.fixture
async def spawn():
    children = []

    async def start(*args):
        children.append(await Child.start(*args))
        return children[-1]

    yield start
    for child in children:
        await child.end()


async def test_a_writer_that_wakes_after_its_lease_cannot_commit_nor_damage_what_others_read(kit, spawn, eventually):
    store = await kit.store(arena_bytes=65536 * 8, disk_bytes=0, lease_ttl_s=0.3)
    writer = await spawn("writer", store.mesh.self_info.grpc_address)
    assert await writer.hear() == "reserved"
    assert store.core.audit().reserved == 2 * 65536
    writer.signal(signal.SIGSTOP)
    await writer.stopped()
    await eventually(lambda: store.core.audit().reserved == 0)
    assert store.core.audit().quarantined == 2 * 65536

    # Others use every slot that is left, and the very names that the writer wanted.
    client = kit.client(LAYOUT)
    blocks = [block_of(n) for n in range(8)]
    assert await client.put(blocks) == 6
    refs = await client.match([b[0] for b in blocks])
    assert len(refs) == 6
    writer.say("go")
    writer.signal(signal.SIGCONT)

    assert await writer.hear() == "scribbled"
    assert await writer.hear() == "stale_incarnation"
    assert [bytes(r.data) for r in refs] == [b[3] for b in blocks[:6]]
    assert store.core.audit().quarantined == 2 * 65536  # it is alive and may scribble again
    await writer.end()
    await eventually(lambda: store.core.audit().quarantined == 0)
    assert await client.put(blocks[6:]) == 2
    again = await client.match([b[0] for b in blocks])
    assert [bytes(r.data) for r in again] == [b[3] for b in blocks]
    assert store.core.audit().num_leaked == 0


async def test_a_reader_that_wakes_after_its_lease_still_reads_what_it_matched(kit, spawn, eventually):
    store = await kit.store(arena_bytes=65536 * 8, disk_bytes=0, lease_ttl_s=0.3)
    client = kit.client(LAYOUT)
    await client.put([block_of(n) for n in range(3)])
    reader = await spawn("reader", store.mesh.self_info.grpc_address)
    assert await reader.hear() == 3
    assert store.core.audit().pinned == 3 * 65536
    reader.signal(signal.SIGSTOP)
    await reader.stopped()
    await eventually(lambda: store.core.audit().pinned == 0)

    for start in range(10, 60, 5):
        assert await client.put([block_of(n) for n in range(start, start + 5)]) == 5
    reader.say("go")
    reader.signal(signal.SIGCONT)
    assert await reader.hear() == [True, True, True]
    await eventually(lambda: not store.core.quarantines)  # it released them
    reader.say("go")
    assert await reader.hear() == 3  # and matches them with a new lease


@pytest.mark.parametrize("role", ["writer", "reader"])
async def test_a_killed_client_gives_its_bytes_back_within_5_s(kit, spawn, eventually, role):
    store = await kit.store(arena_bytes=65536 * 8, disk_bytes=0, lease_ttl_s=60.0)
    client = kit.client(LAYOUT)
    first = 0 if role == "reader" else 100  # the writer wants to write blocks that are not there
    await client.put([block_of(n) for n in range(first, first + 3)])
    baseline = store.core.audit()
    child = await spawn(role, store.mesh.self_info.grpc_address)
    await child.hear()
    assert store.core.audit() != baseline
    child.signal(signal.SIGKILL)

    await eventually(lambda: store.core.audit() == baseline, timeout_s=5.0)


async def test_after_kill_9_while_writing_to_disk_only_whole_blocks_come_back(kit, spawn, tmp_path):
    rng = random.Random(11)
    num_back = 0
    for round_number in range(3):
        child = await spawn("store", str(tmp_path))
        address = await child.hear()
        kit.bus.table["kv-1"] = kit.bus.seen["kv-1"] = wire_info(kit, address)
        client = kit.client(LAYOUT, strict=False, holder=f"h{round_number}")
        killer = asyncio.get_running_loop().call_later(0.1 + rng.random() / 3, child.signal, signal.SIGKILL)
        number = 0
        while child.process.returncode is None:  # names repeat: evicted ones are written again
            start = 10_000 * round_number + number % 160
            if await client.put([block_of(n) for n in range(start, start + 8)]) < 8:
                break
            number += 8
        killer.cancel()
        await client.close()
        await child.end()
        del kit.bus.table["kv-1"]
        assert any((tmp_path / "arena").iterdir())

        store = await kit.store(arena_dir=tmp_path / "arena", disk_dir=tmp_path / "disk", arena_bytes=65536 * 4, disk_bytes=65536 * 64)
        assert len(list((tmp_path / "arena").iterdir())) == 1  # the dead one's arena is gone
        reader = kit.client(LAYOUT, holder="reader")
        for n in range(10_000 * round_number, 10_000 * round_number + 160):
            refs = await reader.match([block_of(n)[0]])
            assert all(bytes(r.data) == block_of(n)[3] for r in refs)
            num_back += len(refs)
            await reader.release(refs)
        assert store.core.audit().num_leaked == 0
        await reader.close()
        await store.stop()
    assert num_back > 0


def wire_info(kit, address):
    from plugmesh.mesh.hostid import host_id
    from plugmesh.types import InstanceInfo

    return InstanceInfo("kvstore", "kv-1", address, address, host_id(), 1)


# --- the processes ------------------------------------------------------------------------------------------------


def tell(value):
    print(json.dumps(value), flush=True)


async def be_writer(address):
    """Reserves two slots, waits, writes garbage into them and commits it as if nothing had happened."""
    from plugmesh.kv.attachment import Attachment
    from plugmesh.kv.pieces import checksum
    from plugmesh.mesh.hostid import host_id
    from plugmesh.types import InstanceInfo
    from plugmesh_proto.v1 import kvstore_pb2 as pb
    from plugmesh_proto.v1 import kvstore_pb2_grpc

    stub = kvstore_pb2_grpc.KvStoreStub(grpc.aio.insecure_channel(address))
    reply = await stub.Attach(pb.AttachRequest(layout=wire.layout_to_pb(LAYOUT), holder="w", incarnation="1", host=host_id()))
    attachment = Attachment(reply, InstanceInfo("kvstore", "kv-1", "", address, "", 1))
    await attachment.map_arena(reply)
    ids = [block_of(n)[0] for n in range(2)]
    slots = (await stub.Reserve(pb.ReserveRequest(lease_id=reply.lease_id, block_ids=ids))).slots
    tell("reserved")
    await asyncio.to_thread(sys.stdin.readline)
    garbage = b"\xee" * LAYOUT.block_bytes
    for slot in slots:
        attachment.write(slot, len(garbage))[:] = garbage
    tell("scribbled")
    request = pb.CommitRequest(lease_id=reply.lease_id)
    for block_id, slot in zip(ids, slots, strict=True):
        request.blocks.add(block_id=block_id, slot=slot, checksum=checksum(garbage), num_tokens=16, num_bytes=len(garbage))
    try:
        tell((await stub.Commit(request)).num_committed)
    except grpc.aio.AioRpcError as e:
        tell(wire.error_from_rpc(e).code)
    await asyncio.to_thread(sys.stdin.readline)


async def be_reader(address):
    """Matches three blocks, waits, says whether they still hold what they should, then matches again."""
    from conftest import Bus, FakeMesh

    from plugmesh.kv import KvClient

    mesh = FakeMesh(Bus())
    mesh.bus.table["kv-1"] = mesh.bus.seen["kv-1"] = wire_info(None, address)
    client = KvClient(mesh, LAYOUT, holder="r", incarnation="1")
    blocks = [block_of(n) for n in range(3)]
    refs = await client.match([b[0] for b in blocks])
    tell(len(refs))
    await asyncio.to_thread(sys.stdin.readline)
    tell([bytes(r.data) == b[3] for r, b in zip(refs, blocks, strict=True)])
    await client.release(refs)
    await asyncio.to_thread(sys.stdin.readline)
    tell(len(await client.match([b[0] for b in blocks])))
    await asyncio.to_thread(sys.stdin.readline)


async def be_store(folder):
    from conftest import Kit

    path = pathlib.Path(folder)
    kit = Kit(path)
    store = await kit.store(
        arena_dir=path / "arena", disk_dir=path / "disk", arena_bytes=65536 * 16, disk_bytes=65536 * 64,
        segment_bytes=65536 * 8, spill_above=0.0,
    )
    tell(store.mesh.self_info.grpc_address)
    await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    import structlog

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    asyncio.run({"writer": be_writer, "reader": be_reader, "store": be_store}[sys.argv[1]](sys.argv[2]))
