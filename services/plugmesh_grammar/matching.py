"""Matchers for the Masks RPC. They live in one process beside the service; when it must be killed, the others' sequences are made again."""

from __future__ import annotations

import array
import asyncio
import collections
import dataclasses
import signal
from typing import Any

import structlog

from plugmesh.config import MeshConfig
from plugmesh.errors import GrammarTimeout, InternalError, LimitExceeded, Unavailable
from plugmesh_grammar import protocol
from plugmesh_grammar.compile import Entry
from plugmesh_grammar.config import Settings
from plugmesh_grammar.process import Worker, WorkerDied
from plugmesh_grammar.vocabularies import LoadedVocabulary

log = structlog.get_logger()

_MAX_ROLLBACK = 128   # that every engine can do; more is a replay
_MAX_LOADED = 256     # grammars that the process keeps though no sequence uses them


@dataclasses.dataclass(frozen=True, slots=True)
class MaskState:
    """Where a sequence stands. `mask`: packed words, empty when every token is allowed."""

    mask: bytes
    forced: bytes
    num_accepted: int
    is_completed: bool
    is_terminated: bool


@dataclasses.dataclass(slots=True, eq=False)
class _Sequence:
    handle: int
    entry: Entry
    model: LoadedVocabulary
    tokens: array.array  # accepted so far: what it is made of again
    generation: int = -1 # of the process that has it


