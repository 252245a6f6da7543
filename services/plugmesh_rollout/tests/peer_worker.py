"""conservation_worker.py for TransferQueue, run by a Python that has it: the same rows and tasks, as its client's documentation has them used.

    peer_worker.py produce ADDRESS FIRST END LOGFILE PACE
    peer_worker.py consume ADDRESS TASK LOGFILE PACE

It has neither ids nor acknowledgements. A producer therefore writes down what it has put, and a later life of it goes on after that; a consumer writes
"done NUMBER NUMBER ..." when its work on rows is finished, "bad NUMBER" when a value is not what its number says.
"""

from __future__ import annotations

import os
import pathlib
import random
import sys
import time

import ray  # type: ignore[import-not-found]
import torch
import transfer_queue  # type: ignore[import-not-found]
from tensordict import TensorDict  # type: ignore[import-not-found]


def payload_of(number: int) -> torch.Tensor:
    return (torch.arange(32, dtype=torch.int64) * 7919 + number) % 100003


def produce(client: object, first: int, end: int, path: pathlib.Path, pace: float) -> None:
    done = [int(line) for line in path.read_text().split()] if path.exists() else []
    i = max(done, default=first)
    with path.open("ab", buffering=0) as out:
        while i < end:
            numbers = list(range(i, min(i + random.randint(1, 16), end)))
            data = TensorDict({"number": torch.tensor(numbers).reshape(-1, 1), "payload": torch.stack([payload_of(n) for n in numbers])}, batch_size=len(numbers))
            client.put(data=data, partition_id="t")  # type: ignore[attr-defined]
            i += len(numbers)
            out.write(f"{i}\n".encode())
            time.sleep(pace)


def consume(client: object, task: str, path: pathlib.Path, pace: float) -> None:
    with path.open("ab", buffering=0) as out:
        while True:
            size = random.randint(1, 16)
            meta = None
            while size and not (meta and meta.size):  # it gives as many as asked for or none
                meta = client.get_meta(data_fields=["number", "payload"], batch_size=size, partition_id="t", mode="fetch", task_name=task)  # type: ignore[attr-defined]
                size //= 2
            if meta is None or not meta.size:
                time.sleep(0.05)
                continue
            rows = client.get_data(meta)  # type: ignore[attr-defined]
            numbers = [int(n.reshape(-1)[0]) for n in rows["number"].unbind()]  # dense or nested, as it likes
            for number, payload in zip(numbers, rows["payload"].unbind(), strict=True):
                if not torch.equal(payload.reshape(-1), payload_of(number)):
                    out.write(f"bad {number}\n".encode())
            time.sleep(pace)
            out.write(f"done {' '.join(map(str, numbers))}\n".encode())


def main() -> None:
    kind, address, *rest = sys.argv[1:]
    random.seed(os.getpid())
    torch.set_num_threads(1)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    transfer_queue.init()
    client = transfer_queue.get_client()
    if kind == "produce":
        produce(client, int(rest[0]), int(rest[1]), pathlib.Path(rest[2]), float(rest[3]))
    else:
        consume(client, rest[0], pathlib.Path(rest[1]), float(rest[2]))


if __name__ == "__main__":
    main()
