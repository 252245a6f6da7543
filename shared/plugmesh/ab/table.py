"""A report as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plugmesh.bench.table import number

_SIDES = ("without", "with", "reference")
MEMORY = {
    "weight_bytes": "bytes of weights, resident", "stored_weight_bytes": "bytes of weights, stored", "kv_bytes_per_token": "bytes of KV per token",
    "pss": "engine process, PSS", "rss": "engine process, RSS",
}  # fmt: skip


def is_certain(low: float, high: float, neutral: float) -> bool:
    """Whether an interval leaves "no difference" out."""
    return not low <= neutral <= high


def verdict(value: float, low: float, high: float, *, neutral: float, better: str) -> str:
    """ "good", "bad" or "same": same where the interval holds "no difference"."""
    if not is_certain(low, high, neutral):
        return "same"
    return "good" if (value > neutral) == (better == "higher") else "bad"


def gain_verdict(row: Mapping[str, Any]) -> str:
    """Of a row of speed; one round says nothing."""
    g = row["gain"]
    return verdict(g["value"], g["low"], g["high"], neutral=1.0, better="higher") if len(row["rounds"]["with"]) > 1 else "same"


COLOURS = {"good": "green", "bad": "red", "same": "default"}
NEUTRAL = {"perplexity_ratio": 1.0, "top1_agreement": 1.0, "identical_continuations": 1.0, "common_beginning": 1.0}
"""Where a delta says "no difference"; 0 for the others."""


def bytes_of(value: float) -> str:
    from plugmesh.cli.output import amount

    return amount(value)


def spread(value: Mapping[str, float], digits: int = 3) -> str:
    """1.23 (1.20 - 1.25), without the brackets where there is one value."""
    text = number(value["value"], digits)
    return text if value["low"] == value["high"] else f"{text} ({number(value['low'], digits)} - {number(value['high'], digits)})"


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    """Everything but the single rounds."""
    machine = report["machine"]
    names = ", ".join(f"{p['slug']} {p['version']} ({p['fidelity']})" for p in report["plugins"])
    console.print(f"\n[bold]{escape(names)}[/] beside the same without it; {escape(machine['cpu'])}, {machine['cores']} cores, load before {machine['load_before']:.1f}")
    if report["is_quick"]:
        console.print("[yellow]one quick round of tiny workloads: the figures mean nothing[/]")
    _output(console, report)
    if report["speed"]:
        console.print(_speed(report))
    if report["memory"]["sides"]:
        console.print(_memory(report))
    if report["quality"]:
        console.print(_quality(report))
    for failure in report["failures"]:
        console.print(f"[red]failed[/] {escape(failure['where'])} ({failure['side']}): {escape(failure['reason'][:500])}")


def _output(console: Console, report: Mapping[str, Any]) -> None:
    for tier, v in report["fidelity"].items():
        shares = ", ".join(f"{share:.0%} of {kind} outputs the same" for kind, share in v["shares"].items())
        if v["holds"]:
            console.print(f"  [green]●[/] output ({tier}): {shares}; declared {v['declared']}")
        else:
            console.print(f"  [bold red]● the card says {v['declared']}, but {escape(v['difference'])}[/] ({tier}: {shares})")


    for p in report["promises"]:
        text = f"{p['metric']} {number(p['value'], 4)}, the card promises {number(p['bound'], 4)}"
        console.print(f"  [green]●[/] {escape(text)}" if p["holds"] else f"  [bold red]● {escape(text)}[/]")


def _speed(report: Mapping[str, Any]) -> Table:
    rounds = "one quick round" if report["is_quick"] else f"medians of {report['num_rounds']} rounds; gain above 1 is better with it, 95 % bootstrap interval of paired rounds"
    table = Table(title=f"speed: {rounds}", title_justify="left")
    for column, justify in (("workload", "left"), ("figure", "left"), ("without", "right"), ("with", "right"), ("gain", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type] # rich names them so
    before = ""
    for row in report["speed"]:
        g, title, before = row["gain"], "" if row["title"] == before else row["title"], row["title"]
        colour = COLOURS[gain_verdict(row)]
        table.add_row(escape(title), row["unit"], number(row["without"]), number(row["with"]), f"[{colour}]{spread(g)}[/]")
    return table


def _memory(report: Mapping[str, Any]) -> Table:
    table = Table(title="memory", title_justify="left")
    for column, justify in (("of", "left"), ("without", "right"), ("with", "right"), ("with / without", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type] # as above
    sides = report["memory"]["sides"]
    for key, title in MEMORY.items():
        cells = [bytes_of(sides[s][key]) if key in sides.get(s, {}) else "-" for s in ("without", "with")]
        ratio = report["memory"]["ratios"].get(key)
        table.add_row(title, *cells, number(ratio) if ratio else "-")
    for part in sorted({p for parts in report.get("served_memory", {}).values() for p in parts}):
        both = [report["served_memory"].get(s, {}).get(part, {}).get("pss") for s in ("without", "with")]
        table.add_row(f"{part} of the mesh, PSS", *(bytes_of(b) if b else "-" for b in both), number(both[1] / both[0]) if all(both) else "-")
    return table


def _quality(report: Mapping[str, Any]) -> Table:
    has_reference = any("reference" in q["figures"] for q in report["quality"])
    sides = _SIDES if has_reference else _SIDES[:2]
    table = Table(title="quality", title_justify="left")
    table.add_column("metric")
    table.add_column("figure", style="dim", no_wrap=True)
    for side in sides:
        table.add_column(side, justify="right")
    table.add_column("difference", justify="right")
    for q in report["quality"]:
        names = [n for n in dict.fromkeys(k for figures in q["figures"].values() for k in figures) if not n.startswith("num_")]
        for i, name in enumerate(names):
            table.add_row(escape(q["title"]) if i == 0 else "", name, *(number(q["figures"].get(s, {}).get(name), 4) for s in sides), "")
        for i, delta in enumerate(q["deltas"]):
            colour = COLOURS[verdict(delta["value"], delta["low"], delta["high"], neutral=NEUTRAL.get(delta["name"], 0.0), better=delta["better"])]
            against = [against_reference(q, side, delta["name"]) for side in ("without", "with")]
            cells = [*against, ""] if has_reference else against
            table.add_row("" if names or i else escape(q["title"]), delta["name"], *cells, f"[{colour}]{spread(delta, 4)}[/]")
    if has_reference:
        table.caption = "rows with a difference: in the columns of the sides, the same against the float32 reference"
    return table


def against_reference(quality: Mapping[str, Any], side: str, name: str) -> str:
    """A side's delta from the float32 reference; empty where that was not asked."""
    found = [d["value"] for d in quality.get("against_reference", {}).get(side, []) if d["name"] == name]
    return number(found[0], 4) if found else ""
