"""The phases of a comparison: each side alone (memory, output, quality), then both in turns (speed), in a process and through a mesh."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from plugmesh.ab import report as r
from plugmesh.ab.side import FIDELITY_PROMPTS, FIDELITY_TOKENS, SEED, fidelity_prompts
from plugmesh.ab.sides import Subject, tools_host
from plugmesh.ab.subject import ServedSubject, Text, english
from plugmesh.ab.systems import SIDES, SideEngine, SideMesh
from plugmesh.ab.workloads import measure_of
from plugmesh.bench import rounds
from plugmesh.bench.peers import BATCH
from plugmesh.bench.rounds import Progress, describe_machine
from plugmesh.bench.systems import Setting, started
from plugmesh.bench.workloads import Call, Shape, random_prompts
from plugmesh.errors import PlugmeshError
from plugmesh.records import Observation, QualityMetricRecord, WorkloadContext, WorkloadRecord

PARTS = ("speed", "memory", "quality")
TIERS = ("engine", "served")
Observations = dict[str, dict[str, Observation]]
"""metric -> side -> what it showed."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much of it is done.

    Attributes:
        parts: Of PARTS. Output is compared in any case: that is cheap, and speed of wrong output is none.
        tiers: Of TIERS.
        metrics, workloads: Names; empty: all.
        reference: Whether the float32 reference is asked, too (slow; needs a GGUF that this repository's reference reads).
    """

    num_rounds: int = 7
    seed: int = 0
    is_quick: bool = False
    parts: tuple[str, ...] = PARTS
    tiers: tuple[str, ...] = TIERS
    metrics: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    reference: bool = True


@dataclass(slots=True)
class Findings:
    """What the phases leave for the report."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    observed: Observations = field(default_factory=dict)
    outputs: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # tier -> side -> kind -> outputs
    speed: dict[str, dict[str, Any]] = field(default_factory=dict)               # tier -> report of `run_rounds`
    failures: list[dict[str, str]] = field(default_factory=list)

    def fail(self, where: str, side: str, reason: str) -> None:
        self.failures.append({"where": where, "side": side, "reason": reason})


async def compare(subject: Subject, setting: Setting, options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """The whole report as plain data. A side, metric or workload that fails is in it with its reason; the others go on.

    Raises:
        ConfigError: The plugins cannot be loaded, or not together.
    """
    progress = progress or Progress()
    subject.check(setting)
    host = tools_host(subject.slugs, subject.tables(setting, loaded=True))
    metrics = _named(host.records("quality_metrics"), options.metrics)
    workloads = _named(host.records("workloads"), options.workloads)
    found = Findings()
    machine = describe_machine()
    if subject.has_engine_side and "engine" in options.tiers:
        for side in SIDES:
            await _alone(subject, setting, options, side, metrics, found, progress)
        if options.reference and "quality" in options.parts:
            await _reference(subject, setting, options, [m for m in metrics if m.uses_reference], found, progress)
        if "speed" in options.parts:
            await _speed("engine", [SideEngine(setting, subject, s) for s in SIDES], workloads, setting, options, found, progress)
    if "served" in options.tiers:
        meshes = [SideMesh(setting, subject, s, examiner(subject, setting, options, s, metrics, found)) for s in SIDES]
        await _speed("served", meshes, workloads if "speed" in options.parts else [], setting, options, found, progress)
    return r.build(subject, options, machine, metrics, workloads, found)


def _named(records: Sequence[Any], names: Sequence[str]) -> list[Any]:
    from plugmesh.errors import InvalidRequest

    known = {x.name: x for x in records}
    unknown = [n for n in names if n not in known]
    if unknown:
        raise InvalidRequest(f"there is no {unknown[0]!r}; there are {', '.join(known)}")
    return [known[n] for n in names] if names else list(records)


@contextlib.contextmanager
def _failing(found: Findings, where: str, side: str) -> Any:
    try:
        yield
    except PlugmeshError as e:
        found.fail(where, side, e.message)


async def _alone(
    subject: Subject, setting: Setting, options: Options, side: str, metrics: Sequence[QualityMetricRecord], found: Findings, progress: Progress
) -> None:
    """Memory first, as a process that has served some requests; no other engine lives that could share pages of weights with it."""
    engine = SideEngine(setting, subject, side)
    async with started([engine], progress.say) as (facts, missing):
        if missing:
            found.fail("engine", side, missing[engine.name])
            return
        found.facts[side] = facts[engine.name]
        if "memory" in options.parts:
            with _failing(found, "memory", side):
                progress.say(f"memory: {engine.title}")
                await engine.run(_memory_work(options), 8, BATCH, use_cache=True)
                found.memory[side] = dataclasses.asdict(engine.memory()["engine"])
        with _failing(found, "output", side):
            progress.say(f"output: {engine.title}")
            found.outputs.setdefault("engine", {})[side] = (await engine.ask(outputs=True, is_quick=options.is_quick))["outputs"]
        if "quality" in options.parts:
            await _observe(engine, metrics, options, found, progress)


async def _reference(
    subject: Subject, setting: Setting, options: Options, metrics: Sequence[QualityMetricRecord], found: Findings, progress: Progress
) -> None:
    engine = SideEngine(setting, subject, "reference")
    async with started([engine] if metrics else [], progress.say) as (_, missing):
        if missing:
            found.fail("quality", "reference", missing[engine.name])
        else:
            await _observe(engine, metrics, options, found, progress)


async def _observe(engine: SideEngine, metrics: Sequence[QualityMetricRecord], options: Options, found: Findings, progress: Progress) -> None:
    for metric in metrics:
        with _failing(found, metric.name, engine.name):
            progress.say(f"quality: {metric.title}: {engine.title}")
            found.observed.setdefault(metric.name, {})[engine.name] = await engine.observe(metric.name, seed=options.seed, is_quick=options.is_quick)


def _memory_work(options: Options) -> list[tuple[Call, ...]]:
    """Eight streams and a long prompt: enough that buffers have the size that serving needs."""
    num_in, num_out, long = (32, 4, 64) if options.is_quick else (256, 32, 2048)
    short = random_prompts(Shape(num_conversations=8, num_in=num_in, num_out=num_out), 1)
    return [*short, *random_prompts(Shape(num_conversations=1, num_in=long, num_out=num_out), 2)]


def examiner(
    subject: Subject, setting: Setting, options: Options, side: str, metrics: Sequence[QualityMetricRecord], found: Findings
) -> Callable[[str, str], None]:
    """What is asked of a mesh before its speed is measured: the same texts; and quality, where no engine side has told it."""

    def examine(url: str, model: str) -> None:
        served = ServedSubject(url, model, Text(setting.model), seed=options.seed, is_quick=options.is_quick)
        num, length = (2, 8) if options.is_quick else (FIDELITY_PROMPTS, FIDELITY_TOKENS)
        with _failing(found, "served output", side):
            prompts = fidelity_prompts(served, num)
            found.outputs.setdefault("served", {})[side] = {
                "greedy": served.continuations(prompts, length, temperature=0.0, seed=SEED),
                "seeded": served.continuations(prompts, length, temperature=0.8, seed=SEED),
            }  # fmt: skip
        if "quality" in options.parts and not subject.has_engine_side:
            for metric in metrics:
                if metric.needs <= served.kinds:
                    with _failing(found, metric.name, side):
                        found.observed.setdefault(metric.name, {})[side] = metric.observe(served)

    return examine


async def _speed(
    tier: str, systems: Sequence[Any], workloads: Sequence[WorkloadRecord], setting: Setting, options: Options, found: Findings, progress: Progress
) -> None:
    """The interleaved rounds of the bench; who is first alternates from round to round."""
    text = Text(setting.model)
    context = WorkloadContext(options.seed, text.vocab_size, text.encode, text.chat, english)
    chosen = [measure_of(w, context, is_quick=options.is_quick) for w in workloads if tier in w.tiers]
    if not chosen and tier == "engine":
        return
    result = await rounds.run_rounds(
        systems, chosen, num_rounds=1 if options.is_quick else options.num_rounds, seed=options.seed, kind="ab", progress=progress, bandwidth=False,
        warm_up=not options.is_quick,
    )
    found.speed[tier] = result
    for name, system in result["systems"].items():
        if system["state"] != "measured":
            found.fail(tier, name, system["reason"])
    for failure in result["failures"]:
        found.fail(f"{tier} {failure['measure']}", failure["system"], failure["reason"])


def run(subject: Subject, setting: Setting, options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """`compare` from code without an event loop."""
    return asyncio.run(compare(subject, setting, options, progress))
