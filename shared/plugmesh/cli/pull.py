"""`plugmesh pull`: a model's file into the cache, with a progress bar."""

from __future__ import annotations

import pathlib
import time

from plugmesh import config as configuration
from plugmesh import models
from plugmesh.cli import output


def run_pull(model: str, *, config: pathlib.Path | None, as_json: bool) -> None:
    """Prints where the model is. Raises PlugmeshError as `models.pull` does."""
    settings = configuration.load(config)
    cache_dir = settings.mesh.cache_dir.expanduser()
    was_there = models.find(model, cache_dir) is not None
    started = time.monotonic()
    path = fetch(model, cache_dir, quiet=as_json)
    elapsed_s = time.monotonic() - started
    if as_json:
        output.print_json({"model": model, "path": str(path), "num_bytes": _size(path), "fetched": not was_there, "seconds": round(elapsed_s, 3)})
    elif was_there:
        output.out.print(f"[green]✓[/] {model} is already there: {path} ({output.amount(_size(path))})", soft_wrap=True)
    else:
        output.out.print(f"[green]✓[/] {model} in {output.seconds(elapsed_s)}: {path} ({output.amount(_size(path))})", soft_wrap=True)


def fetch(model: str, cache_dir: pathlib.Path, *, quiet: bool = False) -> pathlib.Path:
    """The model's path; fetched first where it is missing, with a bar on standard error."""
    found = models.find(model, cache_dir)
    if found is not None or quiet:
        return found or models.pull(model, cache_dir)
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    words = {"wait": "waiting for another process", "download": "downloading", "unpack": "unpacking", "done": "done"}
    with Progress(*columns, console=output.err, transient=True) as progress:
        task = progress.add_task(f"{model}: looking", total=None)
        phase_now = ""

        def show(phase: str, done: int, total: int) -> None:
            nonlocal phase_now
            if phase != phase_now:
                phase_now = phase
                progress.reset(task, description=f"{model}: {words.get(phase, phase)}", total=total or None)
            progress.update(task, completed=done, total=total or None)

        return models.pull(model, cache_dir, progress=show)


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
