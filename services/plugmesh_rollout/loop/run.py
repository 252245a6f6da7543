"""A whole run: table, feed, worker processes, until the trainer has done its steps. What `plugmesh rl run` calls.

A run is its folder. Started again, it goes on from the trainer's checkpoint: with the same table where nothing but that step is missing, else with a new topic
that begins at the checkpoint's step, so that nothing is trained twice and admission starts with an empty table.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import safetensors
import structlog

from plugmesh.client.rollout import RolloutClient
from plugmesh.errors import ConfigError, InternalError, NotFound
from plugmesh_rollout.alone import Alone
from plugmesh_rollout.config import Settings as TableSettings
from plugmesh_rollout.loop.cores import set_apart
from plugmesh_rollout.loop.fleet import Fleet
from plugmesh_rollout.loop.folder import RunFolder
from plugmesh_rollout.loop.publish import check_mesh, published_of
from plugmesh_rollout.loop.settings import Settings
from plugmesh_rollout.loop.synchronous import first_weights
from plugmesh_rollout.loop.trainer import StepFacts, Trainer
from plugmesh_rollout.loop.workers import (
    Run,
    advantage,
    create_topic,
    feed,
    host_of,
    plan_of,
    reference,
    rollout,
    score,
    train,
)

log = structlog.get_logger()

MAX_RESTARTS = 5  # of one worker process
_STOP_S = 20.0


@dataclass(slots=True)
class Progress:
    """What a display may show; filled as the run goes on."""

    steps: int
    first_step: int = 0
    num_restarts: int = 0
    processes: dict[str, int] = field(default_factory=dict)  # worker to process id


@contextlib.asynccontextmanager
async def prepared(settings: Settings, fleet: Fleet | None = None) -> AsyncIterator[tuple[Run, int]]:
    """A run that workers can join: checked, version 0 made, the table there and its topic; and the step that it begins with.

    Raises:
        ConfigError: An unknown record or plugin, a folder of a run with other settings, or a mesh that cannot serve this run.
        InvalidRequest: A workflow that could not work, among others with a capacity below what it needs.
    """
    host = host_of(settings)
    plan = plan_of(settings, host)
    folder = RunFolder(settings.run.folder)
    written = settings.model_dump_json(indent=1)
    if folder.settings.exists() and _essential(json.loads(folder.settings.read_text())) != _essential(json.loads(written)):
        raise ConfigError(f"{folder.root} holds a run with other settings; take another folder, or remove it")
    folder.settings.write_text(written)
    if not folder.weights(0).exists():
        config, tensors = await asyncio.to_thread(first_weights, settings)
        folder.save_weights(0, config, tensors)
    step, facts = _checkpoint(folder)
    if settings.rollout.backend == "mesh":
        await check_mesh(settings, plan, folder.load_weights(0)[0], fleet)
        published_of(folder).forget_after(step)
    async with contextlib.AsyncExitStack() as stack:
        address = settings.run.table
        if not address:
            table = await Alone.start(folder.table, TableSettings(durability=settings.run.durability), host=host)
            stack.push_async_callback(table.stop)
            address = table.address
        client = await stack.enter_async_context(RolloutClient(address, retry_s=60.0))
        name = await _topic(client, folder, settings, step, facts)
        run = Run(settings, plan, host, folder, client, name, fleet=fleet)
        await create_topic(client, name, settings, plan, with_reference=run.needs_reference)
        folder.topic.write_text(json.dumps({"topic": name, "address": address}))
        await client.publish_version(name, step)
        if step and facts.get("topic") == name:
            await client.clear(name, json.loads(facts["indexes"]))  # trained already; the acknowledgement may have been lost
        yield run, step


def _essential(settings: dict[str, Any]) -> dict[str, Any]:
    """What must not change when a run goes on."""
    settings = json.loads(json.dumps(settings))
    for key in ("steps", "time_limit_s", "eval_every", "eval_examples", "table", "durability"):
        settings["run"].pop(key, None)
    for key in ("mesh", "nats", "nats_user", "nats_password_file", "address", "weightstore"):
        settings["rollout"].pop(key, None)
    return dict(settings)


def _checkpoint(folder: RunFolder) -> tuple[int, dict[str, str]]:
    if not folder.checkpoint.exists():
        return 0, {}
    with safetensors.safe_open(folder.checkpoint, "pt") as f:
        facts = dict(f.metadata())
    return int(facts["step"]), facts


async def _topic(client: RolloutClient, folder: RunFolder, settings: Settings, step: int, facts: dict[str, str]) -> str:
    """The topic to go on with: the one before if the checkpoint is its newest version, else one that starts at the checkpoint."""
    prefix = f"rl-{settings.run.seed}-{zlib.crc32(str(folder.root).encode()) if settings.run.table else 0}"
    number = 0
    if folder.topic.exists():
        before = json.loads(folder.topic.read_text())["topic"]
        number = int(before.rsplit("-", 1)[1])
        with contextlib.suppress(NotFound):
            state = await client.status(before)
            latest = state.latest_version or 0
            if latest in (step, step - 1) and (step == 0 or facts.get("topic") == before):
                return str(before)
            await client.drop_topic(before)
        number += 1
    return f"{prefix}-{number}"


async def run_in_process(settings: Settings, on_step: Callable[[StepFacts], None] = lambda facts: None, fleet: Fleet | None = None) -> Trainer:
    """All workers as tasks of this event loop, each a stream of its own, over a real table. For tests, and small runs.

    Args:
        fleet: The mesh of a run whose backend is one, in place of what the settings name.
    """
    async with prepared(settings, fleet) as (run, step):
        trainer, _ = await _until_trained(run, step, on_step)
        return trainer


async def _until_trained(run: Run, step: int, on_step: Callable[[StepFacts], None]) -> tuple[Trainer, None]:
    others = [
        asyncio.create_task(feed(run, step * run.settings.rollout.groups_per_step)),
        *(asyncio.create_task(rollout(run, i)) for i in range(run.settings.rollout.workers)),
        asyncio.create_task(score(run)),
        asyncio.create_task(advantage(run)),
        *([asyncio.create_task(reference(run))] if run.needs_reference else []),
    ]
    trainer = asyncio.create_task(train(run, 0, on_step))
    try:
        waiting = {trainer, *others}
        while not trainer.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {trainer}:
                task.result()
        return trainer.result(), None
    finally:
        run.stop.set()
        trainer.cancel()
        _, late = await asyncio.wait(others, timeout=_STOP_S)
        for task in late:
            task.cancel()
        await asyncio.gather(trainer, *others, return_exceptions=True)


async def run_processes(settings: Settings, progress: Progress, *, stop: asyncio.Event | None = None) -> int:
    """The same with a process for each rollout worker, one for scoring and one for the trainer, with one thread each.

    A worker process that dies is started again; its leases end and its rows go to whoever asks next. The trainer goes on from its checkpoint.

    Returns:
        The steps that are done: fewer than asked for when `stop` was set or the time was up.

    Raises:
        InternalError: A worker died too often.
    """
    with set_apart(settings.trainer.threads) if settings.run.pin else contextlib.nullcontext(set[int]()) as cores:
        return await _run_processes(settings, progress, stop, cores)


async def _run_processes(settings: Settings, progress: Progress, stop: asyncio.Event | None, trainers_cores: set[int]) -> int:
    async with prepared(settings) as (run, step):
        progress.first_step = step
        address = json.loads(run.folder.topic.read_text())["address"]
        stop = stop or asyncio.Event()
        teams = [[f"rollout:{i}"] for i in range(settings.rollout.workers)] + [["reward:0", "advantage:0"]]
        teams += [["reference:0"]] if run.needs_reference else []
        feeder = asyncio.create_task(feed(run, step * settings.rollout.groups_per_step))
        supervised = [asyncio.create_task(_supervise(run, address, team, progress)) for team in teams]
        trainer = asyncio.create_task(_supervise(run, address, ["train:0"], progress, until_done=True, cores=trainers_cores))
        stopping = asyncio.create_task(stop.wait())
        tasks = {trainer, stopping, feeder, *supervised}
        try:
            while not trainer.done() and not stopping.done():
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            run.stop.set()
            for task in (trainer, stopping, feeder, *supervised):
                task.cancel()
            await asyncio.gather(trainer, stopping, feeder, *supervised, return_exceptions=True)
        return _checkpoint(run.folder)[0]


async def _supervise(run: Run, address: str, team: Sequence[str], progress: Progress, *, until_done: bool = False, cores: Set[int] = frozenset()) -> None:
    """Keeps a worker process alive until cancelled; with `until_done`, until it ends well. `cores` are those that it may use, where there are any."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for attempt in range(MAX_RESTARTS + 1):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "plugmesh_rollout.loop.workers", str(run.folder.root), address, *team, env=environment
        )
        progress.processes[team[0]] = process.pid
        if cores:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, cores)  # before it has other threads, which will inherit it
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
            raise
        if code == 0 and until_done:
            return
        progress.num_restarts += 1
        log.warning("rl.worker_died", worker=team[0], exit_code=code, attempt=attempt)
        if until_done and run.settings.run.checkpoint_every != 1:
            raise InternalError(f"the trainer ended with {code}; the run goes on from its checkpoint when it is started again")
        await asyncio.sleep(min(5.0, 0.2 * 2**attempt))
    raise InternalError(f"worker {team[0]} died {MAX_RESTARTS + 1} times")
