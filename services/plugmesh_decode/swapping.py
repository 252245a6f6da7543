"""Other weights for a running instance: fetched and mapped beside the steps, exchanged between two of them, told to everybody who names versions.

`SwapWeights` asks for it; with `follow_model` the instance also does it by itself whenever new weights of that name are published. Old and new weights are both
in memory from the loading to the end of the exchange.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from google.protobuf.message import DecodeError

from plugmesh.errors import DeadlineExceeded, FailedPrecondition, NotFound, PlugmeshError
from plugmesh.mesh.api import Event, Mesh
from plugmesh.types import ModelConfig
from plugmesh_decode.config import Settings
from plugmesh_engine import Engine
from plugmesh_engine.driver import EngineDriver
from plugmesh_engine.seams import Model, PreparedWeights
from plugmesh_engine.swap import Swap, SwapMode, SwapReport, difference
from plugmesh_proto.v1 import weightstore_pb2

log = structlog.get_logger()

TOPIC = "weights.published"
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0


@dataclass(frozen=True, slots=True)
class Swapped:
    """How a swap went; `report` is None where the version was in force already."""

    manifest: weightstore_pb2.ModelManifest
    report: SwapReport | None
    load_ms: float
    num_bytes: int


class Swapper:
    """Swaps the weights of one instance, one swap at a time; lives in its event loop.

    Args:
        fetch: The manifest of a version or alias in the executor's format, readable on this host.
        load: Maps a manifest; blocks.
        on_begin: Called in the event loop before the engine learns of a swap: with what will be in force.
        on_end: Called afterwards, with what is in force: the new weights, or, where nothing came of it, the old ones.
    """

    def __init__(
        self, engine: Engine, driver: EngineDriver, manifest: weightstore_pb2.ModelManifest, *, fetch: Callable[[str], Any],
        load: Callable[[weightstore_pb2.ModelManifest], Model], on_begin: Callable[[weightstore_pb2.ModelManifest], None],
        on_end: Callable[[weightstore_pb2.ModelManifest, SwapReport | None], Any],
    ) -> None:  # fmt: skip
        self.manifest = manifest
        self._engine, self._driver = engine, driver
        self._fetch, self._load, self._on_begin, self._on_end = fetch, load, on_begin, on_end
        self._one_at_a_time = asyncio.Lock()

    async def swap(self, version: str, mode: SwapMode, timeout_s: float) -> Swapped:
        """Has the engine go over to other weights.

        Args:
            timeout_s: How long running requests may take to end (FINISH); new ones wait meanwhile.

        Raises:
            NotFound: The weightstore has no such version.
            FailedPrecondition: It is of another architecture or shape, or the executor cannot exchange weights.
            DeadlineExceeded: What runs did not end in time; the swap is withdrawn.
            PlugmeshError: It could not be fetched or loaded. In all cases the instance goes on as before.
        """
        async with self._one_at_a_time:
            began = time.monotonic()
            manifest = await self._fetch(version)
            if manifest.version == self.manifest.version:
                return Swapped(manifest, None, 0.0, 0)
            problem = difference(self._engine.model.config, ModelConfig.from_json(manifest.config_json))  # before gigabytes are mapped
            if problem:
                raise FailedPrecondition(f"weights can be swapped for those of the same model only: {problem}", param="version")
            model, prepared = await asyncio.to_thread(self._prepare, manifest)
            load_ms = 1e3 * (time.monotonic() - began)
            report: SwapReport | None = None
            self._on_begin(manifest)
            try:
                report = await self._exchange(model, prepared, mode, timeout_s)
                self.manifest = manifest
            finally:
                await self._on_end(self.manifest, report)
                await asyncio.to_thread(prepared.close)  # the old weights after an exchange, else the new ones
            num_bytes = model.num_mapped_bytes + model.num_copied_bytes
            log.info(
                "decode.swapped", old_version=report.old_version, new_version=report.new_version, mode=mode.value, pause_ms=round(report.pause_ms, 3),
                load_ms=round(load_ms, 1), num_bytes=num_bytes, num_running=report.num_running, num_restarted=report.num_restarted,
            )  # fmt: skip
            return Swapped(manifest, report, load_ms, num_bytes)

    def _prepare(self, manifest: weightstore_pb2.ModelManifest) -> tuple[Model, PreparedWeights]:
        model = self._load(manifest)
        return model, self._engine.prepare_swap(model)

    async def _exchange(self, model: Model, prepared: PreparedWeights, mode: SwapMode, timeout_s: float) -> SwapReport:
        swap = await self._driver.call(lambda engine: engine.swap(model, mode, prepared))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(swap.done)
        except TimeoutError:
            if await self._withdraw(swap):
                raise DeadlineExceeded(f"running requests did not end within {timeout_s:g} s; the old weights stay") from None
            return swap.done.result()
        except asyncio.CancelledError:  # the caller went away
            if not await asyncio.shield(self._withdraw(swap)):
                return swap.done.result()  # too late: it has happened, and the others must hear of it
            raise

    async def _withdraw(self, swap: Swap) -> bool:
        return await self._driver.call(lambda engine: not swap.done.done() and engine.withdraw_swap() is swap)


class Follower:
    """Keeps an instance on the newest published version of a model.

    A notification that was lost costs `poll_s`: the weightstore is asked that often anyway.
    """

    def __init__(self, mesh: Mesh, swapper: Swapper, settings: Settings) -> None:
        self._model = settings.follow_model
        self._mode, self._timeout_s, self._poll_s = SwapMode(settings.follow_mode), settings.swap_timeout_s, settings.follow_poll_s
        self._swapper = swapper
        self._news = asyncio.Event()
        self._stop = mesh.subscribe(TOPIC, self._on_published)
        self._task = asyncio.create_task(self._run(), name="decode.follow_model")

    async def close(self) -> None:
        self._stop()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _on_published(self, event: Event) -> None:
        with contextlib.suppress(DecodeError):
            if weightstore_pb2.WeightsPublished.FromString(event.data).model == self._model:
                self._news.set()

    async def _run(self) -> None:
        pause_s, retry_s = 0.0, FIRST_RETRY_S  # also at once: something may have been published while this instance started
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._news.wait()
            self._news.clear()
            try:
                await self._swapper.swap(self._model, self._mode, self._timeout_s)
                pause_s, retry_s = self._poll_s, FIRST_RETRY_S
            except NotFound:
                pause_s = self._poll_s  # nothing was published yet
            except PlugmeshError as e:
                log.warning("decode.follow_failed", model=self._model, code=e.code, error=e.message)
                pause_s, retry_s = retry_s, min(LAST_RETRY_S, 2 * retry_s)
            except Exception as e:
                log.exception("decode.follow_failed", model=self._model, error=type(e).__name__)
                pause_s = self._poll_s
