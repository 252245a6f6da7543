"""The decode service on the wire."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import prometheus_client
import structlog

from plugmesh.errors import InvalidRequest, NotFound, Unavailable
from plugmesh.hookspecs import hookimpl
from plugmesh.kv.stores import KvStores
from plugmesh.mesh.api import Binding, ServiceContext
from plugmesh.metrics import Metrics
from plugmesh.records import PrefillPolicyRecord
from plugmesh.wire import layout_to_pb
from plugmesh_decode.config import Settings
from plugmesh_decode.constraints import Constraints
from plugmesh_decode.events import MAX_IDS, KvEvents
from plugmesh_decode.generate import Generator
from plugmesh_decode.primitives import score, tap
from plugmesh_decode.session import Session
from plugmesh_decode.swapping import Follower, Swapper
from plugmesh_engine import EngineConfig, EnginePlugins, EngineStats, build_engine, load_model, weight_format
from plugmesh_engine.fetch import fetch_manifest
from plugmesh_engine.swap import SwapMode, SwapReport
from plugmesh_proto.v1 import decode_pb2 as pb
from plugmesh_proto.v1 import decode_pb2_grpc as rpc
from plugmesh_proto.v1 import kvstore_pb2, prefill_pb2, weightstore_pb2

log = structlog.get_logger()

PUBLISH_LOAD_S = 0.5
SWAP_FETCH_S = 120.0  # a weightstore that packs a large model takes its time
_MODES = {
    pb.SwapWeightsRequest.FINISH: SwapMode.FINISH, pb.SwapWeightsRequest.CONTINUE: SwapMode.CONTINUE, pb.SwapWeightsRequest.ABORT: SwapMode.ABORT,
}


def create(context: ServiceContext) -> DecodeService:
    return DecodeService(context)


class CorePrefillPolicy:
    """The default rule, registered through the same door as a plugin's."""

    def __init__(self, min_tokens: int) -> None:
        self._min_tokens = min_tokens

    @hookimpl
    def register_prefill_policies(self) -> list[PrefillPolicyRecord]:
        """Remote when the prompt is long and running sequences would have to wait for it."""
        return [
            PrefillPolicyRecord(
                name="when-others-would-wait",
                choose=lambda uncached, running, _: "remote" if uncached >= self._min_tokens and running > 0 else "local",
            )
        ]


