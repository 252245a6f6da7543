"""The loop as streams: each worker takes rows that have what it needs, and gives them what it makes. None of them knows another.

    feed -> rollout -> reward -> advantage -> train
               ^   \\-> (reference) ------------/ |
               +---------- new weights ---------+

How far generation may run ahead is the plan's (`plugmesh.records.LoopPlan`): admission bounds what is in flight, the table's window bounds what is selected, the
trainer refuses what exceeds the bound all the same.

    python -m plugmesh_rollout.loop.workers FOLDER ADDRESS rollout:0 [reward:0 advantage:0]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import pathlib
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog

from plugmesh import logs
from plugmesh.client.rollout import Batch, RolloutClient, Row
from plugmesh.client.rollout_values import Value
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError, InternalError, NotFound, Overloaded, PlugmeshError, StaleIncarnation
from plugmesh.host import PluginHost
from plugmesh.records import LoopPlan, LoopShape, Loss, Reward
from plugmesh_rollout.loop.backends import Backend, EngineBackend, MeshBackend
from plugmesh_rollout.loop.fleet import Fleet, connect
from plugmesh_rollout.loop.folder import Figures, RunFolder
from plugmesh_rollout.loop.losses import CoreLosses, group_advantages
from plugmesh_rollout.loop.policy import Policy, Sample, seed_of
from plugmesh_rollout.loop.publish import Decoders, Publisher, published_of
from plugmesh_rollout.loop.reference import Reference, is_wanted
from plugmesh_rollout.loop.rewards import CoreRewards
from plugmesh_rollout.loop.settings import Settings, checked
from plugmesh_rollout.loop.synchronous import examples_of, measured, policy_of, text_of
from plugmesh_rollout.loop.trainer import StepFacts, Trainer, TrainRow
from plugmesh_rollout.loop.workflows import CoreWorkflows

log = structlog.get_logger()

FIELDS = {
    "prompt_ids": "int32", "prompt": "str", "answer": "str", "response_ids": "int32", "logprobs": "float32", "versions": "int32", "reward": "float",
    "advantage": "float",
}  # fmt: skip
REFERENCE = {"reference": "float32"}  # where the loss asks for it; the task that makes it has the same name
TASKS = ("rollout", "reward", "advantage", "train")
_SINGULAR = {"losses": "loss"}
_WAIT_S = 1.0  # of a worker for rows, before it looks whether it is to stop


@dataclass(slots=True)
class Run:
    """What every worker of a run is given; workers end when `stop` is set."""

    settings: Settings
    plan: LoopPlan
    host: PluginHost
    folder: RunFolder
    client: RolloutClient
    topic: str
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    fleet: Fleet | None = None  # in place of what the settings name

    @contextlib.asynccontextmanager
    async def reach(self) -> AsyncIterator[Fleet]:
        """The mesh of a run whose backend is one."""
        if self.fleet is not None:
            yield self.fleet
            return
        async with contextlib.AsyncExitStack() as stack:
            fleet = await connect(self.settings.rollout)
            stack.push_async_callback(fleet.close)
            yield fleet

    def record(self, kind: str, name: str) -> Any:
        """Raises ConfigError naming those that there are."""
        records = {r.name: r for r in self.host.records(kind)}
        if name not in records:
            raise ConfigError(f"no {_SINGULAR.get(kind, kind.removesuffix('s'))} {name!r}; known: {', '.join(records)}")
        return records[name]

    def loss(self) -> Loss:
        loss: Loss = self.record("losses", self.settings.loss.name).build(self.settings.loss.options)
        return loss

    @property
    def needs_reference(self) -> bool:
        return is_wanted(self.loss())

    def figures(self, worker: str) -> Figures:
        return Figures(self.folder.figures / f"{worker}.jsonl")


def host_of(settings: Settings) -> PluginHost:
    """The plugins of a run, with the core's own records. Raises ConfigError."""
    config = MeshConfig.model_validate({"services": {"rollout": {"plugins": list(settings.run.plugins)}}, "plugins": settings.plugins})
    host = PluginHost.load(list(settings.run.plugins), config, service="rollout")
    for core in (CoreLosses(), CoreRewards(), CoreWorkflows()):
        host.register_builtin(core)
    return host


