"""The prefill service on the wire."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from plugmesh.errors import Unavailable
from plugmesh.hookspecs import hookimpl
from plugmesh.kv.stores import KvStores
from plugmesh.mesh.api import Binding, ServiceContext
from plugmesh.metrics import Metrics
from plugmesh.records import HandOver, KvHandOverRecord
from plugmesh_engine import EngineConfig, EnginePlugins, build_engine, weight_format
from plugmesh_engine.fetch import fetch_manifest
from plugmesh_prefill.compute import PrefillRunner
from plugmesh_prefill.config import Settings
from plugmesh_prefill.take_jobs import JobTaker
from plugmesh_proto.v1 import prefill_pb2 as pb
from plugmesh_proto.v1 import prefill_pb2_grpc as rpc

PUBLISH_LOAD_S = 0.5


def create(context: ServiceContext) -> PrefillService:
    return PrefillService(context)


class CoreHandOver:
    """The default: store finished blocks while the next chunk runs, chunks as the scheduler cuts them."""

    @hookimpl
    def register_kv_hand_overs(self) -> list[KvHandOverRecord]:
        return [KvHandOverRecord(name="overlapped", plan=lambda num_prompt_tokens, layout: HandOver())]


class PrefillService(rpc.PrefillServicer):
    """See `plugmesh.mesh.api.Service` for the life cycle."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._settings: Settings = context.settings
        metrics = Metrics(context.metrics)
        self._jobs = metrics.counter("prefill_jobs", "Prefill jobs by how they ended", ("outcome",))
        self._leaked = metrics.gauge("kv_blocks_leaked", "KV blocks with references that no live sequence accounts for")
        self._blocks = metrics.gauge("kv_blocks", "KV blocks of the engine's pool", ("state",))
        self._stored = metrics.gauge("prefill_stored_bytes", "Bytes of KV handed to the kvstore since the start")
        self._stores: KvStores | None = None
        self._runner: PrefillRunner | None = None
        self._taker: JobTaker | None = None
        self._load_task: asyncio.Task[None] | None = None
        self._is_draining = False

    async def start(self) -> None:
        context, settings = self._context, self._settings
        context.plugins.register_builtin(CoreHandOver())
        config = self._engine_config()
        plugins = EnginePlugins.from_host(context.plugins, settings.weight_format)
        manifest = await fetch_manifest(
            context.mesh, "", settings.weight_format or weight_format(config), cache_dir=context.config.mesh.cache_dir.expanduser()
        )
        self._manifest = manifest
        self._engine = await asyncio.to_thread(build_engine, manifest, config, plugins)
        me = context.mesh.self_info
        self._stores = KvStores(context.mesh, self._engine.layout, holder=me.instance_id, incarnation=me.incarnation)
        self._runner = PrefillRunner(
            self._engine, self._stores, context.plugins, context.plugins.last("kv_hand_overs"), instance=me.instance_id, max_jobs=settings.max_jobs
        )
        self._runner.driver.start()
        self._taker = JobTaker(
            context.mesh, self._runner, max_jobs=settings.max_jobs, ack_wait_s=settings.job_ack_wait_s,
            max_deliveries=settings.max_deliveries, count=lambda outcome: self._jobs.labels(outcome).inc(),
        )
        self._taker.start()
        self._load_task = asyncio.create_task(self._publish_load())

    def _engine_config(self) -> EngineConfig:
        settings = self._settings
        return EngineConfig(
            executor=settings.executor, dtype=settings.dtype, kv_dtype=settings.kv_dtype, device=settings.device, num_blocks=settings.num_kv_blocks,
            commit_kv=settings.commit_kv,
            max_num_sequences=settings.max_jobs, max_tokens_per_step=settings.max_tokens_per_step, max_model_len=settings.max_model_len,
            prefix_cache=settings.prefix_cache, num_threads=settings.num_threads,
        )

    def bindings(self) -> Sequence[Binding]:
        return [Binding(rpc.add_PrefillServicer_to_server, self, "plugmesh_proto.v1.Prefill")]

    def describe(self) -> dict[str, Any]:
        return {"model": self._manifest.model, "weight_version": self._manifest.version, "roles": ("prefill",)}

    async def drain(self, deadline_s: float) -> None:
        self._is_draining = True
        if self._taker is not None and self._runner is not None:
            await self._taker.stop()
            with contextlib.suppress(TimeoutError):
                await self._runner.wait_idle(deadline_s)

    async def stop(self) -> None:
        if self._load_task is not None:
            self._load_task.cancel()
        if self._taker is not None:
            await self._taker.stop()
            await self._taker.cancel_running()
        if self._runner is not None:
            await self._runner.driver.stop()
            self._engine.close()
        if self._stores is not None:
            await self._stores.close()

    # The wire

    async def Run(self, request: pb.PrefillJob, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.PrefillEvent]:
        assert self._runner is not None
        if self._is_draining:
            raise Unavailable("this prefill instance is draining", retry_after_s=1)
        events = self._runner.run(request)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event
        self._jobs.labels("done").inc()

    async def Status(self, request: pb.PrefillStatusRequest, context: grpc.aio.ServicerContext) -> pb.PrefillStatus:
        assert self._runner is not None
        stats = await self._runner.driver.call(lambda engine: engine.stats())
        return pb.PrefillStatus(
            num_running=self._runner.num_running, num_pending_tokens=stats.num_pending_tokens, num_jobs_done=self._runner.num_done,
            kv_blocks_used=stats.kv_blocks_used, kv_blocks_total=stats.kv_blocks_total,
        )

    async def _publish_load(self) -> None:
        assert self._runner is not None
        while True:
            stats = await self._runner.driver.call(lambda engine: engine.stats())
            self._leaked.set(stats.kv_blocks_leaked)
            self._blocks.labels("used").set(stats.kv_blocks_used)
            self._blocks.labels("total").set(stats.kv_blocks_total)
            self._stored.set(self._runner.num_stored_bytes)
            self._context.mesh.set_load(
                num_running=self._runner.num_running, num_pending_tokens=stats.num_pending_tokens, kv_blocks_used=stats.kv_blocks_used,
                kv_blocks_total=stats.kv_blocks_total,
            )
            await asyncio.sleep(PUBLISH_LOAD_S)
