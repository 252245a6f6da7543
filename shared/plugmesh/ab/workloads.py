"""The core's own work for comparisons, registered like a plugin's, and how a workload becomes a measure of the bench."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from plugmesh.bench import workloads
from plugmesh.bench.measures import Measure
from plugmesh.bench.peers import BATCH
from plugmesh.bench.workloads import Call, Conversation, Shape
from plugmesh.hookspecs import hookimpl
from plugmesh.records import WorkloadContext, WorkloadRecord


def _random(num: int, num_in: int, num_out: int, spread: float = 0.0) -> Callable[[WorkloadContext], list[list[tuple[Sequence[int], int]]]]:
    shape = Shape(num_conversations=num, num_in=num_in, num_out=num_out, spread=spread)
    return lambda context: [[(c.prompt, c.max_tokens) for c in conversation] for conversation in workloads.random_prompts(shape, context.seed)]


class CoreWorkloads:
    """What every plugin is measured by. Prompts are random tokens: whoever gains from text that repeats itself brings a workload of its own."""

    @hookimpl
    def register_workloads(self) -> list[WorkloadRecord]:
        return [
            WorkloadRecord("prefill_512", "prefill of 512 tokens", _random(3, 512, 1), 1, "prefill_tok_s", ("engine",), False),
            WorkloadRecord("decode_1", "single stream, 128 in / 128 out", _random(1, 128, 128), 1, "decode_tok_s", ("engine",)),
            WorkloadRecord("batch_32", "32 streams, 128 in / 64 out", _random(32, 128, 64), 32, "output_tok_s", ("engine",)),
            WorkloadRecord("served_1", "single requests through the mesh, 128 in / 32 out", _random(6, 128, 32), 1, "decode_tok_s", ("served",)),
            WorkloadRecord("served_16", "16 streams through the mesh, 64-192 in / 32-96 out", _random(32, 128, 64, 0.5), 16, "output_tok_s", ("served",)),
        ]


FIGURES = {
    "output_tok_s": "output tok/s", "decode_tok_s": "tok/s of a stream", "prefill_tok_s": "prompt tok/s", "requests_s": "requests/s",
    "ttft_ms.p50": "ms to the first token, p50", "ttft_ms.p99": "ms to the first token, p99", "tpot_ms.p50": "ms per token, p50",
    "itl_ms.p99": "ms between tokens, p99", "e2e_ms.p50": "ms per request, p50", "e2e_ms.p99": "ms per request, p99",
}  # fmt: skip
SERVED_FIGURES = ("ttft_ms.p50", "tpot_ms.p50", "output_tok_s")


def is_time(figure: str) -> bool:
    """Whether less is better."""
    return "_ms" in figure


def measure_of(record: WorkloadRecord, context: WorkloadContext, *, is_quick: bool) -> Measure:
    """The record as the bench runs it; quick ones are cut to a few tokens of a few streams."""

    def build(seed: int) -> list[Conversation]:
        made = record.build(dataclasses.replace(context, seed=seed))
        conversations = [tuple(Call(tuple(prompt), num) for prompt, num in conversation) for conversation in made]
        if not is_quick:
            return conversations
        return [
            tuple(dataclasses.replace(c, prompt=c.prompt[:32], max_tokens=min(c.max_tokens, 8)) for c in conversation[:2]) for conversation in conversations[:2]
        ]

    return Measure(record.name, record.title, build, min(record.streams, 2) if is_quick else record.streams, BATCH, use_cache=record.use_cache)
