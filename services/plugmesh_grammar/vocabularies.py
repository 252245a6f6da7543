"""The vocabularies that this instance has loaded, by alias and by version."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time

import structlog

from plugmesh.errors import PlugmeshError
from plugmesh.grammar import vocabulary as vocabularies
from plugmesh.grammar.seams import GrammarVocabulary
from plugmesh.mesh.api import Mesh
from plugmesh.tokenization import fetch
from plugmesh_grammar.config import Settings
from plugmesh_grammar.protocol import pack_vocabulary

log = structlog.get_logger()


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedVocabulary:
    """One model's tokens; `packed` is the message that teaches them to a worker."""

    model: str
    version: str
    vocabulary: GrammarVocabulary
    packed: bytes

    @property
    def hash(self) -> str:
        return self.vocabulary.tokenizer_hash


class Vocabularies:
    """Loads on first use and keeps the most recently used. For one event loop. An alias is asked about again after `alias_ttl_s`, in the background."""

    def __init__(self, mesh: Mesh, settings: Settings) -> None:
        self._mesh = mesh
        self._settings = settings
        self._loaded: collections.OrderedDict[str, LoadedVocabulary] = collections.OrderedDict()  # by version
        self._aliases: dict[str, tuple[str, float]] = {}                                            # to version and when it was asked for
        self._loading: dict[str, asyncio.Task[LoadedVocabulary]] = {}

    def __len__(self) -> int:
        return len(self._loaded)

    async def start(self, models: tuple[str, ...]) -> LoadedVocabulary:
        """Loads the deployment's model, waiting for the weightstore. Raises the last failure."""
        files = await fetch.resolve_patiently(
            self._mesh, models, call_timeout_s=self._settings.call_timeout_s, within_s=self._settings.start_timeout_s)
        loaded = await self._load(files)
        for alias in {"", *models}:
            self._aliases[alias] = (loaded.version, time.monotonic())
        return loaded

    async def stop(self) -> None:
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def by_hash(self, tokenizer_hash: str) -> LoadedVocabulary | None:
        return next((v for v in self._loaded.values() if v.hash == tokenizer_hash), None)

    async def get(self, model: str) -> LoadedVocabulary:
        """The vocabulary of an alias or version, the empty name being the deployment's default.

        Raises:
            NotFound: No such model.
            CorruptModelFile: Its tokenizer cannot be used.
            Unavailable: The weightstore is away and the model is not loaded.
        """
        version, asked = self._aliases.get(model, (model, time.monotonic()))
        loaded = self._loaded.get(version)
        if loaded is None:
            return await asyncio.shield(self._single(model))  # one caller's cancellation must not take the load from the others
        self._loaded.move_to_end(version)
        if time.monotonic() - asked > self._settings.alias_ttl_s and model not in self._loading:
            self._aliases[model] = (version, time.monotonic())
            self._single(model).add_done_callback(_log_failure)
        return loaded

    def _single(self, model: str) -> asyncio.Task[LoadedVocabulary]:
        task = self._loading.get(model)
        if task is None:
            task = self._loading[model] = asyncio.create_task(self._resolve_and_load(model), name=f"load-{model or 'default'}")
            task.add_done_callback(lambda done: (self._loading.pop(model, None), done.cancelled() or done.exception()))
        return task

    async def _resolve_and_load(self, model: str) -> LoadedVocabulary:
        files = await fetch.resolve(self._mesh, model, timeout_s=self._settings.call_timeout_s)
        loaded = self._loaded.get(files.version) or await self._load(files)
        if model != files.version:
            self._aliases[model] = (loaded.version, time.monotonic())
        return loaded

    async def _load(self, files: fetch.ModelFiles) -> LoadedVocabulary:
        begin = time.monotonic()
        vocabulary = await vocabularies.load(
            self._mesh, files, max_bytes=self._settings.max_asset_bytes, timeout_s=self._settings.call_timeout_s)
        # Without `encode`, which would keep the whole tokenizer in memory: nothing here turns text into tokens.
        vocabulary = dataclasses.replace(vocabulary, encode=None)
        loaded = LoadedVocabulary(files.model, files.version, vocabulary, await asyncio.to_thread(pack_vocabulary, vocabulary))
        self._loaded[files.version] = loaded
        while len(self._loaded) > self._settings.max_models:
            version, _ = self._loaded.popitem(last=False)
            self._aliases = {a: (v, t) for a, (v, t) in self._aliases.items() if v != version}
        log.info(
            "grammar.vocabulary_loaded", model=files.model, version=files.version, vocab_size=vocabulary.vocab_size,
            tokenizer_hash=vocabulary.tokenizer_hash, load_ms=round(1000 * (time.monotonic() - begin), 1))
        return loaded


def _log_failure(task: asyncio.Task[LoadedVocabulary]) -> None:
    if not task.cancelled() and isinstance(e := task.exception(), Exception):
        log.warning("grammar.refresh_failed", code=e.code if isinstance(e, PlugmeshError) else type(e).__name__)
