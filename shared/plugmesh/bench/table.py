"""Reports as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plugmesh.bench.measures import figure_of
from plugmesh.bench.metrics import Spread

_COLOURS = {"aim": "green", "must": "yellow", "missed": "red"}
FIGURES = {"decode_1": "decode_tok_s", "prefill_512": "prefill_tok_s", "prefill_2048": "prefill_tok_s", "long_7000": "decode_tok_s"}
"""The figure that a measure is about; output_tok_s for the others, and times for those of the mesh's overhead and the prefix."""
_TIMES = ("overhead_16", "overhead_1", "prefix_shared", "prefix_fresh")


def main_figure(measure: str) -> tuple[str, str]:
    """Path and unit of the figure to show for a measure."""
    if measure in _TIMES:
        return "ttft_ms.p50", "ms to the first token"
    path = FIGURES.get(measure, "output_tok_s")
    return path, {"decode_tok_s": "tok/s decode", "prefill_tok_s": "tok/s prefill", "output_tok_s": "output tok/s"}[path]


def medians(report: dict[str, Any], measure: str, path: str) -> dict[str, Spread]:
    """System to the figure's spread over the rounds."""
    found = {}
    for system, runs in report["measures"][measure]["runs"].items():
        spread = Spread.of(figure_of(r, path) for r in runs)
        if spread:
            found[system] = spread
    return found


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent: 1,370 or 0.0312."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return f"{value:.1f}" if "e" in text else text


def _with_spread(spread: Spread) -> str:
    return number(spread.median) + (f" [dim]({number(spread.low)} - {number(spread.high)})[/]" if spread.num > 1 else "")


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Systems, figures per measure, lines of the comparison, memory, and everything that failed."""
    machine = report["machine"]
    bandwidth = f", reads {machine['memory_read_gb_s']:.0f} GB/s" if machine.get("memory_read_gb_s") else ""
    console.print(f"\n[bold]{escape(machine['cpu'])}[/], {machine['cores']} cores ({', '.join(machine['features'])}){bandwidth}; load before {machine['load_before']:.1f}")
    for name, system in report["systems"].items():
        if system["state"] == "measured":
            extra = ", ".join(str(system[k]) for k in ("version", "executor", "format", "kv_codec") if system.get(k))
            console.print(f"  [green]●[/] {name}: {escape(system['title'])} [dim]{escape(extra)}[/]")
        else:
            console.print(f"  [red]○[/] {name}: [red]not measured[/]: {escape(system['reason'][:300])}")
    names = [n for n, s in report["systems"].items() if s["state"] == "measured"]
    rounds = "one quick round; these figures mean nothing" if report.get("is_quick") else f"median of {report['num_rounds']} rounds (lowest - highest)"
    table = Table(title=rounds, title_justify="left")
    table.add_column("measure")
    table.add_column("figure", style="dim")
    for name in names:
        table.add_column(name, justify="right")
    for measure, content in report["measures"].items():
        rows = [main_figure(measure)] + ([("tpot_ms.p50", "ms per token")] if measure == "overhead_16" else [])
        for path, unit in rows:
            found = medians(report, measure, path)
            cells = [_with_spread(found[n]) if n in found else "-" for n in names]
            table.add_row(content["title"], unit, *cells)
    console.print(table)
    if report["lines"] and not report.get("is_quick"):
        console.print(_lines(report))
    if report.get("bandwidth_share") and not report.get("is_quick"):
        console.print(f"single-stream decode reads its weights at {report['bandwidth_share']:.0%} of the measured memory bandwidth")
    for failure in report["failures"]:
        console.print(f"[red]failed[/] {failure['system']} in {failure['measure']}: {escape(failure['reason'][:300])}")


def _lines(report: dict[str, Any]) -> Table:
    table = Table(title="against the goals", title_justify="left")
    for column, justify in (("line", "left"), ("ours", "left"), ("against", "left"), ("value", "right"), ("must", "right"), ("aim", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type] # rich names them so
    for line in report["lines"]:
        value = line["value"]
        unit = "x" if line["kind"] in ("ratio", "inverse") else " %" if line["kind"] == "increase" else " ms"
        colour = _COLOURS[line["verdict"]]
        table.add_row(
            line["title"], f"{line['ours']} {number(line['ours_value']['median'])}", f"{line['against']} {number(line['against_value']['median'])}",
            f"[{colour}]{value['median']:.2f}{unit}[/] [dim]({value['low']:.2f} - {value['high']:.2f})[/]", f"{line['must']:g}{unit}", f"{line['aim']:g}{unit}",
            f"[{colour}]{line['verdict']}[/]",
        )  # fmt: skip
    memory = report.get("memory_line")
    if memory:
        colour = _COLOURS[memory["verdict"]]
        table.add_row(
            "memory of prefill + decode", f"RSS {memory['rss'] / 1e6:.0f} MB", "", f"[{colour}]PSS {memory['pss'] / 1e6:.0f} MB[/]",
            f"{memory['must'] / 1e6:.0f} MB", f"{memory['aim'] / 1e6:.0f} MB", f"[{colour}]{memory['verdict']}[/]",
        )  # fmt: skip
    return table


def print_run(console: Console, title: str, figures: dict[str, Any]) -> None:
    """One run's figures, for `bench serve`."""
    table = Table(title=title, title_justify="left")
    for column in ("milliseconds", "mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(column, justify="left" if column == "milliseconds" else "right")
    for key, label in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_ms", "ITL"), ("e2e_ms", "E2E")):
        row = figures.get(key)
        if row:
            table.add_row(label, *(number(row[c]) for c in ("mean", "p50", "p90", "p95", "p99", "max")))
    console.print(table)
    console.print(
        f"{figures['num_requests']} requests in {figures['duration_s']:.2f} s, {figures['num_failed']} failed; "
        f"{number(figures['output_tok_s'])} output tok/s, {number(figures['requests_s'])} requests/s; "
        f"{figures['num_prompt_tokens']} prompt tokens" + (f" ({figures['num_cached_tokens']} cached)" if figures.get("num_cached_tokens") else "")
    )
    if "goodput" in figures:
        console.print(f"goodput {number(figures['goodput']['requests_s'])} requests/s ({figures['goodput']['share']:.0%} of all met every objective)")
    if "max_late_ms" in figures:
        console.print(f"latest request left {number(figures['max_late_ms'])} ms after its time")
    if figures["num_inexact"]:
        console.print(f"[yellow]{figures['num_inexact']} answers or prompts had other lengths than asked for; do not compare these figures[/]")
    console.print(f"[dim]the load generator used {figures['client_cpu_s']:.2f} s of CPU ({figures['client_cpu_share'] or 0:.0%} of one core)[/]")
    for error in figures["errors"]:
        console.print(f"[red]{escape(error)}[/]")
