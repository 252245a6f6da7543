"""Compiled grammars from the mesh: `GrammarClient` for whoever asks for one, `Grammars` for whoever matches with them."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
import structlog

from plugmesh import wire
from plugmesh.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    GrammarTimeout,
    InternalError,
    Overloaded,
    PlugmeshError,
    Unavailable,
)
from plugmesh.grammar.seams import CompiledGrammar, GrammarEngine, GrammarVocabulary
from plugmesh.grammar.spec import GrammarSpec
from plugmesh.mesh.api import Mesh
from plugmesh.records import GrammarEngineRecord
from plugmesh.types import InstanceInfo
from plugmesh_proto.v1 import grammar_pb2 as pb
from plugmesh_proto.v1 import grammar_pb2_grpc

log = structlog.get_logger()

MAX_COMPILED_BYTES = 256 << 20
BIG_FORM_BYTES = 256 << 10  # takes a noticeable time to load: a form of 3 MB about 0.4 s
_LOST = (Unavailable, DeadlineExceeded, InternalError, Overloaded, DataLoss)  # another instance may do better

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unenforced:
    """A part of a schema that a `relaxed` grammar leaves out; `path` is a JSON Pointer."""

    keyword: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class GrammarInfo:
    """What the grammar service says of a compiled grammar; see `CompiledGrammarInfo` in grammar.proto."""

    key: str
    engine: str
    engine_version: str
    tokenizer_hash: str
    num_bytes: int
    was_cached: bool
    compile_ms: float
    unenforced: tuple[Unenforced, ...] = ()


def info_from_pb(m: pb.CompiledGrammarInfo) -> GrammarInfo:
    return GrammarInfo(
        m.key, m.engine, m.engine_version, m.tokenizer_hash, m.num_bytes, m.was_cached, m.compile_ms,
        tuple(Unenforced(u.keyword, u.path, u.reason) for u in m.unenforced))


def info_to_pb(info: GrammarInfo) -> pb.CompiledGrammarInfo:
    return pb.CompiledGrammarInfo(
        key=info.key, engine=info.engine, engine_version=info.engine_version, tokenizer_hash=info.tokenizer_hash, num_bytes=info.num_bytes,
        was_cached=info.was_cached, compile_ms=info.compile_ms,
        unenforced=[pb.UnenforcedKeyword(keyword=u.keyword, path=u.path, reason=u.reason) for u in info.unenforced])


class GrammarClient:
    """Asks the grammar service. Equal grammars go to the same instance first, so that each is compiled once per mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def compile(self, spec: GrammarSpec, model: str, *, timeout_s: float) -> GrammarInfo:
        """Compiles, or finds what was compiled before.

        Raises:
            UnsupportedGrammar: Malformed, or cannot be enforced exactly; `fields` hold "keyword" and "path".
            LimitExceeded: Larger than the service takes.
            GrammarTimeout: It takes too long to compile.
            Overloaded: All instances have enough to do.
            Unavailable: No instance lives, or none answers; `retry_after_s` says when to ask again.
        """
        request = pb.CompileGrammarRequest(spec=wire.spec_to_pb(spec), model=model)

        async def ask(info: InstanceInfo, left_s: float) -> GrammarInfo:
            stub = grammar_pb2_grpc.GrammarStub(self._mesh.channel("grammar", info.instance_id))
            return info_from_pb(await stub.Compile(request, timeout=left_s))

        return await self._try_each(spec, ask, timeout_s)

    async def export(self, spec: GrammarSpec, model: str, *, timeout_s: float) -> tuple[GrammarInfo, bytes]:
        """The compiled form, for the `load` of an engine of that name and version. Raises as `compile`."""
        request = pb.CompileGrammarRequest(spec=wire.spec_to_pb(spec), model=model)

        async def ask(instance: InstanceInfo, left_s: float) -> tuple[GrammarInfo, bytes]:
            stub = grammar_pb2_grpc.GrammarStub(self._mesh.direct_channel(instance))
            info, data = None, bytearray()
            async for part in stub.Export(request, timeout=left_s):
                info = info_from_pb(part.info) if info is None else info
                data += part.data
                if len(data) > min(info.num_bytes, MAX_COMPILED_BYTES):
                    raise DataLoss("a compiled grammar is longer than it said")
            if info is None or len(data) != info.num_bytes:
                raise DataLoss("a compiled grammar is shorter than it said")
            return info, bytes(data)

        return await self._try_each(spec, ask, timeout_s)

    async def _try_each(self, spec: GrammarSpec, ask: Callable[[InstanceInfo, float], Awaitable[T]], timeout_s: float) -> T:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        failure: PlugmeshError = Unavailable("no grammar service is there; requests without a grammar are served", retry_after_s=1)
        found = self._mesh.instances("grammar") or self._mesh.instances("grammar", include_suspect=True)
        named = hashlib.sha256(f"{spec.kind}\0{spec.source}".encode()).digest()
        for info in sorted(found, key=lambda i: hashlib.sha256(named + i.instance_id.encode()).digest()):
            left_s = deadline - loop.time()
            if left_s <= 0:
                break
            try:
                return await ask(info, left_s)
            except grpc.RpcError as e:
                problem = wire.error_from_rpc(e)
            except DataLoss as e:
                problem = e
            if isinstance(problem, GrammarTimeout) or not isinstance(problem, _LOST):
                raise problem
            log.info("grammar.instance_failed", instance=info.instance_id, code=problem.code)
            failure = problem
        if isinstance(failure, DeadlineExceeded | DataLoss):
            raise Unavailable(f"no grammar service answers: {failure.message}", retry_after_s=1) from failure
        raise failure