def plan_of(settings: Settings, host: PluginHost) -> LoopPlan:
    """Raises ConfigError for an unknown workflow, InvalidRequest for one that cannot work."""
    r = settings.rollout
    records = {x.name: x for x in host.records("workflows")}
    if settings.workflow.name not in records:
        raise ConfigError(f"no workflow {settings.workflow.name!r}; known: {', '.join(records)}")
    shape = LoopShape(r.group_size, r.groups_per_step, r.groups_at_once * r.workers)
    plan: LoopPlan = records[settings.workflow.name].plan(settings.workflow.options, shape)
    if plan.is_pinned and r.swap != "finish":
        raise ConfigError(f"rollout.swap: {r.swap} changes weights under sequences, and the policy pins those of each: use finish, or another policy")
    return plan


async def create_topic(client: RolloutClient, name: str, settings: Settings, plan: LoopPlan, *, with_reference: bool = False) -> None:
    """Raises InvalidRequest when the capacity is below what the plan needs.

    Args:
        with_reference: Rows also get what the reference model finds of them.
    """
    more = REFERENCE if with_reference else {}
    await client.create_topic(
        name, {**FIELDS, **more}, (*TASKS, *more), group_size=settings.rollout.group_size, capacity_rows=plan.capacity_rows, staleness=plan.staleness,
        batch_rows=settings.batch_rows if plan.is_gated else 0, admission_task="train" if plan.is_gated else "",
    )  # fmt: skip


# -- prompts ------------------------------------------------------------------------------------------------------------


async def feed(run: Run, first_group: int) -> None:
    """Puts prompts in order, group by group, as fast as admission lets them in; what is there already stays."""
    settings, examples, size = run.settings, examples_of(run.settings), run.settings.rollout.group_size
    group = first_group
    end = settings.run.steps * settings.rollout.groups_per_step
    while (group < end or run.plan.evicts) and not run.stop.is_set():
        e = examples.train(group)
        row: dict[str, Value] = {"prompt_ids": np.array(examples.prompt_ids(e), np.int32), "prompt": e.prompt, "answer": e.answer}
        rows = [Row(f"{group:08d}/{i}", row, group=f"{group:08d}") for i in range(size)]
        with contextlib.suppress(Overloaded):
            await run.client.put(run.topic, rows, keep_existing=True, wait_s=_WAIT_S)
            group += 1


# -- generation ---------------------------------------------------------------------------------------------------------


async def rollout(run: Run, number: int = 0, backend: Backend | None = None) -> None:
    """Keeps `groups_at_once` groups in the backend; each begins with the weights that are newest when it is handed out, or with those the plan pins."""
    s, figures = run.settings, run.figures(f"rollout-{number}")
    own = backend is None
    stack = contextlib.AsyncExitStack()
    if backend is None and s.rollout.backend == "mesh":
        backend = MeshBackend(Decoders(await stack.enter_async_context(run.reach()), published_of(run.folder), s.rollout.swap))
    elif backend is None:
        config, _ = await asyncio.to_thread(run.folder.load_weights, 0)
        backend = EngineBackend(policy_of(s, config), figures)
    slots, live = asyncio.Semaphore(s.rollout.groups_at_once), set[asyncio.Task[None]]()
    worker = _Rollout(run, backend, figures, slots)
    try:
        while not run.stop.is_set():
            for task in [t for t in live if t.done()]:
                live.discard(task)
                task.result()
            await slots.acquire()
            batch = await worker.next_group()
            if batch is None:
                slots.release()
                figures.now_and_then(tokens=worker.num_tokens, lost=worker.num_lost)
                continue
            live.add(asyncio.create_task(worker.generate(batch)))
    finally:
        for task in live:
            task.cancel()
        await asyncio.gather(*live, return_exceptions=True)
        figures.add(tokens=worker.num_tokens, lost=worker.num_lost, **({"moved": backend.num_moved} if isinstance(backend, MeshBackend) else {}))
        figures.close()
        if own:
            await backend.close()
        await stack.aclose()


