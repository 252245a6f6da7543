"""The grammar service on the wire: translates RPCs into calls of the compiler, the matchers and the pool."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import structlog

from plugmesh import cards, wire
from plugmesh.errors import (
    AlreadyExists,
    InternalError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PlugmeshError,
    Unavailable,
)
from plugmesh.grammar.client import info_to_pb
from plugmesh.mesh.api import Binding, ServiceContext
from plugmesh.records import GrammarEngineRecord
from plugmesh_grammar.catalogue import Catalogue
from plugmesh_grammar.compile import Compiler, Entry
from plugmesh_grammar.config import Settings
from plugmesh_grammar.matching import MaskState, Matching
from plugmesh_grammar.measure import Measures
from plugmesh_grammar.pool import WorkerPool
from plugmesh_grammar.vocabularies import LoadedVocabulary, Vocabularies
from plugmesh_proto.v1 import grammar_pb2 as pb
from plugmesh_proto.v1 import grammar_pb2_grpc

log = structlog.get_logger()

FULL_NAME = "plugmesh_proto.v1.Grammar"
PART_BYTES = 192 << 10      # of an exported form; with what is around it below 256 KiB
_MAX_NAME_CHARS = 256       # of a sequence
_MAX_TOKENS = 4096          # in one AcceptTokens


def create(context: ServiceContext) -> GrammarService:
    """The service of one instance; see `plugmesh.mesh.api.Service`."""
    return GrammarService(context)


class GrammarService:
    """Life cycle of one instance; the RPCs are in `GrammarServicer`."""

    def __init__(self, context: ServiceContext) -> None:
        settings: Settings = context.settings
        self.settings = settings
        self._context = context
        self.records: list[GrammarEngineRecord] = context.plugins.records("grammar_engines")
        self.vocabularies = Vocabularies(context.mesh, settings)
        # The processes load the plugins that this one has loaded.
        config = context.config.model_copy(update={"services": {"grammar": {"plugins": list(context.plugins.slugs)}}})
        self.pool = WorkerPool(config, settings, on_load=self._show_load)
        self.matching = Matching(config, settings)
        self.catalogue = self._make_catalogue()
        self.compiler = Compiler(
            self.records, self.pool, self.catalogue, settings, plugin_settings={slug: config.plugins.get(slug, {}) for slug in context.plugins.slugs})
        self.num_streams = 0
        self.is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._default: LoadedVocabulary | None = None
        self.measures = Measures(context.metrics, self)

    def _make_catalogue(self) -> Catalogue | None:
        settings = self.settings
        if settings.catalogue_bytes == 0:
            return None
        data_dir = self._context.config.mesh.data_dir.expanduser()
        password = settings.database_password_file.read_text().strip() if settings.database_password_file else None
        url = settings.database_url or f"sqlite:///{data_dir / 'grammar' / 'catalogue.sqlite3'}"
        return Catalogue(url, password, max_bytes=settings.catalogue_bytes)

    def _show_load(self) -> None:
        """Goes out with the next renewal of the lease."""
        self._context.mesh.set_load(num_running=float(self.pool.num_running), num_waiting=float(self.pool.num_waiting))

    @property
    def num_killed(self) -> int:
        return self.pool.num_killed + self.matching.num_killed

    def bindings(self) -> Sequence[Binding]:
        add = grammar_pb2_grpc.add_GrammarServicer_to_server
        return [Binding(add, GrammarServicer(self), FULL_NAME, grpc_only=frozenset({"Export"}))]

    async def start(self) -> None:
        """Loads the deployment's vocabulary and starts one process. Raises the last failure when the weightstore stays away too long."""
        configured = str(self._context.config.mesh.model)
        # A path is the weightstore's affair; what it made of it is the default model.
        names = ("",) if "/" in configured or configured.endswith(".gguf") else (configured, "")
        if self.catalogue is not None:
            await asyncio.to_thread(self.catalogue.open)
        self._default = await self.vocabularies.start(names)
        self._show_load()
        for slug in cards.DEFAULT_ENGINES:
            if "plugins" not in self._context.config.services.get("grammar", {}) and (missing := cards.left_out(slug)):
                log.info("grammar.engine_left_out", engine=slug, not_installed=missing)
        if self.records:
            await self.pool.start(self._default.vocabulary, self._default.packed)
        else:
            log.warning("grammar.no_engine")

    async def drain(self, deadline_s: float) -> None:
        """Refuses new streams and waits until those open have ended."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()

    async def stop(self) -> None:
        await self.compiler.stop()
        await self.vocabularies.stop()
        await self.pool.stop()
        await self.matching.stop()
        if self.catalogue is not None:
            await asyncio.to_thread(self.catalogue.close)

    def describe(self) -> dict[str, Any]:
        return {"model": self._default.model, "weight_version": self._default.version} if self._default else {}

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Holds a place among the Masks streams. Raises Unavailable while draining and Overloaded when too many are open."""
        if self.is_draining:
            raise Unavailable("this grammar service is draining", retry_after_s=1)
        if self.num_streams >= self.settings.max_streams:
            raise Overloaded(f"{self.num_streams} streams are open", retry_after_s=1)
        self.num_streams += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_streams -= 1
            if not self.num_streams:
                self._idle.set()

    async def compiled(self, request: pb.CompileGrammarRequest) -> tuple[Entry, LoadedVocabulary]:
        """The grammar of a request, with its model's vocabulary. Raises as `Compiler.get` and `Vocabularies.get`."""
        spec = wire.spec_from_pb(request.spec)
        model = await self.vocabularies.get(request.model)
        entry = await self.compiler.get(spec, model)
        self.measures.num_lookups.labels(entry.source).inc()
        if entry.source == "compiled":
            self.measures.compile_seconds.labels(entry.compiled.engine).observe(entry.compiled.compile_ms / 1000)
        return entry, model

    @contextlib.contextmanager
    def call(self, method: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """Counts and logs one call; adds what the caller puts into the dictionary. Never a grammar's text."""
        begin, code = time.perf_counter(), "ok"
        try:
            yield facts
        except PlugmeshError as e:
            code = e.code
            raise
        except BaseException as e:
            code = "cancelled" if isinstance(e, asyncio.CancelledError | GeneratorExit) else "internal_error"
            raise
        finally:
            self.measures.num_calls.labels(method, code).inc()
            log.info(f"grammar.{method.lower()}", code=code, total_ms=round(1000 * (time.perf_counter() - begin), 2), **facts)


class GrammarServicer(grammar_pb2_grpc.GrammarServicer):
    """See grammar.proto. Raises PlugmeshErrors, which the carrier translates."""

    def __init__(self, service: GrammarService) -> None:
        self._service = service

    async def Compile(self, request: pb.CompileGrammarRequest, context: Any) -> pb.CompiledGrammarInfo:
        with self._service.call("Compile", **_facts(request)) as facts:
            entry, _ = await self._service.compiled(request)
            facts.update(_entry_facts(entry))
            return info_to_pb(entry.info)

    async def Export(self, request: pb.CompileGrammarRequest, context: Any) -> AsyncIterator[pb.GrammarPart]:
        with self._service.call("Export", **_facts(request)) as facts:
            entry, _ = await self._service.compiled(request)
            facts.update(_entry_facts(entry))
            data = entry.compiled.data
            for at in range(0, max(1, len(data)), PART_BYTES):
                part = pb.GrammarPart(data=data[at : at + PART_BYTES])
                if at == 0:
                    part.info.CopyFrom(info_to_pb(entry.info))
                yield part
                self._service.measures.exported_bytes.inc(len(part.data))

    async def Masks(self, request_iterator: AsyncIterator[pb.MaskRequest], context: Any) -> AsyncIterator[pb.MaskReply]:
        with self._service.call("Masks") as facts, self._service.stream():
            stream = MaskStream(self._service)
            try:
                async for request in request_iterator:
                    yield await stream.answer(request)
            finally:
                facts.update(num_requests=stream.num_requests, num_sequences=stream.num_opened, num_failed=stream.num_failed)
                await asyncio.shield(stream.close())

    async def Validate(self, request: pb.ValidateGrammarRequest, context: Any) -> pb.ValidateGrammarReply:
        with self._service.call("Validate", **_facts(request.grammar)) as facts:
            text = request.text.encode()
            if len(text) > self._service.settings.max_validate_bytes:
                raise PayloadTooLarge(f"the text has {len(text)} bytes, at most {self._service.settings.max_validate_bytes} are allowed", param="text")
            entry, model = await self._service.compiled(request.grammar)
            facts.update(_entry_facts(entry), num_text_bytes=len(text))
            found = await self._service.pool.validate(entry.compiled, text, model.vocabulary, model.packed)
            return pb.ValidateGrammarReply(is_valid=found["is_valid"], is_prefix=found["is_prefix"], num_valid_bytes=found["num_valid"])

    async def Describe(self, request: pb.DescribeGrammarsRequest, context: Any) -> pb.GrammarsDescription:
        service, settings = self._service, self._service.settings
        return pb.GrammarsDescription(
            engines=[pb.GrammarEngineInfo(name=r.name, version=r.version, languages=sorted(r.languages)) for r in service.records],
            num_cached=len(service.compiler), cached_bytes=service.compiler.cached_bytes, num_compiled=service.compiler.num_compiled,
            num_killed=service.num_killed, max_schema_bytes=settings.max_schema_bytes, max_schema_depth=settings.max_schema_depth,
            max_enum_values=settings.max_enum_values, max_regex_chars=settings.max_regex_chars, compile_timeout_s=settings.compile_timeout_s)


class MaskStream:
    """The sequences of one Masks stream. Every request is answered once, in order; an error ends its sequence only."""

    def __init__(self, service: GrammarService) -> None:
        self._service = service
        self._handles: dict[str, int] = {}
        self.num_requests = 0
        self.num_opened = 0
        self.num_failed = 0

    async def answer(self, request: pb.MaskRequest) -> pb.MaskReply:
        """The reply; an error is in it."""
        self.num_requests += 1
        name = request.sequence
        begin = time.perf_counter()
        try:
            state = await self._state(request)
        except PlugmeshError as e:
            error = e
        except Exception as e:
            log.warning("grammar.mask_failed", error=type(e).__name__)
            error = InternalError(f"the mask failed: {type(e).__name__}")
        else:
            self._service.measures.mask_seconds.observe(time.perf_counter() - begin)
            if state is None:
                return pb.MaskReply(sequence=name)
            return pb.MaskReply(
                sequence=name, mask=state.mask, is_completed=state.is_completed, is_terminated=state.is_terminated, forced=state.forced,
                num_accepted=state.num_accepted)
        self.num_failed += 1
        if not isinstance(error, AlreadyExists):
            await self._end(name)
        return pb.MaskReply(sequence=name[:_MAX_NAME_CHARS], error=wire.error_to_pb(error))

    async def close(self) -> None:
        for name in list(self._handles):
            await self._end(name)

    async def _end(self, name: str) -> None:
        handle = self._handles.pop(name, None)
        if handle is not None:
            await self._service.matching.close(handle)

    async def _state(self, request: pb.MaskRequest) -> MaskState | None:
        what, name, matching = request.WhichOneof("what"), request.sequence, self._service.matching
        if what == "open":
            return await self._open(name, request.open)
        if name not in self._handles:
            raise NotFound("there is no such sequence on this stream", param="sequence")
        handle = self._handles[name]
        if what == "accept":
            tokens = list(request.accept.token_ids)
            if len(tokens) > _MAX_TOKENS:
                raise LimitExceeded(f"{len(tokens)} tokens at once, at most {_MAX_TOKENS} are allowed", param="accept")
            return await matching.accept(handle, tokens)
        if what == "rollback":
            return await matching.rollback(handle, request.rollback)
        if what == "close":
            await self._end(name)
            return None
        raise InvalidRequest("say what to do: open, accept, rollback or close", param="what")

    async def _open(self, name: str, what: pb.OpenMatcher) -> MaskState:
        if name in self._handles:
            raise AlreadyExists("a sequence of that name is open on this stream", param="sequence")
        if not name or len(name) > _MAX_NAME_CHARS:
            raise InvalidRequest(f"a sequence has a name of 1 to {_MAX_NAME_CHARS} characters", param="sequence")
        if len(self._handles) >= self._service.settings.max_sequences_per_stream:
            raise LimitExceeded(f"{len(self._handles)} sequences are open on this stream", param="sequence")
        if what.key:
            entry = await self._service.compiler.by_key(what.key)
            model = self._service.vocabularies.by_hash(entry.tokenizer_hash)
            if model is None:
                raise NotFound("the model of that grammar is not loaded; send the grammar itself", param="key")
        else:
            entry, model = await self._service.compiled(what.grammar)
        handle, state = await self._service.matching.open(entry, model)
        self._handles[name] = handle
        self.num_opened += 1
        return state


def _facts(request: pb.CompileGrammarRequest) -> dict[str, Any]:
    return {"kind": request.spec.kind[:32], "num_chars": len(request.spec.source)}


def _entry_facts(entry: Entry) -> dict[str, Any]:
    info = entry.info
    return {
        "key": info.key[:16], "engine": info.engine, "source": entry.source, "num_bytes": info.num_bytes, "compile_ms": round(info.compile_ms, 2),
        "num_unenforced": len(info.unenforced),
    }
