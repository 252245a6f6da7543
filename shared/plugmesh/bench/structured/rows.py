"""The report as titled tables of text: the same for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugmesh.bench.table import number


@dataclass(frozen=True, slots=True)
class Grid:
    """`rows` have as many cells as `head`; `notes` stand below."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def grids(report: Mapping[str, Any]) -> list[Grid]:
    """Every part that was measured, in the order of the report."""
    makers = {"suite": _suite, "extraction": _extraction, "overhead": _overhead, "mesh-overhead": _overhead, "times": _times, "jump": _jump}
    found: list[Grid] = [grid for name, part in report["parts"].items() for grid in makers[name](part)]
    if report["goals"]:
        found.append(Grid("goals", ("what", "measured", ""), tuple((g["name"], g["value"], "holds" if g["holds"] else "missed") for g in report["goals"])))
    return found


def _suite(part: Mapping[str, Any]) -> list[Grid]:
    measured = {label: s for label, s in part.items() if "error" not in s}
    head = ("engines", "schemas", "accepted", "refused", "outputs", "valid", "invalid", "cut", "broken", "failed", "example refused", "key twice")
    rows, notes = [], []
    for label, s in measured.items():
        t = s["total"]
        rows.append((label, *map(str, (t["num_schemas"], t["num_accepted"], t["num_refused"], s["num_outputs"], t["valid"], t["invalid"], t["cut"], t["broken"],
                                       t["failed"], t["num_examples_rejected"], t["num_duplicates"]))))  # fmt: skip
        if s["refusals"]:
            notes.append(f"{label} refuses: " + ", ".join(f"{reason} ({n})" for reason, n in s["refusals"].items()))
        if len(s["engines"]) > 1:
            notes.append(f"{label}: " + ", ".join(f"{engine} compiled {n}" for engine, n in s["engines"].items()))
        unasked = [c["name"] for c in s["cases"] if c["gateway_refused"] is False]
        if unasked:
            notes.append(f"{label}: the gateway did not answer 400 to what was refused: {', '.join(unasked)}")
        notes += [f"{label}: {f['case']} with seed {f['seed']}: {f['reason']}" for f in s["failures"][:10]]
        if s["unchecked_formats"]:
            notes.append(f"formats that jsonschema does not check here: {', '.join(s['unchecked_formats'])}")
    notes += [f"{label}: not measured: {s['error']}" for label, s in part.items() if "error" in s]
    found = [Grid("generated schemas, real model at temperature 1.0", head, tuple(rows), tuple(dict.fromkeys(notes)))]
    times = []
    for label, s in measured.items():
        for key, title in (("compile_ms", "compilation, the service's own time"), ("first_call_ms", "first call"), ("cached_call_ms", "call for a cached one")):
            if s[key]:
                times.append((label, title, str(s[key]["num"]), *(number(s[key][c]) for c in ("p50", "p90", "p99", "max"))))
    if times:
        found.append(Grid("compile times over the suite, ms", ("engines", "what", "schemas", "p50", "p90", "p99", "max"), tuple(times)))
    return found + [_keywords(label, s) for label, s in measured.items()]


def _keywords(label: str, suite: Mapping[str, Any]) -> Grid:
    """A line per keyword."""
    rows = []
    for name, t in suite["keywords"].items():
        outputs = (t["valid"], t["invalid"] + t["broken"] + t["failed"], t["cut"])
        rows.append((name, *map(str, (t["num_schemas"], t["num_accepted"], t["num_refused"], *outputs))))
    note = "a schema counts for each of its keywords; wrong: invalid, cut where nothing can follow, or failed"
    return Grid(f"per keyword: {label}", ("keyword", "schemas", "accepted", "refused", "valid", "wrong", "cut"), tuple(rows), (note,))


