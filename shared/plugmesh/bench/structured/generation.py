"""The suite on the real model: what is compiled and what refused, and whether what a mesh then generates at temperature 1.0 validates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from plugmesh.bench.http_client import response_format
from plugmesh.bench.metrics import percentile
from plugmesh.bench.rounds import Progress
from plugmesh.bench.structured import scoring
from plugmesh.bench.structured.meshes import Answer, Compiled, StructuredMesh
from plugmesh.bench.structured.scoring import CaseResult, Judge, Judgement
from plugmesh.bench.structured.suite import Case
from plugmesh.bench.systems import Setting
from plugmesh.errors import PlugmeshError
from plugmesh.grammar.spec import GrammarSpec

STREAMS = 32
MAX_TOKENS = 192


def spec_of(case: Case) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(case.schema, ensure_ascii=False))


async def run_suite(
    setting: Setting, engines: Sequence[str], cases: Sequence[Case], *, seeds: Sequence[int], progress: Progress, max_tokens: int = MAX_TOKENS
) -> dict[str, Any]:
    """One mesh with these engines: every schema compiled for the first time, accepted ones generated from with every seed, all outputs judged.

    Returns the report as plain data. Raises PlugmeshError when the mesh does not start.
    """
    label = "+".join(engines)
    judge = Judge()
    async with StructuredMesh(setting, f"suite-{label}", engines) as mesh:
        progress.say(f"{label}: compiling {len(cases)} schemas")
        compiled = [await mesh.compile(spec_of(case)) for case in cases]
        again = [await mesh.compile(spec_of(case)) for case, c in zip(cases, compiled, strict=True) if c.error is None]
        accepted = [i for i, c in enumerate(compiled) if c.error is None]
        asked = [(i, seed) for i in accepted for seed in seeds]
        progress.say(f"{label}: {len(accepted)} accepted; {len(asked)} outputs at temperature 1.0")
        progress.begin(len(asked))
        bodies = [_body(cases[i], max_tokens, seed) for i, seed in asked]
        answers = await mesh.chat(bodies, STREAMS, on_answer=lambda _: progress.done(""))
        judgements: dict[int, list[Judgement]] = {i: [] for i in accepted}
        for (i, _), answer in zip(asked, answers, strict=True):
            judgements[i].append(await _judge(mesh, judge, cases[i], answer))
        refused = [i for i, c in enumerate(compiled) if c.error is not None]
        said = await mesh.chat([_body(cases[i], 1, 0) for i in refused], STREAMS)
        gateway = {i: answer.status == 400 for i, answer in zip(refused, said, strict=True)}
        results = [
            _result(case, c, tuple(judgements.get(i, ())), await _example(mesh, case) if c.error is None else None, gateway.get(i))
            for i, (case, c) in enumerate(zip(cases, compiled, strict=True))
        ]
    times = [c.compile_ms for c in compiled if c.error is None and not c.was_cached]
    return {
        "engines": list(engines), **scoring.plain(results), "num_outputs": len(answers), "num_output_tokens": sum(a.num_tokens for a in answers),
        "compile_ms": _times(times), "first_call_ms": _times([c.wall_ms for c in compiled if c.error is None and not c.was_cached]),
        "cached_call_ms": _times([c.wall_ms for c in again if c.error is None and c.was_cached]), "num_already_cached": sum(c.was_cached for c in compiled),
        "grammar_bytes": _times([float(c.num_bytes) for c in compiled if c.error is None]),
        "unchecked_formats": sorted({k.removeprefix("format:") for case in cases for k in case.keywords if k.startswith("format:")} - judge.checked_formats),
        "failures": [
            {"case": cases[i].name, "seed": seed, "reason": j.reason or j.verdict}
            for (i, seed), j in zip(asked, (j for i in accepted for j in judgements[i]), strict=True) if j.verdict in ("invalid", "broken", "failed")
        ],
    }  # fmt: skip


def _body(case: Case, max_tokens: int, seed: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"Give {case.asks} as JSON."}], "temperature": 1.0, "seed": seed, "max_tokens": max_tokens,
        "response_format": response_format(case.schema),
    }  # fmt: skip


async def _judge(mesh: StructuredMesh, judge: Judge, case: Case, answer: Answer) -> Judgement:
    if answer.status != 200:
        return Judgement("failed", f"HTTP {answer.status}: {answer.error}")
    if answer.finish_reason == "stop":
        return judge.judge(case.schema, answer.text)
    if answer.finish_reason != "length":
        return Judgement("failed", f"finish_reason {answer.finish_reason}")
    try:
        # A cut may fall within a character; what a gateway then puts in its place is no part of the output.
        whole, viable = await mesh.validate(spec_of(case), answer.text.rstrip("\ufffd"))
    except PlugmeshError as e:
        return Judgement("failed", f"Validate: {e.code}")
    return Judgement("cut") if whole or viable else Judgement("broken", "cut, and nothing can follow")


async def _example(mesh: StructuredMesh, case: Case) -> bool | None:
    """Whether the case's own instance is in the language, written with json.dumps's separators and compactly."""
    try:
        for separators in ((", ", ": "), (",", ":")):
            if not (await mesh.validate(spec_of(case), json.dumps(case.example, ensure_ascii=False, separators=separators)))[0]:
                return False
    except PlugmeshError:
        return None
    return True


def _result(case: Case, c: Compiled, judgements: tuple[Judgement, ...], example: bool | None, gateway: bool | None) -> CaseResult:
    result = CaseResult(case.name, case.keywords, c.engine, c.compile_ms, judgements=judgements, example_accepted=example, gateway_refused=gateway)
    if c.error is None:
        return result
    fields = c.error.fields
    return dataclasses.replace(result, engine="", code=c.error.code, keyword=str(fields.get("keyword", "")), path=str(fields.get("path", "")))


def _times(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"num": len(values), "p50": percentile(values, 0.5), "p90": percentile(values, 0.9), "p99": percentile(values, 0.99), "max": max(values)}