class Grammars:
    """Compiled grammars of one vocabulary, in memory; what is missing is exported by the grammar service. For one event loop.

    Forms are loaded in threads of their own, each once however many ask for it. Big ones one after another, so that they take one core at most from those
    who compute, and so that a small one never waits behind several of them.

    Args:
        engines: Records of the engines that may have compiled them; each is built when it is first needed.
        max_bytes: Of compiled grammars; the least recently used go. One that a matcher still uses lives on with it.
    """

    def __init__(
        self, mesh: Mesh, engines: Sequence[GrammarEngineRecord], vocabulary: GrammarVocabulary, *, max_bytes: int, timeout_s: float = 15.0
    ) -> None:
        self._client = GrammarClient(mesh)
        self._records = {record.name: record for record in engines}
        self._vocabulary = vocabulary
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._engines: dict[str, asyncio.Task[GrammarEngine]] = {}
        self._cached: collections.OrderedDict[str, CompiledGrammar] = collections.OrderedDict()
        self._loading: dict[str, asyncio.Task[CompiledGrammar]] = {}
        self._big = asyncio.Semaphore(1)
        self.cached_bytes = 0

    def __len__(self) -> int:
        return len(self._cached)

    def known(self, key: str) -> CompiledGrammar | None:
        """The grammar if it is in memory."""
        found = self._cached.get(key)
        if found is not None:
            self._cached.move_to_end(key)
        return found

    async def get(self, key: str, spec: GrammarSpec, model: str) -> CompiledGrammar:
        """The grammar that `key` names, loaded in a thread where it is not in memory.

        Args:
            key: As `GrammarClient.compile` told it; empty: not compiled yet.

        Raises:
            FailedPrecondition: It was compiled by an engine that is not loaded here, in another version, or for another tokenizer.
            UnsupportedGrammar, LimitExceeded, GrammarTimeout, Overloaded, Unavailable: As `GrammarClient.compile`.
        """
        found = self.known(key) if key else None
        if found is not None:
            return found
        single = key or repr((spec, model))
        task = self._loading.get(single)
        if task is None:
            task = self._loading[single] = asyncio.create_task(self._load(key, spec, model), name="load-grammar")
            task.add_done_callback(lambda done: (self._loading.pop(single, None), done.cancelled() or done.exception()))
        return await asyncio.shield(task)  # one caller's cancellation must not take it from the others

    async def stop(self) -> None:
        tasks = [*self._loading.values(), *self._engines.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _load(self, key: str, spec: GrammarSpec, model: str) -> CompiledGrammar:
        info, data = await self._client.export(spec, model, timeout_s=self._timeout_s)
        if info.tokenizer_hash != self._vocabulary.tokenizer_hash:
            raise FailedPrecondition("the grammar was compiled for another tokenizer than this model's")
        record = self._records.get(info.engine)
        if record is None or record.version != info.engine_version:
            have = f"version {record.version}" if record else "none"
            raise FailedPrecondition(f"the grammar was compiled by the engine {info.engine!r}, version {info.engine_version}; here is {have}")
        begin = asyncio.get_running_loop().time()
        engine = await self._engine(record)
        async with self._big if len(data) >= BIG_FORM_BYTES else contextlib.nullcontext():
            compiled = await asyncio.to_thread(engine.load, data)
        log.info(
            "grammar.loaded", key=info.key[:16], engine=info.engine, num_bytes=len(data),
            load_ms=round(1000 * (asyncio.get_running_loop().time() - begin), 1))
        for name in {key or info.key, info.key}:
            old = self._cached.pop(name, None)
            self.cached_bytes += compiled.num_bytes - (old.num_bytes if old else 0)
            self._cached[name] = compiled
        while self.cached_bytes > self._max_bytes and len(self._cached) > 1:
            self.cached_bytes -= self._cached.popitem(last=False)[1].num_bytes
        return compiled

    async def _engine(self, record: GrammarEngineRecord) -> GrammarEngine:
        task = self._engines.get(record.name)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._engines[record.name] = asyncio.create_task(asyncio.to_thread(record.build, self._vocabulary), name=f"build-{record.name}")
        return await asyncio.shield(task)