class Matching:
    """Sequences by handle. The process starts with the first of them and is asked one thing at a time."""

    def __init__(self, config: MeshConfig, settings: Settings) -> None:
        self._config = config
        self._settings = settings
        self._lock = asyncio.Lock()
        self._worker: Worker | None = None
        self._generation = 0
        self._loaded: collections.OrderedDict[str, None] = collections.OrderedDict()  # grammars that the process has, by key
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0
        self._is_closed = False
        self.num_killed = 0

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def pid(self) -> int | None:
        return self._worker.pid if self._worker is not None else None

    async def stop(self) -> None:
        self._is_closed = True
        if self._worker is not None:
            await self._worker.kill()

    async def open(self, entry: Entry, model: LoadedVocabulary) -> tuple[int, MaskState]:
        """A new sequence at the beginning of a grammar. Raises as `accept`."""
        self._next += 1
        sequence = _Sequence(self._next, entry, model, array.array("i"))
        state = await self._step(sequence, {})
        self._sequences[sequence.handle] = sequence
        return sequence.handle, state

    async def accept(self, handle: int, tokens: list[int]) -> MaskState:
        """Goes on by tokens, up to the first that is not allowed.

        Raises:
            LimitExceeded: More tokens than a sequence may have, or more memory than the process may.
            GrammarTimeout: It took longer than `mask_timeout_s`.
            InternalError: The engine failed.
        """
        sequence = self._sequences[handle]
        if len(sequence.tokens) + len(tokens) > self._settings.max_tokens_per_sequence:
            raise LimitExceeded(f"a sequence may have {self._settings.max_tokens_per_sequence} tokens", param="accept")
        state = await self._step(sequence, {"op": "accept", "tokens": tokens})
        sequence.tokens.extend(tokens[: state.num_accepted])
        return state

    async def rollback(self, handle: int, num_tokens: int) -> MaskState:
        """Takes the last tokens back, however many. Raises LimitExceeded when there are fewer."""
        sequence = self._sequences[handle]
        if not 0 <= num_tokens <= len(sequence.tokens):
            raise LimitExceeded(f"{num_tokens} tokens cannot be taken back from {len(sequence.tokens)}", param="rollback")
        kept = sequence.tokens[: len(sequence.tokens) - num_tokens]
        if num_tokens <= _MAX_ROLLBACK:
            state = await self._step(sequence, {"op": "rollback", "num_tokens": num_tokens})
            sequence.tokens = kept
        else:
            sequence.tokens, sequence.generation = kept, -1
            state = await self._step(sequence, {})
        return state

    async def close(self, handle: int) -> None:
        sequence = self._sequences.pop(handle, None)
        if sequence is None or sequence.generation != self._generation or self._worker is None or self._is_closed:
            return
        try:
            async with self._lock:
                if sequence.generation == self._generation:
                    await self._ask({"op": "close", "handle": handle}, b"")
        except (WorkerDied, TimeoutError):
            await self._lost()

    async def _step(self, sequence: _Sequence, fields: dict[str, Any]) -> MaskState:
        """One request; brings the process to where the sequence is first, if that is another one than before. No fields: only that."""
        async with self._lock:
            if self._is_closed:
                raise Unavailable("the grammar service is stopping", retry_after_s=1)
            for is_last in (False, True):
                try:
                    reply, data = await self._bring_and_ask(sequence, fields)
                    break
                except TimeoutError:
                    await self._lost()
                    raise GrammarTimeout(f"a mask took longer than {self._settings.mask_timeout_s:g} s") from None
                except WorkerDied as e:
                    await self._lost()
                    if e.number == signal.SIGALRM:
                        raise GrammarTimeout(f"a mask took longer than {self._settings.mask_timeout_s:g} s") from e
                    # Somebody else may have killed it, then the grammar is not to blame; twice is no accident.
                    if is_last or e.number != signal.SIGKILL:
                        raise LimitExceeded("a mask needs more memory than allowed, or breaks its engine") from e
                except asyncio.CancelledError:
                    await self._lost()  # its answer would be taken for the next one's
                    raise
        at = reply["num_mask"]
        return MaskState(data[:at], data[at:], reply["num_accepted"], reply["completed"], reply["terminated"])

    async def _bring_and_ask(self, sequence: _Sequence, fields: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        reply = await self._bring(sequence)
        if fields or reply is None:
            return await self._ask({**(fields or {"op": "accept", "tokens": []}), "handle": sequence.handle}, b"")
        return reply

    async def _bring(self, sequence: _Sequence) -> tuple[dict[str, Any], bytes] | None:
        model, entry = sequence.model, sequence.entry
        if self._worker is None or not self._worker.is_alive:
            await self._lost()
            self._worker = await Worker.start(
                self._config, memory_bytes=self._settings.compile_memory_bytes, timeout_s=self._settings.mask_timeout_s + 1.0)
        try:
            await self._worker.teach(model.vocabulary, model.packed)
        except Unavailable:
            await self._lost()
            raise
        if sequence.generation == self._generation:
            return None
        if entry.key not in self._loaded:
            await self._ask({"op": "load", "key": entry.key, "hash": model.hash, "engine": entry.compiled.engine}, entry.compiled.data)
            self._loaded[entry.key] = None
            while len(self._loaded) > _MAX_LOADED:
                await self._ask({"op": "unload", "key": self._loaded.popitem(last=False)[0]}, b"")
        self._loaded.move_to_end(entry.key)
        fields = {"op": "open", "handle": sequence.handle, "key": entry.key, "hash": model.hash, "tokens": sequence.tokens.tolist()}
        reply = await self._ask(fields, b"")
        if reply[0]["num_accepted"] != len(sequence.tokens):
            raise InternalError("a sequence could not be made again")
        sequence.generation = self._generation
        return reply

    async def _ask(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        assert self._worker is not None
        async with asyncio.timeout(self._settings.mask_timeout_s):
            reply, answer = await self._worker.ask(fields, data)
        if "error" in reply:
            raise protocol.error_of(reply["error"])
        return reply, answer

    async def _lost(self) -> None:
        """Forgets the process; sequences are made again in the next one when they go on."""
        worker, self._worker = self._worker, None
        self._generation += 1
        self._loaded.clear()
        if worker is not None:
            self.num_killed += 1
            log.warning("grammar.mask_process_ended", num_sequences=len(self._sequences))
            await worker.kill()
