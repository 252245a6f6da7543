"""How fast the table is: rows a second and latencies, 4 producers and 3 tasks of 4 consumers, each in a process of its own.

    python -m plugmesh_rollout.bench
    python -m plugmesh_rollout.bench --peer-python /path/to/python --json out.json     # a Python with the package transferqueue

Every row is put once and taken once by each task; sums of row numbers show that none was lost or doubled. The floor comes first: calls that a batch needs, times
what an empty call costs here, and bytes that cross a socket, over what a socket carries here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import platform
import secrets
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from plugmesh.client.rollout import RolloutClient

WORKER = pathlib.Path(__file__).with_name("bench_worker.py")
PRODUCERS, TASKS, CONSUMERS = 4, ("x", "y", "z"), 4
SIZES = {1 << 10: (8192, 64), 32 << 10: (2048, 32), 1 << 20: (128, 4)}  # bytes of a row: rows, rows of a batch
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
ENV |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # of the peer's cluster, which lives as long as this run
ENV["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # makes Ray listen on loopback only: it takes 127.0.0.1 for "whatever others reach this machine by" otherwise


def start(python: str, *arguments: str) -> subprocess.Popen[str]:
    env = ENV if python == sys.executable else {k: v for k, v in ENV.items() if k != "PYTHONPATH"}  # another Python has packages of its own
    return subprocess.Popen([python, *arguments], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1)


def end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def run(python: str, system: str, address: str, topic: str, size: int, num_rows: int, batch: int, limit_s: float, client: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One run; raises RuntimeError when rows are missing or doubled, or it takes too long."""
    base = {"address": address, "topic": topic, "size": size, "batch": batch, "client": dict(client or {})}
    each = num_rows // PRODUCERS
    jobs: list[tuple[str, dict[str, Any]]] = [("produce", {**base, "first": k * each, "end": (k + 1) * each}) for k in range(PRODUCERS)]
    jobs += [("consume", {**base, "task": task}) for task in TASKS for _ in range(CONSUMERS)]
    workers: list[tuple[str, subprocess.Popen[str]]] = []
    try:
        for kind, arguments in jobs:
            workers.append((arguments.get("task", ""), start(python, str(WORKER), system, kind, json.dumps(arguments))))
        deadline = time.monotonic() + limit_s
        for _, process in workers:
            if _first_line(process, deadline - time.monotonic()) != "ready":
                raise RuntimeError(f"a worker of {system} did not start")
        with selectors.DefaultSelector() as ready:
            for task, process in workers:
                assert process.stdout is not None and process.stdin is not None
                os.set_blocking(process.stdout.fileno(), False)
                ready.register(process.stdout, selectors.EVENT_READ, task)
            began = time.perf_counter()
            for _, process in workers:
                assert process.stdin is not None
                process.stdin.write("go\n")
            return _collect(ready, num_rows, began, limit_s)
    finally:
        for _, process in workers:
            end(process)


def _first_line(process: subprocess.Popen[str], limit_s: float) -> str:
    """What a process says first; "" when it ends or takes too long. It says no second line before it is answered."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline().strip() if ready.select(max(0.0, limit_s)) else ""


def _collect(ready: selectors.BaseSelector, num_rows: int, began: float, limit_s: float) -> dict[str, Any]:
    rows, sums = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0)
    times: dict[str, list[float]] = {"put": [], "get": []}
    left: dict[int, bytes] = {}
    while any(rows[t] < num_rows for t in TASKS):
        if time.perf_counter() - began > limit_s:
            raise RuntimeError(f"not done after {limit_s:g} s: {rows} of {num_rows}")
        for key, _ in ready.select(1.0):
            data = os.read(key.fd, 1 << 16)
            if not data:
                ready.unregister(key.fileobj)
                continue
            *lines, left[key.fd] = (left.get(key.fd, b"") + data).split(b"\n")
            for line in lines:
                num, ms, total = line.split()
                times["get" if key.data else "put"].append(float(ms))
                if key.data:
                    rows[key.data] += int(num)
                    sums[key.data] += int(total)
    took = time.perf_counter() - began
    if set(rows.values()) != {num_rows} or set(sums.values()) != {num_rows * (num_rows - 1) // 2}:
        raise RuntimeError(f"rows were lost or doubled: {rows}, {sums}")
    return {
        "seconds": took, "rows_s": num_rows / took,
        **{f"{k}_ms": {"p50": statistics.median(v), "p99": sorted(v)[int(len(v) * 0.99)]} for k, v in times.items() if v},
    }  # fmt: skip


@contextlib.contextmanager
def table(durability: str) -> Iterator[str]:
    """A table in a process of its own; gives its address."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(sys.executable, "-m", "plugmesh_rollout.alone", "--folder", folder, "--durability", durability, "--memory-bytes", str(4 << 30))
        try:
            address = _first_line(process, 60.0)
            if not address:
                raise RuntimeError("the table did not start")
            yield address
        finally:
            process.terminate()  # it takes its shared memory away
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            end(process)


async def _create(address: str, topic: str) -> None:
    async with RolloutClient(address) as client:
        await client.create_topic(topic, {"payload": "uint8"}, TASKS, capacity_rows=1 << 16, capacity_bytes=1 << 30)


