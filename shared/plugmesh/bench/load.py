"""How a workload is sent: closed loop (a fixed number of streams, each with one request at a time) or open loop (arrival times)."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from plugmesh.bench.metrics import Record, Run
from plugmesh.bench.workloads import Call, Conversation

OnRecord = Callable[[Record], None]


class Sender(Protocol):
    """What the loops need of a client; `http_client.Client` is one."""

    def encode(self, call: Call, *, use_cache: bool = True) -> bytes: ...
    async def connect(self, num: int) -> None: ...
    async def send(self, call: Call, body: bytes, due_s: float = float("nan")) -> Record: ...


async def closed_loop(
    sender: Sender, conversations: Sequence[Conversation], streams: int, *, use_cache: bool = True, on_record: OnRecord = lambda r: None
) -> Run:
    """`streams` callers at once, each taking the next conversation when its last one has ended; the load follows the system's pace."""
    streams = min(streams, len(conversations))
    ready = [[(call, sender.encode(call, use_cache=use_cache)) for call in c] for c in conversations]
    await sender.connect(streams)
    waiting = iter(ready)
    records: list[Record] = []

    async def caller() -> None:
        for conversation in waiting:
            await _converse(sender, conversation, records, on_record)

    return await _timed(lambda: asyncio.gather(*(caller() for _ in range(streams))), records, streams)


async def open_loop(
    sender: Sender, conversations: Sequence[Conversation], arrivals: Iterator[float], *, use_cache: bool = True,
    max_in_flight: int = 1024, on_record: OnRecord = lambda r: None,
) -> Run:  # fmt: skip
    """Each conversation begins at its arrival time whether or not earlier ones have ended; further turns follow their predecessors.

    At `max_in_flight` conversations, arrivals wait: a system that far behind its load has no steady state, and `max_late_ms` shows it.
    """
    ready = [[(call, sender.encode(call, use_cache=use_cache)) for call in c] for c in conversations]
    await sender.connect(min(16, len(ready)))
    slots = asyncio.Semaphore(max_in_flight)
    records: list[Record] = []

    async def one(conversation: list[tuple[Call, bytes]], due: float) -> None:
        try:
            await _converse(sender, conversation, records, on_record, due)
        finally:
            slots.release()

    async def send_all() -> None:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for conversation, at in zip(ready, itertools.islice(arrivals, len(ready)), strict=True):
                due = start + at
                if (left := due - time.perf_counter()) > 0:
                    await asyncio.sleep(left)
                await slots.acquire()
                group.create_task(one(conversation, due))

    return await _timed(send_all, records, 0)


async def _converse(
    sender: Sender, conversation: list[tuple[Call, bytes]], records: list[Record], on_record: OnRecord, due: float = float("nan")
) -> None:
    for call, body in conversation:
        if call.pause_s:
            await asyncio.sleep(call.pause_s)
        record = await sender.send(call, body, due)
        due = float("nan")  # only the first turn has a time of its own
        records.append(record)
        on_record(record)
        if record.error:
            return  # later turns would build on an answer that is not there


async def _timed(work: Callable[[], object], records: list[Record], streams: int) -> Run:
    wall, cpu = time.perf_counter(), time.process_time()
    await work()  # type: ignore[misc] # a coroutine or asyncio.gather's future
    return Run(tuple(records), time.perf_counter() - wall, time.process_time() - cpu, streams)
