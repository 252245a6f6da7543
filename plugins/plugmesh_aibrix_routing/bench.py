"""Routing policies over two decode instances at equal load: cached tokens, time to the first token, tokens per second.

    python -m plugmesh_aibrix_routing.bench [--rounds 3] [--requests 120] [--rate 2.5] [--json FILE]

Starts one real mesh on the default model with two decode instances of one thread each, and one more gateway per policy on the
same broker; they are used in turn. Every run of a round sends the same requests at the same (Poisson) times, with token ids
shifted so that no run finds what another one left in the caches. Workloads:

    tenants    20 system prompts with Zipf popularity, each request one of them plus an end of its own
    one        one system prompt for all: what a policy that only looks at prefixes overloads one instance with
    none       nothing is shared: what the policy costs where it cannot help

Each instance's cache holds about two thirds of the tenants' prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import logging
import pathlib
import random
import statistics
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import structlog

from plugmesh.bench.http_client import DIALECTS, Client
from plugmesh.bench.load import open_loop
from plugmesh.bench.metrics import summary
from plugmesh.bench.rounds import describe_machine
from plugmesh.bench.workloads import Call, Conversation, arrivals
from plugmesh.supervisor.plan import free_port
from plugmesh.testing.cluster import Cluster, running, wait_until

NUM_TENANTS, PREFIX, OWN, OUT = 20, 512, 32, 16
NUM_BLOCKS = 448                   # per instance: the tenants' prompts need 640, beside those of running sequences
IDS, SHIFT = range(1000, 40_000), 1_777
POLICIES: dict[str, dict[str, Any]] = {
    "core": {},                    # the gateway's own router: fewest pending tokens
    "random": {"policy": "random"},
    "round-robin": {"policy": "round-robin"},
    "least-request": {"policy": "least-request"},
    "prefix-cache": {"policy": "prefix-cache"},
    "prefix-even": {"policy": "prefix-cache", "imbalance_requests": 2},
    "prefix-only": {"policy": "prefix-cache", "imbalance_requests": 1 << 20, "load_sigma": 1e9},
}
WORKLOADS = ("tenants", "one", "none")
FIGURES = ("hit_rate", "ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms", "output_tok_s", "busiest_share")


def make(workload: str, num: int, seed: int) -> list[Conversation]:
    """The requests of one run, the same for every policy but for the ids."""
    rng = random.Random(f"{workload} {seed}")
    num_prefixes = {"tenants": NUM_TENANTS, "one": 1, "none": num}[workload]
    prefixes = [rng.choices(IDS, k=PREFIX) for _ in range(num_prefixes)]
    weights = [1 / (i + 1) for i in range(num_prefixes)]
    chosen = range(num) if workload == "none" else rng.choices(range(num_prefixes), weights, k=num)
    return [(Call(tuple(prefixes[c] + rng.choices(IDS, k=OWN)), OUT),) for c in chosen]


def shifted(conversations: Sequence[Conversation], by: int) -> list[Conversation]:
    """The same requests with every id moved within the range, so that they share nothing with the unmoved ones."""
    move = {i: IDS[(i - IDS.start + by) % len(IDS)] for i in IDS}
    return [tuple(Call(tuple(move[i] for i in c.prompt), c.max_tokens) for c in conversation) for conversation in conversations]


def config(settings: Mapping[str, Any], port: int = 0) -> dict[str, Any]:
    decode = {"replicas": 2, "num_threads": 1, "num_kv_blocks": NUM_BLOCKS, "max_tokens_per_step": 256, "use_kvstore": False}
    gateway: dict[str, Any] = {"port": port}
    tables: dict[str, Any] = {"services": {"decode": decode, "prefill": {"replicas": 0}, "kvstore": {"replicas": 0}, "gateway": gateway}}
    if settings:
        gateway["plugins"] = ["aibrix_routing"]
        tables["plugins"] = {"aibrix_routing": dict(settings)}
    return tables


@contextlib.contextmanager
def gateway_of(cluster: Cluster, name: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """One more gateway on the mesh's broker; gives its address."""
    port = free_port("127.0.0.1")
    (cluster.folder / name).mkdir()
    Cluster(cluster.folder / name, config(settings, port))  # writes the file
    served = cluster.command("serve", "gateway", "--config", str(cluster.folder / name / "mesh.toml"))

    assert served.stdout is not None
    lines: collections.deque[bytes] = collections.deque(maxlen=40)
    threading.Thread(target=lines.extend, args=(served.stdout,), daemon=True).start()  # a full pipe would stop the gateway
    state = ""

    def is_up() -> bool:
        nonlocal state
        assert served.poll() is None, b"".join(lines).decode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                return int(response.status) == 200
        except OSError as e:
            state = f"{e} {e.read().decode() if isinstance(e, urllib.error.HTTPError) else ''}"
            return False

    try:
        wait_until(is_up, 60, lambda: f"gateway {name}: {state}")
        yield f"http://127.0.0.1:{port}"
    finally:
        served.terminate()
        served.wait(30)