async def _drop(address: str, topic: str) -> None:
    async with RolloutClient(address) as client:
        await client.drop_topic(topic)


async def _empty_call_us(address: str) -> float:
    async with RolloutClient(address) as client:
        await client.create_topic("empty", ["a"], ["x"], capacity_bytes=1 << 20)
        await client.clear("empty")
        began = time.perf_counter()
        for _ in range(2000):
            await client.clear("empty")
        return (time.perf_counter() - began) / 2000 * 1e6


def _socket_bytes_s() -> float:
    """What one connection on loopback carries, sender and receiver in threads."""
    listener = socket.create_server(("127.0.0.1", 0))
    total = 1 << 29

    def send() -> None:
        with socket.create_connection(listener.getsockname()) as s:
            block = bytes(1 << 20)
            for _ in range(total >> 20):
                s.sendall(block)

    thread = threading.Thread(target=send)
    thread.start()
    got, buffer = 0, bytearray(1 << 20)
    with listener, listener.accept()[0] as s:
        began = time.perf_counter()
        while got < total:
            got += s.recv_into(buffer)
        took = time.perf_counter() - began
    thread.join()
    return total / took


@contextlib.contextmanager
def transferqueue(python: str) -> Iterator[str]:
    """A cluster with TransferQueue; gives its address."""
    process = start(python, str(WORKER), "transferqueue", "head", "{}")
    try:
        assert process.stdin is not None
        address = _first_line(process, 300.0)
        if not address:
            raise RuntimeError("TransferQueue did not start")
        yield address
        process.stdin.write("end\n")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    except BaseException:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.terminate()  # Ray's own processes end with it, unlike when it is killed
            process.wait(20)
        raise
    finally:
        end(process)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m plugmesh_rollout.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, one after another in turn; the median counts")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="bytes of a row")
    parser.add_argument("--durability", nargs="+", choices=("none", "batch", "commit"), default=["none", "batch", "commit"])
    parser.add_argument("--without-shared", action="store_true", help="each durability also with values over gRPC")
    parser.add_argument("--peer-python", default="", help="a Python that has the package transferqueue")
    parser.add_argument("--limit-s", type=float, default=300.0, help="for one run")
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    console = Console(width=140)

    with table("none") as address:
        call_us = asyncio.run(_empty_call_us(address))
    bytes_s = _socket_bytes_s()
    console.print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs; an empty call {call_us:.0f} us, a socket {bytes_s / 1e9:.1f} GB/s")
    results: list[dict[str, Any]] = []
    systems: list[tuple[str, str, dict[str, Any]]] = [(f"plugmesh, {d}", d, {}) for d in given.durability]
    systems += [(f"plugmesh, {d}, no shared memory", d, {"shared_bytes": 0}) for d in given.durability if given.without_shared]
    systems += [("transferqueue", "", {})] if given.peer_python else []
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(transferqueue(given.peer_python)) if given.peer_python else ""
        tables = {d: stack.enter_context(table(d)) for d in given.durability}
        for size in given.sizes:
            num_rows, batch = SIZES.get(size, (max(64, min(8192, (128 << 20) // size)) // 64 * 64, 16))
            calls = (1 + 2 * len(TASKS)) / batch
            floor = 1 / max(calls * call_us / 1e6, (1 + len(TASKS)) * size / bytes_s)
            found: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in systems}
            for i in range(given.rounds):
                for k, (name, durability, client) in enumerate(systems):
                    topic = f"{size}-{i}-{k}"
                    if durability:
                        asyncio.run(_create(tables[durability], topic))
                        result = run(sys.executable, "plugmesh", tables[durability], topic, size, num_rows, batch, given.limit_s, client)
                        asyncio.run(_drop(tables[durability], topic))
                    else:
                        result = run(given.peer_python, "transferqueue", cluster, topic, size, num_rows, batch, given.limit_s)
                    found[name].append(result)
                    console.print(f"  {size} bytes, round {i + 1}, {name}: {result['rows_s']:.0f} rows/s")
            for name, runs in found.items():
                middle = sorted(runs, key=lambda r: r["rows_s"])[len(runs) // 2]
                results.append({"size": size, "batch": batch, "num_rows": num_rows, "system": name, "floor_rows_s": floor, "runs": [r["rows_s"] for r in runs], **middle})
    grid = Grid("row bytes", "batch", "system", "rows/s", "range", "MB/s in and out", "put p50 / p99 ms", "get + ack p50 / p99 ms", "one-connection floor")
    for r in results:
        grid.add_row(
            str(r["size"]), str(r["batch"]), r["system"], f"{r['rows_s']:.0f}", f"{min(r['runs']):.0f}-{max(r['runs']):.0f}",
            f"{r['rows_s'] * r['size'] * (1 + len(TASKS)) / 1e6:.0f}", *(f"{r[k]['p50']:.1f} / {r[k]['p99']:.1f}" for k in ("put_ms", "get_ms")),
            f"{r['floor_rows_s']:.0f}",
        )  # fmt: skip
    console.print(grid)
    if given.json:
        given.json.write_text(json.dumps({"call_us": call_us, "socket_bytes_s": bytes_s, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
