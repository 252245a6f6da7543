"""How fast 1,000 tokens of SmolLM2's KV go in and out; prints figures (`-m slow -s`)."""

from __future__ import annotations

import statistics
import time

import pytest

from plugmesh.types import BLOCK_TOKENS, KvLayout

SMOLLM2 = [KvLayout("smollm2", "raw", dtype, 30, 3, 64, BLOCK_TOKENS, 2 * 30 * 3 * 64 * 16 * size) for dtype, size in (("float32", 4), ("bfloat16", 2))]


@pytest.mark.slow
@pytest.mark.parametrize("layout", SMOLLM2, ids=lambda x: x.dtype)
async def test_throughput_of_a_prompt(kit, layout, make_blocks):
    await kit.store(arena_bytes=256 << 20, disk_bytes=0, lease_ttl_s=10.0)
    blocks = make_blocks(layout, 63)  # 1,008 tokens
    megabytes = 63 * layout.block_bytes / 1e6
    for name, arena in (("arena", True), ("grpc", False)):
        client = kit.client(layout, holder=name, allow_arena=arena)
        await client.match([blocks[0][0]])
        puts, reads = [], []
        for seed in range(7):
            chain = [(bytes([seed, arena]) + i[2:], p, n, d) for i, p, n, d in blocks]
            ids = [b[0] for b in chain]
            began = time.perf_counter()
            assert await client.put(chain) == 63
            puts.append(time.perf_counter() - began)
            began = time.perf_counter()
            refs = await client.match(ids)
            data = [bytes(r.data) for r in refs]
            reads.append(time.perf_counter() - began)
            assert data == [b[3] for b in blocks]
            del data
            await client.release(refs)
        for label, pick in (("median", statistics.median), ("best", min)):
            put_s, read_s = pick(puts[1:]), pick(reads[1:])
            print(
                f"\n{layout.dtype} {name} {label} of 6: {megabytes:.1f} MB  put {megabytes / put_s:.0f} MB/s ({put_s * 1e3:.1f} ms)"
                f"  match+read {megabytes / read_s:.0f} MB/s ({read_s * 1e3:.1f} ms)"
                f"  all {megabytes / (put_s + read_s):.0f} MB/s"
            )
        await client.close()
