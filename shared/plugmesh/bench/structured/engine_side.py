"""One engine with grammar engines in a process, driven over its standard input: `python -m plugmesh.bench.structured.engine_side FILE`.

FILE holds what to load. One JSON object a line: first what was loaded, then an answer to every ask. The engine runs as decode runs it, on its
driver's thread with callers in an event loop, so that what constrained rows cost beside it is in the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import uvloop

from plugmesh import logs
from plugmesh.config import MeshConfig
from plugmesh.errors import FailedPrecondition, PlugmeshError
from plugmesh.grammar.pairing import pairings
from plugmesh.grammar.seams import CompiledGrammar, GrammarEngine, GrammarVocabulary
from plugmesh.grammar.vocabulary import vocabulary_of
from plugmesh.host import PluginHost
from plugmesh.tokenization.load import GGUF_ASSET, Vocabulary, load_vocabulary
from plugmesh_engine import EngineConfig, build_engine
from plugmesh_engine.bench import load_manifest
from plugmesh_engine.config import resolve_executor, weight_format
from plugmesh_engine.constrained import Constraint
from plugmesh_engine.driven import run_driven

_FILLS_BEFORE = 16  # unmeasured, so that what a library does once is not in the figures


class Side:
    """The engine, the vocabulary and the compiled grammars.

    Args:
        ask: `model`, `store`, `executor`, `kv_dtype`, `threads`, `num_blocks`, `jump_forward`, `grammar_engines` (slugs).
    """

    def __init__(self, ask: Mapping[str, Any]) -> None:
        config = EngineConfig(
            executor=ask["executor"], kv_dtype=ask["kv_dtype"], num_threads=ask["threads"], num_blocks=ask["num_blocks"], commit_kv=True,
            jump_forward=ask["jump_forward"],
        )  # fmt: skip
        model = pathlib.Path(ask["model"])
        manifest = load_manifest(model, weight_format(config), pathlib.Path(ask["store"]))
        self.engine = build_engine(manifest, config)
        self.words = tokenizer_vocabulary(model)
        self.vocabulary: GrammarVocabulary = vocabulary_of(self.words, self.engine.model.config.vocab_size)
        self.engines: dict[str, tuple[Any, GrammarEngine]] = {}
        for record in PluginHost.load(ask["grammar_engines"], MeshConfig(), service="decode").records("grammar_engines"):
            self.engines[record.name] = (record, record.build(self.vocabulary))
        self.grammars: dict[tuple[str, str], CompiledGrammar] = {}
        self.facts = {
            "executor": resolve_executor(config, self.engine.model.config.architecture), "jump_forward": ask["jump_forward"],
            "grammar_engines": {name: record.version for name, (record, _) in self.engines.items()}, "uses_torch": "torch" in sys.modules,
        }  # fmt: skip

    def compile(self, candidates: Sequence[Mapping[str, str]], engine: str) -> tuple[CompiledGrammar, dict[str, Any]]:
        """The first candidate that the engine takes. Raises FailedPrecondition when it takes none, naming the last reason."""
        record, built = self.engines[engine]
        reason = f"it takes {', '.join(sorted(record.languages))}, not {', '.join(c['language'] for c in candidates)}"
        for candidate, _, _ in pairings([(c["language"], c) for c in candidates], [record]):
            began = time.perf_counter()
            try:
                data = built.compile(candidate["language"], candidate["source"])
            except PlugmeshError as e:
                reason = e.message
                continue
            mid = time.perf_counter()
            compiled = built.load(data)
            return compiled, {
                "compile_ms": (mid - began) * 1e3, "load_ms": (time.perf_counter() - mid) * 1e3, "num_bytes": len(data), "language": candidate["language"]
            }
        raise FailedPrecondition(f"{engine} cannot enforce it: {reason[:200]}")

    def answer(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        if "compile" in ask:
            what = ask["compile"]
            self.grammars[what["name"], what["engine"]], facts = self.compile(what["candidates"], what["engine"])
            return facts
        return self._micro(**ask["micro"]) if "micro" in ask else self._run(**ask["run"])

    def _run(
        self, prompts: Sequence[str], max_tokens: int, streams: int, grammar: Sequence[str] | None, temperature: float = 0.0, seed: int = 0,
        want_text: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Every prompt once. A free run ignores ends of texts, so that it has exactly `max_tokens`; a constrained one ends when its grammar does."""
        request = {"grammar": Constraint(self.grammars[grammar[0], grammar[1]], self.vocabulary)} if grammar else {}
        conversations = [
            [{
                "prompt": self.encode(text), "max_tokens": max_tokens, "request": request,
                "sampling": {"temperature": temperature, "seed": seed * 1000 + i, "ignore_eos": grammar is None},
            }]
            for i, text in enumerate(prompts)
        ]  # fmt: skip
        before = self.engine.stats()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            done = runner.run(run_driven(self.engine, conversations, streams, use_cache=False, want_tokens=True))
        after = self.engine.stats()
        tokens = done.pop("tokens")
        ends = set(self.vocabulary.eos_token_ids)
        counters = {f: getattr(after, f) - getattr(before, f) for f in after.__dataclass_fields__ if f.startswith("num_") and f not in ("num_running", "num_waiting", "num_held")}
        texts = [self.decode([t for t in row if t not in ends]) for row in tokens]
        return {**done, "counters": counters, "num_chars": sum(map(len, texts)), **({"texts": texts} if want_text else {})}

    def _micro(self, candidates: Sequence[Mapping[str, str]], engine: str, text: str) -> dict[str, Any]:
        """Microseconds of every fill, accept and forced along a text of the language."""
        compiled, facts = self.compile(candidates, engine)
        mask = np.zeros(self.vocabulary.num_words, np.uint32)
        ids = self.encode(text)
        began = time.perf_counter()
        matcher = compiled.matcher()
        times: dict[str, list[float]] = {"matcher": [(time.perf_counter() - began) * 1e6], "fill": [], "accept": [], "forced": []}
        for _ in range(_FILLS_BEFORE):
            compiled.matcher().fill(mask)
        num_free, num_forced = 0, 0
        for token in ids:
            num_free += not _timed(times["fill"], matcher.fill, mask)
            num_forced += bool(_timed(times["forced"], matcher.forced))
            if not _timed(times["accept"], matcher.accept, token):
                break
        return {**facts, "us": times, "num_tokens": len(ids), "num_free": num_free, "num_forced": num_forced, "is_whole": matcher.is_completed}

    def encode(self, text: str) -> list[int]:
        assert self.vocabulary.encode is not None
        return list(self.vocabulary.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.vocabulary.token_bytes[i] or b"" for i in ids).decode("utf-8", "replace")


