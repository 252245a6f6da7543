"""How long two greedy continuations stay the same, free running, through scheduler, drafts and sampler."""

from __future__ import annotations

import numpy as np

from plugmesh.quality import statistics
from plugmesh.quality.perplexity import windows
from plugmesh.records import Observation, QualityDelta, QualityMetricRecord, QualitySubject

NUM_PROMPTS, PROMPT_TOKENS, NUM_TOKENS = 16, 96, 48
_NOTHING = -1


def observe(subject: QualitySubject) -> Observation:
    num, size, length = (2, 24, 8) if subject.is_quick else (NUM_PROMPTS, PROMPT_TOKENS, NUM_TOKENS)
    tokens = np.full((num, length), _NOTHING, np.int64)
    for row, found in zip(tokens, subject.generate(windows(subject, num, size), length), strict=True):
        row[: len(found)] = found
    return Observation({"num_prompts": float(num), "num_tokens": float((tokens != _NOTHING).sum())}, {"tokens": tokens})


def common_share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, length) twice to (n,): the part of a continuation before the first difference; 1 where there is none."""
    differs = a != b
    return np.where(differs.any(axis=1), differs.argmax(axis=1), a.shape[1]) / a.shape[1]


def compare(without: Observation, with_: Observation) -> list[QualityDelta]:
    share = common_share(without.arrays["tokens"], with_.arrays["tokens"])
    same, common = statistics.mean(share == 1), statistics.mean(share)
    return [
        QualityDelta("identical_continuations", same.value, same.low, same.high, "higher"),
        QualityDelta("common_beginning", common.value, common.low, common.high, "higher"),
    ]


RECORD = QualityMetricRecord("greedy", "greedy continuations", frozenset({"tokens"}), observe, compare)