async def measure(url: str, conversations: list[Conversation], rate: float, seed: int) -> dict[str, Any]:
    client = Client(url, "smollm2", DIALECTS["plugmesh"])
    try:
        run = await open_loop(client, conversations, arrivals(rate, seed))
    finally:
        client.close()
    figures = summary(run)
    ttft = figures["ttft_ms"] or {}
    return {
        "hit_rate": (figures["num_cached_tokens"] or 0) / max(1, figures["num_prompt_tokens"]), "ttft_mean_ms": ttft.get("mean"),
        "ttft_p50_ms": ttft.get("p50"), "ttft_p99_ms": ttft.get("p99"), "output_tok_s": figures["output_tok_s"], "num_failed": figures["num_failed"],
        "num_inexact": figures["num_inexact"], "errors": figures["errors"],
    }  # fmt: skip


def prefills(cluster: Cluster) -> list[float]:
    return [cluster.metric(i, "plugmesh_decode_prefills_total") for i in cluster.instances("decode")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--rate", type=float, default=2.5, help="requests per second")
    parser.add_argument("--policies", nargs="+", default=["core", "random", "round-robin", "prefix-cache", "prefix-even"], choices=list(POLICIES))
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {w: {p: [] for p in args.policies} for w in args.workloads}
    machine = describe_machine()
    shifts = itertools.count(1)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(running(folder, config({})))
        urls = {p: stack.enter_context(gateway_of(cluster, p, POLICIES[p])) for p in args.policies}
        asyncio.run(measure(urls[args.policies[0]], make("none", 16, -1), 8.0, 0))  # first steps touch memory
        for round_ in range(args.rounds):
            for workload in args.workloads:
                base = make(workload, args.requests, round_)
                order = args.policies[round_ % len(args.policies) :] + args.policies[: round_ % len(args.policies)]
                for policy in order:
                    before = prefills(cluster)
                    found = asyncio.run(measure(urls[policy], shifted(base, next(shifts) * SHIFT), args.rate, round_))
                    after = [b - a for a, b in zip(before, prefills(cluster), strict=True)]
                    found["busiest_share"] = max(after) / max(1.0, sum(after))
                    results[workload][policy].append(found)
                    print(f"{round_ + 1} {workload:8} {policy:14}", {k: round(v, 2) for k, v in found.items() if isinstance(v, float)}, *found["errors"], flush=True)
    medians = {w: {p: {f: statistics.median(r[f] for r in runs) for f in FIGURES} for p, runs in of.items()} for w, of in results.items()}
    for workload, of in medians.items():
        print(f"\n{workload:15}{'hit rate':>10}{'TTFT mean':>12}{'p50':>10}{'p99':>10} ms{'tokens/s':>10}{'busiest':>9}")
        for policy, m in of.items():
            print(
                f"{policy:15}{m['hit_rate']:10.1%}{m['ttft_mean_ms']:12.1f}{m['ttft_p50_ms']:10.1f}{m['ttft_p99_ms']:10.1f}   {m['output_tok_s']:10.1f}"
                f"{m['busiest_share']:9.0%}"
            )
    if args.json:
        plan = {"requests": args.requests, "rate": args.rate, "rounds": args.rounds, "policies": {p: POLICIES[p] for p in args.policies}}
        args.json.write_text(json.dumps({"machine": machine, "plan": plan, "rounds": results, "medians": medians}, indent=1))
    return int(any(r["num_failed"] or r["num_inexact"] for of in results.values() for runs in of.values() for r in runs))


if __name__ == "__main__":
    sys.exit(main())