class _Rollout:
    def __init__(self, run: Run, backend: Backend, figures: Figures, slots: asyncio.Semaphore) -> None:
        self._run = run
        self._backend = backend
        self._figures = figures
        self._slots = slots
        self.num_tokens = 0
        self.num_lost = 0

    async def next_group(self) -> Batch | None:
        """One group, stamped with the version that will generate it, which the backend has loaded.

        The stamp and the hand-out are one: were the row stamped later, or with a version that is not the newest, more rows could have to be trained by the next
        step than one step takes.
        """
        r, plan = self._run.settings.rollout, self._run.plan
        stamp = None if plan.is_pinned or self._backend.version < 0 else self._backend.version
        batch = await self._run.client.get(
            self._run.topic, "rollout", ["prompt_ids"], r.group_size, sampler="grpo_groups", any_version=True, stamp_version=stamp, lease_s=r.lease_s, wait_s=_WAIT_S,
        )  # fmt: skip
        if not batch:
            return None
        latest = batch.latest_version or 0
        if plan.is_pinned:
            wanted = max(0, group_number(batch.rows[0]) // r.groups_per_step - plan.staleness)
            if wanted != self._backend.version:
                await self._load(wanted)
        elif latest != self._backend.version:
            await self._run.client.release(batch)  # first: weights may come late
            await self._load(latest)
            return None if self._run.stop.is_set() else await self.next_group()
        return batch

    async def _load(self, version: int) -> None:
        tensors = (await asyncio.to_thread(self._run.folder.load_weights, version))[1] if self._backend.takes_weights else {}
        loading, stopping = asyncio.ensure_future(self._backend.load(version, tensors)), asyncio.ensure_future(self._run.stop.wait())
        try:
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)  # a mesh that is away is waited for without end
            if not loading.done():
                return
            loading.result()
        finally:
            loading.cancel()
            stopping.cancel()
        self._figures.add(version=version, tokens=self.num_tokens, lost=self.num_lost)

    async def generate(self, batch: Batch) -> None:
        s, number, name = self._run.settings, group_number(batch.rows[0]), batch.rows[0].group
        try:
            async with self._run.client.keep(batch):
                samples = await self._backend.generate(
                    f"{name}:{batch.lease_id}", batch.rows[0].fields["prompt_ids"].tolist(), len(batch), seed_of(s.run.seed, number),  # type: ignore[union-attr]
                    max_tokens=s.rollout.max_tokens, lengths=drawn_lengths(s, number),
                )  # fmt: skip
                if s.rollout.slow_s:
                    await asyncio.sleep(min(50.0, random.Random(f"{s.run.seed}/{number}").lognormvariate(0, 1.2)) * s.rollout.slow_s)
            self.num_tokens += sum(len(x.token_ids) for x in samples)
            await self._run.client.ack(batch, columns_of(samples), version=min((int(v) for x in samples for v in x.versions), default=None))
            self._figures.now_and_then(tokens=self.num_tokens, lost=self.num_lost)
        except (StaleIncarnation, NotFound):  # somebody else has the rows by now, or they were dropped as too old
            self.num_lost += 1
        finally:
            self._slots.release()


