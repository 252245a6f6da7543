"""The report on a terminal, and as a page of `docs/measurements`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plugmesh.bench.structured.rows import Grid, grids

_COLOURS = {"holds": "green", "missed": "red"}


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    """All tables, their notes, and what failed."""
    console.print(f"\n[bold]{escape(_machine(report))}[/]")
    if report["is_quick"]:
        console.print("[yellow]a quick run; these figures mean nothing[/]")
    for grid in grids(report):
        table = Table(title=grid.title, title_justify="left")
        for i, column in enumerate(grid.head):
            table.add_column(column, justify="right" if i and _is_figures(grid, i) else "left")
        for row in grid.rows:
            table.add_row(*(f"[{_COLOURS[c]}]{c}[/]" if c in _COLOURS else escape(c) for c in row))
        console.print(table)
        for note in grid.notes:
            console.print(f"  [dim]{escape(note)}[/]")
    for failure in report["failures"]:
        console.print(f"[red]failed[/] {failure['part']}: {escape(failure['reason'][:600])}")


def page(report: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# Structured output", "", f"{_machine(report)}. Model: {report['model']}. {report['finished'][:10]}, `{report['command']}`, "
        f"{report['num_rounds']} interleaved rounds, medians (lowest to highest). How it is measured: [benchmarking](../benchmarking.md#structured-output).", "",
    ]  # fmt: skip
    for grid in grids(report):
        lines += [f"## {grid.title[0].upper()}{grid.title[1:]}", "| " + " | ".join(grid.head) + " |", "|" + "---|" * len(grid.head)]
        lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in grid.rows]
        lines += ["", *(f"- {note}" for note in grid.notes), ""] if grid.notes else [""]
    lines += [f"- Not measured: {f['part']}: {' '.join(f['reason'].split())[:300]}" for f in report["failures"]]
    return "\n".join(lines).rstrip() + "\n"


def _machine(report: Mapping[str, Any]) -> str:
    m = report["machine"]
    return f"{m['cpu']}, {m['cores']} cores ({', '.join(m['features'])}), load before {m['load_before']:.1f}"


def _is_figures(grid: Grid, column: int) -> bool:
    return all(row[column][:1] in "0123456789-+" for row in grid.rows if row[column])
