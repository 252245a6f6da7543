"""The tokenizers that this instance has loaded, by alias and by version."""

from __future__ import annotations

import asyncio
import collections
import time
from dataclasses import dataclass

import structlog

from plugmesh.errors import PlugmeshError
from plugmesh.mesh.api import Mesh
from plugmesh.tokenization import fetch
from plugmesh.tokenization.encode import Encoder
from plugmesh.tokenization.load import Vocabulary, load_vocabulary

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """One model's tokenizer, ready to use."""

    model: str
    version: str
    vocabulary: Vocabulary
    encoder: Encoder


@dataclass(slots=True)
class _Alias:
    version: str
    checked_at: float


class Models:
    """Loads on first use and keeps the most recently used. All methods run on one event loop.

    An alias is asked about again after `alias_ttl_s`, in the background: a request never waits for that, and a
    weightstore that is away leaves what is known in force.
    """

    def __init__(
        self, mesh: Mesh, *, max_models: int, max_asset_bytes: int, call_timeout_s: float, alias_ttl_s: float
    ) -> None:
        self._mesh = mesh
        self._max_models = max_models
        self._max_asset_bytes = max_asset_bytes
        self._call_timeout_s = call_timeout_s
        self._alias_ttl_s = alias_ttl_s
        self._loaded: collections.OrderedDict[str, LoadedTokenizer] = collections.OrderedDict()  # by version
        self._aliases: dict[str, _Alias] = {}
        self._loading: dict[str, asyncio.Task[LoadedTokenizer]] = {}

    def __len__(self) -> int:
        return len(self._loaded)

    async def start(self, models: tuple[str, ...], *, within_s: float) -> LoadedTokenizer:
        """Loads the deployment's model, waiting for the weightstore. Raises the last failure after `within_s`."""
        files = await fetch.resolve_patiently(self._mesh, models, call_timeout_s=self._call_timeout_s, within_s=within_s)
        loaded = await self._load(files)
        for alias in {"", *models}:
            self._aliases[alias] = _Alias(loaded.version, time.monotonic())
        return loaded

    async def stop(self) -> None:
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def known(self, model: str) -> LoadedTokenizer | None:
        """The tokenizer if it is loaded; costs two look-ups. The empty name is the deployment's default."""
        alias = self._aliases.get(model)
        loaded = self._loaded.get(alias.version if alias else model)
        if loaded is None:
            return None
        self._loaded.move_to_end(loaded.version)
        if alias and time.monotonic() - alias.checked_at > self._alias_ttl_s and model not in self._loading:
            alias.checked_at = time.monotonic()
            self._single(model).add_done_callback(_log_failure)
        return loaded

    async def get(self, model: str) -> LoadedTokenizer:
        """The tokenizer of an alias or version, loaded if need be.

        Raises:
            NotFound: No such model.
            CorruptModelFile: Its tokenizer cannot be used.
            Unavailable: The weightstore is away and the model is not loaded.
        """
        loaded = self.known(model)
        if loaded is not None:
            return loaded
        # Shielded: one caller's cancellation must not take the load from the others.
        return await asyncio.shield(self._single(model))

    def _single(self, model: str) -> asyncio.Task[LoadedTokenizer]:
        task = self._loading.get(model)
        if task is None:
            task = self._loading[model] = asyncio.create_task(self._resolve_and_load(model), name=f"load-{model or 'default'}")
            task.add_done_callback(lambda done: (self._loading.pop(model, None), done.cancelled() or done.exception()))
        return task

    async def _resolve_and_load(self, model: str) -> LoadedTokenizer:
        files = await fetch.resolve(self._mesh, model, timeout_s=self._call_timeout_s)
        loaded = self._loaded.get(files.version) or await self._load(files)
        if model != files.version:
            self._aliases[model] = _Alias(loaded.version, time.monotonic())
        return loaded

    async def _load(self, files: fetch.ModelFiles) -> LoadedTokenizer:
        begin = time.monotonic()
        assets = await fetch.read_assets(self._mesh, files, max_bytes=self._max_asset_bytes, timeout_s=self._call_timeout_s)
        vocabulary = await asyncio.to_thread(load_vocabulary, assets, config=files.config)
        loaded = LoadedTokenizer(files.model, files.version, vocabulary, Encoder(vocabulary))
        self._loaded[files.version] = loaded
        while len(self._loaded) > self._max_models:
            version, _ = self._loaded.popitem(last=False)
            self._aliases = {a: v for a, v in self._aliases.items() if v.version != version}
            log.info("tokenizer.unloaded", version=version)
        log.info(
            "tokenizer.loaded", model=files.model, version=files.version, vocab_size=vocabulary.vocab_size,
            tokenizer_hash=vocabulary.hash, load_ms=round(1000 * (time.monotonic() - begin), 1),
        )
        return loaded


def _log_failure(task: asyncio.Task[LoadedTokenizer]) -> None:
    if not task.cancelled() and isinstance(e := task.exception(), Exception):
        log.warning("tokenizer.refresh_failed", code=e.code if isinstance(e, PlugmeshError) else type(e).__name__)
