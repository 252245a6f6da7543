"""Gaps between tokens of running streams while long prompts arrive: split pools against one co-located instance.

    python -m plugmesh_splitwise.bench [--rounds 3] [--json FILE]

Starts two real meshes on the default model, one thread per engine, and runs the same work on them in turn: four streams decode
while prompts of about 2,000 tokens arrive one after another. "co-located" computes every prompt in the decode instance, whole;
"split" sends it to the prefill instance. Both have the same processes, so the split mesh uses a second core where the
co-located one leaves it idle: the comparison is of interference, not of throughput per core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import httpx

from plugmesh.testing.cluster import Cluster, running

NUM_STREAMS, NUM_PROMPTS, PROMPT_WORDS = 4, 3, 500


def config(*, split: bool) -> dict[str, Any]:
    engine: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 512, "num_threads": 1, "max_tokens_per_step": 8192}
    prefill = {**engine, "max_tokens_per_step": 128}
    if not split:
        return {"services": {"decode": {**engine, "remote_prefill_min_tokens": 1 << 20}, "prefill": prefill}}
    names = ["splitwise"]
    return {
        "services": {"gateway": {"plugins": names}, "decode": engine, "prefill": {**prefill, "plugins": names}},
        "plugins": {"splitwise": {"mixed_threshold_tokens": 1 << 20}},
    }


async def _stream(client: httpx.AsyncClient, prompt: str, num_tokens: int, times: list[float]) -> None:
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    async with client.stream("POST", "/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())


async def measure(cluster: Cluster, round_: int) -> dict[str, float]:
    """One round on one mesh; milliseconds."""
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=300) as client:
        times: list[list[float]] = [[] for _ in range(NUM_STREAMS)]
        tasks = [asyncio.create_task(_stream(client, f"Story {round_} {i}: once", 4000, t)) for i, t in enumerate(times)]
        while min(len(t) for t in times) < 20:  # noqa: ASYNC110  polled on purpose: an event per token would be work in the measured loop
            await asyncio.sleep(0.02)
        quiet_from = time.perf_counter()
        await asyncio.sleep(2.0)
        busy_from = time.perf_counter()
        ttft = []
        for p in range(NUM_PROMPTS):
            first: list[float] = []
            started = time.perf_counter()
            await _stream(client, f"{round_} {p} " + " ".join(f"w{(i * 7919 + p) % 997}" for i in range(PROMPT_WORDS)), 2, first)
            ttft.append(1000 * (first[0] - started))
        busy_to = time.perf_counter()
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)

    def gaps(start: float, end: float) -> list[float]:
        return sorted(1000 * (b - a) for t in times for a, b in itertools.pairwise(t) if start <= b <= end)

    quiet, busy = gaps(quiet_from, busy_from), gaps(busy_from, busy_to)
    num_tokens = sum(1 for t in times for x in t if busy_from <= x <= busy_to)
    return {
        "quiet_p50_ms": quiet[len(quiet) // 2], "quiet_p99_ms": quiet[int(len(quiet) * 0.99)],
        "busy_p50_ms": busy[len(busy) // 2], "busy_p99_ms": busy[int(len(busy) * 0.99)], "busy_max_ms": busy[-1],
        "ttft_ms": statistics.median(ttft), "tokens_per_s": num_tokens / (busy_to - busy_from),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"co-located": [], "split": []}
    with contextlib.ExitStack() as stack:
        meshes = {}
        for name in results:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            meshes[name] = stack.enter_context(running(folder, config(split=name == "split")))
        for round_ in range(args.rounds):
            for name, cluster in meshes.items():
                results[name].append(asyncio.run(measure(cluster, round_)))
                print(name, {k: round(v, 1) for k, v in results[name][-1].items()}, flush=True)
    medians = {n: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for n, rows in results.items()}
    for key in medians["split"]:
        print(f"{key:14} co-located {medians['co-located'][key]:9.1f}   split {medians['split'][key]:9.1f}   ratio {medians['co-located'][key] / medians['split'][key]:.2f}")
    if args.json:
        args.json.write_text(json.dumps({"rounds": results, "medians": medians}, indent=1))


if __name__ == "__main__":
    main()
