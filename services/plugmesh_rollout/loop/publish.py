"""A run's weights, step by step, in a mesh: published in its weightstore, and served by its decode instances.

    trainer: step -> weights file -> table: "version k is the newest" -> Publisher.offer(k)        (the trainer goes on)
    Publisher: weightstore -> published.json: "version k is called 3f9c..." -> SwapWeights on every decode instance
    rollout worker: takes rows only for the newest version, and asks only instances that serve it (`Decoders`)

The table hears of a version before anybody can be asked with it, so no token is newer than what the table knows; a name is written down before any instance may
use it, so every token's version has a number. Delayed parameter update: AsyncFlow, arXiv:2507.01663.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import structlog

from plugmesh.client import weights
from plugmesh.client.decode import DecodeClient
from plugmesh.errors import ConfigError, DataLoss, DeadlineExceeded, NotFound, Overloaded, PlugmeshError, Unavailable
from plugmesh.types import InstanceInfo, ModelConfig
from plugmesh_engine.swap import difference
from plugmesh_engine.testing import to_bfloat16
from plugmesh_proto.v1 import decode_pb2, decode_pb2_grpc, weightstore_pb2, weightstore_pb2_grpc
from plugmesh_rollout.loop.fleet import Fleet, connect
from plugmesh_rollout.loop.folder import Figures, RunFolder
from plugmesh_rollout.loop.settings import Settings

if TYPE_CHECKING:
    from plugmesh.mesh.api import Mesh
    from plugmesh.records import LoopPlan

log = structlog.get_logger()

_KEPT = 256  # versions in the file: more than any staleness
_CALL_S = 10.0
_SWAP_S = 120.0
_LOOK_S = 0.02  # between two looks at the file
_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Version:
    """Weights of a run: their number, which is how many steps made them, and their name in the weightstore."""

    number: int
    name: str


class Published:
    """What a run has published, in a file of its folder that one process writes and many read.

    Two numbers may have one name: a step that changed no weight. The name then stands for the newer.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] = (0, 0)
        self._versions: list[Version] = []

    def all(self) -> list[Version]:
        """In the order of their numbers."""
        try:
            stat = self._path.stat()
            stamp = stat.st_mtime_ns, stat.st_ino
            if stamp != self._stamp:
                self._versions = [Version(int(n), str(name)) for n, name in json.loads(self._path.read_text())]
                self._stamp = stamp
        except FileNotFoundError:
            self._versions = []
        return self._versions

    def newest(self) -> Version | None:
        return versions[-1] if (versions := self.all()) else None

    def number_of(self, name: str) -> int | None:
        """None for a name that is none of this run's."""
        return next((v.number for v in reversed(self.all()) if v.name == name), None)

    def add(self, version: Version) -> None:
        """Numbers grow."""
        self._write([*(v for v in self.all() if v.number < version.number), version][-_KEPT:])

    def forget_after(self, number: int) -> None:
        """A run that goes on from a checkpoint makes those behind it again, and others than they were."""
        kept = [v for v in self.all() if v.number <= number]
        if len(kept) != len(self._versions):
            self._write(kept)

    def _write(self, versions: list[Version]) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps([[v.number, v.name] for v in versions]))
        part.replace(self._path)


def published_of(folder: RunFolder) -> Published:
    return Published(folder.root / "published.json")


