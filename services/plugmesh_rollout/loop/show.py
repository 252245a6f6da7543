"""`plugmesh rl run`: a run with its progress on the terminal, and its curves at the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import signal
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from plugmesh import logs
from plugmesh_rollout.loop import curves
from plugmesh_rollout.loop.folder import RunFolder
from plugmesh_rollout.loop.run import Progress, run_processes
from plugmesh_rollout.loop.settings import Settings

_LOOK_S = 0.5


def run(path: pathlib.Path, *, changes: dict[str, Any], plain: bool, as_json: bool) -> int:
    """Returns the exit code: 0 when all steps are done, 1 when it was interrupted (it can be gone on with). Raises what `run_processes` raises."""
    settings = Settings.read(path, **changes)
    logs.configure("warning", service="rl")  # the table of a run is in this process; its news would stand between the lines
    console = Console(stderr=as_json)
    done = asyncio.run(_run(settings, console, plain or as_json or not console.is_terminal))
    written = curves.write([settings.run.folder])
    if as_json:
        print(written[0].read_text())
    else:
        for file in written:
            console.print(str(file), soft_wrap=True)
    return 0 if done >= settings.run.steps or settings.run.time_limit_s else 1


async def _run(settings: Settings, console: Console, plain: bool) -> int:
    stop, progress = asyncio.Event(), Progress(settings.run.steps)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    console.print(f"{settings.task.name}: {settings.run.steps} steps of {settings.batch_rows} rows, workflow {settings.workflow.name} in {settings.run.folder}", soft_wrap=True)
    running = asyncio.create_task(run_processes(settings, progress, stop=stop))
    tail = Tail(RunFolder(settings.run.folder))
    told = 0
    started = time.monotonic()
    with contextlib.nullcontext() if plain else Live(console=console, auto_refresh=False) as live:
        while not running.done():
            await asyncio.wait([running], timeout=_LOOK_S)
            figures = tail.read()
            if live is not None:
                live.update(_table(figures, progress, time.monotonic() - started, stop.is_set()), refresh=True)
                continue
            for line in [x for x in curves.by_step(figures.get("trainer-0", [])) if x["step"] > max(told, progress.first_step)]:
                told = line["step"]
                held_out = f" held-out {line['held_out_reward']:.3f} accuracy {line['accuracy']:.3f}" if "accuracy" in line else ""
                console.print(f"step {told} reward {line['reward']:.3f} loss {line['loss']:.4f} behind {json.dumps(line['lags'])}{held_out}", soft_wrap=True, highlight=False)
    return running.result()


class Tail:
    """A run's figures as they grow: each look reads what came since the last one, not a whole run's lines twice a second."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._read: dict[pathlib.Path, int] = {}
        self._lines: dict[str, list[dict[str, Any]]] = {}

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """Lines by worker, as `RunFolder.read_figures`; the same lists every time."""
        for path in sorted(self._folder.figures.glob("*.jsonl")):
            with path.open("rb") as f:
                f.seek(self._read.get(path, 0))
                whole = f.read().rpartition(b"\n")[0]
            lines = self._lines.setdefault(path.stem, [])
            if whole:
                self._read[path] = self._read.get(path, 0) + len(whole) + 1
                for line in whole.split(b"\n"):
                    with contextlib.suppress(ValueError):  # one that a killed worker did not finish
                        lines.append(json.loads(line))
        return self._lines


_BAR = 30


def _table(figures: curves.Figures, progress: Progress, seconds: float, is_stopping: bool = False) -> Table:
    s = curves.summary(figures)
    trainer = figures.get("trainer-0", ())
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(min_width=20, no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row("step", f"{s['last_step']} of {progress.steps}   {seconds:.0f} s   {_doing(figures, progress, is_stopping)}".rstrip())
    if progress.num_restarts:
        table.add_row("restarts", str(progress.num_restarts))
    steps = curves.by_step(trainer)
    if steps:
        table.add_row("reward", f"{_text(s['reward'])}   (mean of {min(10, len(steps))} steps; the last one {_text(steps[-1]['reward'])})")
    measured = [line["before"] for line in trainer if "before" in line][:1] + [line for line in steps if "accuracy" in line]
    if measured:
        for name, key in (("held-out reward", "held_out_reward"), ("held-out accuracy", "accuracy")):
            first = f"   (at first {_text(measured[0][key])})" if len(measured) > 1 else ""
            table.add_row(name, _text(measured[-1][key]) + first)
    generated = sum(lines[-1].get("tokens", 0) for worker, lines in figures.items() if worker.startswith("rollout-") and lines)
    table.add_row("tokens", f"{generated} generated" + (f"   {s['trained_tokens_per_s']:.0f} trained/s" if s["trained_tokens_per_s"] else ""))
    total = sum(s["lags"].values())
    for lag, count in s["lags"].items():
        table.add_row(f"{lag} behind", _bar(count / total))
    for worker, share in s["idle"].items():
        if share is not None:
            table.add_row(f"{worker} idle", _bar(share))
    return table


def _doing(figures: curves.Figures, progress: Progress, is_stopping: bool) -> str:
    """What there is to wait for, while nothing else tells."""
    if is_stopping:
        return "stopping"
    if not progress.processes:
        return "making the first weights"
    return "" if figures.get("trainer-0") else "workers are starting"


def _bar(share: float) -> str:
    return f"{'█' * round(_BAR * share):<{_BAR}} {share:4.0%}"


def _text(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
