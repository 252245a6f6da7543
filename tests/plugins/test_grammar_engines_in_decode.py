"""The engine with the real grammar engines: they let go of the interpreter's lock, and obey on the default model."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jsonschema
import numpy as np
import pytest

from plugmesh import models
from plugmesh.config import MeshConfig
from plugmesh.grammar.seams import GrammarVocabulary
from plugmesh.grammar.spec import GrammarSpec
from plugmesh.grammar.vocabulary import vocabulary_of
from plugmesh.host import PluginHost
from plugmesh.types import SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest, build_engine, weight_format
from plugmesh_engine.bench import load_manifest
from plugmesh_engine.constrained import Constraint
from plugmesh_engine.testing import events_of, run_to_end, steps, tokens_of

each_engine = pytest.mark.parametrize("name", ["xgrammar", "llguidance"])

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150, "minimum": 0}, "city": {"enum": ["Paris", "Rome", "Vienna"]}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def path() -> pathlib.Path:
    found = models.find("smollm2")
    if found is None:
        pytest.skip("the default model is not here; plugmesh pull smollm2 fetches it")
    return pathlib.Path(found)


@pytest.fixture(scope="module")
def vocabulary(path) -> GrammarVocabulary:
    from plugmesh.bench.structured.engine_side import tokenizer_vocabulary

    return vocabulary_of(tokenizer_vocabulary(path), 49152)


@pytest.fixture(scope="module")
def engine(path, tmp_path_factory) -> Iterator[Engine]:
    config = EngineConfig(num_threads=1, num_blocks=256)
    made = build_engine(load_manifest(path, weight_format(config), tmp_path_factory.mktemp("store")), config)
    yield made
    made.close()


@pytest.fixture(scope="module")
def constrain(vocabulary):
    """Engine's name and a specification to what a request takes."""
    from plugmesh_grammar.schema import SchemaLimits, lower

    def make(name: str, spec: GrammarSpec) -> Constraint:
        pytest.importorskip(name)
        record = PluginHost.load([name], MeshConfig(), service="decode").records("grammar_engines")[0]
        built = record.build(vocabulary)
        candidate = next(c for c in lower(spec, limits=SchemaLimits()).candidates if c.language in record.languages)
        return Constraint(built.load(built.compile(candidate.language, candidate.source)), vocabulary)

    return make


def ask(name: str, vocabulary: GrammarVocabulary, grammar: Constraint | None, text: str = "A person as JSON:\n", **sampling) -> EngineRequest:
    assert vocabulary.encode is not None
    wanted = SamplingParams(**{"temperature": 0.0, "max_tokens": 80, **sampling})
    return EngineRequest(name, tuple(vocabulary.encode(text)), wanted, grammar=grammar)


def turns_of_another_thread(call: Callable[[], object], seconds: float) -> int:
    """How often another thread got the interpreter's lock while `call` was repeated. With a switch interval of a minute that is only when `call` lets go of it."""
    stop, turns = threading.Event(), 0

    def count() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(1e-4)

    before = sys.getswitchinterval()
    thread = threading.Thread(target=count, daemon=True)
    try:
        thread.start()
        sys.setswitchinterval(60)
        time.sleep(0.01)
        seen, until = turns, time.perf_counter() + seconds
        while time.perf_counter() < until and turns == seen:
            call()
        return turns - seen
    finally:
        stop.set()
        sys.setswitchinterval(before)
        thread.join()


@pytest.mark.model
@pytest.mark.slow
@each_engine
def test_a_mask_is_computed_without_the_interpreter_lock(constrain, name):
    matcher = constrain(name, GrammarSpec("json_schema", json.dumps(SCHEMA))).compiled.matcher()
    mask = np.zeros(1536, np.uint32)
    assert turns_of_another_thread(lambda: matcher.fill(mask), 10.0) > 0
    assert turns_of_another_thread(lambda: sum(mask.tolist()), 0.2) == 0  # what does not let go is told apart


@pytest.mark.model
@pytest.mark.slow
@each_engine
def test_output_validates_jumping_or_not_and_resumes_anywhere(engine, constrain, vocabulary, name):
    grammar = constrain(name, GrammarSpec("json_schema", json.dumps(SCHEMA)))
    request = ask("a", vocabulary, grammar)
    before = engine.stats()
    engine.add(request)
    out = steps(engine)
    (tokens,) = tokens_of(engine, out)["a"]
    after = engine.stats()
    jsonschema.validate(json.loads(text_of(vocabulary, tokens)), SCHEMA)
    assert after.num_jumped_tokens > before.num_jumped_tokens
    assert after.num_steps - before.num_steps < len(tokens)
    assert any(len(e.tokens) > 1 for e in events_of(out))
    for at in range(1, len(tokens), 3):
        rest = run_to_end(engine, dataclasses.replace(request, request_id=f"r{at}", resume=(tuple(tokens[:at]),)))
        assert rest.get(f"r{at}", [[]])[0] == tokens[at:]
    for seed in range(3):
        hot = run_to_end(engine, ask(f"h{seed}", vocabulary, grammar, temperature=1.0, seed=seed))[f"h{seed}"][0]
        jsonschema.validate(json.loads(text_of(vocabulary, hot)), SCHEMA)
    stats = engine.stats()
    assert stats.num_grammar_errors == stats.kv_blocks_leaked == stats.kv_blocks_used == 0


@pytest.mark.model
@pytest.mark.slow
def test_free_rows_beside_both_engines_are_the_same_bit_for_bit(engine, constrain, vocabulary):
    free = [ask(f"f{i}", vocabulary, None, f"{i} things are", temperature=0.8, seed=i, max_tokens=16, logprobs=True) for i in range(2)]
    made = [constrain(n, GrammarSpec("json_schema", json.dumps(SCHEMA))) for n in ("xgrammar", "llguidance")]
    made.append(constrain("xgrammar", GrammarSpec("choice", json.dumps(["yes", "no", "maybe so"]))))

    def told(requests: list[EngineRequest]) -> dict[str, list[tuple[int, float]]]:
        for r in requests:
            engine.add(r)
        found: dict[str, list[tuple[int, float]]] = {}
        for e in events_of(steps(engine)):
            assert e.error is None
            found.setdefault(e.request_id, []).extend((t.token_id, t.logprob) for t in e.tokens)
        return found

    alone = told(free)
    mixed = told([ask("c0", vocabulary, made[0]), free[0], ask("c1", vocabulary, made[1], temperature=1.0, seed=1), free[1], ask("c2", vocabulary, made[2])])
    assert {k: mixed[k] for k in alone} == alone
    assert text_of(vocabulary, [t for t, _ in mixed["c2"]]) in ("yes", "no", "maybe so")


def text_of(vocabulary: GrammarVocabulary, tokens) -> str:
    return b"".join(vocabulary.token_bytes[t] or b"" for t in tokens if t not in vocabulary.special_ids).decode()
