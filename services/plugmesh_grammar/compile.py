"""From a specification to its compiled form: out of memory, out of the catalogue, or from a worker; each once, however many ask."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from plugmesh.errors import InvalidRequest, NotFound, PlugmeshError, Unavailable, UnsupportedGrammar
from plugmesh.grammar.client import GrammarInfo, Unenforced
from plugmesh.grammar.spec import GrammarSpec
from plugmesh.records import GrammarEngineRecord
from plugmesh_grammar.catalogue import Catalogue
from plugmesh_grammar.check import check
from plugmesh_grammar.config import Settings
from plugmesh_grammar.pool import Compiled, WorkerPool
from plugmesh_grammar.vocabularies import LoadedVocabulary

log = structlog.get_logger()

_MAX_REFUSED = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One compiled grammar; `source` says where this answer came from: "memory", "catalogue" or "compiled"."""

    key: str
    tokenizer_hash: str
    compiled: Compiled
    source: str = "memory"

    @property
    def info(self) -> GrammarInfo:
        c = self.compiled
        return GrammarInfo(
            self.key, c.engine, c.engine_version, self.tokenizer_hash, len(c.data), self.source != "compiled", c.compile_ms,
            tuple(Unenforced(*u) for u in c.unenforced))


@functools.cache
def front_end_version() -> str:
    """Of everything that decides into what a grammar is lowered: the front end's own code, so that nobody can forget to count it up."""
    digest = hashlib.sha256()
    for path in sorted((pathlib.Path(__file__).parent / "schema").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()  # TOML has dates


class Compiler:
    """For one event loop; nothing blocks it for longer than looking through one grammar's text takes.

    Args:
        plugin_settings: `[plugins.<slug>]` of the plugins that bring the engines; a form that was compiled under others is not used again.
    """

    def __init__(
        self, records: Sequence[GrammarEngineRecord], pool: WorkerPool, catalogue: Catalogue | None, settings: Settings, *,
        plugin_settings: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._records = list(records)
        self._pool = pool
        self._catalogue = catalogue
        self._settings = settings
        self._made_by = (front_end_version(), {slug: table for slug, table in plugin_settings.items() if table})
        self._cached: collections.OrderedDict[str, Entry] = collections.OrderedDict()  # by request hash
        self._by_key: dict[str, str] = {}
        self._running: dict[str, asyncio.Task[Entry]] = {}
        self._refused: collections.OrderedDict[str, tuple[PlugmeshError, float]] = collections.OrderedDict()
        self.cached_bytes = 0
        self.num_compiled = 0

    def __len__(self) -> int:
        return len(self._cached)

    async def get(self, spec: GrammarSpec, model: LoadedVocabulary) -> Entry:
        """The compiled form of a grammar for a model.

        Raises:
            UnsupportedGrammar, LimitExceeded, InvalidRequest: What is wrong with it.
            GrammarTimeout: It took too long; the next call tries again.
            Overloaded: Too many wait.
            Unavailable: There is no engine, or none starts.
        """
        if not self._records:
            raise Unavailable("no grammar engine is installed; grammars cannot be compiled", retry_after_s=30)
        if spec.engine and all(r.name != spec.engine for r in self._records):
            raise InvalidRequest(f"there is no grammar engine {spec.engine[:64]!r}; there are {', '.join(r.name for r in self._records)}", param="grammar.engine")
        fields = dataclasses.asdict(spec)
        request = _hash(fields, model.hash, self._made_by, [[r.name, r.version] for r in self._records])
        found = self._known(request)
        if found is not None:
            return found
        error, until = self._refused.get(request, (None, 0.0))
        if error is not None and time.monotonic() < until:
            raise error.with_traceback(None)
        check(spec, self._settings)
        task = self._running.get(request)
        if task is None:
            task = self._running[request] = asyncio.create_task(self._find_or_compile(request, spec, model), name="compile-grammar")
            task.add_done_callback(lambda done: (self._running.pop(request, None), done.cancelled() or done.exception()))
        return await asyncio.shield(task)  # one caller's cancellation must not take it from the others

    async def by_key(self, key: str) -> Entry:
        """A grammar that was compiled before. Raises NotFound."""
        request = self._by_key.get(key)
        found = self._known(request) if request is not None else None
        if found is None and self._catalogue is not None and len(key) == 64:
            row = await asyncio.to_thread(self._catalogue.get_by_key, key)
            if row is not None and any((r.name, r.version) == (row[2].engine, row[2].engine_version) for r in self._records):
                found = Entry(key, row[0], row[2], "catalogue")
        if found is None:
            raise NotFound("no grammar of that key is compiled; send the grammar itself", param="key")
        return found

    async def stop(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _known(self, request: str) -> Entry | None:
        found = self._cached.get(request)
        if found is not None:
            self._cached.move_to_end(request)
        return found

    async def _find_or_compile(self, request: str, spec: GrammarSpec, model: LoadedVocabulary) -> Entry:
        if self._catalogue is not None:
            row = await asyncio.to_thread(self._catalogue.get, request)
            if row is not None:
                return self._keep(request, Entry(row[0], model.hash, row[1], "catalogue"))
        try:
            compiled = await self._pool.compile(spec, model.vocabulary, model.packed)
        except UnsupportedGrammar as e:
            # What the engines cannot do they cannot do a moment later. Whatever depends on the machine's state is not remembered.
            self._refused[request] = (e, time.monotonic() + self._settings.refused_ttl_s)
            while len(self._refused) > _MAX_REFUSED:
                self._refused.popitem(last=False)
            raise
        self.num_compiled += 1
        fields = {k: v for k, v in dataclasses.asdict(spec).items() if k != "engine"}
        key = _hash(fields, model.hash, self._made_by, compiled.engine, compiled.engine_version)
        if self._catalogue is not None:
            await asyncio.to_thread(self._catalogue.put, request, key, model.hash, compiled)
        return self._keep(request, Entry(key, model.hash, compiled, "compiled"))

    def _keep(self, request: str, entry: Entry) -> Entry:
        kept = dataclasses.replace(entry, source="memory")
        if len(entry.compiled.data) <= self._settings.cache_bytes:
            self._cached[request] = kept
            self._by_key[entry.key] = request
            self.cached_bytes += len(entry.compiled.data)
        while self.cached_bytes > self._settings.cache_bytes:
            gone, old = self._cached.popitem(last=False)
            self.cached_bytes -= len(old.compiled.data)
            if self._by_key.get(old.key) == gone:
                del self._by_key[old.key]
        return entry
