"""Retrieval from a long context: a sentence with a number, somewhere in English text, and a question about it."""

from __future__ import annotations

import re

import numpy as np

from plugmesh.quality import accuracy
from plugmesh.records import Observation, QualityDelta, QualityMetricRecord, QualitySubject

LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
COLOURS = ("red", "blue", "green", "golden", "silver", "purple", "white", "black")
ANIMALS = ("fox", "owl", "horse", "whale", "tiger", "rabbit", "eagle", "turtle")


def questions(subject: QualitySubject) -> list[tuple[int, str, str]]:
    """(length, question, right answer); the text has `length` tokens, cut at words."""
    lengths, depths = ((128,), (0.5,)) if subject.is_quick else (LENGTHS, DEPTHS)
    rng = np.random.default_rng((subject.seed, 2))
    text = subject.english()
    found = []
    for length in lengths:
        if length + 64 > subject.context_tokens:
            continue
        for depth in depths:
            start = int(rng.integers(0, len(text) - 8 * length))
            words = subject.decode(subject.encode(text[start : start + 8 * length])[:length]).split(" ")
            name = f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}"
            number = str(rng.integers(1000, 10000))
            at = int(depth * len(words))
            hay = " ".join([*words[:at], f"\n\nThe secret number of the {name} is {number}.\n\n", *words[at:]])
            found.append((length, f"{hay}\n\nWhat is the secret number of the {name}? Answer with the number.", number))
    return found


def observe(subject: QualitySubject) -> Observation:
    correct: dict[str, list[bool]] = {}
    asked = questions(subject)
    # One length after another, so that the KV of the long ones is not there at once.
    for length in sorted({n for n, _, _ in asked}):
        group = [(q, right) for n, q, right in asked if n == length]
        answers = subject.answer([q for q, _ in group], 24)
        correct[f"at_{length}"] = [right in re.findall(r"\d+", answer.replace(",", "")) for answer, (_, right) in zip(answers, group, strict=True)]
    return accuracy.observation(correct)


def compare(without: Observation, with_: Observation) -> list[QualityDelta]:
    return accuracy.compare("needle", without, with_)


RECORD = QualityMetricRecord("needle", "retrieval from a long context, % right", frozenset({"answers"}), observe, compare)
