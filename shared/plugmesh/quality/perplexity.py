"""Perplexity on English text that every CPython carries, computed as a server would: chunk after chunk, each reading the KV that earlier ones left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from plugmesh.quality import statistics
from plugmesh.records import Observation, QualityDelta, QualityMetricRecord, QualitySubject

WINDOW_TOKENS, NUM_WINDOWS = 512, 8
BLOCK = 64  # tokens that the interval takes for one item


def windows(subject: QualitySubject, num: int, num_tokens: int) -> list[list[int]]:
    """Pieces of the text, spread over all of it, where the seed says."""
    text = subject.english()
    rng = np.random.default_rng((subject.seed, 1))
    num_chars = num_tokens * 8  # English has four or five characters a token; what is too much is cut off
    stride = len(text) // num
    starts = [i * stride + int(rng.integers(0, max(1, stride - num_chars))) for i in range(num)]
    return [subject.encode(text[s : s + num_chars])[:num_tokens] for s in starts]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n, vocab) in float32, stable."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def negative_log_likelihoods(subject: QualitySubject, token_ids: Sequence[int]) -> np.ndarray:
    """(T - 1,) of every token but the first, in nats. A NaN among the logits stays one."""
    return np.concatenate(list(_per_chunk(subject, token_ids)))


def _per_chunk(subject: QualitySubject, token_ids: Sequence[int]) -> Iterator[np.ndarray]:
    at = 0
    for logits in subject.logits(token_ids):
        targets = np.asarray(token_ids[at + 1 : at + 1 + len(logits)])
        rows = logits[: len(targets)].astype(np.float64)
        at += len(logits)
        highest = rows.max(axis=1, keepdims=True)
        total = np.log(np.exp(rows - highest).sum(axis=1)) + highest[:, 0]
        yield total - rows[np.arange(len(targets)), targets]


def observe(subject: QualitySubject) -> Observation:
    num, size = (1, 96) if subject.is_quick else (NUM_WINDOWS, WINDOW_TOKENS)
    nll = np.stack([negative_log_likelihoods(subject, w) for w in windows(subject, num, size)])
    return Observation({"perplexity": float(np.exp(nll.mean())), "num_tokens": float(nll.size)}, {"nll": nll})


def compare(without: Observation, with_: Observation) -> list[QualityDelta]:
    """The ratio of perplexities, from differences token by token."""
    difference = with_.arrays["nll"] - without.arrays["nll"]
    found = statistics.exp_mean(np.concatenate([statistics.blocks(row, BLOCK) for row in difference]))
    return [QualityDelta("perplexity_ratio", found.value, found.low, found.high, "lower")]


RECORD = QualityMetricRecord("perplexity", "perplexity on English text", frozenset({"logits"}), observe, compare, uses_reference=True)
