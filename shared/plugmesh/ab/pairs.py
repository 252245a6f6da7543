"""Which plugins go together: all that cards allow are loaded together and generate a little.

Two plugins that decode loads are tried alone, in an engine. A whole mesh takes a minute, so there as many as go together are tried at once: what the
group does, each two of it do. Pairs of a group that fails are tried alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plugmesh.ab.asks import asks_of
from plugmesh.ab.compare import Findings, examiner
from plugmesh.ab.compare import Options as CompareOptions
from plugmesh.ab.side import SAMPLE_TOKENS
from plugmesh.ab.sides import Subject
from plugmesh.ab.systems import SideEngine, SideMesh
from plugmesh.bench.rounds import Progress, describe_machine
from plugmesh.bench.systems import Setting, started
from plugmesh.cards import Card
from plugmesh.errors import ConfigError, FailedPrecondition, PlugmeshError
from plugmesh.quality.fidelity import Outputs, combined, judge
from plugmesh.quality.samples import compare_samples

State = Literal["same", "runs", "conflict", "differs", "fails"]
NUM_SAMPLES = 1000  # of each side, where cards promise the same distribution


@dataclass(frozen=True, slots=True)
class Pair:
    """What became of two plugins together.

    Attributes:
        tier: "engine" where both are loaded by decode, else "served": a whole mesh.
        shares: Kind of output to the share that is as without plugins.
        group: All that were loaded; more than the two where a group was tried.
        seconds: That trying it took, its share where it was a group.
    """

    a: str
    b: str
    state: State
    reason: str = ""
    tier: str = ""
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    group: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Verdict:
    state: State
    reason: str = ""
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    refused: Mapping[frozenset[str], str] = dataclasses.field(default_factory=dict)  # requests that use several plugins at once, by them


def subject_of_cards(cards: Iterable[Card]) -> Subject:
    """With the settings under which a short prompt makes use of each."""
    cards = tuple(cards)
    return Subject(cards, {c.slug: c.ab.short for c in cards if c.ab.short})


def why_not(cards: Sequence[Card], setting: Setting) -> str:
    """Why these cannot be loaded together, as their cards say; empty when they can."""
    subject = subject_of_cards(cards)
    wanted: dict[tuple[str, str], tuple[str, Any]] = {}
    for card in cards:
        for service, keys in card.ab.services.items():
            for key, value in keys.items():
                other, theirs = wanted.setdefault((service, key), (card.slug, value))
                if theirs != value:
                    return f"{other} wants services.{service}.{key} = {theirs!r}, {card.slug} wants {value!r}"
    try:
        subject.check(setting)
    except ConfigError as e:
        return e.message.removeprefix("plugmesh ab: ")
    return ""


def tier_of(cards: Iterable[Card]) -> str:
    """An engine shows what a plugin does only where decode alone loads it, and prefill, whose part an engine does itself."""
    return "engine" if all({"decode"} <= set(c.services) <= {"decode", "prefill", "weightstore", "tools"} for c in cards) else "served"


def groups(pairs: Sequence[tuple[Card, Card]], cards: Sequence[Card], excluded: Iterable[frozenset[str]]) -> list[tuple[Card, ...]]:
    """Few groups that hold all `pairs` and none of `excluded`. A pair whose output must not change is in a group whose output must not."""
    never = set(excluded)
    left = {frozenset((a.slug, b.slug)): (a, b) for a, b in pairs}
    found = []
    while left:
        group = list(next(iter(left.values())))
        promise = combined([c.fidelity for c in group])
        for card in cards:
            fits = card not in group and all(frozenset((card.slug, other.slug)) not in never for other in group)
            if fits and combined([*(c.fidelity for c in group), card.fidelity]) == promise:
                group.append(card)
        for a, b in itertools.combinations(group, 2):
            if combined([a.fidelity, b.fidelity]) == promise:
                left.pop(frozenset((a.slug, b.slug)), None)
        found.append(tuple(sorted(group, key=lambda c: c.slug)))
    return found


async def try_pairs(cards: Sequence[Card], setting: Setting, *, is_quick: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """All pairs of the plugins, as plain data. What fails is a finding; nothing raises."""
    progress = progress or Progress()
    machine = describe_machine()
    trial = _Trial(setting, is_quick)
    pairs = list(itertools.combinations(cards, 2))
    found: dict[frozenset[str], Pair] = {}
    for a, b in pairs:
        if reason := why_not((a, b), setting):
            found[frozenset((a.slug, b.slug))] = Pair(a.slug, b.slug, "conflict", reason)
    excluded = set(found)
    rest = [p for p in pairs if frozenset((p[0].slug, p[1].slug)) not in excluded]
    alone = [p for p in rest if tier_of(p) == "engine"]
    together = groups([p for p in rest if tier_of(p) == "served"], cards, excluded)
    progress.begin(len(alone) + len(together))
    for group in together:
        progress.say(" with ".join(c.slug for c in group))
        began = asyncio.get_running_loop().time()
        verdict = await trial.of(group, "served")
        progress.say(f"{verdict.state}: {verdict.reason}"[:200])
        inside = [p for p in itertools.combinations(group, 2) if tier_of(p) == "served" and frozenset((p[0].slug, p[1].slug)) not in found]
        seconds = round((asyncio.get_running_loop().time() - began) / max(1, len(inside)), 1)
        promise = combined([c.fidelity for c in group])
        for a, b in inside:
            key = frozenset((a.slug, b.slug))
            if verdict.state in ("same", "runs") and combined([a.fidelity, b.fidelity]) == promise:
                found[key] = Pair(a.slug, b.slug, verdict.state, verdict.refused.get(key, ""), "served", dict(verdict.shares), tuple(c.slug for c in group), seconds)
            elif verdict.state not in ("same", "runs") and len(group) > 2:
                alone.append((a, b))
            elif len(group) == 2:
                found[key] = Pair(a.slug, b.slug, verdict.state, verdict.reason, "served", dict(verdict.shares), (), seconds)
        progress.done("")
    for a, b in alone:
        key = frozenset((a.slug, b.slug))
        if key in found:
            continue  # another group has shown it meanwhile
        progress.say(f"{a.slug} with {b.slug}")
        began = asyncio.get_running_loop().time()
        verdict = await trial.of((a, b), tier_of((a, b)))
        progress.say(f"{verdict.state}: {verdict.reason}"[:200])
        seconds = round(asyncio.get_running_loop().time() - began, 1)
        reason = verdict.reason or verdict.refused.get(key, "")
        found[key] = Pair(a.slug, b.slug, verdict.state, reason, tier_of((a, b)), dict(verdict.shares), (), seconds)
        progress.done("")
    return {
        "schema": 1, "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine, "is_quick": is_quick,
        "plugins": [c.slug for c in cards], "pairs": [dataclasses.asdict(found[frozenset((a.slug, b.slug))]) for a, b in pairs],
    }  # fmt: skip


class _Trial:
    """Loads plugins and judges what comes out; runs without plugins are kept."""

    def __init__(self, setting: Setting, is_quick: bool) -> None:
        self._setting = setting
        self._is_quick = is_quick
        self._without: dict[Any, Outputs] = {}
        self._num = 0

    async def of(self, cards: Sequence[Card], tier: str) -> _Verdict:
        subject = subject_of_cards(cards)
        try:
            # What cards set for both sides may change output, too (another dtype, say), so baselines are told apart by it.
            is_dist = tier == "engine" and subject.fidelity == "dist" and not self._is_quick
            key = (tier, is_dist, repr(subject.tables(self._setting, loaded=False)))
            if key not in self._without:
                self._without[key] = (await self._outputs(subject, tier, "without"))[0]
            with_, refused = await self._outputs(subject, tier, "with")
            without = dict(self._without[key])
            # Samples are drawn with seeds of their own on each side, so they are no outputs to be compared one by one.
            ours, theirs = without.pop("samples", ()), with_.pop("samples", ())
            verdict = judge(subject.fidelity, without, with_)
            unlike = compare_samples(_tokens(ours), _tokens(theirs), SAMPLE_TOKENS)[1] if is_dist else ""
        except PlugmeshError as e:
            return _Verdict("fails", e.message)
        except ValueError as e:  # fewer outputs than prompts
            return _Verdict("fails", str(e))
        if not verdict.holds or unlike:
            return _Verdict("differs", verdict.difference or unlike, verdict.shares, refused)
        if not all(all(outputs) for outputs in with_.values()):
            return _Verdict("fails", "an output is empty", verdict.shares, refused)
        return _Verdict("same" if min(verdict.shares.values()) == 1 else "runs", "", verdict.shares, refused)

    async def _outputs(self, subject: Subject, tier: str, side: str) -> tuple[dict[str, Any], Mapping[frozenset[str], str]]:
        if tier == "engine":
            return await self._of_engine(subject, side), {}
        outputs, refused = await self._of_mesh(subject, side)
        return dict(outputs), refused

    async def _of_engine(self, subject: Subject, side: str) -> dict[str, Any]:
        engine = SideEngine(self._setting, subject, side)
        async with started([engine], lambda text: None) as (_, missing):
            _raise(missing)
            outputs: dict[str, Any] = (await engine.ask(outputs=True, is_quick=self._is_quick))["outputs"]
            if subject.fidelity == "dist" and not self._is_quick:
                outputs |= await engine.ask(samples=NUM_SAMPLES, seed=1 if side == "without" else 1 + NUM_SAMPLES)
            return outputs

    async def _of_mesh(self, subject: Subject, side: str) -> tuple[Outputs, Mapping[frozenset[str], str]]:
        found = Findings()
        refused: dict[frozenset[str], str] = {}
        plain = examiner(subject, self._setting, CompareOptions(is_quick=self._is_quick, parts=()), side, [], found)

        def examine(url: str, model: str) -> None:
            plain(url, model)
            if side == "with":
                refused.update(asks_of(subject.cards, url, model))

        # Every mesh wants a folder of its own, with a short name: sockets lie below it.
        self._num += 1
        apart = dataclasses.replace(self._setting, folder=self._setting.folder / f"p{self._num}")
        async with started([SideMesh(apart, subject, side, examine)], lambda text: None) as (_, missing):
            _raise(missing)
        _raise({f["side"]: f["reason"] for f in found.failures})
        return found.outputs["served"][side], refused


def _tokens(samples: Sequence[Sequence[int] | str]) -> list[list[int]]:
    return [[int(t) for t in sample] for sample in samples]


def _raise(missing: dict[str, str]) -> None:
    for reason in missing.values():
        raise FailedPrecondition(reason)


def run_pairs(cards: Sequence[Card], setting: Setting, *, is_quick: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """`try_pairs` from code without an event loop."""
    return asyncio.run(try_pairs(cards, setting, is_quick=is_quick, progress=progress))
