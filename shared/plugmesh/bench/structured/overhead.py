"""What a schema costs per output token: the same prompts with and without, equally many tokens, in turns on one engine and through one mesh."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from plugmesh.bench.http_client import DIALECTS, Client
from plugmesh.bench.load import closed_loop
from plugmesh.bench.metrics import Run, Spread, median_interval, percentile, summary
from plugmesh.bench.rounds import Progress
from plugmesh.bench.structured.engines import StructuredEngine, lower
from plugmesh.bench.structured.meshes import StructuredMesh
from plugmesh.bench.structured.suite import Case
from plugmesh.bench.systems import Setting
from plugmesh.bench.workloads import RECORD_SCHEMA, Call, endless
from plugmesh.errors import FailedPrecondition, PlugmeshError
from plugmesh.grammar.spec import GrammarSpec

FREE = "free"
MAX_INCREASE = 3.0  # percent, at the median
_WORDS = ("Vienna", "Paris", "a hospital", "a school", "a bakery", "a ship", "the mountains", "an orchestra", "a museum", "a football club", "an airport", "a farm")

# Neither can end within a run, so that it ends by its number of tokens, as the free one does.
SCHEMAS: dict[str, dict[str, Any]] = {
    "records": endless(RECORD_SCHEMA, 128),
    "strings": endless({"type": "string"}, 128),
}


def prompts_of(seed: int, num: int) -> list[str]:
    """Different ones of about the same length."""
    rng = random.Random(f"structured prompts {seed}")
    return [f"List {rng.randint(10, 99)}: people of {rng.choice(_WORDS)}, as a JSON array of objects with name, age, job and active.\n" for _ in range(num)]


async def run_overhead(
    setting: Setting, engines: Sequence[str], *, num_rounds: int, seed: int, progress: Progress, batches: Mapping[int, int], schemas: Sequence[str] = tuple(SCHEMAS)
) -> dict[str, Any]:
    """On one engine in a process, jump-forward off (it saves passes; here a pass is compared with a pass).

    Args:
        batches: Streams to output tokens of each.
    """
    engine = StructuredEngine(setting, "overhead", engines, jump_forward=False)
    failures: list[dict[str, str]] = []
    try:
        facts = await engine.start()
        sides = await _compiled(engine, engines, schemas, failures)
        measures = [(s, b, t) for s in schemas for b in batches for t in (0.0, 1.0)]
        results: dict[str, Any] = {_name(*m): {} for m in measures}
        progress.begin((num_rounds + 1) * sum(1 + len(sides[s]) for s, _, _ in measures))
        for number in range(-1, num_rounds):
            for schema, batch, temperature in measures:
                turn = [FREE, *sides[schema]]
                shift = number % len(turn)
                for side in turn[shift:] + turn[:shift]:
                    progress.say(f"{'warming up' if number < 0 else f'round {number + 1}'}: {_name(schema, batch, temperature)}, {side}")
                    run, rest = await engine.generate(
                        prompts_of(seed * 1000 + number, batch), batches[batch], grammar=None if side == FREE else [schema, side], temperature=temperature, seed=seed,
                    )  # fmt: skip
                    if number >= 0:
                        results[_name(schema, batch, temperature)].setdefault(side, {})[number] = {**summary(run), "counters": rest["counters"]}
                    progress.done("")
    finally:
        await engine.stop()
    return {"facts": facts, "runs": results, "lines": lines_of(results), "failures": failures + left_out(results)}


def _name(schema: str, batch: int, temperature: float) -> str:
    return f"{schema}, batch {batch}, {'greedy' if temperature == 0 else f'temperature {temperature:g}'}"


async def _compiled(engine: StructuredEngine, engines: Sequence[str], schemas: Sequence[str], failures: list[dict[str, str]]) -> dict[str, list[str]]:
    """Schema to the engines that can enforce it, each having compiled it."""
    lowered = await lower([GrammarSpec("json_schema", json.dumps(SCHEMAS[s])) for s in schemas])
    sides: dict[str, list[str]] = {s: [] for s in schemas}
    for schema, low in zip(schemas, lowered, strict=True):
        for name in engines:
            try:
                if low.error:
                    raise FailedPrecondition(low.error)
                await engine.ask(compile={"name": schema, "engine": name, "candidates": low.candidates})
                sides[schema].append(name)
            except FailedPrecondition as e:
                failures.append({"where": f"{schema}, {name}", "reason": e.message})
    return sides


def lines_of(results: Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """Per measure and engine: milliseconds per token with and without, and the increase in percent, round by round. Runs of other lengths than asked for count not.

    `increase` is of the time per token, the mean over a run's requests: the median one is now and then one whose prompt was read in the last step of prompts, and
    the time of that step, which the others wait for, is then in the figure or not. `interval` is of the median time between two tokens of a run: a neighbour that
    takes the processor for part of a run is in the first and not in the second, and so is what happens at few tokens only. The `between` are where the median over
    the rounds lies.
    """
    found = []
    for measure, sides in results.items():
        free = _tpots(sides.get(FREE, {}))
        for side, rounds in sides.items():
            if side == FREE:
                continue
            ours = _tpots(rounds)
            both = sorted(ours.keys() & free.keys())
            increases = [(ours[r] / free[r] - 1) * 100 for r in both]
            of_intervals = [(rounds[r]["itl_ms"]["p50"] / sides[FREE][r]["itl_ms"]["p50"] - 1) * 100 for r in both if rounds[r].get("itl_ms")]
            increase, typical = Spread.of(increases), Spread.of(of_intervals)
            mine, theirs = Spread.of(ours.values()), Spread.of(free.values())
            if increase is None or mine is None or theirs is None:
                continue
            found.append({
                "measure": measure, "engine": side, "free_ms": asdict(theirs), "constrained_ms": asdict(mine), "increase_percent": asdict(increase),
                "median_between": median_interval(increases), "interval_percent": asdict(typical) if typical else None,
                "interval_between": median_interval(of_intervals),
                "must": MAX_INCREASE, "holds": increase.median <= MAX_INCREASE,
            })  # fmt: skip
    return found


def left_out(results: Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]) -> list[dict[str, str]]:
    """Runs that are in no line, and why."""
    found = []
    for measure, sides in results.items():
        for side, rounds in sides.items():
            for number, f in sorted(rounds.items()):
                if f["num_failed"] or f["num_inexact"]:
                    reason = f"{f['num_failed']} requests failed, {f['num_inexact']} had other lengths" + "".join(f"; {e}" for e in f["errors"])
                    found.append({"where": f"{measure}, {side}, round {number + 1}", "reason": reason})
    return found


def _tpots(rounds: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    return {r: f["tpot_ms"]["mean"] for r, f in rounds.items() if f.get("tpot_ms") and not f["num_failed"] and not f["num_inexact"]}


async def run_mesh_overhead(setting: Setting, engines: Sequence[str], *, num_rounds: int, seed: int, progress: Progress, batches: Mapping[int, int]) -> dict[str, Any]:
    """The same through a mesh of each engine, over HTTP, jump-forward off."""
    results: dict[str, dict[str, dict[int, Any]]] = {f"records, batch {b}, through the mesh": {} for b in batches}
    failures: list[dict[str, str]] = []
    all_lines: list[dict[str, Any]] = []
    progress.begin(2 * len(engines) * len(batches) * (num_rounds + 1))
    for engine in engines:
        own: dict[str, dict[str, dict[int, Any]]] = {m: {} for m in results}
        try:
            async with StructuredMesh(setting, f"overhead-{engine}", (engine,), {"decode": {"jump_forward": False}}) as mesh:
                await _mesh_rounds(mesh, engine, own, num_rounds=num_rounds, seed=seed, progress=progress, batches=batches, model=setting)
        except PlugmeshError as e:
            failures.append({"where": f"mesh with {engine}", "reason": e.message})
        all_lines += lines_of(own)
        for measure, sides in own.items():
            results[measure] |= {f"{engine}: {side}" if side == FREE else side: rounds for side, rounds in sides.items()}
    return {"runs": results, "lines": all_lines, "failures": failures + left_out(results)}


async def _mesh_rounds(
    mesh: StructuredMesh, engine: str, own: dict[str, dict[str, dict[int, Any]]], *, num_rounds: int, seed: int, progress: Progress, batches: Mapping[int, int],
    model: Setting,
) -> None:  # fmt: skip
    from plugmesh.bench.hf_folder import tokenizer_of

    tokenizer = tokenizer_of(model.model)
    if tokenizer is None:
        raise FailedPrecondition("prompts of exact lengths need the packages gguf and tokenizers")
    for number in range(-1, num_rounds):
        for batch, max_tokens in batches.items():
            prompts = [tuple(tokenizer.encode(p).ids) for p in prompts_of(seed * 1000 + number, batch)]
            turn = [FREE, engine] if number % 2 == 0 else [engine, FREE]
            for side in turn:
                progress.say(f"mesh with {engine}, {'warming up' if number < 0 else f'round {number + 1}'}: batch {batch}, {side}")
                calls = [(Call(prompt, max_tokens, schema=None if side == FREE else SCHEMAS["records"]),) for prompt in prompts]
                client = Client(mesh.url, mesh.model, DIALECTS["plugmesh"])
                try:
                    run: Run = await closed_loop(client, calls, batch, use_cache=False)
                finally:
                    client.close()
                if number >= 0:
                    own[f"records, batch {batch}, through the mesh"].setdefault(side, {})[number] = summary(run)
                progress.done("")


async def run_micro(setting: Setting, engines: Sequence[str], cases: Sequence[Case], *, progress: Progress) -> dict[str, Any]:
    """Compile, load, fill, accept and forced per engine, over the suite's schemas along their own examples."""
    from plugmesh.bench.structured.generation import spec_of

    lowered = await lower([spec_of(c) for c in cases])
    engine = StructuredEngine(setting, "micro", engines, jump_forward=False, num_blocks=64)
    found: dict[str, Any] = {}
    try:
        facts = await engine.start()
        progress.begin(len(engines) * len(cases))
        for name in engines:
            progress.say(f"times of {name}")
            taken: dict[str, list[float]] = {k: [] for k in ("compile_ms", "load_ms", "fill_us", "accept_us", "forced_us", "matcher_us", "bytes")}
            counts = {"accepted": 0, "refused": 0, "tokens": 0, "free_masks": 0, "forced": 0, "examples_left": 0}
            for case, low in zip(cases, lowered, strict=True):
                progress.done("")
                try:
                    if low.error:
                        raise FailedPrecondition(low.error)
                    text = json.dumps(case.example, ensure_ascii=False)
                    m = await engine.ask(micro={"candidates": low.candidates, "engine": name, "text": text})
                except FailedPrecondition:
                    counts["refused"] += 1
                    continue
                for key, values in (("compile_ms", [m["compile_ms"]]), ("load_ms", [m["load_ms"]]), ("bytes", [m["num_bytes"]]), *((f"{k}_us", v) for k, v in m["us"].items())):
                    taken[key] += values
                for key, value in (("accepted", 1), ("tokens", m["num_tokens"]), ("free_masks", m["num_free"]), ("forced", m["num_forced"]), ("examples_left", not m["is_whole"])):
                    counts[key] += value
            found[name] = {**counts, **{k: _percentiles(v) for k, v in taken.items()}}
    finally:
        await engine.stop()
    return {"facts": facts, "lower_ms": _percentiles([low.lower_ms for low in lowered if not low.error]), "num_lowered": sum(not low.error for low in lowered), "engines": found}


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    return {"num": len(values), "p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values)} if values else None