@dataclass(frozen=True, slots=True)
class Counters:
    """Metrics of this service; docs/operations.md defines them."""

    requests: prometheus_client.Counter
    tokens: prometheus_client.Counter
    frames: prometheus_client.Counter
    prefills: prometheus_client.Counter
    blocks: prometheus_client.Gauge
    leaked: prometheus_client.Gauge
    sequences: prometheus_client.Gauge
    steps: prometheus_client.Gauge
    pending: prometheus_client.Gauge
    drafts: prometheus_client.Gauge
    draft_errors: prometheus_client.Gauge
    held: prometheus_client.Gauge
    forks: prometheus_client.Gauge
    scored: prometheus_client.Gauge
    filtered: prometheus_client.Gauge
    filter_errors: prometheus_client.Gauge
    masks: prometheus_client.Gauge
    masks_late: prometheus_client.Gauge
    jumped: prometheus_client.Gauge
    grammar_errors: prometheus_client.Gauge
    swaps: prometheus_client.Gauge

    @classmethod
    def make(cls, metrics: Metrics) -> Counters:
        return cls(
            requests=metrics.counter("decode_requests", "Requests by how they ended", ("outcome",)),
            tokens=metrics.counter("decode_tokens", "Generated tokens"),
            frames=metrics.counter("decode_frames", "Frames sent, one per step and consumer"),
            prefills=metrics.counter("decode_prefills", "Prompts by where they were computed", ("mode",)),
            blocks=metrics.gauge("kv_blocks", "KV blocks of the engine's pool", ("state",)),
            leaked=metrics.gauge("kv_blocks_leaked", "KV blocks with references that no live sequence accounts for"),
            sequences=metrics.gauge("engine_sequences", "Sequences in the engine", ("state",)),
            steps=metrics.gauge("engine_steps", "Steps since the start"),
            pending=metrics.gauge("engine_pending_tokens", "Prompt tokens to compute plus tokens to generate"),
            drafts=metrics.gauge("engine_draft_tokens", "Drafted tokens since the start, by what became of them", ("outcome",)),
            draft_errors=metrics.gauge("engine_draft_errors", "Steps without drafts since the start because the draft method failed"),
            held=metrics.gauge("engine_held_sequences", "Finished sequences that are held to fork from"),
            forks=metrics.gauge("engine_forks", "Requests since the start that went on from another one's sequence"),
            scored=metrics.gauge("engine_scored_tokens", "Given tokens since the start whose log-probabilities were told"),
            filtered=metrics.gauge("engine_filtered_prompts", "Prompts since the start of which a filter chose the tokens that were read"),
            filter_errors=metrics.gauge("engine_filter_errors", "Prompts since the start that were read whole because the filter failed"),
            masks=metrics.gauge("engine_grammar_rows", "Rows of sequences with a grammar since the start, by whether there was a mask and what it did", ("mask",)),
            masks_late=metrics.gauge("engine_masks_late", "Steps since the start that waited for a grammar's masks after their forward pass"),
            jumped=metrics.gauge("engine_jumped_tokens", "Tokens since the start that grammars forced, without a forward pass of their own"),
            grammar_errors=metrics.gauge("engine_grammar_errors", "Requests since the start that ended because their grammar's matcher failed"),
            swaps=metrics.gauge("engine_swaps", "Times since the start that the weights were exchanged"),
        )

    def show(self, stats: EngineStats) -> None:
        self.blocks.labels("used").set(stats.kv_blocks_used)
        self.blocks.labels("cached").set(stats.kv_blocks_cached)
        self.blocks.labels("total").set(stats.kv_blocks_total)
        self.leaked.set(stats.kv_blocks_leaked)
        self.sequences.labels("running").set(stats.num_running)
        self.sequences.labels("waiting").set(stats.num_waiting)
        self.steps.set(stats.num_steps)
        self.pending.set(stats.num_pending_tokens)
        self.drafts.labels("accepted").set(stats.num_draft_tokens_accepted)
        self.drafts.labels("rejected").set(stats.num_draft_tokens - stats.num_draft_tokens_accepted)
        self.draft_errors.set(stats.num_draft_errors)
        self.held.set(stats.num_held)
        self.forks.set(stats.num_forks)
        self.scored.set(stats.num_scored_tokens)
        self.filtered.set(stats.num_filtered_prompts)
        self.filter_errors.set(stats.num_filter_errors)
        self.masks.labels("filled").set(stats.num_masks_filled)
        self.masks.labels("checked").set(stats.num_checked)
        self.masks.labels("redrawn").set(stats.num_redrawn)
        self.masks.labels("skipped").set(stats.num_masks_skipped)
        self.masks_late.set(stats.num_masks_late)
        self.jumped.set(stats.num_jumped_tokens)
        self.grammar_errors.set(stats.num_grammar_errors)
        self.swaps.set(stats.num_swaps)