def _extraction(part: Mapping[str, Any]) -> list[Grid]:
    titles = {"asked": "schema in the prompt only", "mode": "response_format json_object", "strict": "json_schema, strict"}
    rows, notes = [], []
    for side, s in part["sides"].items():
        rows.append((titles[side], str(s["num"]), *(f"{s[k]:.1%}" for k in ("json", "json_leniently", "valid", "right_fields", "cut")), str(s["failed"]), str(s["num_tokens"])))
        notes += [f"{titles[side]}: {e}" for e in s["errors"]]
    head = ("enforced", "tasks", "a JSON object and nothing else", "one in the text", "validates", "right fields", "cut", "failed", "tokens")
    return [Grid("extraction, greedy", head, tuple(rows), tuple(notes))]


def _spread(s: Mapping[str, float], unit: str = "", sign: bool = False) -> str:
    def text(v: float) -> str:
        return f"{v:+.1f}" if sign else number(v)

    return f"{text(s['median'])}{unit}" + (f" ({text(s['low'])} to {text(s['high'])})" if s["num"] > 1 else "")


def _median(s: Mapping[str, float] | None, between: Sequence[float] | None) -> str:
    if not s:
        return "?"
    return f"{s['median']:+.1f} %" + (f" ({between[0]:+.1f} to {between[1]:+.1f})" if between else "")


def _overhead(part: Mapping[str, Any]) -> list[Grid]:
    rows = tuple(
        (line["measure"], line["engine"], _spread(line["free_ms"]), _spread(line["constrained_ms"]), _median(line["increase_percent"], line.get("median_between")),
         _median(line.get("interval_percent"), line.get("interval_between")), f"{line['must']:g} %", "holds" if line["holds"] else "missed")
        for line in part["lines"]
    )  # fmt: skip
    notes = tuple(f"failed: {f['where']}: {f['reason'][:300]}" for f in part["failures"])
    return [Grid("time per output token, ms: with a schema against without", ("measure", "engine", "free", "constrained", "increase (95 %)", "of the median interval", "at most", ""), rows, notes)]


def _times(part: Mapping[str, Any]) -> list[Grid]:
    rows, notes = [], []
    for engine, e in part["engines"].items():
        for key, title in (("compile_ms", "compile, ms"), ("load_ms", "load, ms"), ("bytes", "compiled form, bytes"), ("matcher_us", "new matcher, µs"), ("fill_us", "fill a mask, µs"),
                           ("accept_us", "accept a token, µs"), ("forced_us", "forced bytes, µs")):  # fmt: skip
            if e[key]:
                rows.append((engine, title, str(e[key]["num"]), *(number(e[key][c]) for c in ("p50", "p99", "max"))))
        notes.append(f"{engine}: {e['accepted']} schemas accepted, {e['refused']} not; of {e['tokens']} tokens {e['free_masks']} masks allow everything, {e['forced']} have forced bytes; "
                     f"{e['examples_left']} examples left the language")  # fmt: skip
    if part["lower_ms"]:
        rows.insert(0, ("front end", "lower, ms", str(part["lower_ms"]["num"]), *(number(part["lower_ms"][c]) for c in ("p50", "p99", "max"))))
    return [Grid("one process, along the suite's own examples", ("engine", "what", "number", "p50", "p99", "max"), tuple(rows), tuple(notes))]


def _jump(part: Mapping[str, Any]) -> list[Grid]:
    rows = []
    for line in part["lines"]:
        saved = 1 - line["steps_on"] / line["steps_off"] if line["steps_off"] else 0.0
        rows.append((
            line["measure"], _spread(line["gain"], "×"), f"{number(line['tok_s_off'])} / {number(line['tok_s_on'])}", f"{line['steps_off']} / {line['steps_on']}", f"{saved:.0%}",
            f"{line['tokens_off']} / {line['tokens_on']}", "-" if line["num_jumped"] is None else str(line["num_jumped"]), f"{line['num_same']} of {line['num_answers']}",
        ))  # fmt: skip
    head = ("engine, whitespace, streams", "answers per second, on / off", "tok/s off / on", "passes off / on", "saved", "tokens off / on", "jumped", "same texts")
    notes = tuple(f"failed: {f['where']}: {f['reason'][:300]}" for f in part["failures"])
    return [Grid("jump-forward on a schema with fixed keys", head, tuple(rows), notes)]
