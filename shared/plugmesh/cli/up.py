"""`plugmesh up`: a mesh in the foreground until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import math
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

from rich.markup import escape

from plugmesh import config as configuration
from plugmesh import models
from plugmesh.cli import display, output, pull
from plugmesh.config import MeshConfig
from plugmesh.errors import AlreadyExists, ConfigError, PlugmeshError
from plugmesh.supervisor.children import ChildEvent, ChildState
from plugmesh.supervisor.launch import Launcher
from plugmesh.tasks import end

EXIT_OK, EXIT_FAILED = 0, 1


def run_up(
    *, port: int | None, config: pathlib.Path | None, nats: str, model: str | None, plain: bool, ready_timeout_s: float
) -> int:
    """0 after a stop that was asked for and orderly, 1 when the mesh did not come up or had to be killed.

    Raises:
        ConfigError: Before anything was started, or when a service refuses its configuration (everything is stopped again).
    """
    output.quiet_logs()
    settings = load(config, port=port, nats=nats, model=model)
    fetch_model(settings)
    return asyncio.run(_up(settings, plain=plain, ready_timeout_s=ready_timeout_s))


def load(config: pathlib.Path | None, *, port: int | None = None, nats: str = "", model: str | None = None, **overrides: Any) -> MeshConfig:
    """The configuration with the command line's options on top. Raises ConfigError."""
    if port is not None:
        overrides["services.gateway.port"] = port
    if nats:
        overrides["mesh.nats.url"] = nats
    if model:
        overrides["mesh.model"] = model
    return configuration.load(config, overrides=overrides)


def fetch_model(settings: MeshConfig) -> None:
    """Fetches a known model that is not here yet, with a progress bar; other names are the weightstore's business."""
    if settings.mesh.model in models.KNOWN:
        pull.fetch(settings.mesh.model, settings.mesh.cache_dir.expanduser())


@contextlib.contextmanager
def signals(on_first: Any, on_second: Any) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal call `on_first`, every later one `on_second`. Within a running loop."""
    loop = asyncio.get_running_loop()
    num = 0

    def handle() -> None:
        nonlocal num
        num += 1
        (on_first if num == 1 else on_second)()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _up(settings: MeshConfig, *, plain: bool, ready_timeout_s: float) -> int:
    stop = asyncio.Event()
    is_up = False

    def on_event(event: ChildEvent) -> None:
        if is_up or event.kind != "ready":  # the table shows a normal start
            output.err.print(display.event_line(event), soft_wrap=True)

    launcher = Launcher(settings, on_event=on_event)
    status = EXIT_OK
    started = time.monotonic()
    with signals(stop.set, launcher.kill):
        try:
            if await bring_up(launcher, stop, plain=plain, timeout_s=ready_timeout_s):
                is_up = True
                _announce(launcher, time.monotonic() - started)
                await stop.wait()
            if not stop.is_set():
                status = EXIT_FAILED
        except PlugmeshError as e:
            status = EXIT_FAILED
            if not isinstance(e, ConfigError | AlreadyExists):  # those two say all that is to be known
                show_failure(launcher)
            raise
        finally:
            if status == EXIT_OK:
                output.err.print("[dim]draining; Ctrl-C again stops at once[/]")
            if not await launcher.stop():
                status = EXIT_FAILED
                output.err.print("[yellow]stopped by force; nothing is left running[/]")
            elif status == EXIT_OK:
                output.err.print("[green]stopped[/]")
    return status


async def bring_up(launcher: Launcher, stop: asyncio.Event, *, plain: bool, timeout_s: float) -> bool:
    """Starts everything and waits, with a display, until a first token was served. False when stopped or failed before.

    Raises:
        ConfigError: A service refused the configuration; the message is its own.
        PlugmeshError: The broker or the first token failed.
    """
    with display.Progress(launcher, output.err, plain=plain) as progress:
        work = asyncio.create_task(launcher.start(progress.say, timeout_s), name="bring-up")
        stopping = asyncio.create_task(stop.wait(), name="stop-asked")
        try:
            while not work.done() and not stop.is_set():
                await asyncio.wait({work, stopping}, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
                progress.update()
            if work.done():
                work.result()
                progress.update()
                return True
            return False
        finally:
            await end(work, stopping, timeout_s=math.inf, patience_s=0.5)


def show_failure(launcher: Launcher) -> None:
    """Which services are not serving, and the last lines of their logs."""
    for status in launcher.snapshot():
        if status.state in (ChildState.READY, ChildState.STOPPED):
            continue
        output.err.print(f"[bold]{status.name}[/] is {status.state.value}{f': {escape(status.detail)}' if status.detail else ''}")
        for line in launcher.log_tail(status.name):
            output.err.print(f"  [dim]{escape(line[:400])}[/]", soft_wrap=True)


def _announce(launcher: Launcher, elapsed_s: float) -> None:
    url = launcher.run.gateway_url
    model = launcher.served_model
    out = output.out
    out.print(f"\n[bold green]●[/] [bold]plugmesh[/] serves [bold]{escape(model)}[/] at [bold cyan]{url}/v1[/]   [dim]first token after {output.seconds(elapsed_s)}[/]\n", soft_wrap=True)
    out.print(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\", markup=False, soft_wrap=True)
    out.print(
        f'    -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}\'\n',
        markup=False, soft_wrap=True,
    )  # fmt: skip
    rows = [("API page", f"{url}/docs"), ("status", "plugmesh status"), ("logs", launcher.run.runtime_dir + "/logs"), ("stop", "Ctrl-C")]
    for name, value in rows:
        out.print(f"  [dim]{name:<9}[/]{value}", soft_wrap=True)
    out.print()
