"""The weightstore on the wire: translates RPCs into calls of the catalogue, the importer, the resolver and the blobs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import sqlalchemy.exc
import structlog

from plugmesh.config import SERVICE_NAMES
from plugmesh.errors import (
    Cancelled,
    ConfigError,
    DataLoss,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    PlugmeshError,
    Unavailable,
    from_info,
)
from plugmesh.mesh.api import Binding, ServiceContext
from plugmesh.mesh.hostid import host_id
from plugmesh_proto.v1 import weightstore_pb2 as pb
from plugmesh_proto.v1 import weightstore_pb2_grpc
from plugmesh_weightstore.blobs import BlobStore
from plugmesh_weightstore.catalogue import Catalogue, StoredModel
from plugmesh_weightstore.config import Settings
from plugmesh_weightstore.default_model import ensure_default
from plugmesh_weightstore.importing import AllowedRoots, import_model, sweep
from plugmesh_weightstore.measure import Measures
from plugmesh_weightstore.publishing import Declared, Order, publish
from plugmesh_weightstore.resolving import Resolver

log = structlog.get_logger()

FULL_NAME = "plugmesh_proto.v1.WeightStore"
PIECE_BYTES = 1 << 20
PUBLISHED_TOPIC = "weights.published"
_INLINE_TOTAL_BYTES = 96 << 10  # of all assets together: a manifest must fit into a message of 256 KiB
_PROGRESS_S = 0.1
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0

T = TypeVar("T")


class WeightStoreServicer(weightstore_pb2_grpc.WeightStoreServicer):
    """One method per RPC; see weightstore.proto for what each promises."""

    def __init__(self, owner: WeightStoreService) -> None:
        self._owner = owner
        self._measures = owner.measures

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsReply:
        with self._measures.call("ListModels") as facts:
            found = await self._owner.run("call", self._owner.catalogue.list_models)
            facts["num_models"] = len(found)
            return pb.ListModelsReply(models=[_summary(m) for m in found])

    async def Resolve(self, request: pb.ResolveRequest, context: Any) -> pb.ModelManifest:
        with self._measures.call("Resolve", model=request.model[:128], format=request.format[:64]) as facts:
            manifest = await self._owner.run("call", self._owner.manifest, request.model, request.format, request.tokenizer_only)
            facts.update(version=manifest.version, num_tensors=len(manifest.tensors), message_bytes=manifest.ByteSize())
            return manifest

    async def Import(self, request: pb.ImportRequest, context: Any) -> AsyncIterator[pb.ImportProgress]:
        if not request.path:
            raise InvalidRequest("name a file or folder", param="path")
        with self._measures.call("Import", file=Path(request.path).name[:128]) as facts:
            stop = threading.Event()
            latest: list[tuple[str, int, int]] = []  # at most one; a thread replaces it

            def note(phase: str, done: int, total: int) -> None:
                latest[:] = [(phase, done, total)]

            work = self._owner.begin_import(request, note, stop)
            try:
                seen: tuple[str, int, int] | None = None
                while not (await asyncio.wait({work}, timeout=_PROGRESS_S))[0]:
                    if latest and latest[0] != seen:
                        seen = latest[0]
                        yield pb.ImportProgress(phase=seen[0], done_bytes=seen[1], total_bytes=seen[2])
                model = await work
            finally:
                stop.set()  # where the client went away, the thread gives up at its next piece
            facts.update(model=_name(model), version=model.version, num_bytes=model.stored_bytes)
            yield pb.ImportProgress(phase="done", done_bytes=model.stored_bytes, total_bytes=model.stored_bytes, model=_summary(model))

    async def Publish(self, request_iterator: AsyncIterator[pb.PublishPart], context: Any) -> pb.PublishReply:
        with self._measures.call("Publish") as facts:
            reply = await self._owner.publish(request_iterator, facts)
            return reply

    async def Remove(self, request: pb.RemoveModelRequest, context: Any) -> pb.RemoveModelReply:
        with self._measures.call("Remove", model=request.model[:128]) as facts:
            freed = await self._owner.run("call", self._owner.remove, request.model)
            facts["freed_bytes"] = freed
            return pb.RemoveModelReply(freed_bytes=freed)

    async def ReadBlob(self, request: pb.ReadBlobRequest, context: Any) -> AsyncIterator[pb.BlobPiece]:
        with self._measures.call("ReadBlob", offset=request.offset, length=request.length) as facts, self._owner.slot("read"):
            num_bytes = await self._owner.run("call", self._owner.catalogue.has_blob, request.sha256)
            if num_bytes is None:
                raise NotFound(f"no model has a blob {request.sha256[:80]!r}", param="sha256")
            if not 0 <= request.offset <= num_bytes:
                raise InvalidRequest(f"offset {request.offset} is outside the {num_bytes} bytes of the blob", param="offset")
            if not 0 <= request.length <= num_bytes - request.offset:
                raise InvalidRequest(f"length {request.length} reaches beyond the {num_bytes} bytes of the blob", param="length")
            end = request.offset + request.length if request.length else num_bytes
            fd = self._owner.blobs.open(request.sha256)
            reading: asyncio.Future[bytes] | None = None
            try:
                at = request.offset
                while at < end:
                    reading = asyncio.ensure_future(self._owner.in_thread(os.pread, fd, min(PIECE_BYTES, end - at), at))
                    data = await asyncio.shield(reading)
                    if not data:
                        raise DataLoss(f"the blob {request.sha256} ends at byte {at}, expected {num_bytes}", sha256=request.sha256)
                    yield pb.BlobPiece(offset=at, data=data)
                    self._measures.read_bytes.inc(len(data))
                    at += len(data)
            finally:
                if reading is None or reading.done():
                    os.close(fd)
                else:  # cancelled while a thread reads: the number must not be given to another file before it is through
                    reading.add_done_callback(lambda _: os.close(fd))
            facts["num_bytes"] = end - request.offset


class WeightStoreService:
    """Owns the catalogue, the blobs, the threads that work on them and the two background tasks."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._settings: Settings = context.settings
        mesh = context.config.mesh
        self._data_dir: Path = mesh.data_dir.expanduser()
        self._cache_dir: Path = mesh.cache_dir.expanduser()
        self.measures = Measures(context.metrics)
        self._threads = concurrent.futures.ThreadPoolExecutor(8, thread_name_prefix="weightstore")
        self._import_threads = concurrent.futures.ThreadPoolExecutor(self._settings.max_imports, thread_name_prefix="import")
        self._limits = {"call": self._settings.max_calls, "import": self._settings.max_imports, "read": self._settings.max_readers}
        self._running = dict.fromkeys(self._limits, 0)
        self._imports: dict[asyncio.Task[StoredModel], threading.Event] = {}
        self._coming: set[concurrent.futures.Future[pb.PublishPart | None]] = set()  # what publications wait for
        self._tasks: list[asyncio.Task[None]] = []
        self._default: StoredModel | None = None
        self._configured_version = ""
        self._default_error: PlugmeshError | None = None
        self.tidy_up = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    # Life cycle.

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self.in_thread(self._open)
        try:
            await self._ensure_default()
        except PlugmeshError as e:
            # The rest of the mesh can start, and `Resolve` says what is missing.
            self._default_error = e
            log.error("weightstore.default_model_missing", model=self._context.config.mesh.model, code=e.code, error=e.message)
            self._tasks.append(asyncio.create_task(self._retry_default(), name="weightstore-default"))
        self.tidy_up.set()
        self._tasks.append(asyncio.create_task(self._tidy(), name="weightstore-tidy"))

    def bindings(self) -> Sequence[Binding]:
        add = weightstore_pb2_grpc.add_WeightStoreServicer_to_server
        return [Binding(add, WeightStoreServicer(self), FULL_NAME, grpc_only=frozenset({"ReadBlob", "Publish"}))]

    async def drain(self, deadline_s: float) -> None:
        """Running calls end by themselves; imports that are not through by the deadline are given up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()

    async def stop(self) -> None:
        for stop in self._imports.values():
            stop.set()
        for coming in list(self._coming):
            coming.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._imports, return_exceptions=True)
        loop = asyncio.get_running_loop()
        for pool in (self._import_threads, self._threads):
            await loop.run_in_executor(None, lambda p=pool: p.shutdown(wait=True, cancel_futures=True))  # type: ignore[misc] # lambda with a default
        if hasattr(self, "catalogue"):
            self.catalogue.close()

    def describe(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"roles": ("weightstore",)}
        if self._default is not None:
            facts |= {"model": _name(self._default), "weight_version": self._default.version}
        return facts

    # Work, in threads.

    def _open(self) -> None:
        root = (self._settings.store_dir or self._data_dir / "weights").expanduser()
        self.blobs = BlobStore(root)
        url = self._settings.database_url or f"sqlite:///{self.blobs.root / 'catalogue.sqlite3'}"
        password = self._password(url)
        deadline, pause = time.monotonic() + self._settings.database_timeout_s, 0.2
        while True:
            try:
                self.catalogue = Catalogue(url, password)
                break
            except sqlalchemy.exc.OperationalError as e:
                if time.monotonic() > deadline:
                    raise Unavailable("the catalogue's database does not answer", retry_after_s=5.0) from e
                log.warning("weightstore.waiting_for_database")
                time.sleep(pause)
                pause = min(2.0, pause * 2)
        self.resolver = Resolver(self.catalogue, self.blobs, self._context.plugins.records("weight_formats"))
        self.roots = AllowedRoots([self._cache_dir / "models", self._data_dir / "models", *self._settings.allowed_roots])

    def _password(self, url: str) -> str | None:
        with contextlib.suppress(sa.exc.ArgumentError):
            if sa.make_url(url).password is not None:
                raise ConfigError("keep the password out of database_url; name its file in database_password_file", key="services.weightstore.database_url")
        file = self._settings.database_password_file
        if file is None:
            return None
        try:
            return file.expanduser().read_text().strip()
        except OSError as e:
            raise ConfigError(f"cannot read {file}: {e.strerror}", key="services.weightstore.database_password_file") from e

    def find(self, model: str) -> StoredModel:
        """By name; the configured name, whatever its form, means the default."""
        wants_configured = model in ("", self._context.config.mesh.model)
        error = self._default_error
        if error is not None and wants_configured:
            raise from_info(error.code, error.message, error.param, error.retry_after_s, error.fields)
        try:
            return self.catalogue.find(model)
        except NotFound:
            if not model or not wants_configured:
                raise
            return self.catalogue.find(self._configured_version)

    def manifest(self, name: str, format: str, tokenizer_only: bool) -> pb.ModelManifest:
        model = self.find(name)
        format = format or "source"
        out = pb.ModelManifest(
            model=_name(model), version=model.version, architecture=model.architecture, config_json=model.config_json,
            format=format, host=host_id(),
        )  # fmt: skip
        publication = self.catalogue.publication(model.version)
        if publication is not None:
            out.publication = publication.number
            out.metadata.update(publication.metadata)
        for t in [] if tokenizer_only else self.resolver.tensors(model, format):
            out.tensors.add(
                name=t.name, dtype=t.dtype, shape=t.shape, sha256=t.blob.sha256, num_bytes=t.blob.num_bytes, path=str(self.blobs.path(t.blob.sha256))
            )
        inline = _INLINE_TOTAL_BYTES
        for asset, blob in sorted(model.assets, key=lambda a: a[1].num_bytes):
            entry = out.assets.add(name=asset, sha256=blob.sha256, num_bytes=blob.num_bytes, path=str(self.blobs.path(blob.sha256)))
            if blob.num_bytes <= min(inline, self._settings.inline_asset_bytes):
                entry.data = self.blobs.read(blob.sha256, blob.num_bytes)
                inline -= blob.num_bytes
        return out

    def begin_import(self, request: pb.ImportRequest, note: Callable[[str, int, int], None], stop: threading.Event) -> asyncio.Task[StoredModel]:
        """A task that outlives a client who goes away, until its thread has noticed `stop`."""

        def ended(task: asyncio.Task[StoredModel]) -> None:
            del self._imports[task]
            self.tidy_up.set()
            if not task.cancelled():
                task.exception()  # seen, also where nobody is left to hear of it

        task = asyncio.create_task(self.run("import", self.import_model, request, note, stop), name="weightstore-import")
        self._imports[task] = stop
        task.add_done_callback(ended)
        return task

    def import_model(self, request: pb.ImportRequest, note: Callable[[str, int, int], None], stop: threading.Event) -> StoredModel:
        model = import_model(
            Path(request.path), self.catalogue, self.blobs, self.roots, alias=request.model, make_default=request.make_default,
            max_bytes=self._settings.max_model_bytes, progress=note, cancelled=stop,
        )  # fmt: skip
        if request.make_default:
            self._default, self._default_error = model, None
        return model

    async def publish(self, parts: AsyncIterator[pb.PublishPart], facts: dict[str, Any]) -> pb.PublishReply:
        """See `weightstore.proto`. The publication goes on to its commit or its error even where the client went away meanwhile."""
        order = order_of(await self._next_part(parts))
        facts.update(model=order.model, num_tensors=len(order.tensors), metadata=dict(order.metadata))
        loop = asyncio.get_running_loop()

        def pieces() -> Iterator[bytes]:
            # Pulled by the thread that stores them, one at a time: a slow disk slows the sender, and memory stays bounded.
            while True:
                coming = asyncio.run_coroutine_threadsafe(self._next_part(parts), loop)
                self._coming.add(coming)
                try:
                    part = coming.result()
                except concurrent.futures.CancelledError:
                    raise Cancelled("the publication was cancelled") from None
                finally:
                    self._coming.discard(coming)
                if part is None:
                    return
                if part.WhichOneof("part") != "data" or not part.data:
                    raise InvalidRequest("after the header come bytes", param="data")
                yield part.data

        found = await self.run(
            "import", lambda: publish(
                order, pieces(), self.catalogue, self.blobs, max_bytes=self._settings.max_model_bytes, keep=self._settings.max_published_versions,
                in_use=self._served_versions,
            ),
        )  # fmt: skip
        if order.make_default:
            self._default, self._default_error = found.model, None
        if found.removed or found.num_reused:
            self.tidy_up.set()
        publication = found.publication
        facts.update(version=publication.version, publication=publication.number, num_bytes=found.received_bytes)
        if self._context.mesh is not None:
            event = pb.WeightsPublished(
                model=publication.alias, version=publication.version, base_version=publication.base_version, publication=publication.number,
                metadata=publication.metadata,
            )  # fmt: skip
            with contextlib.suppress(PlugmeshError):  # the broker is away: followers also ask from time to time
                await self._context.mesh.publish(PUBLISHED_TOPIC, event.SerializeToString())
        return pb.PublishReply(
            model=publication.alias, version=publication.version, publication=publication.number, received_bytes=found.received_bytes,
            num_reused_tensors=found.num_reused, removed_versions=found.removed,
        )  # fmt: skip

    async def _next_part(self, parts: AsyncIterator[pb.PublishPart]) -> pb.PublishPart | None:
        """None at the end of the stream. Raises DeadlineExceeded when nothing comes."""
        try:
            async with asyncio.timeout(self._settings.publish_idle_s):
                return await anext(parts, None)
        except TimeoutError:
            raise DeadlineExceeded(f"the publisher sent nothing for {self._settings.publish_idle_s:g} s") from None

    def _served_versions(self) -> frozenset[str]:
        mesh = self._context.mesh
        if mesh is None:
            return frozenset()
        return frozenset(i.weight_version for role in SERVICE_NAMES for i in mesh.instances(role, include_suspect=True) if i.role != "weightstore")

    def remove(self, name: str) -> int:
        model = self.catalogue.remove(name)
        log.info("weightstore.removed", model=_name(model), version=model.version)
        try:
            return sweep(self.catalogue, self.blobs, timeout_s=2.0)[1]
        except Unavailable:
            return 0  # an import is running; the background sweep frees the bytes after it
        finally:
            self._loop.call_soon_threadsafe(self.tidy_up.set)

    # Threads and limits.

    @contextlib.contextmanager
    def slot(self, kind: str) -> Iterator[None]:
        """Counts a running call of a kind. Raises Overloaded above its cap."""
        if self._running[kind] >= self._limits[kind]:
            raise Overloaded(f"{self._running[kind]} calls of the kind {kind!r} are running, at most {self._limits[kind]} are allowed", retry_after_s=1.0)
        self._running[kind] += 1
        self._idle.clear()
        self.measures.running.labels(kind).set(self._running[kind])
        try:
            yield
        finally:
            self._running[kind] -= 1
            if not any(self._running.values()):
                self._idle.set()
            self.measures.running.labels(kind).set(self._running[kind])

    async def in_thread(self, work: Callable[..., T], *args: Any, pool: concurrent.futures.Executor | None = None) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool or self._threads, work, *args)
        except sqlalchemy.exc.OperationalError as e:
            log.warning("weightstore.database_failed", error=type(e.orig).__name__)
            raise Unavailable("the catalogue's database does not answer", retry_after_s=2.0) from e

    async def run(self, kind: str, work: Callable[..., T], *args: Any) -> T:
        """`work` in a thread of its kind, counted against the kind's cap."""
        with self.slot(kind):
            return await self.in_thread(work, *args, pool=self._import_threads if kind == "import" else None)

    # Background.

    async def _ensure_default(self) -> None:
        self._default = await self.in_thread(
            lambda: ensure_default(
                self._context.config.mesh.model, self.catalogue, self.blobs, cache_dir=self._cache_dir,
                pull=self._settings.pull, max_bytes=self._settings.max_model_bytes,
            ),
            pool=self._import_threads,
        )  # fmt: skip
        self._default_error = None
        self._configured_version = self._default.version if self._default else ""

    async def _retry_default(self) -> None:
        """Tries again, ever more seldom, what may succeed later."""
        pause = _FIRST_RETRY_S
        while self._default_error is not None and self._default_error.retry_after_s > 0:
            await asyncio.sleep(pause)
            pause = min(_LAST_RETRY_S, pause * 2)
            try:
                if self._default_error is not None:  # an import with make_default may have settled it
                    await self._ensure_default()
            except PlugmeshError as e:
                self._default_error = e

    async def _tidy(self) -> None:
        """Sweeps what failed imports and removals left, once nobody writes, and brings the gauges up to date."""
        while True:
            await self.tidy_up.wait()
            self.tidy_up.clear()
            try:
                await self.in_thread(sweep, self.catalogue, self.blobs)
            except Unavailable:
                self.tidy_up.set()
                await asyncio.sleep(1.0)
            except Exception as e:
                log.error("weightstore.background_failed", error=type(e).__name__, exc_info=True)
            with contextlib.suppress(PlugmeshError, OSError):
                num_blobs, num_bytes = await self.in_thread(self.blobs.usage)
                self.measures.blobs.set(num_blobs)
                self.measures.blob_bytes.set(num_bytes)
                self.measures.models.set(len(await self.in_thread(self.catalogue.list_models)))


