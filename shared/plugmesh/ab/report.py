"""The report as plain data: ratios with intervals, deltas of quality, and whether the output is what the cards declare."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from plugmesh import __version__
from plugmesh.ab.sides import Subject
from plugmesh.ab.workloads import FIGURES, SERVED_FIGURES, is_time
from plugmesh.bench.measures import by_round
from plugmesh.quality.fidelity import judge
from plugmesh.quality.statistics import ratio_of_rounds
from plugmesh.records import Observation, QualityMetricRecord, WorkloadRecord

if TYPE_CHECKING:
    from plugmesh.ab.compare import Findings, Options

SCHEMA = 1


def build(
    subject: Subject, options: Options, machine: Mapping[str, Any], metrics: Sequence[QualityMetricRecord], workloads: Sequence[WorkloadRecord],
    found: Findings,
) -> dict[str, Any]:  # fmt: skip
    """What `--json` writes; `table`, `page` and `leaderboard` read it and nothing else."""
    fidelity = {tier: dataclasses.asdict(judge(subject.fidelity, sides["without"], sides["with"])) for tier, sides in found.outputs.items() if len(sides) == 2}
    quality = [q for m in metrics if m.name in found.observed and (q := _quality(m, found))]
    promises = [] if options.is_quick else _promises(subject, quality)
    return {
        "schema": SCHEMA, "plugmesh": __version__, "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["plugmesh", *sys.argv[1:]]), "machine": dict(machine), "num_rounds": 1 if options.is_quick else options.num_rounds,
        "seed": options.seed, "is_quick": options.is_quick,
        "plugins": [{"slug": c.slug, "version": c.version, "summary": c.summary, "fidelity": c.fidelity} for c in subject.cards],
        "claims": [{"slug": c.slug, **c.claim.model_dump()} for c in subject.cards if c.claim],
        "settings": {slug: dict(values) for slug, values in subject.settings.items()},
        "declared": subject.fidelity, "fidelity": fidelity, "promises": promises,
        "holds": all(v["holds"] for v in fidelity.values()) and all(p["holds"] for p in promises),
        "facts": found.facts, "memory": _memory(found), "served_memory": found.speed.get("served", {}).get("memory", {}),
        "speed": [row for tier in found.speed for row in _speed(tier, workloads, found)],
        "quality": quality, "failures": found.failures,
    }  # fmt: skip


def _memory(found: Findings) -> dict[str, Any]:
    """Bytes per side, and with / without."""
    sides = {
        side: {**{k: facts[k] for k in ("weight_bytes", "stored_weight_bytes", "kv_bytes_per_token")}, **found.memory.get(side, {})}
        for side, facts in found.facts.items()
    }
    ratios = {}
    if len(sides) == 2:
        a, b = sides["without"], sides["with"]
        ratios = {k: b[k] / a[k] for k in a if k in b and a[k]}
    return {"sides": sides, "ratios": ratios}


def _speed(tier: str, workloads: Sequence[WorkloadRecord], found: Findings) -> list[dict[str, Any]]:
    rows = []
    result = found.speed[tier]
    runs = {m: {s: {x["round"]: x for x in each} for s, each in content["runs"].items()} for m, content in result["measures"].items()}
    for work in workloads:
        if work.name not in runs:
            continue
        more = [f for f in SERVED_FIGURES if f != work.figure] if tier == "served" else []
        for figure in (work.figure, *more):
            row = _row(tier, work, figure, runs)
            if row:
                rows.append({**row, "is_main": figure == work.figure})
    return rows


def _row(tier: str, work: WorkloadRecord, figure: str, runs: Mapping[str, Any]) -> dict[str, Any] | None:
    without, with_ = (by_round(runs, work.name, side, figure) for side in ("without", "with"))
    both = sorted(without.keys() & with_.keys())
    ours, theirs = [with_[n] for n in both], [without[n] for n in both]
    gain = ratio_of_rounds(theirs, ours) if is_time(figure) else ratio_of_rounds(ours, theirs)
    if gain is None:
        return None
    return {
        "tier": tier, "workload": work.name, "title": work.title, "figure": figure, "unit": FIGURES.get(figure, figure), "streams": work.streams,
        "without": statistics.median(theirs), "with": statistics.median(ours), "gain": dataclasses.asdict(gain),
        "rounds": {"without": theirs, "with": ours},
    }  # fmt: skip


def _quality(metric: QualityMetricRecord, found: Findings) -> dict[str, Any] | None:
    seen = found.observed[metric.name]
    out: dict[str, Any] = {"metric": metric.name, "title": metric.title, "figures": {side: dict(o.figures) for side, o in seen.items()}, "deltas": []}
    if "without" in seen and "with" in seen:
        out["deltas"] = _deltas(metric, seen["without"], seen["with"], "with", found)
    if "reference" in seen:
        out["against_reference"] = {side: _deltas(metric, seen["reference"], o, side, found) for side, o in seen.items() if side != "reference"}
    return out


def _promises(subject: Subject, quality: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the cards of lossy plugins bound, as far as it was measured here; of a combination each member's bound is its own concern."""
    if len(subject.cards) != 1 or (loss := subject.cards[0].loss) is None:
        return []
    return [
        {"metric": loss.metric, "bound": loss.bound, "setting": loss.setting, "value": d["value"],
         "holds": d["value"] <= loss.bound if d["better"] == "lower" else d["value"] >= loss.bound}
        for q in quality for d in q["deltas"] if d["name"] == loss.metric
    ]  # fmt: skip


def _deltas(metric: QualityMetricRecord, a: Observation, b: Observation, side: str, found: Findings) -> list[dict[str, Any]]:
    try:
        return [dataclasses.asdict(d) for d in metric.compare(a, b)]
    except Exception as e:  # a metric of a plugin: the others are still told
        found.fail(metric.name, side, f"{type(e).__name__}: {e}")
        return []


def quality_delta(report: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A delta between the sides by its name."""
    for metric in report["quality"]:
        for delta in metric["deltas"]:
            if delta["name"] == name:
                return dict(delta)
    return None


def main_gain(report: Mapping[str, Any], workload: str) -> dict[str, Any] | None:
    """The row of a workload's own figure."""
    return next((dict(row) for row in report["speed"] if row["workload"] == workload and row["is_main"]), None)
