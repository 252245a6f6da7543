"""The extraction tasks on the default model, with the schema enforced and only asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from plugmesh.bench.http_client import response_format
from plugmesh.bench.rounds import Progress
from plugmesh.bench.structured.extraction import Task, leaves, num_right
from plugmesh.bench.structured.meshes import Answer, StructuredMesh
from plugmesh.bench.structured.scoring import Extracted, Judge, extraction_shares, only_object
from plugmesh.bench.systems import Setting

MAX_TOKENS = 256
STREAMS = 16


async def run_extraction(setting: Setting, tasks: Sequence[Task], *, progress: Progress, max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """Greedy answers of one mesh to the same prompts. "asked": the schema stands in the prompt only; "mode": any JSON object is enforced; "strict": the schema is.

    Raises PlugmeshError when the mesh does not start.
    """
    found: dict[str, Any] = {}
    async with StructuredMesh(setting, "extraction") as mesh:
        progress.begin(3 * len(tasks))
        for side in ("asked", "mode", "strict"):
            progress.say(f"extraction: {len(tasks)} tasks, {side}")
            began = time.perf_counter()
            answers = await mesh.chat([_body(task, side, max_tokens) for task in tasks], STREAMS, on_answer=lambda _: progress.done(""))
            wall = time.perf_counter() - began
            scored = await asyncio.to_thread(_scored, tasks, answers)
            kinds = {task.name.split("-")[0] for task in tasks}
            found[side] = {
                **extraction_shares(scored), "failed": sum(a.status != 200 for a in answers), "errors": sorted({a.error for a in answers if a.error})[:3],
                "num_tokens": sum(a.num_tokens for a in answers), "wall_s": wall,
                "kinds": {k: extraction_shares([s for s, t in zip(scored, tasks, strict=True) if t.name.startswith(f"{k}-")]) for k in sorted(kinds)},
            }  # fmt: skip
    return {"num_tasks": len(tasks), "sides": found}


def _scored(tasks: Sequence[Task], answers: Sequence[Answer]) -> list[Extracted]:
    judge = Judge()
    return [score(judge, task, answer) for task, answer in zip(tasks, answers, strict=True)]


def _body(task: Task, side: str, max_tokens: int) -> dict[str, Any]:
    enforced = {"asked": None, "mode": {"type": "json_object"}, "strict": response_format(task.schema)}[side]
    body = {"messages": [{"role": "user", "content": task.prompt}], "temperature": 0, "max_tokens": max_tokens}
    return {**body, "response_format": enforced} if enforced else body


def score(judge: Judge, task: Task, answer: Answer) -> Extracted:
    """Fields count leniently: the object may stand in a fenced block or in a sentence."""
    strict, lenient = only_object(answer.text), only_object(answer.text, lenient=True)
    return Extracted(
        strict is not None, lenient is not None, not judge.why_invalid(task.schema, answer.text.strip()), num_right(lenient, task.right), len(leaves(task.right)),
        answer.finish_reason == "length",
    )  # fmt: skip
