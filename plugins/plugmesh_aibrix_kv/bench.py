"""Hit ratios of S3-FIFO against least recently used: `python -m plugmesh_aibrix_kv.bench [--blocks 512] [--requests 20000] [--json FILE]`.

Every workload runs through a real block store (the kvstore's core, with its arena, pins and eviction, without network), once per order, from the same
seeds. Hit ratio: blocks found of blocks asked for, prefixes only, from a cold start. Time: of the processor, per block asked for, the store's own work included, medians
over the seeds; the rest is counted, not timed, and is the same on any machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from plugmesh.config import MeshConfig
from plugmesh.host import PluginHost
from plugmesh.records import EvictionRecord
from plugmesh_aibrix_kv.workloads import WORKLOADS

ORDERS: dict[str, dict[str, Any] | None] = {"lru": None, "s3-fifo": {}, "s3-fifo, promote_hits 2": {"promote_hits": 2}, "s3-fifo, small_share 0.1": {"small_share": 0.1}}


def record(settings: dict[str, Any] | None) -> EvictionRecord | None:
    """As the kvstore gets it: through the host, with checked settings."""
    if settings is None:
        return None
    config = MeshConfig(plugins={"aibrix_kv": settings} if settings else {})
    found: EvictionRecord | None = PluginHost.load(["aibrix_kv"], config, service="kvstore").last("evictions")
    return found


def run(requests: Iterable[Sequence[bytes]], num_blocks: int, settings: dict[str, Any] | None, num_disk_blocks: int = 0) -> Any:
    """One `plugmesh_kvstore.replay.Replay`; by name, since plugins import no service."""
    return importlib.import_module("plugmesh_kvstore.replay").replay(requests, num_blocks, record(settings), num_disk_blocks=num_disk_blocks)


def measure(num_blocks: int, num_requests: int, seeds: Sequence[int], num_disk_blocks: int = 0) -> list[dict[str, Any]]:
    """A row per workload and order. Orders take turns within a seed, so that a machine's drift hits all alike."""
    rows = []
    for workload, make in WORKLOADS.items():
        runs: dict[str, list[Any]] = {name: [] for name in ORDERS}
        for seed in seeds:
            for name, settings in ORDERS.items():
                runs[name].append(run(make(num_blocks, num_requests, seed), num_blocks, settings, num_disk_blocks))
        for name, several in runs.items():
            ratios = [r.hit_ratio for r in several]
            assert not any(r.orders_dropped for r in several)
            rows.append({
                "workload": workload, "order": name, "hit_ratio": statistics.mean(ratios), "lowest": min(ratios), "highest": max(ratios),
                "evicted": sum(r.evicted for r in several) // len(several), "demoted": sum(r.demoted for r in several) // len(several),
                "us_per_block": statistics.median(r.us_per_block for r in several),
            })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| workload | " + " | ".join(ORDERS) + " |", "|---|" + "---|" * len(ORDERS)]
    for workload in dict.fromkeys(r["workload"] for r in rows):
        cells = [f"{r['hit_ratio']:.1%}" for r in rows if r["workload"] == workload]
        lines.append(f"| {workload} | " + " | ".join(cells) + " |")
    times = [statistics.median(r["us_per_block"] for r in rows if r["order"] == name) for name in ORDERS]
    return "\n".join([*lines, "| us per block, median over the workloads | " + " | ".join(f"{t:.1f}" for t in times) + " |"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=512, help="that the arena holds")
    parser.add_argument("--disk-blocks", type=int, default=0, help="that the disk tier holds")
    parser.add_argument("--requests", type=int, default=20_000, help="of a workload, without its scans")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    rows = measure(options.blocks, options.requests, range(options.seeds), options.disk_blocks)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"blocks": options.blocks, "disk_blocks": options.disk_blocks, "requests": options.requests, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
