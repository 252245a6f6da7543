"""Which plugins go together: every pair is loaded and generates a little, unless the cards forbid it."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plugmesh.ab.compare import Findings, examiner
from plugmesh.ab.compare import Options as CompareOptions
from plugmesh.ab.sides import Subject
from plugmesh.ab.systems import SideEngine, SideMesh
from plugmesh.bench.rounds import Progress, describe_machine
from plugmesh.bench.systems import Setting, started
from plugmesh.cards import Card
from plugmesh.errors import ConfigError, PlugmeshError
from plugmesh.quality.fidelity import Outputs, judge

State = Literal["same", "runs", "conflict", "differs", "fails"]


@dataclass(frozen=True, slots=True)
class Pair:
    """What became of two plugins together.

    Attributes:
        tier: "engine" where both are loaded by decode, else "served": a whole mesh.
        shares: Kind of output to the share that is as without plugins.
    """

    a: str
    b: str
    state: State
    reason: str = ""
    tier: str = ""
    shares: dict[str, float] = dataclasses.field(default_factory=dict)


async def try_pairs(cards: Sequence[Card], setting: Setting, *, is_quick: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """All pairs of the plugins, as plain data. What fails is a finding; nothing raises."""
    progress = progress or Progress()
    machine = describe_machine()
    pairs = list(itertools.combinations(cards, 2))
    progress.begin(len(pairs))
    baselines: dict[Any, Outputs] = {}
    found = []
    for a, b in pairs:
        progress.say(f"{a.slug} with {b.slug}")
        found.append(await _try(Subject((a, b)), setting, baselines, is_quick=is_quick))
        progress.done("")
    return {
        "schema": 1, "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine, "is_quick": is_quick,
        "plugins": [c.slug for c in cards], "pairs": [dataclasses.asdict(p) for p in found],
    }  # fmt: skip


async def _try(subject: Subject, setting: Setting, baselines: dict[Any, Outputs], *, is_quick: bool) -> Pair:
    a, b = subject.slugs
    try:
        subject.check(setting)
    except ConfigError as e:
        return Pair(a, b, "conflict", e.message.removeprefix("plugmesh ab: "))
    tier = "engine" if all("decode" in c.services for c in subject.cards) else "served"
    produce = _engine_outputs if tier == "engine" else _served_outputs
    try:
        # What cards set for both sides may change output, too (another dtype, say), so baselines are told apart by it.
        key = (tier, repr(subject.tables(setting, loaded=False)))
        if key not in baselines:
            baselines[key] = await produce(subject, setting, "without", is_quick=is_quick)
        with_ = await produce(subject, setting, "with", is_quick=is_quick)
        verdict = judge(subject.fidelity, baselines[key], with_)
    except PlugmeshError as e:
        return Pair(a, b, "fails", e.message, tier)
    except ValueError as e:  # fewer outputs than prompts
        return Pair(a, b, "fails", str(e), tier)
    if not verdict.holds:
        return Pair(a, b, "differs", verdict.difference, tier, dict(verdict.shares))
    if not all(all(outputs) for outputs in with_.values()):
        return Pair(a, b, "fails", "an output is empty", tier, dict(verdict.shares))
    return Pair(a, b, "same" if min(verdict.shares.values()) == 1 else "runs", "", tier, dict(verdict.shares))


async def _engine_outputs(subject: Subject, setting: Setting, side: str, *, is_quick: bool) -> Outputs:
    engine = SideEngine(setting, subject, side)
    async with started([engine], lambda text: None) as (_, missing):
        _raise(missing)
        outputs: Outputs = (await engine.ask(outputs=True, is_quick=is_quick))["outputs"]
        return outputs


async def _served_outputs(subject: Subject, setting: Setting, side: str, *, is_quick: bool) -> Outputs:
    found = Findings()
    options = CompareOptions(is_quick=is_quick, parts=())
    # Every mesh wants a folder of its own.
    apart = dataclasses.replace(setting, folder=setting.folder / f"{subject.name}-{side}")
    async with started([SideMesh(apart, subject, side, examiner(subject, setting, options, side, [], found))], lambda text: None) as (_, missing):
        _raise(missing)
    _raise({f["side"]: f["reason"] for f in found.failures})
    return found.outputs["served"][side]


def _raise(missing: dict[str, str]) -> None:
    from plugmesh.errors import FailedPrecondition

    for reason in missing.values():
        raise FailedPrecondition(reason)


def run_pairs(cards: Sequence[Card], setting: Setting, *, is_quick: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """`try_pairs` from code without an event loop."""
    return asyncio.run(try_pairs(cards, setting, is_quick=is_quick, progress=progress))
