"""What all commands print with: answers to standard output, everything about them to standard error."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """One clear line."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def print_json(value: Any) -> None:
    """Plain JSON, never coloured or wrapped."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=False, default=str) + "\n")
    sys.stdout.flush()


def amount(num_bytes: float) -> str:
    """Bytes for people: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def seconds(value: float) -> str:
    """A duration for people: 4.2 s, 3 min 5 s, 2 h 7 min."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def quiet_logs() -> None:
    """Events of the libraries that a command uses stay out of the terminal, errors excepted; services log to files."""
    from plugmesh import logs

    logs.configure("error")
