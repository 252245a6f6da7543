"""The parts of `plugmesh bench structured`, one after another, as one report of plain data."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugmesh import __version__
from plugmesh.bench.rounds import SCHEMA, Progress, describe_machine
from plugmesh.bench.structured import extracting, extraction, generation, jump, overhead
from plugmesh.bench.structured.engines import ENGINES
from plugmesh.bench.structured.suite import NUM_PER_FAMILY, make_suite
from plugmesh.bench.systems import Setting
from plugmesh.errors import PlugmeshError

PARTS = ("suite", "extraction", "overhead", "mesh-overhead", "times", "jump")
Part = Callable[[], Coroutine[Any, Any, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        engines: Slugs of grammar engines, in the order in which a mesh tries them.
        num_seeds: Outputs of every accepted schema.
        is_quick: A few schemas, tasks and tokens, to see that everything runs; figures mean nothing.
    """

    parts: tuple[str, ...] = PARTS
    engines: tuple[str, ...] = ENGINES
    seed: int = 0
    num_rounds: int = 5
    num_seeds: int = 3
    is_quick: bool = False


async def run(setting: Setting, plan: Plan, progress: Progress | None = None) -> dict[str, Any]:
    """A part that fails is in the report with its reason; the others go on."""
    progress = progress or Progress()
    machine = describe_machine()
    found: dict[str, Any] = {}
    failures: list[dict[str, str]] = []
    parts = _parts(setting, plan, progress)
    for name in plan.parts:
        try:
            found[name] = await parts[name]()
        except (PlugmeshError, OSError) as e:
            failures.append({"part": name, "reason": getattr(e, "message", str(e))[:1000]})
    return {
        "schema": SCHEMA, "kind": "structured", "plugmesh": __version__, "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["plugmesh", *sys.argv[1:]]), "machine": machine, "model": setting.model.stem, "seed": plan.seed, "num_rounds": plan.num_rounds,
        "is_quick": plan.is_quick, "parts": found, "failures": failures, "goals": goals(found),
    }  # fmt: skip


def _parts(setting: Setting, plan: Plan, progress: Progress) -> dict[str, Part]:
    quick = plan.is_quick
    cases = make_suite(plan.seed, per_family=1 if quick else NUM_PER_FAMILY)[:: 12 if quick else 1]
    tasks = extraction.make_tasks(plan.seed, 5 if quick else extraction.NUM_TASKS)
    batches = {1: 8, 4: 8} if quick else {1: 128, 32: 64}
    rounds = 1 if quick else plan.num_rounds
    part = dataclasses.replace

    def own(name: str) -> Setting:
        return part(setting, folder=setting.folder / name)

    async def suite() -> dict[str, Any]:
        # The default order first, then every engine by itself: what it would refuse alone.
        found = {}
        for engines in [plan.engines, *((e,) for e in plan.engines if len(plan.engines) > 1)]:
            label = "+".join(engines)
            seeds = [plan.seed + i for i in range(1 if quick else plan.num_seeds)]
            try:
                found[label] = await generation.run_suite(own("suite"), engines, cases, seeds=seeds, progress=progress, max_tokens=48 if quick else generation.MAX_TOKENS)
            except PlugmeshError as e:
                found[label] = {"error": e.message[:1000]}
        if all("error" in f for f in found.values()):
            raise_first(found)
        return found

    return {
        "suite": suite,
        "extraction": lambda: extracting.run_extraction(own("extraction"), tasks, progress=progress, max_tokens=128 if quick else extracting.MAX_TOKENS),
        "overhead": lambda: overhead.run_overhead(own("overhead"), plan.engines, batches=batches, num_rounds=rounds, seed=plan.seed, progress=progress),
        "mesh-overhead": lambda: overhead.run_mesh_overhead(own("mesh"), plan.engines, batches=batches, num_rounds=rounds, seed=plan.seed, progress=progress),
        "times": lambda: overhead.run_micro(own("times"), plan.engines, cases, progress=progress),
        "jump": lambda: jump.run_jump(own("jump"), plan.engines, batches=(1, 4) if quick else (1, 32), num_rounds=rounds, seed=plan.seed, progress=progress),
    }


def raise_first(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises what every side of a part failed with."""
    from plugmesh.errors import Unavailable

    raise Unavailable("; ".join(f"{label}: {f['error']}" for label, f in found.items()))


def goals(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the project wants, with the value that was measured and whether it holds."""
    found = []

    def add(name: str, value: str, holds: bool) -> None:
        found.append({"name": name, "value": value, "holds": holds})

    for label, suite in parts.get("suite", {}).items():
        if "error" not in suite:
            t = suite["total"]
            wrong = t["invalid"] + t["broken"] + t["failed"]
            add(f"{label}: finished outputs that validate", f"{t['valid']} of {t['valid'] + t['invalid'] + t['failed']}", not wrong and t["valid"] > 0)
    if "extraction" in parts:
        strict = parts["extraction"]["sides"]["strict"]
        add("extraction with strict: valid JSON", f"{strict['json']:.1%}", strict["json"] == 1.0)
    for line in parts.get("overhead", {}).get("lines", ()):
        if line["engine"] == ENGINES[0]:
            add(f"{line['engine']}, {line['measure']}: time per token", f"{line['increase_percent']['median']:+.1f} %", line["holds"])
    for line in parts.get("jump", {}).get("lines", ()):
        add(f"jump-forward, {line['measure']}: passes", f"{line['steps_on']} instead of {line['steps_off']}", line["steps_on"] < line["steps_off"])
    return found


def measure(setting: Setting, plan: Plan, progress: Progress) -> dict[str, Any]:
    """`run` from a place without an event loop."""
    return asyncio.run(run(setting, plan, progress))


def unknown(names: Sequence[str], known: Sequence[str]) -> str:
    """The first name that is not known; empty when all are."""
    return next((n for n in names if n not in known), "")
