"""How far the next-token distribution moves: KL divergence and agreement of the likeliest token, both teacher-forced on the same text."""

from __future__ import annotations

import numpy as np

from plugmesh.quality import statistics
from plugmesh.quality.perplexity import log_softmax, windows
from plugmesh.records import Observation, QualityDelta, QualityMetricRecord, QualitySubject

NUM_WINDOWS, CONTEXT, KEPT = 4, 320, 64  # the last KEPT rows of each window: behind a context, and 50 MB in all with a vocabulary of 49,152


def observe(subject: QualitySubject) -> Observation:
    num, size, kept = (1, 48, 16) if subject.is_quick else (NUM_WINDOWS, CONTEXT, KEPT)
    rows = []
    for window in windows(subject, num, size):
        at = 0
        for logits in subject.logits(window):
            first = max(0, size - kept - at)
            at += len(logits)
            if first < len(logits):
                rows.append(log_softmax(logits[first:]))
    log_probs = np.concatenate(rows)
    entropy = -(np.exp(log_probs, dtype=np.float64) * log_probs).sum(axis=1).mean()
    return Observation({"entropy_nats": float(entropy), "num_positions": float(len(log_probs))}, {"log_probs": log_probs})


def compare(without: Observation, with_: Observation) -> list[QualityDelta]:
    """KL(without || with) in nats per position, and how often the likeliest token is the same one."""
    p, q = without.arrays["log_probs"], with_.arrays["log_probs"]
    each = np.array([float((np.exp(a.astype(np.float64)) * (a.astype(np.float64) - b)).sum()) for a, b in zip(p, q, strict=True)])
    kl = statistics.mean(np.maximum(each, 0))  # rounding makes it a little negative where both are equal
    same = statistics.mean(p.argmax(axis=1) == q.argmax(axis=1))
    return [
        QualityDelta("kl_nats", kl.value, kl.low, kl.high, "lower"),
        QualityDelta("top1_agreement", same.value, same.low, same.high, "higher"),
    ]


RECORD = QualityMetricRecord("divergence", "divergence of the next-token distribution", frozenset({"logits"}), observe, compare, uses_reference=True)