def order_of(part: pb.PublishPart | None) -> Order:
    """The header of a publication, its numbers not checked yet. Raises InvalidRequest for anything else."""
    if part is None or part.WhichOneof("part") != "header":
        raise InvalidRequest("a publication begins with its header", param="header")
    h = part.header
    if h.kind not in (pb.PublishHeader.FULL, pb.PublishHeader.DELTA):
        raise InvalidRequest("say whether all tensors come or those that changed", param="kind")
    tensors = tuple(Declared(t.name, t.dtype, tuple(t.shape), t.sha256) for t in h.tensors)
    return Order(h.model, h.base_version, h.kind == pb.PublishHeader.FULL, tensors, dict(h.metadata), h.make_default)


def _name(model: StoredModel) -> str:
    return model.aliases[0] if model.aliases else model.version


def _summary(model: StoredModel) -> pb.ModelSummary:
    return pb.ModelSummary(
        model=_name(model), version=model.version, architecture=model.architecture, num_parameters=model.num_parameters,
        stored_bytes=model.stored_bytes, source=model.source, formats=model.formats, imported_unix_s=model.imported_unix_s,
        license=model.license, context_length=model.context_length,
    )  # fmt: skip


def create(context: ServiceContext) -> WeightStoreService:
    """Light: database and folders are opened in `start`."""
    return WeightStoreService(context)