def _timed(into: list[float], call: Any, *args: Any) -> Any:
    began = time.perf_counter()
    value = call(*args)
    into.append((time.perf_counter() - began) * 1e6)
    return value


def tokenizer_vocabulary(path: pathlib.Path) -> Vocabulary:
    """The vocabulary of a GGUF file. Raises FailedPrecondition when the package that reads it is missing."""
    try:
        import gguf
    except ImportError as e:
        raise FailedPrecondition("reading a GGUF needs the package gguf: pip install 'plugmesh[weightstore]'") from e
    fields = {name: field.contents() for name, field in gguf.GGUFReader(str(path)).fields.items() if name.startswith("tokenizer.")}
    return load_vocabulary({GGUF_ASSET: json.dumps(fields).encode()})


def main() -> int:
    parser = argparse.ArgumentParser(description="One engine with grammar engines over standard input; see the module's text.")
    parser.add_argument("file", type=pathlib.Path)
    args = parser.parse_args()
    # The protocol has standard output for itself: whatever a library prints there goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logs.configure("error")
    try:
        side = Side(json.loads(args.file.read_text()))
    except PlugmeshError as e:
        answers.write(json.dumps({"error": e.message}) + "\n")
        return 1
    gc.collect()
    gc.freeze()
    answers.write(json.dumps({"ready": side.facts}) + "\n")
    for line in sys.stdin:
        try:
            answer = side.answer(json.loads(line))
        except PlugmeshError as e:
            answer = {"error": e.message}
        answers.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
