"""The interleaved comparison: in every round every system does the same work once, in turns, so that a slow minute hits all of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import os
import pathlib
import platform
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from plugmesh import __version__
from plugmesh.bench import measures as m
from plugmesh.bench.measures import Measure
from plugmesh.bench.metrics import Objectives, Run, summary
from plugmesh.bench.systems import System, started
from plugmesh.errors import PlugmeshError

SCHEMA = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What the comparison tells while it runs."""

    say: Callable[[str], None] = lambda text: None
    begin: Callable[[int], None] = lambda num_runs: None
    done: Callable[[str], None] = lambda text: None


def seed_of(measure: Measure, seed: int, number: int) -> int:
    """Of a measure's prompts in a round. With one stream of random numbers for all measures, prompts would begin like those of an earlier one, and caches find them."""
    return (seed * 1_000_003 + number + 1) << 32 | zlib.crc32(measure.name.encode())


async def run_rounds(
    systems: Sequence[System], chosen: Sequence[Measure], *, num_rounds: int, seed: int, kind: str, progress: Progress | None = None,
    pause_s: float = 0.0, bandwidth: bool = True, warm_up: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Starts the systems, runs the rounds, stops the systems; returns the whole report as plain data.

    A system that cannot be started, or fails in a run, is in the report with its reason; the others go on. One unmeasured run per system and
    measure comes first, because first runs compile, touch memory and fill caches.

    Args:
        seed: Every round has prompts of its own, which are the same for every system.
        pause_s: Rest between runs, for machines whose clock depends on their heat.
    """
    progress = progress or Progress()
    results: dict[str, dict[str, dict[int, Any]]] = {x.name: {} for x in chosen}
    failures: list[dict[str, str]] = []
    machine = describe_machine()
    if bandwidth:
        progress.say("measuring memory bandwidth")
        machine["memory_read_gb_s"] = await asyncio.to_thread(memory_bandwidth_gb_s)
    async with started(systems, progress.say) as (facts, missing):
        running = [s for s in systems if s.name in facts]
        jobs = [(x, s) for x in chosen for s in running if not x.systems or s.name in x.systems]
        num_of = {x.name: min(num_rounds, x.max_rounds or num_rounds) for x in chosen}
        progress.begin(sum(num_of[x.name] + warm_up for x, _ in jobs))
        dead: set[tuple[str, str]] = set()
        for number in range(-1 if warm_up else 0, num_rounds):
            for measure in chosen:
                if number >= num_of[measure.name]:
                    continue
                conversations = measure.build(seed_of(measure, seed, number))
                turn = [s for x, s in jobs if x is measure]
                shift = (number + 1) % max(1, len(turn))  # who is first changes, so that nobody always follows the same neighbour
                for system in [*turn[shift:], *turn[:shift]]:
                    if (measure.name, system.name) in dead:
                        progress.done("")
                        continue
                    progress.say(f"{'warm-up' if number < 0 else f'round {number + 1} of {num_of[measure.name]}'}: {measure.title}: {system.name}")
                    try:
                        run = await system.run(conversations, measure.streams, measure.profile, use_cache=measure.use_cache)
                    except PlugmeshError as e:
                        dead.add((measure.name, system.name))
                        failures.append({"measure": measure.name, "system": system.name, "reason": e.message})
                    else:
                        note_failures(run, measure.name, system.name, failures)
                        if number >= 0:
                            results[measure.name].setdefault(system.name, {})[number] = summary(run, Objectives())
                    progress.done("")
                    if pause_s:
                        await asyncio.sleep(pause_s)
        memory = {}
        for system in running:
            with contextlib.suppress(PlugmeshError, psutil.Error, OSError):
                memory[system.name] = {part: dataclasses.asdict(used) for part, used in system.memory().items()}
    return report(kind, chosen, systems, results, facts, missing, failures, memory, machine, num_rounds=num_rounds, seed=seed)


def note_failures(run: Run, measure: str, system: str, failures: list[dict[str, str]]) -> None:
    """Adds why a run is no comparison, once per measure and system."""
    bad = next((r.error or "no output" for r in run.records if not r.is_ok), "")
    inexact = next((r for r in run.records if r.is_ok and not r.is_exact), None)
    if not bad and inexact is not None:
        bad = f"asked for {inexact.asked_prompt} + {inexact.asked_out} tokens, usage says {inexact.num_prompt} + {inexact.num_out}"
    if bad and not any(f["measure"] == measure and f["system"] == system for f in failures):
        failures.append({"measure": measure, "system": system, "reason": bad})


def report(
    kind: str, chosen: Sequence[Measure], systems: Sequence[System], results: m.Results, facts: dict[str, Any], missing: dict[str, str],
    failures: list[dict[str, str]], memory: dict[str, Any], machine: dict[str, Any], *, num_rounds: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything as plain data: what `--json` writes, and what the table and the page are made from."""
    lines = [line for line in (m.compare(x, results) for x in m.LINES if x.measure in results) if line]
    out: dict[str, Any] = {
        "schema": SCHEMA, "kind": kind, "plugmesh": __version__, "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["plugmesh", *sys.argv[1:]]), "machine": machine, "num_rounds": num_rounds, "seed": seed,
        "systems": {
            s.name: {"title": s.title, **({"state": "measured", **facts[s.name]} if s.name in facts else {"state": "missing", "reason": missing.get(s.name, "")})}
            for s in systems
        },
        "measures": {
            x.name: {
                "title": x.title, "streams": x.streams,
                "runs": {name: [{"round": r, **figures} for r, figures in sorted(rounds.items())] for name, rounds in results[x.name].items()},
            }
            for x in chosen
        },
        "lines": lines, "memory": memory, "failures": failures,
    }  # fmt: skip
    _add_bandwidth_share(out, results)
    _add_memory_line(out)
    return out


def _add_bandwidth_share(out: dict[str, Any], results: m.Results) -> None:
    """Single-stream decode reads every weight once per token: the share of the measured bandwidth that this is."""
    rate = m.Spread.of(m.by_round(results, "decode_1", "engine", "decode_tok_s").values())
    weights = out["systems"].get("engine", {}).get("weight_bytes")
    bandwidth = out["machine"].get("memory_read_gb_s")
    if rate and weights and bandwidth:
        out["bandwidth_share"] = rate.median * weights / (bandwidth * 1e9)


def _add_memory_line(out: dict[str, Any]) -> None:
    parts = out["memory"].get("mesh", {})
    if "prefill" in parts and "decode" in parts:
        pss, rss = (parts["prefill"][k] + parts["decode"][k] for k in ("pss", "rss"))
        out["memory_line"] = {
            "pss": pss, "rss": rss, "must": m.MEMORY_MUST, "aim": m.MEMORY_AIM, "verdict": m.verdict(pss, m.MEMORY_MUST, m.MEMORY_AIM, at_most=True),
            "verdict_rss": m.verdict(rss, m.MEMORY_MUST, m.MEMORY_AIM, at_most=True),
        }


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge figures, and how busy the machine was when they began."""
    model = platform.processor() or platform.machine()
    flags: list[str] = []
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags" and not flags:
                flags = [f for f in value.split() if f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_vbmi", "amx_int8", "amx_bf16", "avx_vnni")]
    return {
        "cpu": model, "cores": len(os.sched_getaffinity(0)), "features": flags, "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(), "system": f"{platform.system()} {platform.release()}", "load_before": os.getloadavg()[0],
    }  # fmt: skip


def memory_bandwidth_gb_s(num_bytes: int = 1 << 28, repeats: int = 5) -> float | None:
    """Best read bandwidth with a thread per core, in 1e9 bytes/s: each finds the maximum of its own part of an array far beyond the caches.

    None where numpy is missing. A lower bound: a kernel with better prefetching may read faster.
    """
    try:
        import numpy as np
    except ImportError:
        return None
    import concurrent.futures

    num = len(os.sched_getaffinity(0))
    parts = [np.ones(num_bytes // num // 4, np.int32) for _ in range(num)]
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(num) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(np.max, parts))  # vectorised, and without the GIL
            best = max(best, sum(p.nbytes for p in parts) / (time.perf_counter() - began) / 1e9)
    return best
