"""What is counted, with formulas; one definition for HTTP servers and for the engine in a process.

- TTFT: from the request's sending to its first token.
- E2E: from the request's sending to its last token.
- TPOT: (E2E - TTFT) / (n_out - 1), per request, for n_out > 1.
- ITL: gaps between a request's streamed events. An event may carry several tokens, or a token none of its own where its bytes complete
  no character yet; so n_out comes from `usage` and never from counting events.
- Goodput: requests per second that meet every objective.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One request as its caller saw it; times in seconds on one clock.

    Attributes:
        sent_s: When its bytes were handed to the connection, or the request to the engine.
        times_s: Arrival of each event that carried output.
        num_prompt, num_out, num_cached: Tokens, as `usage` reports them; num_cached is -1 where the system does not tell.
        asked_prompt, asked_out: What was asked for.
        due_s: When an open loop wanted to send it; equal to sent_s in a closed loop.
        error: Empty when it went well.
    """

    sent_s: float
    times_s: tuple[float, ...]
    num_prompt: int
    num_out: int
    asked_prompt: int
    asked_out: int
    num_cached: int = -1
    due_s: float = math.nan
    error: str = ""

    @property
    def is_ok(self) -> bool:
        return not self.error and bool(self.times_s)

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.times_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """NaN for an answer of one token."""
        return (self.e2e_s - self.ttft_s) / (self.num_out - 1) if self.num_out > 1 else math.nan

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times_s)]

    @property
    def is_exact(self) -> bool:
        """Whether prompt and answer had the lengths that were asked for; figures of other lengths are no comparison."""
        return self.num_prompt == self.asked_prompt and self.num_out == self.asked_out


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request has to meet to count as good; 0 is no objective. In milliseconds."""

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    e2e_ms: float = 0.0

    @property
    def is_set(self) -> bool:
        return any((self.ttft_ms, self.tpot_ms, self.e2e_ms))

    def met(self, r: Record) -> bool:
        if not r.is_ok:
            return False
        limits = ((self.ttft_ms, r.ttft_s), (self.tpot_ms, r.tpot_s), (self.e2e_ms, r.e2e_s))
        return all(not limit or math.isnan(value) or value * 1e3 <= limit for limit, value in limits)


@dataclass(frozen=True, slots=True)
class Run:
    """The requests of one run, what the load generator itself used, and for how long it ran."""

    records: tuple[Record, ...]
    wall_s: float
    client_cpu_s: float = 0.0
    streams: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks (numpy's default); NaN of nothing. `share` from 0 to 1."""
    if not values:
        return math.nan
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def distribution(values_s: Iterable[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; None of nothing. NaNs are left out."""
    values = [v * 1e3 for v in values_s if not math.isnan(v)]
    if not values:
        return None
    return {
        "mean": statistics.fmean(values), "p50": percentile(values, 0.5), "p90": percentile(values, 0.9), "p95": percentile(values, 0.95),
        "p99": percentile(values, 0.99), "max": max(values),
    }  # fmt: skip


def summary(run: Run, objectives: Objectives | None = None) -> dict[str, Any]:
    """The figures of a run, ready for JSON.

    Rates go from the first request's sending to the last token. `decode_tok_s` is the rate of one stream, 1 / median TPOT;
    `prefill_tok_s` is prompt tokens / TTFT, the median over requests: meaningful for one stream and one output token.
    """
    objectives = objectives or Objectives()
    good = [r for r in run.records if r.is_ok]
    failed = [r for r in run.records if not r.is_ok]
    span = max((r.times_s[-1] for r in good), default=0.0) - min((r.sent_s for r in good), default=0.0)
    tpot = [r.tpot_s for r in good if not math.isnan(r.tpot_s)]
    late = [r.sent_s - r.due_s for r in run.records if not math.isnan(r.due_s)]
    out: dict[str, Any] = {
        "num_requests": len(run.records), "num_failed": len(failed), "num_inexact": sum(not r.is_exact for r in good), "streams": run.streams,
        "duration_s": span, "num_prompt_tokens": sum(r.num_prompt for r in good), "num_output_tokens": sum(r.num_out for r in good),
        "num_cached_tokens": sum(max(r.num_cached, 0) for r in good) if any(r.num_cached >= 0 for r in good) else None,
        "output_tok_s": sum(r.num_out for r in good) / span if span > 0 else None,
        "total_tok_s": sum(r.num_out + r.num_prompt for r in good) / span if span > 0 else None,
        "requests_s": len(good) / span if span > 0 else None,
        "decode_tok_s": 1 / statistics.median(tpot) if tpot and statistics.median(tpot) > 0 else None,
        "prefill_tok_s": statistics.median(r.num_prompt / r.ttft_s for r in good if r.ttft_s > 0) if any(r.ttft_s > 0 for r in good) else None,
        "ttft_ms": distribution(r.ttft_s for r in good), "tpot_ms": distribution(tpot),
        "itl_ms": distribution(g for r in good for g in r.gaps_s), "e2e_ms": distribution(r.e2e_s for r in good),
        "client_cpu_s": run.client_cpu_s, "client_cpu_share": run.client_cpu_s / run.wall_s if run.wall_s > 0 else None, "wall_s": run.wall_s,
        "errors": sorted({r.error for r in failed if r.error})[:5], **run.facts,
    }  # fmt: skip
    if late:
        out["max_late_ms"] = max(late) * 1e3
    if objectives.is_set:
        met = sum(objectives.met(r) for r in run.records)
        out["goodput"] = {
            "requests_s": met / span if span > 0 else 0.0, "share": met / len(run.records) if run.records else 0.0,
            "objectives_ms": {"ttft": objectives.ttft_ms, "tpot": objectives.tpot_ms, "e2e": objectives.e2e_ms},
        }  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class Spread:
    """A value over the rounds."""

    median: float
    low: float
    high: float
    num: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        found = [v for v in values if v is not None and not math.isnan(v)]
        return cls(statistics.median(found), min(found), max(found), len(found)) if found else None


def median_interval(values: Iterable[float]) -> tuple[float, float] | None:
    """Between which two of the values the median of whatever they are drawn from lies, with a confidence of 95 % or a little more, whatever its distribution.

    The number of values below the true median is binomial. None of fewer than six values.
    """
    found = sorted(values)
    n = len(found)
    below, k = 0.0, 0
    while below + math.comb(n, k) / 2**n <= 0.025:
        below += math.comb(n, k) / 2**n
        k += 1
    return (found[k - 1], found[n - k]) if k else None


def paired_ratio(ours: dict[int, float], theirs: dict[int, float]) -> Spread | None:
    """Ours / theirs, round by round: a disturbance that hits a round hits both sides of its ratio. Rounds that one side lacks are left out."""
    return Spread.of(ours[r] / theirs[r] for r in sorted(ours.keys() & theirs.keys()) if theirs[r])
