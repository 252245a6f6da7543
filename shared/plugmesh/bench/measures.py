"""What is measured, and the lines of the table that follow from it.

A measure is a workload with a number of streams; every system runs it once per round, and all figures of the run are kept. A line compares one
figure of one of our systems with the same figure of others, round by round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugmesh.bench import workloads
from plugmesh.bench.metrics import Spread, paired_ratio
from plugmesh.bench.peers import BATCH, DRIVEN, SINGLE, Profile
from plugmesh.bench.workloads import Conversation, Shape

PEER_NAMES = ("llama.cpp", "vllm", "transformers")


@dataclass(frozen=True, slots=True)
class Measure:
    """One workload.

    Attributes:
        streams: Callers at once, each with one request at a time.
        systems: Names of the systems that take part; empty: all.
        use_cache: Whether systems may find prefixes again. Off where a prompt is fresh anyway, so that none pays for keeping it.
        max_rounds: Fewer rounds than asked for, where a run is long; 0: no limit.
    """

    name: str
    title: str
    build: Callable[[int], list[Conversation]]
    streams: int
    profile: Profile
    systems: tuple[str, ...] = ()
    use_cache: bool = True
    max_rounds: int = 0


def _random(num: int, num_in: int, num_out: int, spread: float = 0.0) -> Callable[[int], list[Conversation]]:
    return lambda seed: workloads.random_prompts(Shape(num_conversations=num, num_in=num_in, num_out=num_out, spread=spread), seed)


def _apart(build: Callable[[int], list[Conversation]], longest_s: float) -> Callable[[int], list[Conversation]]:
    return lambda seed: workloads.with_pauses(build(seed), longest_s, seed)


def _long(num: int, num_in: int, num_out: int) -> Callable[[int], list[Conversation]]:
    return lambda seed: workloads.long_context(Shape(num_conversations=num, num_in=num_in, num_out=num_out), seed)


def _shared(num: int, prefix: int, num_out: int) -> Callable[[int], list[Conversation]]:
    shape = Shape(num_conversations=num, num_in=prefix + 32, num_out=num_out, prefix_tokens=prefix, depth=1, branching=1)
    return lambda seed: workloads.prefix_tree(shape, seed)


_OURS = ("engine", "mesh")

MEASURES: dict[str, Measure] = {
    m.name: m
    for m in (
        Measure("decode_1", "single stream, 128 in / 128 out", _random(1, 128, 128), 1, SINGLE),
        Measure("prefill_512", "prefill of 512 tokens", _random(3, 512, 1), 1, SINGLE),
        Measure("prefill_2048", "prefill of 2,048 tokens", _random(2, 2048, 1), 1, SINGLE),
        Measure("batch_8", "8 streams, 128 in / 64 out", _random(8, 128, 64), 8, BATCH),
        Measure("batch_16", "16 streams, 128 in / 64 out", _random(16, 128, 64), 16, BATCH),
        Measure("batch_32", "32 streams, 128 in / 64 out", _random(32, 128, 64), 32, BATCH),
        Measure("long_7000", "single stream at 7,000 tokens of context, 64 out", _long(1, 7000, 64), 1, SINGLE, max_rounds=5),
        # Several requests per stream and lengths that differ, so that requests come while others decode. With equal lengths all streams end in the same few
        # steps, and whether the next requests then come one step earlier or later decides who waits for whom: that moves TTFT by hundreds of milliseconds.
        # Pauses of 0 to 40 ms, longer than a step: a request that comes right after a step waits for nearly all of the next one, and whether it comes just
        # before or just after that boundary would decide on more than the mesh costs.
        Measure("overhead_16", "16 streams, 64-192 in / 48-144 out, five requests each", _apart(_random(80, 128, 96, 0.5), 0.04), 16, DRIVEN, _OURS),
        Measure("overhead_1", "single requests, 128 in / 32 out", _apart(_random(8, 128, 32), 0.04), 1, DRIVEN, _OURS),
        Measure("prefix_shared", "32 requests in a row with a prefix of 1,000 tokens in common", _shared(32, 1000, 4), 1, SINGLE, _OURS, max_rounds=5),
        Measure("prefix_fresh", "the same without anything in common", _random(32, 1032, 4), 1, SINGLE, _OURS, use_cache=False, max_rounds=5),
    )
}
MEASURE_SETS = {
    "engine": ("prefill_512", "prefill_2048", "decode_1", "batch_8", "batch_16", "batch_32", "long_7000"),
    "overhead": ("overhead_16", "overhead_1"),
    "peers": ("decode_1", "prefill_512", "prefill_2048", "batch_32", "long_7000", "overhead_16", "overhead_1", "prefix_shared", "prefix_fresh"),
}


def scaled(measure: Measure, *, max_tokens: int) -> Measure:
    """The same measure with shortened prompts and answers, to see that everything runs; its figures mean nothing."""

    def build(seed: int) -> list[Conversation]:
        return [
            tuple(dataclasses.replace(c, prompt=c.prompt[: max_tokens * 4], max_tokens=min(c.max_tokens, max_tokens)) for c in conversation)
            for conversation in measure.build(seed)[: max(2, measure.streams // 4)]
        ]

    return dataclasses.replace(measure, build=build, streams=max(1, measure.streams // 4), max_rounds=1)


Figures = Mapping[str, Any]
"""A run's summary, see `metrics.summary`."""
Results = Mapping[str, Mapping[str, Mapping[int, Figures]]]
"""measure -> system -> round -> figures."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the comparison.

    Attributes:
        figure: Path of a figure within a run's summary, such as "ttft_ms.p50".
        against: Systems to compare with; of several, the one with the best median counts.
        other_measure: Where the other side comes from another measure.
        kind: "ratio" of rates (higher is better), "inverse" of times (theirs / ours), "increase" of a time in percent, or "added" milliseconds.
        must, aim: What the project wants; at least for the first two kinds, at most for the others.
    """

    name: str
    title: str
    measure: str
    figure: str
    ours: str
    against: tuple[str, ...]
    must: float
    aim: float
    kind: str = "ratio"
    other_measure: str = ""

    @property
    def is_at_most(self) -> bool:
        return self.kind in ("increase", "added")


