"""The grammars that requests name, ready for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from plugmesh.errors import FailedPrecondition, PlugmeshError
from plugmesh.grammar import vocabulary
from plugmesh.grammar.client import Grammars
from plugmesh.mesh.api import Mesh
from plugmesh.records import GrammarEngineRecord
from plugmesh.tokenization import fetch
from plugmesh.wire import spec_from_pb
from plugmesh_engine.constrained import Constraint
from plugmesh_proto.v1 import decode_pb2 as pb

log = structlog.get_logger()

RESOLVE_S = 10.0


class Constraints:
    """Compiled grammars of the model that this instance serves. Lives in the event loop.

    Args:
        model: The weightstore's name of it; its tokenizer is read when the first request has a grammar, or `warm` was called.
        max_bytes: Of compiled grammars that are kept.
    """

    def __init__(self, mesh: Mesh, engines: Sequence[GrammarEngineRecord], model: str, *, max_bytes: int) -> None:
        self._mesh = mesh
        self._records = engines
        self._model = model
        self._max_bytes = max_bytes
        self._opening: asyncio.Task[tuple[Grammars, vocabulary.GrammarVocabulary]] | None = None

    def warm(self) -> None:
        """Begins to read the tokenizer, so that the first request with a grammar does not wait for it. Does nothing without an engine."""
        if self._records:
            self._open()

    async def get(self, use: pb.GrammarUse) -> Constraint:
        """What `EngineRequest.grammar` takes.

        Raises:
            FailedPrecondition: No engine is loaded here, or not the one that compiled the grammar.
            UnsupportedGrammar, LimitExceeded, GrammarTimeout, Overloaded, Unavailable: It had to be compiled again, see `GrammarClient.compile`.
            PlugmeshError: The model's tokenizer could not be read.
        """
        if not self._records:
            raise FailedPrecondition("this decode instance has no grammar engine")
        spec = spec_from_pb(use.spec)
        grammars, known = await asyncio.shield(self._open())
        return Constraint(await grammars.get(use.key, spec, self._model), known)

    async def close(self) -> None:
        task, self._opening = self._opening, None
        if task is not None:
            task.cancel()
            found = (await asyncio.gather(task, return_exceptions=True))[0]
            if not isinstance(found, BaseException):
                await found[0].stop()

    def _open(self) -> asyncio.Task[tuple[Grammars, vocabulary.GrammarVocabulary]]:
        task = self._opening
        if task is None or (task.done() and (task.cancelled() or task.exception())):  # the next request tries again
            task = self._opening = asyncio.create_task(self._load(), name="decode.load_vocabulary")
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _load(self) -> tuple[Grammars, vocabulary.GrammarVocabulary]:
        try:
            files = await fetch.resolve(self._mesh, self._model, timeout_s=RESOLVE_S)
            known = await vocabulary.load(self._mesh, files)
        except PlugmeshError as e:
            log.warning("decode.vocabulary_missing", code=e.code)
            raise
        return Grammars(self._mesh, self._records, known, max_bytes=self._max_bytes), known