class Decoders:
    """The decode instances of a mesh, and what each of them serves.

    An incarnation that is not known to serve wanted weights is asked what it serves, and swapped; until then nobody asks it for tokens.
    """

    def __init__(self, fleet: Fleet, published: Published, mode: str, *, swap_s: float = _SWAP_S) -> None:
        self._fleet, self._published, self._mode, self._swap_s = fleet, published, mode, swap_s
        self._serves: dict[tuple[str, str], int] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}

    @property
    def published(self) -> Published:
        return self._published

    def client(self, info: InstanceInfo, timeout_s: float = 3600.0) -> DecodeClient:
        return DecodeClient(self._fleet.direct_channel(info), timeout_s=timeout_s)

    def instances(self) -> list[InstanceInfo]:
        return self._fleet.instances("decode")

    def serving(self, number: int) -> list[InstanceInfo]:
        """Those that are known to serve this version or a newer one."""
        return [i for i in self.instances() if self._serves.get(_key(i), -1) >= number]

    def doubt(self, info: InstanceInfo) -> None:
        """It answered otherwise than expected, or not at all."""
        self._serves.pop(_key(info), None)

    async def bring(self, wanted: Version) -> list[decode_pb2.SwapWeightsReply]:
        """Has every instance serve these weights or newer ones of the run; what cannot be reached, or refuses, is left out. Answers of those that swapped."""
        return [r for r in await asyncio.gather(*(self._bring_one(i, wanted) for i in self.instances())) if r is not None]

    async def _bring_one(self, info: InstanceInfo, wanted: Version) -> decode_pb2.SwapWeightsReply | None:
        key = _key(info)
        async with self._locks.setdefault(key, asyncio.Lock()):
            if self._serves.get(key, -1) >= wanted.number:
                return None
            try:
                reply = None
                served = self._published.number_of(await self._served_by(info))
                if served is None or served < wanted.number:
                    wanted = max(wanted, self._published.newest() or wanted, key=lambda v: v.number)  # newer ones may have come while this one waited
                    reply = await self.client(info, self._swap_s).swap_weights(wanted.name, self._mode)
                    served = wanted.number
                self._serves[key] = served
                return reply
            except PlugmeshError as e:
                self._serves.pop(key, None)
                log.info("rl.swap_failed", instance=info.instance_id, version=wanted.number, code=e.code, error=e.message)
                if not isinstance(e, (Unavailable, Overloaded, DeadlineExceeded, NotFound, DataLoss)):
                    raise
                return None

    async def _served_by(self, info: InstanceInfo) -> str:
        stub = decode_pb2_grpc.DecodeStub(self._fleet.direct_channel(info))
        with weights.typed_errors():
            status = await stub.Status(decode_pb2.DecodeStatusRequest(), timeout=_CALL_S)
        return str(status.weight_version)


def _key(info: InstanceInfo) -> tuple[str, str]:
    return info.instance_id, info.incarnation