def _line(name: str, title: str, measure: str, figure: str, ours: str, against: Sequence[str], must: float, aim: float, kind: str = "ratio", other: str = "") -> Line:
    return Line(name, title, measure, figure, ours, tuple(against), must, aim, kind, other)


LINES: tuple[Line, ...] = (
    _line("decode_1", "single-stream decode", "decode_1", "decode_tok_s", "engine", ["llama.cpp"], 1.8, 2.5),
    _line("prefill_512", "prefill of 512 tokens", "prefill_512", "prefill_tok_s", "engine", PEER_NAMES, 1.5, 2.2),
    _line("prefill_2048", "prefill of 2,048 tokens", "prefill_2048", "prefill_tok_s", "engine", PEER_NAMES, 1.5, 2.2),
    _line("batch_32", "32 streams, output tokens", "batch_32", "output_tok_s", "engine", PEER_NAMES, 2.0, 2.7),
    _line("mesh_32", "32 streams through the mesh", "batch_32", "output_tok_s", "mesh", PEER_NAMES, 1.7, 2.5),
    _line("long_7000", "decode at 7,000 tokens of context", "long_7000", "decode_tok_s", "engine", ["llama.cpp"], 1.8, 2.5),
    _line("mesh_of_engine_32", "mesh / engine, 32 streams", "batch_32", "output_tok_s", "mesh", ["engine"], 0.85, 0.95),
    _line("overhead_tpot", "mesh overhead at 16 streams, TPOT, %", "overhead_16", "tpot_ms.p50", "mesh", ["engine"], 5, 2, "increase"),
    _line("overhead_ttft", "mesh overhead at 16 streams, TTFT, ms", "overhead_16", "ttft_ms.p50", "mesh", ["engine"], 6, 3, "added"),
    _line("overhead_ttft_1", "mesh overhead of single requests, TTFT, ms", "overhead_1", "ttft_ms.p50", "mesh", ["engine"], 6, 3, "added"),
    _line("prefix_engine", "shared prefix against no cache, TTFT (engine)", "prefix_shared", "ttft_ms.p50", "engine", ["engine"], 5, 15, "inverse", "prefix_fresh"),
    _line("prefix_mesh", "shared prefix against no cache, TTFT (mesh)", "prefix_shared", "ttft_ms.p50", "mesh", ["mesh"], 5, 15, "inverse", "prefix_fresh"),
)  # fmt: skip
MEMORY_MUST, MEMORY_AIM = 600e6, 400e6  # PSS of prefill and decode


def figure_of(figures: Figures, path: str) -> float | None:
    """A figure by its path; None where the run has none."""
    value: Any = figures
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def by_round(results: Results, measure: str, system: str, path: str) -> dict[int, float]:
    """The figure of every clean round: a run with failures, or with lengths other than asked for, is no comparison."""
    found = {}
    for number, figures in results.get(measure, {}).get(system, {}).items():
        value = figure_of(figures, path)
        if value is not None and not figures.get("num_failed") and not figures.get("num_inexact"):
            found[number] = value
    return found


def compare(line: Line, results: Results) -> dict[str, Any] | None:
    """A line's value with its spread over the rounds; None where a side has no figures."""
    ours = by_round(results, line.measure, line.ours, line.figure)
    best: tuple[str, dict[int, float]] | None = None
    for name in line.against:
        theirs = by_round(results, line.other_measure or line.measure, name, line.figure)
        spread = Spread.of(theirs.values())
        best_spread = Spread.of(best[1].values()) if best else None
        # Rates: the highest is the one to beat; times: the lowest.
        if spread and (best_spread is None or (spread.median > best_spread.median) == (line.kind == "ratio")):
            best = (name, theirs)
    if not ours or best is None:
        return None
    name, theirs = best
    value = _value(line.kind, ours, theirs)
    if value is None:
        return None
    return {
        "name": line.name, "title": line.title, "measure": line.measure, "figure": line.figure, "kind": line.kind, "ours": line.ours, "against": name,
        "ours_value": _plain(Spread.of(ours.values())), "against_value": _plain(Spread.of(theirs.values())), "value": _plain(value),
        "must": line.must, "aim": line.aim, "verdict": verdict(value.median, line.must, line.aim, at_most=line.is_at_most),
    }  # fmt: skip


def _value(kind: str, ours: dict[int, float], theirs: dict[int, float]) -> Spread | None:
    if kind == "ratio":
        return paired_ratio(ours, theirs)
    if kind == "inverse":
        return paired_ratio(theirs, ours)
    both = sorted(ours.keys() & theirs.keys())
    if kind == "increase":
        return Spread.of((ours[r] / theirs[r] - 1) * 100 for r in both if theirs[r])
    return Spread.of(ours[r] - theirs[r] for r in both)


def verdict(value: float, must: float, aim: float, *, at_most: bool) -> str:
    """ "aim", "must" or "missed"."""
    if at_most:
        return "aim" if value <= aim else "must" if value <= must else "missed"
    return "aim" if value >= aim else "must" if value >= must else "missed"


def _plain(spread: Spread | None) -> dict[str, float] | None:
    return dataclasses.asdict(spread) if spread else None
