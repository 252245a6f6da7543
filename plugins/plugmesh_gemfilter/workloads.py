"""Questions about long texts for `plugmesh ab`: what the two stages are for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from plugmesh.records import WorkloadContext, WorkloadRecord

_ANSWER_TOKENS = 32
Build = Callable[[WorkloadContext], Sequence[Sequence[tuple[Sequence[int], int]]]]


def _questions(num: int, num_tokens: int) -> Build:
    def build(context: WorkloadContext) -> list[list[tuple[list[int], int]]]:
        rng = random.Random(f"document {num_tokens} {context.seed}")
        text = context.english()
        found = []
        for _ in range(num):
            start = rng.randrange(len(text) - 8 * num_tokens)
            passage = text[start : start + 8 * num_tokens]
            passage = passage[: len(passage) * num_tokens // len(context.encode(passage))]  # about so many tokens
            found.append([(context.chat(f"{passage}\n\nWhat is this text about? Answer in one sentence."), _ANSWER_TOKENS)])
        return found

    return build


WORKLOADS = [
    WorkloadRecord("document_4k", "a question about a text of 4,000 tokens", _questions(2, 4000), 1, "ttft_ms.p50", use_cache=False),
    WorkloadRecord("document_7k", "a question about a text of 7,000 tokens", _questions(1, 7000), 1, "ttft_ms.p50", ("engine",), use_cache=False),
]
