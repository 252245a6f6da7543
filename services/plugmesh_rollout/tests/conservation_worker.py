"""A producer or consumer that may be killed at any time; run as a process by test_conservation.

    conservation_worker.py produce ADDRESS NUMBER FIRST END PACE
    conservation_worker.py consume ADDRESS TASK LOGFILE PACE

PACE is how many seconds it works on a batch.
A consumer writes a line before it acknowledges ("try LEASE ID ID ...") and one after ("ack LEASE"); "bad ..." when a value is not what its id says.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import zlib

import numpy as np

from plugmesh.client.rollout import RolloutClient, Row
from plugmesh.errors import StaleIncarnation

NEEDS = {"x": ["payload"], "y": ["payload", "score"], "z": ["score"]}


def payload_of(id: str) -> np.ndarray:
    """Ragged, and empty now and then."""
    seed = zlib.crc32(id.encode())
    return np.random.default_rng(seed).integers(0, 1 << 30, seed % 50, dtype=np.int32)


def score_of(id: str) -> float:
    return zlib.crc32(id.encode()) / 7.0


async def produce(client: RolloutClient, number: str, first: int, end: int, pace: float) -> None:
    """From the beginning, whatever an earlier life of this producer has put."""
    i = first
    while i < end:
        num = min(random.randint(1, 16), end - i)
        ids = [f"p{number}-{j}" for j in range(i, i + num)]
        await client.put("t", [Row(id, {"payload": payload_of(id)}, group=number) for id in ids], wait_s=60)
        i += num
        await asyncio.sleep(pace)


async def consume(client: RolloutClient, task: str, path: str, pace: float) -> None:
    with open(path, "ab", buffering=0) as out:
        while True:
            batch = await client.get("t", task, NEEDS[task], random.randint(1, 16), min_rows=1, lease_s=1.0, wait_s=5.0)
            if not batch:
                continue
            for row in batch.rows:
                good = "payload" not in row.fields or np.array_equal(row.fields["payload"], payload_of(row.id))
                good = good and ("score" not in row.fields or row.fields["score"] == score_of(row.id))
                if not good or set(row.fields) != set(NEEDS[task]):
                    out.write(f"bad {row.id}\n".encode())
            await asyncio.sleep(pace)
            if random.random() < 0.02:
                await asyncio.sleep(1.2)  # too slow: the lease ends
            out.write(f"try {batch.lease_id} {' '.join(r.id for r in batch.rows)}\n".encode())
            try:
                await client.ack(batch, {"score": [score_of(r.id) for r in batch.rows]} if task == "x" else None)
            except StaleIncarnation:
                continue
            out.write(f"ack {batch.lease_id}\n".encode())


async def main() -> None:
    kind, address, *rest = sys.argv[1:]
    random.seed(os.getpid())
    async with RolloutClient(address, retry_s=60.0) as client:
        if kind == "produce":
            await produce(client, rest[0], int(rest[1]), int(rest[2]), float(rest[3]))
        else:
            await consume(client, rest[0], rest[1], float(rest[2]))


if __name__ == "__main__":
    asyncio.run(main())