class DecodeService(rpc.DecodeServicer):
    """See `plugmesh.mesh.api.Service` for the life cycle."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._settings: Settings = context.settings
        self._counters = Counters.make(Metrics(context.metrics))
        self._stores: KvStores | None = None
        self._old_stores: KvStores | None = None  # of the weights before
        self._follower: Follower | None = None
        self._load_task: asyncio.Task[None] | None = None
        self._sessions: set[Session] = set()

    async def start(self) -> None:
        context, settings = self._context, self._settings
        context.plugins.register_builtin(CorePrefillPolicy(settings.remote_prefill_min_tokens))
        config = self._engine_config()
        plugins = EnginePlugins.from_host(context.plugins, settings.weight_format)
        manifest = await self._first_manifest(config)
        self._engine = await asyncio.to_thread(build_engine, manifest, config, plugins)
        self._manifest = manifest
        if settings.use_kvstore:
            self._stores = KvStores(
                context.mesh, self._engine.layout, holder=context.mesh.self_info.instance_id, incarnation=context.mesh.self_info.incarnation
            )
        self._constraints = Constraints(
            context.mesh, context.plugins.records("grammar_engines"), manifest.model, max_bytes=settings.max_grammar_bytes
        )
        self.generator = Generator(
            context.mesh, self._engine, settings, context.plugins, self._stores, context.plugins.last("prefill_policies"), self._counters,
            self._constraints, names=self._names_of(manifest),
        )
        self.generator.epochs[manifest.version] = manifest.publication
        self.swapper = Swapper(
            self._engine, self.generator.driver, manifest, fetch=lambda version: self._fetch(version, config),
            load=lambda found: load_model(found, config, plugins.weight_format), on_begin=self._on_swap_begins, on_end=self._on_swap_ended,
        )
        self.generator.driver.start()
        self._constraints.warm()
        self.kv_events = KvEvents(context.mesh, self.generator.driver)
        self._load_task = asyncio.create_task(self._publish_load())
        if settings.follow_model:
            self._follower = Follower(context.mesh, self.swapper, settings)

    async def _fetch(self, version: str, config: EngineConfig, timeout_s: float = SWAP_FETCH_S) -> weightstore_pb2.ModelManifest:
        format = self._settings.weight_format or weight_format(config)
        cache_dir = self._context.config.mesh.cache_dir.expanduser()
        return await fetch_manifest(self._context.mesh, version, format, cache_dir=cache_dir, timeout_s=timeout_s)

    async def _first_manifest(self, config: EngineConfig) -> weightstore_pb2.ModelManifest:
        if self._settings.follow_model:
            try:
                return await self._fetch(self._settings.follow_model, config, 300.0)
            except NotFound:
                log.info("decode.nothing_published_yet", model=self._settings.follow_model)
        return await self._fetch("", config, 300.0)

    def _names_of(self, manifest: weightstore_pb2.ModelManifest) -> set[str]:
        """What requests may call these weights. The name that the instance began with stays: gateways know it by that."""
        if not hasattr(self, "_model_name"):
            self._model_name = manifest.model
        return {"", self._model_name, manifest.model, manifest.version, self._context.config.mesh.model}

    def _on_swap_begins(self, manifest: weightstore_pb2.ModelManifest) -> None:
        self.generator.epochs[manifest.version] = manifest.publication
        self.generator.names.discard(self._manifest.version)  # who insists on the old version comes too late

    async def _on_swap_ended(self, manifest: weightstore_pb2.ModelManifest, report: SwapReport | None) -> None:
        old, self._manifest = self._manifest, manifest
        self.generator.names = self._names_of(manifest)
        if report is None:
            return
        self.generator.layout = self._engine.layout
        self.generator.fail_unbegun(old.version, NotFound(f"model {old.version!r} is not served here any more", param="model"))
        mesh = self._context.mesh
        if self._stores is not None:
            before, self._old_stores = self._old_stores, self._stores  # blocks of theirs may still be pinned
            self._stores = KvStores(mesh, self._engine.layout, holder=mesh.self_info.instance_id, incarnation=mesh.self_info.incarnation)
            self.generator.stores = self._stores
            if before is not None:
                await before.close()
        mesh.self_info = dataclasses.replace(mesh.self_info, weight_version=manifest.version)
        await mesh.flush_load()

    def _engine_config(self) -> EngineConfig:
        settings = self._settings
        return EngineConfig(
            executor=settings.executor, dtype=settings.dtype, kv_dtype=settings.kv_dtype, device=settings.device, num_blocks=settings.num_kv_blocks,
            commit_kv=settings.commit_kv,
            max_num_sequences=settings.max_num_sequences, max_tokens_per_step=settings.max_tokens_per_step, max_model_len=settings.max_model_len,
            max_waiting=settings.max_waiting, prefix_cache=settings.prefix_cache, num_threads=settings.num_threads,
            max_draft_tokens=settings.max_draft_tokens, max_held=settings.max_held_sequences,
            jump_forward=settings.jump_forward, grammar_timeout_s=settings.grammar_timeout_s,
        )

    def bindings(self) -> Sequence[Binding]:
        return [Binding(rpc.add_DecodeServicer_to_server, self, "plugmesh_proto.v1.Decode")]

    def describe(self) -> dict[str, Any]:
        return {"model": self._model_name, "weight_version": self._manifest.version, "roles": ("decode", "prefill-local")}

    async def drain(self, deadline_s: float) -> None:
        await self.generator.drain(deadline_s)
        for session in list(self._sessions):
            session.close(Unavailable("this decode instance has drained", retry_after_s=1))

    async def stop(self) -> None:
        if self._load_task is not None:
            self._load_task.cancel()
        if self._follower is not None:
            await self._follower.close()
        generator = getattr(self, "generator", None)
        if generator is not None:
            await self._constraints.close()
            await self.kv_events.close()
            generator.held.close()
            generator.remote.close()
            await generator.driver.stop()
            self._engine.close()
        for stores in (self._stores, self._old_stores):
            if stores is not None:
                await stores.close()

    # The wire

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.TokenFrame]:
        session = Session(self._settings.max_session_rows, comes_back=False)  # all through `frames`, which sees the last row
        self._sessions.add(session)
        self.generator.begin(request, session)
        try:
            async for frame in session.frames():
                yield frame
                if frame.rows[-1].request_done:
                    return
        finally:
            self._sessions.discard(session)
            self.generator.drop_session(session)

    async def Session(self, request_iterator: AsyncIterator[pb.DecodeCommand], context: grpc.aio.ServicerContext) -> AsyncIterator[pb.TokenFrame]:
        # Calls over the mesh can write at once; gRPC's own cannot.
        session = Session(self._settings.max_session_rows, getattr(context, "write_at_once", None))
        self._sessions.add(session)

        async def read() -> None:
            async for command in request_iterator:
                match command.WhichOneof("command"):
                    case "submit":
                        self.generator.begin(command.submit, session)
                    case "cancel":
                        self.generator.cancel(session, command.cancel)
                    case "release":
                        await self.generator.release(command.release.request_id)
            session.close()

        reader = asyncio.create_task(read())
        reader.add_done_callback(lambda task: session.close() if task.cancelled() or task.exception() else None)
        try:
            async for frame in session.frames():
                yield frame
        finally:
            reader.cancel()
            self._sessions.discard(session)
            self.generator.drop_session(session)

    async def ReportPrefill(self, request: prefill_pb2.PrefillEvent, context: grpc.aio.ServicerContext) -> pb.ReportPrefillReply:
        return pb.ReportPrefillReply(still_wanted=self.generator.remote.report(request))

    async def Status(self, request: pb.DecodeStatusRequest, context: grpc.aio.ServicerContext) -> pb.DecodeStatus:
        stats = await self.generator.driver.call(lambda engine: engine.stats())
        return pb.DecodeStatus(
            num_running=stats.num_running, num_waiting=stats.num_waiting, num_pending_tokens=stats.num_pending_tokens,
            kv_blocks_used=stats.kv_blocks_used, kv_blocks_cached=stats.kv_blocks_cached, kv_blocks_total=stats.kv_blocks_total,
            kv_blocks_leaked=stats.kv_blocks_leaked, num_steps=stats.num_steps, num_tokens_generated=stats.num_tokens_generated,
            weight_version=self._engine.model.version, model=self._model_name, max_model_len=self._engine.max_model_len,
            layout=layout_to_pb(self._engine.layout), weight_epoch=self.generator.epochs.get(self._engine.model.version, 0),
        )

    async def SwapWeights(self, request: pb.SwapWeightsRequest, context: grpc.aio.ServicerContext) -> pb.SwapWeightsReply:
        if not request.version:
            raise InvalidRequest("name the version to go over to", param="version")
        try:
            mode = _MODES[request.mode]
        except KeyError:
            raise InvalidRequest(f"unknown mode {request.mode}", param="mode") from None
        if request.timeout_s < 0:
            raise InvalidRequest("timeout_s must not be negative", param="timeout_s")
        done = await self.swapper.swap(request.version, mode, request.timeout_s or self._settings.swap_timeout_s)
        r = done.report
        return pb.SwapWeightsReply(
            old_version=r.old_version if r else done.manifest.version, new_version=done.manifest.version, pause_ms=r.pause_ms if r else 0.0,
            num_running=r.num_running if r else 0, num_restarted=r.num_restarted if r else 0, weight_epoch=done.manifest.publication,
            load_ms=done.load_ms, num_bytes=done.num_bytes,
        )

    async def Score(self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.TokenFrame]:
        async for frame in score(self.generator, self._settings, request):
            yield frame

    async def Tap(self, request: pb.TapRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.TapFrame]:
        async for frame in tap(self.generator, self._settings, request, self._engine.model.config.hidden_size):
            yield frame

    async def ReleaseHold(self, request: pb.ReleaseHoldRequest, context: grpc.aio.ServicerContext) -> pb.ReleaseHoldReply:
        return pb.ReleaseHoldReply(released=await self.generator.release(request.request_id))

    async def KvSnapshot(self, request: kvstore_pb2.SnapshotRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[kvstore_pb2.SnapshotPage]:
        sequence, ids = 0, list[bytes]()
        if request.model in ("", self._engine.layout.model):
            sequence, ids = await self.kv_events.snapshot()
        incarnation = self._context.mesh.self_info.incarnation
        for start in range(0, max(1, len(ids)), MAX_IDS):
            yield kvstore_pb2.SnapshotPage(as_of_sequence=sequence, incarnation=incarnation, block_ids=ids[start : start + MAX_IDS])

    async def _publish_load(self) -> None:
        mesh = self._context.mesh
        while True:
            stats = await self.generator.driver.call(lambda engine: engine.stats())
            self._counters.show(stats)
            mesh.set_load(
                num_running=stats.num_running, num_waiting=stats.num_waiting + self.generator.remote.num_waiting,
                num_pending_tokens=stats.num_pending_tokens, kv_blocks_used=stats.kv_blocks_used, kv_blocks_total=stats.kv_blocks_total,
                kv_event_sequence=self.kv_events.sequence,
            )
            await asyncio.sleep(PUBLISH_LOAD_S)