class Publisher:
    """Publishes what a trainer offers, always the newest, beside its work. For one event loop; `start` first, `close` at the end.

    A weightstore or an instance that is away is waited for; whatever else goes wrong is raised by the next `offer` or `finish`.
    """

    def __init__(self, fleet: Fleet, folder: RunFolder, settings: Settings, figures: Figures | None = None) -> None:
        self._fleet, self._folder, self._settings = fleet, folder, settings
        self._figures = figures
        self._published = published_of(folder)
        self._decoders = Decoders(fleet, self._published, settings.rollout.swap)
        self._offered = -1
        self._news, self._settled = asyncio.Event(), asyncio.Condition()
        self._done = -1
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None

    def start(self, number: int) -> None:
        """With the version that the trainer begins with; its weights are in the folder."""
        self._published.forget_after(number)
        self._task = asyncio.create_task(self._run(), name="rl.publish")
        self.offer(number)

    def offer(self, number: int) -> None:
        """These weights are the newest, and in the folder. Raises what ended the publisher."""
        if self._error is not None:
            raise self._error
        self._offered = number
        self._news.set()

    async def finish(self, timeout_s: float = 60.0) -> bool:
        """Waits until what was offered last is served. False where that took too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._settled:
                await self._settled.wait_for(lambda: self._error is not None or self._done >= self._offered)
        if self._error is not None:
            raise self._error
        return self._done >= self._offered

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._figures is not None:
            self._figures.close()

    async def _run(self) -> None:
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                number = self._offered
                try:
                    await self._publish(number)
                except (Unavailable, Overloaded, DeadlineExceeded, FileNotFoundError) as e:
                    log.warning("rl.publish_waits", version=number, error=str(e))
                    await asyncio.sleep(_RETRY_S)
                    self._news.set()
                    continue
                async with self._settled:
                    self._done = number
                    self._settled.notify_all()
        except Exception as e:
            log.error("rl.publish_failed", version=self._offered, error=str(e))
            async with self._settled:
                self._error = e
                self._settled.notify_all()

    async def _publish(self, number: int) -> None:
        start = time.perf_counter()
        told: dict[str, Any] = {}
        newest = self._published.newest()
        if newest is None or newest.number < number or not await self._is_there(newest.name):
            published = await self._send(number, newest.name if newest else "")
            newest = Version(number, published.version)
            self._published.add(newest)
            told = {"publication": published.number, "sent_bytes": published.sent_bytes, "retired": len(published.removed_versions)}
        told["publish_s"] = round(time.perf_counter() - start, 4)
        replies = await self._decoders.bring(newest)
        if self._figures is not None:
            self._figures.worked(time.perf_counter() - start)
            self._figures.add(
                version=number, swapped=len(replies), pause_ms=round(max((r.pause_ms for r in replies), default=0.0), 3),
                load_ms=round(max((r.load_ms for r in replies), default=0.0), 1), **told,
            )  # fmt: skip

    async def _send(self, number: int, before: str) -> weights.Published:
        r = self._settings.rollout
        _, tensors = await asyncio.to_thread(self._folder.load_weights, number)
        if r.publish_dtype == "bfloat16":
            tensors = {name: to_bfloat16(a) if a.ndim > 1 else a for name, a in tensors.items()}
        base = before if before and await self._is_there(before) else r.base
        facts = {"run_seed": str(self._settings.run.seed), "train_step": str(number)}
        # A delta: only tensors whose bytes differ from the base's go over the wire.
        return await weights.publish(cast("Mesh", self._fleet), r.publish_as, tensors, base_version=base or await _default_model(self._fleet), metadata=facts)

    async def _is_there(self, version: str) -> bool:
        try:
            await resolve(self._fleet, version)
        except NotFound:
            return False
        return True


async def resolve(fleet: Fleet, version: str) -> weightstore_pb2.ModelManifest:
    """Raises NotFound; Unavailable where there is no weightstore."""
    found = fleet.instances("weightstore")
    if not found:
        raise Unavailable("no weightstore is in the mesh", retry_after_s=1.0)
    stub = weightstore_pb2_grpc.WeightStoreStub(fleet.direct_channel(found[0]))
    with weights.typed_errors():
        manifest: weightstore_pb2.ModelManifest = await stub.Resolve(weightstore_pb2.ResolveRequest(model=version, tokenizer_only=True), timeout=_CALL_S)
    return manifest


async def _default_model(fleet: Fleet) -> str:
    return (await resolve(fleet, "")).version


async def check_mesh(settings: Settings, plan: LoopPlan, config: ModelConfig, fleet: Fleet | None = None) -> None:
    """What a run on a mesh needs, before anything is started.

    Raises:
        ConfigError: A workflow that pins versions, no mesh, no decode instance or weightstore, prefill instances, or a mesh with another model.
    """
    r = settings.rollout
    if plan.is_pinned:
        raise ConfigError(
            "rollout: backend mesh cannot generate with weights that a policy pins, because an instance serves one version: use the policy weight_fifo, "
            "ready_first or windowed, or the workflow synchronous"
        )
    if fleet is not None:
        await check_fleet(fleet, r.base, config)
        return
    connected = await connect(r)
    try:
        await check_fleet(connected, r.base, config)
    finally:
        await connected.close()


async def check_fleet(fleet: Fleet, base: str, config: ModelConfig) -> None:
    """See `check_mesh`."""
    for role in ("decode", "weightstore"):
        if not fleet.instances(role):
            raise ConfigError(f"rollout: backend mesh: the mesh has no {role} instance")
    prefill = fleet.instances("prefill")
    if prefill:
        raise ConfigError(
            f"rollout: backend mesh: {', '.join(i.instance_id for i in prefill)} would go on with old weights, because prefill instances do not follow swaps: "
            "set services.prefill.replicas = 0 in that mesh"
        )
    try:
        manifest = await resolve(fleet, base)
    except NotFound as e:
        raise ConfigError(f"rollout: backend mesh: {e.message}") from e
    except Unavailable as e:
        raise ConfigError(f"rollout: backend mesh: the weightstore does not answer: {e.message}") from e
    served = ModelConfig.from_json(manifest.config_json)
    if served.max_position >= config.max_position:  # a run may want less
        served = dataclasses.replace(served, max_position=config.max_position)
    problem = difference(config, served)
    if problem:
        raise ConfigError(
            f"rollout: backend mesh: the model {manifest.model} of the mesh is not that of the run: its {problem}; `plugmesh rl export` writes the run's model "
            "as a folder that `plugmesh up --model` takes"
        )


async def wait_for(published: Published, number: int) -> Version:
    """The newest version, once it is this one or a newer one. Waits without end: whoever asks has a lease that is kept, or is cancelled."""
    while (newest := published.newest()) is None or newest.number < number:  # noqa: ASYNC110  another process writes it
        await asyncio.sleep(_LOOK_S)
    return newest

