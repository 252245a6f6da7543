"""What `plugmesh up` and `run` show while a mesh starts: a live table on a terminal, one line per change elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from plugmesh.cli.output import seconds
from plugmesh.supervisor.children import ChildEvent, ChildState, ChildStatus
from plugmesh.supervisor.launch import Launcher

_WORDS = {
    ChildState.STARTING: ("starting", "cyan"),
    ChildState.READY: ("serving", "green"),
    ChildState.WAITING: ("crashed", "yellow"),
    ChildState.FAILED: ("given up", "bold red"),
    ChildState.STOPPING: ("stopping", "cyan"),
    ChildState.STOPPED: ("stopped", "dim"),
}
_EVENT_STYLE = {"crashed": "yellow", "gave_up": "bold red", "restarted": "green", "ready": "dim"}


class Progress:
    """Shows a launcher's children until the block ends. `step` names what is going on besides ("asking for a first token").

    Use as a context manager; `update` is called at every change and is cheap.
    """

    def __init__(self, launcher: Launcher, console: Console, *, plain: bool = False) -> None:
        self._launcher = launcher
        self._console = console
        self._live: Live | None = None
        self._plain = plain or not console.is_terminal
        self._started = time.monotonic()
        self._shown: dict[str, ChildState] = {}
        self._spinners: dict[str, Spinner] = {}
        self.step = ""

    def __enter__(self) -> Progress:
        if not self._plain:
            self._live = Live(self._table(), console=self._console, refresh_per_second=12, transient=True, get_renderable=self._table)
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self) -> None:
        """Prints what changed, where there is no live table (which redraws itself)."""
        if not self._plain:
            return
        for status in self._launcher.snapshot():
            if self._shown.get(status.name) is not status.state:
                self._shown[status.name] = status.state
                word, style = _WORDS[status.state]
                detail = f" ({escape(status.detail)})" if status.detail and status.state in (ChildState.WAITING, ChildState.FAILED) else ""
                self._console.print(f"[dim]{seconds(time.monotonic() - self._started):>7}[/] {status.name}: [{style}]{word}[/]{detail}")

    def say(self, step: str) -> None:
        """Sets the line below the table."""
        self.step = step
        if self._plain and step:
            self._console.print(f"[dim]{seconds(time.monotonic() - self._started):>7}[/] {escape(step)}")

    def _table(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_column(width=1)
        table.add_column(style="bold", min_width=12)
        table.add_column(min_width=9)
        table.add_column(justify="right", min_width=7)
        table.add_column(style="dim", overflow="ellipsis", no_wrap=True)
        now = time.monotonic()
        for status in self._launcher.snapshot():
            word, style = _WORDS[status.state]
            table.add_row(self._mark(status), status.name, Text(word, style=style), seconds(self._elapsed(status, now)), self._note(status))
        header = Text.assemble(
            ("plugmesh ", "bold"), (f"{self._launcher.config.mesh.name} · {self._launcher.config.mesh.model}", "dim"), "   ",
            (seconds(now - self._started), "bold cyan"),
        )  # fmt: skip
        return Group(header, table, Text(self.step, style="dim"))

    def _elapsed(self, status: ChildStatus, now: float) -> float:
        """How long it took to come up, or has been at it."""
        return max(0.0, (status.since if status.state is ChildState.READY else now) - self._started)

    def _mark(self, status: ChildStatus) -> Any:
        if status.state is ChildState.READY:
            return Text("●", style="green")
        if status.state in (ChildState.STARTING, ChildState.STOPPING):
            return self._spinners.setdefault(status.name, Spinner("dots", style="cyan"))
        return Text("●", style=_WORDS[status.state][1])

    def _note(self, status: ChildStatus) -> str:
        if status.state in (ChildState.WAITING, ChildState.FAILED):
            return status.detail
        return f"pid {status.pid}" if status.pid else ""


def event_line(event: ChildEvent) -> str:
    """One line for a running mesh: time, service, what happened."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.at_unix_s))
    return f"[dim]{clock}[/] [bold]{event.name}[/] [{_EVENT_STYLE[event.kind]}]{escape(event.text)}[/]"
