"""Traces of the real model, recorded once and stored, so that every strategy is measured on the same ones."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import structlog

from plugmesh.models import pull
from plugmesh.testing.strategies import Script
from plugmesh.types import FinishReason, SamplingParams, TokenInfo
from plugmesh_deepconf.tasks import Problem

log = structlog.get_logger()
_AT_ONCE = 4  # problems in the engine; each with all of its traces


def record(problems: Sequence[Problem], num_traces: int, path: pathlib.Path, *, temperature: float, top_p: float, top_k: int, max_tokens: int, threads: int) -> None:
    """Writes a line of JSON per problem: its greedy trace and `num_traces` sampled ones, each as (token id, text, confidence) and how it ended."""
    from plugmesh_engine import Engine, EngineConfig, EngineRequest, load_model, weight_format
    from plugmesh_engine.bench import load_manifest
    from plugmesh_engine.testing import gguf_tokenizer

    model_path = pull("smollm2")
    tokenizer: Any = gguf_tokenizer(model_path)
    config = EngineConfig(num_threads=threads, num_blocks=2048, max_num_sequences=128)
    stops = tuple({i for text in ("\n", "\n\n") for i in tokenizer.encode(text, add_special_tokens=False).ids})
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(load_model(load_manifest(model_path, weight_format(config), pathlib.Path(folder)), config), config)
        began = time.monotonic()
        with path.open("w") as out:
            for first in range(0, len(problems), _AT_ONCE):
                part = problems[first : first + _AT_ONCE]
                for i, problem in enumerate(part):
                    ids = tuple(tokenizer.encode(problem.prompt, add_special_tokens=False).ids)
                    sampled = SamplingParams(
                        temperature=temperature, top_p=top_p, seed=first + i, num_sequences=num_traces, max_tokens=max_tokens, stop_token_ids=stops,
                        confidence_top_k=top_k)
                    engine.add(EngineRequest(f"{i}.greedy", ids, dataclasses.replace(sampled, temperature=0.0, num_sequences=1)))
                    engine.add(EngineRequest(f"{i}", ids, sampled))
                tokens: dict[tuple[str, int], list[TokenInfo]] = {}
                ends: dict[tuple[str, int], FinishReason] = {}
                while engine.has_work():
                    for event in engine.step().tokens:
                        assert event.error is None, event.error
                        tokens.setdefault((event.request_id, event.sequence), []).extend(event.tokens)
                        if event.finish_reason is not None:
                            ends[event.request_id, event.sequence] = event.finish_reason
                for i, problem in enumerate(part):
                    keys = [(f"{i}.greedy", 0), *((f"{i}", s) for s in range(num_traces))]
                    traces = []
                    for key in keys:
                        infos = tokens[key][:-1] if ends[key] is FinishReason.STOP else tokens[key]
                        traces.append({"end": ends[key].value, "tokens": [
                            (t.token_id, tokenizer.decode([t.token_id]), round(t.confidence, 5)) for t in infos]})
                    out.write(json.dumps({"task": problem.task, "prompt": problem.prompt, "answer": problem.answer, "traces": traces}) + "\n")
                out.flush()
                log.info("deepconf.recorded", num_problems=first + len(part), of=len(problems), seconds=round(time.monotonic() - began))
        engine.close()


def load(path: pathlib.Path) -> list[tuple[Problem, Script, list[Script]]]:
    """Problems with their greedy and their sampled traces."""
    out = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        scripts = [
            Script([TokenInfo(i, confidence=c) for i, _, c in t["tokens"]], [text for _, text, _ in t["tokens"]], FinishReason(t["end"])) for t in row["traces"]
        ]
        out.append((Problem(row["task"], row["prompt"], row["answer"]), scripts[0], scripts[1:]))
    return out
