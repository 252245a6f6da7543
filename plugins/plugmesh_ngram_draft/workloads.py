"""Chats for `plugmesh ab`: a passage to repeat, where drafts are right, and prose of its own, where there is nothing to draft."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from plugmesh.records import WorkloadContext, WorkloadRecord

_ANSWER_TOKENS, _PASSAGE_CHARS = 128, 600
_SUBJECTS = ("a lighthouse", "a clockmaker", "two rivers", "an unusual library", "the last train", "a painter of maps", "winter bees", "a quiet robot")
Build = Callable[[WorkloadContext], Sequence[Sequence[tuple[Sequence[int], int]]]]


def _copies(num: int) -> Build:
    def build(context: WorkloadContext) -> list[list[tuple[list[int], int]]]:
        rng = random.Random(f"copy {context.seed}")
        text = context.english()
        starts = [rng.randrange(len(text) - _PASSAGE_CHARS) for _ in range(num)]
        asks = [f"Repeat the following text exactly, word for word:\n\n{text[s : s + _PASSAGE_CHARS].strip()}" for s in starts]
        return [[(context.chat(ask), _ANSWER_TOKENS)] for ask in asks]

    return build


def _stories(num: int) -> Build:
    def build(context: WorkloadContext) -> list[list[tuple[list[int], int]]]:
        rng = random.Random(f"story {context.seed}")
        return [[(context.chat(f"Write a long story about {rng.choice(_SUBJECTS)} in the year {rng.randrange(1500, 2500)}."), _ANSWER_TOKENS)] for _ in range(num)]

    return build


WORKLOADS = [
    WorkloadRecord("copy_1", "single stream that repeats a passage", _copies(2), 1, "output_tok_s"),
    WorkloadRecord("copy_8", "8 streams that repeat passages", _copies(8), 8, "output_tok_s", ("engine",)),
    WorkloadRecord("story_1", "single stream that tells a story", _stories(2), 1, "output_tok_s", ("engine",)),
]