def columns_of(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """What a rollout worker gives a group's rows, in their order."""
    return {"response_ids": [x.token_ids for x in samples], "logprobs": [x.logprobs for x in samples], "versions": [x.versions for x in samples]}


def drawn_lengths(settings: Settings, group: int) -> list[int]:
    """Where `rollout.tail` asks for it: log-normal around a quarter of `max_tokens`, which is the longest; else empty."""
    r = settings.rollout
    if not r.tail:
        return []
    rng = np.random.default_rng([settings.run.seed, group, 7])
    return [int(x) for x in np.clip(rng.lognormal(np.log(r.max_tokens / 16), r.tail, r.group_size), 1, r.max_tokens)]


def group_number(row: Row) -> int:
    return int(row.group)


# -- scoring ------------------------------------------------------------------------------------------------------------


async def score(run: Run, number: int = 0) -> None:
    """Rewards responses, whichever are there."""
    reward: Reward = run.record("rewards", run.settings.reward.name).build(run.settings.reward.options)
    text = text_of(run.settings)

    def work(batch: Batch) -> dict[str, list[Any]]:
        rows = zip(batch.column("prompt"), batch.column("answer"), batch.column("response_ids"), strict=True)
        return {"reward": [float(reward.score(p, a, text.decode(ids))) for p, a, ids in rows]}

    await _stream(run, f"reward-{number}", "reward", ["prompt", "answer", "response_ids"], 64, work, min_rows=1)


async def advantage(run: Run, number: int = 0) -> None:
    """Compares the rewards of a group, once all of them are there."""
    size = run.settings.rollout.group_size

    def work(batch: Batch) -> dict[str, list[Any]]:
        found: dict[int, float] = {}
        groups: dict[str, list[Row]] = {}
        for row in batch.rows:
            groups.setdefault(row.group, []).append(row)
        for rows in groups.values():
            if len(rows) != size:
                raise InternalError(f"group {rows[0].group} came with {len(rows)} of {size} rows")
            rows.sort(key=lambda r: r.index)
            values = group_advantages([float(r.fields["reward"]) for r in rows], scale=run.settings.trainer.scale_advantages)  # type: ignore[arg-type]
            found |= {r.index: float(np.float32(a)) for r, a in zip(rows, values, strict=True)}
        return {"advantage": [found[i] for i in batch.indexes]}

    await _stream(run, f"advantage-{number}", "advantage", ["reward"], 8 * size, work, min_rows=size, sampler="grpo_groups")


async def reference(run: Run, number: int = 0) -> None:
    """Asks the run's version 0 about responses, a group at a time."""
    config, tensors = await asyncio.to_thread(run.folder.load_weights, 0)
    model = Reference(config, tensors, share_prompts=run.settings.trainer.share_prompts)
    size = run.settings.rollout.group_size

    def work(batch: Batch) -> dict[str, list[Any]]:
        rows = sorted(batch.rows, key=lambda r: r.index)
        found = model.logprobs(rows[0].fields["prompt_ids"], [r.fields["response_ids"] for r in rows])  # type: ignore[arg-type, misc]
        by_index = dict(zip((r.index for r in rows), found, strict=True))
        return {"reference": [by_index[i] for i in batch.indexes]}

    await _stream(run, f"reference-{number}", "reference", ["prompt_ids", "response_ids"], size, work, min_rows=size, sampler="grpo_groups")


async def _stream(
    run: Run, worker: str, task: str, fields: Sequence[str], num_rows: int, work: Callable[[Batch], dict[str, list[Any]]], *, min_rows: int,
    sampler: str = "sequential",
) -> None:  # fmt: skip
    """Takes batches, works on them and gives back what comes of it, until the run ends."""
    figures = run.figures(worker)
    num_done = 0
    try:
        while not run.stop.is_set():
            batch = await run.client.get(
                run.topic, task, fields, num_rows, min_rows=min_rows, sampler=sampler, any_version=True, lease_s=run.settings.rollout.lease_s, wait_s=_WAIT_S
            )
            if batch:
                start = time.perf_counter()
                async with run.client.keep(batch):
                    made = await asyncio.to_thread(work, batch)
                figures.worked(time.perf_counter() - start)
                with contextlib.suppress(StaleIncarnation, NotFound):
                    await run.client.ack(batch, made)
                num_done += len(batch)
            figures.now_and_then(rows=num_done)
    finally:
        figures.add(rows=num_done)
        figures.close()


# -- training -----------------------------------------------------------------------------------------------------------


async def train(run: Run, number: int = 0, on_step: Callable[[StepFacts], None] = lambda facts: None) -> Trainer:
    """Steps until the run's end; new weights after each. Goes on from the checkpoint where there is one."""
    s, folder, plan, figures = run.settings, run.folder, run.plan, run.figures("trainer-0")
    trainer, facts_before = await asyncio.to_thread(_trainer, run)
    if facts_before.get("topic") == run.topic:  # of a trainer that ended before it could tell the table
        await run.client.publish_version(run.topic, trainer.step_number)  # first: room that the old version gives would be too much
        await run.client.clear(run.topic, json.loads(facts_before["indexes"]))
    reward: Reward = run.record("rewards", s.reward.name).build(s.reward.options)
    policy: Policy | None = None
    started = time.monotonic()
    num_evicted = 0
    fields = ["prompt_ids", "response_ids", "logprobs", "versions", "reward", "advantage", *(REFERENCE if run.needs_reference else ())]
    publisher: Publisher | None = None
    stack = contextlib.AsyncExitStack()
    try:
        if s.rollout.backend == "mesh":
            publisher = Publisher(await stack.enter_async_context(run.reach()), folder, s, run.figures("publisher-0"))
            stack.push_async_callback(publisher.close)
            publisher.start(trainer.step_number)
        if trainer.step_number == 0 and s.run.eval_every:
            policy = policy_of(s, trainer.model.config)
            figures.add(before=await asyncio.to_thread(_measure, policy, trainer, s, reward))
        while trainer.step_number < s.run.steps and not run.stop.is_set():
            batch = await run.client.get(
                run.topic, "train", fields, s.batch_rows,
                sampler=plan.train_sampler, sampler_options=plan.train_options, batch_index=trainer.step_number, lease_s=s.rollout.lease_s, wait_s=_WAIT_S,
            )  # fmt: skip
            if not batch:
                continue
            start = time.perf_counter()
            async with run.client.keep(batch):
                facts = await asyncio.to_thread(_step, trainer, batch, plan.staleness)
                if s.trainer.pause_s:
                    await asyncio.sleep(s.trainer.pause_s)
                await asyncio.to_thread(folder.save_weights, trainer.step_number, trainer.model.config, trainer.model.arrays())
                if trainer.step_number % s.run.checkpoint_every == 0 or trainer.step_number == s.run.steps:
                    await asyncio.to_thread(trainer.save, folder.checkpoint, topic=run.topic, indexes=json.dumps(batch.indexes))
            await run.client.publish_version(run.topic, trainer.step_number)
            if publisher is not None:
                publisher.offer(trainer.step_number)
            try:
                await run.client.ack(batch)
            except StaleIncarnation:  # of a trainer that goes on from a checkpoint after somebody cleared the rows, or a lease that a pause outlasted
                await run.client.clear(run.topic, batch.indexes)
            kept = trainer.step_number - trainer.step_number % s.run.checkpoint_every
            folder.drop_weights(kept - plan.staleness)
            if plan.evicts:
                num_evicted += await run.client.clear(run.topic, older_than=trainer.step_number - plan.staleness)
            told: dict[str, Any] = {}
            if (s.run.eval_every and trainer.step_number % s.run.eval_every == 0) or trainer.step_number == s.run.steps:
                policy = policy or policy_of(s, trainer.model.config)
                told = await asyncio.to_thread(_measure, policy, trainer, s, reward)
            figures.worked(time.perf_counter() - start)
            figures.add(
                step=facts.step, loss=facts.loss, reward=facts.reward, grad_norm=facts.grad_norm, rows=facts.num_rows, tokens=facts.num_tokens,
                lags=facts.lags, means=facts.means, evicted=num_evicted, **told,
            )  # fmt: skip
            on_step(facts)
            if s.run.time_limit_s and time.monotonic() - started > s.run.time_limit_s:
                break
        if publisher is not None and not await publisher.finish():
            log.warning("rl.not_published", version=trainer.step_number)
    finally:
        await stack.aclose()
        figures.close()
        if policy is not None:
            policy.close()
    return trainer


def _trainer(run: Run) -> tuple[Trainer, dict[str, str]]:
    """And what its checkpoint says, where there is one."""
    config, tensors = run.folder.load_weights(0)
    trainer = Trainer(config, tensors, run.settings.trainer, run.loss())
    return trainer, trainer.load(run.folder.checkpoint) if run.folder.checkpoint.exists() else {}


def _step(trainer: Trainer, batch: Batch, staleness: int) -> StepFacts:
    rows = []
    for row in batch.rows:
        f: Any = row.fields
        group, i = row.id.split("/")
        rows.append(
            TrainRow(
                int(group) * 1024 + int(i), f["prompt_ids"], f["response_ids"], f["logprobs"], f["versions"], float(np.float32(f["advantage"])), f["reward"],
                f.get("reference"),
            )
        )
        if len(f["versions"]) and not 0 <= trainer.step_number - int(f["versions"].min()) <= staleness:
            raise InternalError(f"a token of version {f['versions'].min()} would be trained in step {trainer.step_number}, more than {staleness} behind")
    return trainer.step(rows)


def _measure(policy: Policy, trainer: Trainer, settings: Settings, reward: Reward) -> dict[str, float]:
    policy.load(trainer.step_number, trainer.model.arrays())
    return measured(policy, settings, reward)


# -- as processes -------------------------------------------------------------------------------------------------------

ROLES: dict[str, Callable[[Run, int], Awaitable[Any]]] = {"rollout": rollout, "reward": score, "advantage": advantage, "reference": reference, "train": train}


async def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m plugmesh_rollout.loop.workers", description="Workers of a run, in this process.")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("address", help="of the table")
    parser.add_argument("workers", nargs="+", help="role:number, of " + ", ".join(ROLES))
    given = parser.parse_args(arguments)
    logs.configure("warning", service="rollout", instance="+".join(given.workers))
    import torch

    torch.use_deterministic_algorithms(True)
    folder = RunFolder(given.folder)
    settings = checked(json.loads(folder.settings.read_text()))
    torch.set_num_threads(settings.trainer.threads if "train" in [w.partition(":")[0] for w in given.workers] else 1)
    host = host_of(settings)
    async with RolloutClient(given.address, retry_s=60.0) as client:
        run = Run(settings, plan_of(settings, host), host, folder, client, json.loads(folder.topic.read_text())["topic"])
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, run.stop.set)
        async with asyncio.TaskGroup() as group:
            for worker in given.workers:
                role, _, number = worker.partition(":")
                group.create_task(_role(run, role, int(number or 0)), name=worker)


async def _role(run: Run, role: str, number: int) -> None:
    await ROLES[role](run, number)


if __name__ == "__main__":
    try:
        asyncio.run(_main())
    except* PlugmeshError as group:
        for error in group.exceptions:
            print(error, file=sys.stderr)
        sys.exit(1)
