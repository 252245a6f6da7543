"""How long a swap of weights keeps running streams waiting: `python -m plugmesh_decode.bench_swap [--streams 16] [--swaps 8] [--json out.json]`.

A whole mesh as child processes, the default model, and as many streams as asked for that never pause. Two versions are published from it, and the decode instance
goes back and forth between them in every mode. `small` differs from the model in its norms alone; `bfloat16` has every matrix in bfloat16, as a trainer would give
it. Per mode: the engine's own pause (`SwapWeightsReply.pause_ms`, bound: 100 ms), and what a client sees, the longest gap between two tokens of a stream between
the request to swap and its answer, beside the same without swaps. Loading runs beside the steps on the same cores, so its share shows in the gaps, not in the
pause. The floor of loading is a copy of the weights' bytes at the speed that this machine copies memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
import uuid
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from plugmesh import logs, models
from plugmesh.client import weights
from plugmesh.testing.cluster import running
from plugmesh.types import SamplingParams
from plugmesh.wire import error_from_pb, sampling_to_pb
from plugmesh_proto.v1 import decode_pb2 as pb
from plugmesh_proto.v1 import decode_pb2_grpc, weightstore_pb2, weightstore_pb2_grpc

BOUND_MS = 100.0
PROMPT_TOKENS, MAX_TOKENS = 64, 48
MODES = {"continue": pb.SwapWeightsRequest.CONTINUE, "abort": pb.SwapWeightsRequest.ABORT, "finish": pb.SwapWeightsRequest.FINISH}


class Streams:
    """Callers that ask again as soon as an answer ended. `gaps` are (end of the gap, its length) in seconds, of one stream's consecutive tokens and from its
    request to its first."""

    def __init__(self, stub: decode_pb2_grpc.DecodeStub, num: int) -> None:
        self._stub = stub
        self.gaps: list[tuple[float, float]] = []
        self.num_done = self.num_tokens = 0
        self._tasks = [asyncio.create_task(self._run(i)) for i in range(num)]

    async def _run(self, number: int) -> None:
        rng = np.random.default_rng(number)
        while True:
            sampling = SamplingParams(max_tokens=MAX_TOKENS - number % 16, temperature=0.0, ignore_eos=True)
            ids = rng.integers(100, 40000, PROMPT_TOKENS).tolist()
            request = pb.GenerateRequest(request_id=uuid.uuid4().hex, token_ids=ids, sampling=sampling_to_pb(sampling), no_prefix_cache=True)
            last, got = time.perf_counter(), 0
            async for frame in self._stub.Generate(request):
                now = time.perf_counter()
                self.gaps.append((now, now - last))
                last = now
                for row in frame.rows:
                    if row.HasField("error"):
                        raise error_from_pb(row.error)
                    got += len(row.tokens)
            if got != sampling.max_tokens:
                raise RuntimeError(f"a stream ended after {got} of {sampling.max_tokens} tokens")
            self.num_done += 1
            self.num_tokens += got

    def check(self) -> None:
        """Raises what ended a stream."""
        for task in self._tasks:
            if task.done():
                task.result()
                raise RuntimeError("a stream ended")

    def longest_ms(self, start: float, end: float) -> float:
        """The longest gap that overlaps a stretch of time."""
        return 1e3 * max((length for at, length in self.gaps if at >= start and at - length <= end), default=0.0)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def copy_floor_ms(num_bytes: int) -> float:
    """Best of five copies of a buffer of this size."""
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


async def publish_both(address: str) -> dict[str, weights.Published]:
    """Norms a little larger; and everything, in bfloat16."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = weightstore_pb2_grpc.WeightStoreStub(channel)
        manifest = await stub.Resolve(weightstore_pb2.ResolveRequest(format="bfloat16"), timeout=300)
        norms, every = {}, {}
        for t in manifest.tensors:
            bits = np.fromfile(t.path, np.uint16, t.num_bytes // 2, offset=t.offset).reshape(tuple(t.shape))
            every[t.name] = bits
            if len(t.shape) == 1:
                norms[t.name] = (bits.astype(np.uint32) << 16).view(np.float32) * np.float32(1.001)
        found = {
            "small": await weights.publish(address, "bench-small", norms, base_version=manifest.version),
            "bfloat16": await weights.publish(address, "bench-bfloat16", every, base_version=manifest.version, full=True),
        }
        for published in found.values():  # packed now: a swap after this one finds the form
            await stub.Resolve(weightstore_pb2.ResolveRequest(model=published.version, format="native"), timeout=600)
        found["base"] = weights.Published("", manifest.version, 0, 0, 0, 0, ())
        return found


async def measure(decode: str, store: str, num_streams: int, num_swaps: int) -> list[dict[str, Any]]:
    began = time.perf_counter()
    versions = await publish_both(store)
    publish_s = time.perf_counter() - began
    rows: list[dict[str, Any]] = []
    async with grpc.aio.insecure_channel(decode) as channel:
        stub = decode_pb2_grpc.DecodeStub(channel)
        for kind in ("small", "bfloat16"):
            await stub.SwapWeights(pb.SwapWeightsRequest(version=versions["base"].version), timeout=300)
            streams, is_base = Streams(stub, num_streams), True
            try:
                await asyncio.sleep(2.0)
                start = time.perf_counter()
                await asyncio.sleep(4.0)
                quiet = sorted(length for at, length in streams.gaps if at >= start)
                quiet_ms = {"gap_p50_ms": 1e3 * statistics.median(quiet), "gap_max_ms": 1e3 * quiet[-1]}
                for name, mode in MODES.items():
                    replies, gaps = [], []
                    for _ in range(num_swaps):
                        is_base = not is_base
                        target = versions["base" if is_base else kind].version
                        start = time.perf_counter()
                        reply = await stub.SwapWeights(pb.SwapWeightsRequest(version=target, mode=mode, timeout_s=60), timeout=120)
                        end = time.perf_counter()
                        await asyncio.sleep(0.7)
                        streams.check()
                        if reply.new_version != target or reply.old_version == target:
                            raise RuntimeError("the swap did not happen")
                        replies.append(reply)
                        gaps.append(streams.longest_ms(start, end + 0.5))
                    pauses = sorted(r.pause_ms for r in replies)
                    num_bytes = max(r.num_bytes for r in replies)
                    rows.append({
                        "weights": kind, "mode": name, "num_swaps": len(replies), "num_streams": num_streams, "pause_p50_ms": statistics.median(pauses),
                        "pause_max_ms": pauses[-1], "gap_p50_ms": statistics.median(gaps), "gap_max_ms": max(gaps), "quiet_gap_p50_ms": quiet_ms["gap_p50_ms"],
                        "quiet_gap_max_ms": quiet_ms["gap_max_ms"], "load_p50_ms": statistics.median(r.load_ms for r in replies), "num_bytes": num_bytes,
                        "copy_floor_ms": copy_floor_ms(num_bytes), "num_running": max(r.num_running for r in replies),
                        "published_bytes": versions[kind].sent_bytes, "publish_both_s": publish_s, "num_requests_done": streams.num_done,
                    })  # fmt: skip
            finally:
                await streams.close()
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    grid = Table(title=f"Swap of weights under {rows[0]['num_streams']} streams, bound of the pause {BOUND_MS:g} ms")
    for heading in ("weights", "mode", "MB", "pause p50", "max", "longest gap p50", "max", "without swap p50", "max", "load", "floor of load"):
        grid.add_column(heading, justify="left" if heading in ("weights", "mode") else "right")
    for r in rows:
        grid.add_row(
            r["weights"], r["mode"], f"{r['num_bytes'] / 1e6:.0f}", f"{r['pause_p50_ms']:.2f}", f"{r['pause_max_ms']:.2f}", f"{r['gap_p50_ms']:.0f}",
            f"{r['gap_max_ms']:.0f}", f"{r['quiet_gap_p50_ms']:.0f}", f"{r['quiet_gap_max_ms']:.0f}", f"{r['load_p50_ms']:.0f}", f"{r['copy_floor_ms']:.0f}",
        )  # fmt: skip
    console.print(grid)
    console.print("milliseconds; a gap is a client's, from token to token or from request to first token; finish counts the wait of queued requests as gaps")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the pause of a swap of weights.")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--swaps", type=int, default=8, help="per kind of weights and mode")
    parser.add_argument("--threads", type=int, default=0, help="of the executor; 0: one per core")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    logs.configure("error")
    path = models.find(args.model)
    if path is None:
        print(f"{args.model} is not on this machine; plugmesh pull fetches it", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="plugmesh-bench-swap-") as folder, contextlib.ExitStack() as stack:
        config = {
            "mesh": {"model": str(path)},
            "services": {"decode": {"use_kvstore": False, "num_threads": args.threads, "max_num_sequences": max(64, args.streams)}, "prefill": {"replicas": 0}},
        }
        mesh = stack.enter_context(running(pathlib.Path(folder), config))
        decode, store = (mesh.instances(role)[0]["grpc_address"] for role in ("decode", "weightstore"))
        rows = asyncio.run(measure(decode, store, args.streams, args.swaps))
    show(rows, Console(width=150))
    if args.json:
        facts = {"machine": platform.processor() or platform.machine(), "num_cpus": os.cpu_count(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if all(r["pause_max_ms"] < BOUND_MS for r in rows) else 2


if __name__ == "__main__":
    sys.exit(main())
