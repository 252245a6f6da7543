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

from plugmesh_rollout.loop import curves
from plugmesh_rollout.loop.folder import RunFolder
from plugmesh_rollout.loop.run import Progress, run_processes
from plugmesh_rollout.loop.settings import Settings

_LOOK_S = 0.5


def run(path: pathlib.Path, *, changes: dict[str, Any], plain: bool, as_json: bool) -> int:
    """Returns the exit code: 0 when all steps are done, 1 when it was interrupted (it can be gone on with). Raises what `run_processes` raises."""
    settings = Settings.read(path, **changes)
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
    folder = RunFolder(settings.run.folder)
    told = 0
    started = time.monotonic()
    with contextlib.nullcontext() if plain else Live(console=console, refresh_per_second=4) as live:
        while not running.done():
            await asyncio.wait([running], timeout=_LOOK_S)
            figures = folder.read_figures()
            if live is not None:
                live.update(_table(figures, progress, time.monotonic() - started))
                continue
            for line in [x for x in curves.by_step(figures.get("trainer-0", [])) if x["step"] > max(told, progress.first_step)]:
                told = line["step"]
                accuracy = f" accuracy {line['accuracy']:.3f}" if "accuracy" in line else ""
                console.print(f"step {told} reward {line['reward']:.3f} loss {line['loss']:.4f} behind {json.dumps(line['lags'])}{accuracy}", soft_wrap=True, highlight=False)
    return running.result()


def _table(figures: curves.Figures, progress: Progress, seconds: float) -> Table:
    s = curves.summary(figures)
    table = Table(show_header=False, box=None)
    table.add_row("step", f"{s['last_step']} of {progress.steps}   {seconds:.0f} s" + (f"   {progress.num_restarts} restarts" if progress.num_restarts else ""))
    table.add_row("reward (10 steps)", _text(s["reward"]))
    table.add_row("held-out accuracy", _text(s["accuracy"]))
    table.add_row("trained tokens/s", _text(s["trained_tokens_per_s"], 0))
    total = sum(s["lags"].values()) or 1
    for lag, count in s["lags"].items():
        table.add_row(f"{lag} behind", f"{'█' * round(30 * count / total)} {count / total:.0%}")
    for worker, share in s["idle"].items():
        table.add_row(f"{worker} idle", "" if share is None else f"{'█' * round(30 * share)} {share:.0%}")
    return table


def _text(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
