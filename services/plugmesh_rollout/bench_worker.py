"""One producer or consumer of `plugmesh_rollout.bench`, of this table or of TransferQueue (then with a Python that has it).

    bench_worker.py SYSTEM KIND ARGUMENTS-AS-JSON

Prints "ready", starts at a line on its input, prints "rows milliseconds sum" for every batch; the sum is of the rows' numbers, so that nothing lost or doubled
goes unseen. A consumer goes on until it is ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import numpy as np


def payload(number: int, size: int) -> np.ndarray:
    """Bytes that begin with the row's number."""
    row = _base(size).copy()
    row[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
    return row


_made: dict[int, np.ndarray] = {}


def _base(size: int) -> np.ndarray:
    if size not in _made:
        _made[size] = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    return _made[size]


def number_of(row: Any) -> int:
    return int.from_bytes(bytes(row[:8]), "little")


def say(num: int, began: float, total: int = 0) -> None:
    print(num, f"{(time.perf_counter() - began) * 1e3:.3f}", total, flush=True)


def wait_for_go() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


async def plugmesh(kind: str, a: dict[str, Any]) -> None:
    from plugmesh.client.rollout import RolloutClient, Row

    async with RolloutClient(a["address"], **a.get("client", {})) as client:
        await client.statuses()
        wait_for_go()
        if kind == "produce":
            for start in range(a["first"], a["end"], a["batch"]):
                rows = [Row(str(i), {"payload": payload(i, a["size"])}) for i in range(start, start + a["batch"])]
                began = time.perf_counter()
                await client.put(a["topic"], rows, wait_s=120)
                say(len(rows), began)
            return
        while True:
            began = time.perf_counter()
            batch = await client.get(a["topic"], a["task"], ["payload"], a["batch"], wait_s=30)
            if batch:
                total = sum(number_of(r.fields["payload"]) for r in batch.rows)
                await client.ack(batch)
                say(len(batch), began, total)


def transferqueue(kind: str, a: dict[str, Any]) -> None:
    import ray  # type: ignore[import-not-found]
    import torch
    import transfer_queue  # type: ignore[import-not-found]
    from tensordict import TensorDict  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    ray.init(address=a["address"], log_to_driver=False, logging_level="ERROR")
    transfer_queue.init()
    client = transfer_queue.get_client()
    wait_for_go()
    if kind == "produce":
        for start in range(a["first"], a["end"], a["batch"]):
            rows = torch.from_numpy(np.stack([payload(i, a["size"]) for i in range(start, start + a["batch"])]))
            data = TensorDict({"payload": rows}, batch_size=a["batch"])
            began = time.perf_counter()
            client.put(data=data, partition_id=a["topic"])
            say(a["batch"], began)
        return
    began = time.perf_counter()
    while True:
        meta = client.get_meta(data_fields=["payload"], batch_size=a["batch"], partition_id=a["topic"], mode="fetch", task_name=a["task"])
        if not meta.size:
            time.sleep(0.002)
            continue
        rows = client.get_data(meta)["payload"]
        say(len(rows), began, sum(number_of(r.numpy()) for r in rows))
        began = time.perf_counter()


def transferqueue_head(a: dict[str, Any]) -> None:
    """The cluster, controller and storage units, until the input ends."""
    import ray  # type: ignore[import-not-found]
    import transfer_queue  # type: ignore[import-not-found]
    from omegaconf import OmegaConf  # type: ignore[import-not-found]

    context = ray.init(num_cpus=8, _node_ip_address="127.0.0.1", log_to_driver=False, logging_level="ERROR", include_dashboard=False, object_store_memory=256 << 20)
    transfer_queue.init(OmegaConf.create({"controller": {"polling_mode": True}, "backend": {"SimpleStorage": {"num_data_storage_units": 2}}}))
    print(context.address_info["gcs_address"], flush=True)
    sys.stdin.readline()
    transfer_queue.close()
    ray.shutdown()


if __name__ == "__main__":
    system, what, text = sys.argv[1:]
    if system == "plugmesh":
        asyncio.run(plugmesh(what, json.loads(text)))
    elif what == "head":
        transferqueue_head(json.loads(text))
    else:
        transferqueue(what, json.loads(text))
