"""The process in which grammars are compiled, validated and matched. Started by `process.py`; ends when its parent closes stdin.

Front end and engines run here and nowhere else: whatever a grammar makes them do, an alarm and a limit of memory end this process only,
and the service starts another. It gets no credential and opens no connection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from plugmesh.config import MeshConfig
from plugmesh.errors import (
    InternalError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PlugmeshError,
    Unavailable,
    UnsupportedGrammar,
)
from plugmesh.grammar.pairing import pairings
from plugmesh.grammar.seams import CompiledGrammar, GrammarEngine, GrammarVocabulary, Matcher
from plugmesh.grammar.spec import GrammarSpec
from plugmesh.host import PluginHost
from plugmesh.records import GrammarEngineRecord
from plugmesh_grammar import protocol

_MAX_FORCED = 4096  # bytes told in one reply


@dataclasses.dataclass(slots=True)
class _Sequence:
    matcher: Matcher
    mask: np.ndarray


class Worker:
    """Answers one request at a time."""

    def __init__(self, config: MeshConfig, *, memory_bytes: int) -> None:
        host = PluginHost.load(config.plugin_slugs("grammar"), config, service="grammar")
        self._records: list[GrammarEngineRecord] = host.records("grammar_engines")
        self._memory_bytes = memory_bytes
        self._vocabularies: dict[str, GrammarVocabulary] = {}
        self._engines: dict[str, dict[str, GrammarEngine]] = {}  # by tokenizer hash, then in the order in which they are tried
        self._bytes_of: dict[str, dict[int, int]] = {}           # by tokenizer hash: byte to the token of that byte alone
        self._grammars: dict[str, CompiledGrammar] = {}
        self._sequences: dict[int, _Sequence] = {}

    def answer(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """One reply; {"error": ...} for what a grammar can provoke."""
        try:
            return getattr(self, f"_{fields['op']}")(fields, data)
        except PlugmeshError as e:
            error: PlugmeshError = e
        except MemoryError:
            error = LimitExceeded("the grammar needs more memory than allowed", param="grammar")
        except RecursionError:
            error = LimitExceeded("the grammar is nested too deeply", param="grammar")
        except Exception as e:  # costs this request only; a text of a foreign library may repeat the grammar, so its type must do
            error = InternalError(f"the grammar engine failed: {type(e).__name__}")
        return {"error": protocol.error_fields(error)}, b""

    # Set-up.

    def _vocabulary(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        vocabulary = protocol.unpack_vocabulary(fields, data)
        engines: dict[str, GrammarEngine] = {}
        missing: dict[str, str] = {}
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for record in self._records:
            try:
                engines[record.name] = record.build(vocabulary)
            except Unavailable as e:
                missing[record.name] = e.message
        self._vocabularies[vocabulary.tokenizer_hash], self._engines[vocabulary.tokenizer_hash] = vocabulary, engines
        self._bytes_of[vocabulary.tokenizer_hash] = {
            piece[0]: i for i, piece in reversed(list(enumerate(vocabulary.token_bytes))) if piece is not None and len(piece) == 1 and i not in vocabulary.special_ids
        }
        # What libraries map at their start says nothing of what a grammar may need; the soft limit only, so that it can be set again.
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + self._memory_bytes, resource.RLIM_INFINITY))
        return {"engines": list(engines), "missing": missing}, b""

    def _forget_vocabulary(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        for table in (self._vocabularies, self._engines, self._bytes_of):
            table.pop(fields["hash"], None)
        return {}, b""

    # Compilation.

    def _compile(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        from plugmesh_grammar.schema import SchemaLimits, lower

        began = time.perf_counter()
        spec = GrammarSpec(**fields["spec"])
        lowered = lower(spec, limits=SchemaLimits(**fields["limits"]))
        engines = self._engines[fields["hash"]]
        records = [r for r in self._records if r.name in engines and spec.engine in ("", r.name)]
        if not records:
            raise Unavailable("no grammar engine can be used here", retry_after_s=5)
        num_broken = fields.get("num_broken", 0)  # so many did not survive it, in processes before this one
        refusal: PlugmeshError | None = LimitExceeded("the grammar needs more memory than allowed, or breaks its engine", param="grammar") if num_broken else None
        num_gbnf = max((len(c.source) for c in lowered.candidates if c.language == "ebnf"), default=0)
        order = pairings([(c.language, c) for c in lowered.candidates], records, num_gbnf=num_gbnf)
        for candidate, language, record in itertools.islice(order, num_broken, None):
            try:
                compiled = engines[record.name].compile(language, candidate.source)
            except (UnsupportedGrammar, LimitExceeded) as e:
                refusal = refusal or e
                continue
            except MemoryError:
                refusal = refusal or LimitExceeded("the grammar needs more memory than allowed", param="grammar")
                continue
            if len(compiled) > fields["max_compiled_bytes"]:
                refusal = refusal or LimitExceeded(
                    f"its compiled form has {len(compiled)} bytes, at most {fields['max_compiled_bytes']} are kept", param="grammar")
                continue
            info = {
                "engine": record.name, "version": record.version, "language": language, "compile_ms": 1000 * (time.perf_counter() - began),
                "unenforced": [{"keyword": u.keyword, "path": u.path, "reason": u.reason} for u in lowered.unenforced],
            }
            return info, compiled
        languages = ", ".join(dict.fromkeys(c.language for c in lowered.candidates)) or "nothing"
        raise refusal or UnsupportedGrammar(
            f"it can be written as {languages}, which no engine of {', '.join(r.name for r in records)} takes", param="grammar", keyword=spec.kind, path="")

    def _validate(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Byte by byte, so that it does not matter into which tokens the text would be cut."""
        text, compiled = data[: fields["num_text"]], data[fields["num_text"] :]
        ids = self._bytes_of[fields["hash"]]
        matcher = self._engines[fields["hash"]][fields["engine"]].load(compiled).matcher()
        num_valid = 0
        for byte in text:
            token = ids.get(byte)
            if token is None:
                raise InvalidRequest("the tokenizer has no token for every single byte, so texts cannot be validated", param="model")
            if not matcher.accept(token):
                break
            num_valid += 1
        is_prefix = num_valid == len(text)
        return {"num_valid": num_valid, "is_prefix": is_prefix, "is_valid": is_prefix and matcher.is_completed}, b""

    # Matching.

    def _load(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        grammar = self._engines[fields["hash"]][fields["engine"]].load(data)
        self._grammars[fields["key"]] = grammar
        return {"num_bytes": grammar.num_bytes}, b""

    def _unload(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        self._grammars.pop(fields["key"], None)
        return {}, b""

    def _open(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        grammar = self._grammars.get(fields["key"])
        if grammar is None:
            raise NotFound("the grammar is not loaded", param="key")
        num_words = self._vocabularies[fields["hash"]].num_words
        self._sequences[fields["handle"]] = _Sequence(grammar.matcher(), np.zeros(num_words, dtype=np.uint32))
        return self._accept(fields, data)

    def _accept(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        sequence = self._sequences[fields["handle"]]
        num_accepted = 0
        for token in fields["tokens"]:
            if not sequence.matcher.accept(token):
                break
            num_accepted += 1
        return self._state(sequence, num_accepted)

    def _rollback(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        sequence = self._sequences[fields["handle"]]
        sequence.matcher.rollback(fields["num_tokens"])
        return self._state(sequence, 0)

    def _close(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        self._sequences.pop(fields["handle"], None)
        return {}, b""

    @staticmethod
    def _state(sequence: _Sequence, num_accepted: int) -> tuple[dict[str, Any], bytes]:
        matcher, mask = sequence.matcher, sequence.mask
        if matcher.is_terminated:
            return {"num_accepted": num_accepted, "completed": True, "terminated": True, "num_mask": mask.nbytes}, bytes(mask.nbytes)
        needed = matcher.fill(mask)
        forced = matcher.forced()[:_MAX_FORCED]
        packed = mask.astype("<u4", copy=False).tobytes() if needed else b""
        fields = {"num_accepted": num_accepted, "completed": matcher.is_completed, "terminated": False, "num_mask": len(packed)}
        return fields, packed + forced


def _address_space() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def _own_stdout() -> Iterator[Any]:
    """The pipe to the parent, out of reach of libraries that print."""
    sink = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    try:
        yield sink
    finally:
        sink.close()


def main() -> None:
    timeout_s = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside a C loop or after the parent is gone
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)      # these are for the parent, which closes stdin
    with _own_stdout() as sink:
        source = sys.stdin.buffer
        first = protocol.read(source)
        if first is None:
            return
        worker = Worker(MeshConfig.model_validate(first[0]["config"]), memory_bytes=first[0]["memory_bytes"])
        sink.write(protocol.pack({}))
        sink.flush()
        while (message := protocol.read(source)) is not None:
            signal.setitimer(signal.ITIMER_REAL, max(timeout_s, 120.0) if message[0]["op"] == "vocabulary" else timeout_s)
            reply = worker.answer(*message)
            signal.setitimer(signal.ITIMER_REAL, 0)
            sink.write(protocol.pack(*reply))
            sink.flush()


if __name__ == "__main__":
    main()
