"""Small generated tasks whose answers a program checks: copying words, adding digits, finding a fact in a list."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from plugmesh.quality import accuracy
from plugmesh.records import Observation, QualityDelta, QualityMetricRecord, QualitySubject

NUM_EACH = 40
WORDS = (
    "river", "candle", "window", "garden", "silver", "monkey", "bridge", "pepper", "castle", "rocket", "pillow", "violin", "harbor", "desert", "ladder",
    "basket", "button", "forest", "island", "mirror", "orange", "pencil", "saddle", "tunnel",
)  # fmt: skip
NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Irene", "Jonas")
CITIES = ("Paris", "London", "Madrid", "Vienna", "Lisbon", "Dublin", "Athens", "Warsaw", "Prague", "Berlin")

Task = tuple[str, str]
"""A question, and what a right answer contains."""


def copying(rng: np.random.Generator) -> Task:
    words = " ".join(rng.choice(WORDS, 6, replace=False))
    return f"Repeat these words exactly: {words}", words


def adding(rng: np.random.Generator) -> Task:
    a, b = int(rng.integers(1, 10)), int(rng.integers(1, 10))
    return f"What is 2 + 2? Answer: 4\nWhat is 5 + 3? Answer: 8\nWhat is {a} + {b}? Answer:", str(a + b)


def extracting(rng: np.random.Generator) -> Task:
    names, cities = rng.choice(NAMES, 4, replace=False), rng.choice(CITIES, 4, replace=False)
    at = int(rng.integers(0, 4))
    facts = " ".join(f"{n} lives in {c}." for n, c in zip(names, cities, strict=True))
    return f"{facts} Where does {names[at]} live? Answer with the name of the city.", str(cities[at])


TASKS: dict[str, Callable[[np.random.Generator], Task]] = {"copy": copying, "arithmetic": adding, "extraction": extracting}


def is_right(name: str, answer: str, right: str) -> bool:
    """Copies may have other white space; of numbers the last one counts; of cities the first that is named."""
    if name == "arithmetic":
        numbers = re.findall(r"\d+", answer)
        return bool(numbers) and numbers[-1] == right
    if name == "extraction":
        named = re.findall("|".join(CITIES), answer)
        return bool(named) and named[0] == right
    return right in " ".join(answer.lower().split())


def observe(subject: QualitySubject) -> Observation:
    correct = {}
    for i, (name, make) in enumerate(TASKS.items()):
        rng = np.random.default_rng((subject.seed, 3, i))
        tasks = [make(rng) for _ in range(2 if subject.is_quick else NUM_EACH)]
        answers = subject.answer([q for q, _ in tasks], 32)
        correct[name] = [is_right(name, answer, right) for answer, (_, right) in zip(answers, tasks, strict=True)]
    return accuracy.observation(correct)


def compare(without: Observation, with_: Observation) -> list[QualityDelta]:
    return accuracy.compare("tasks", without, with_)


RECORD = QualityMetricRecord("tasks", "generated tasks, % right", frozenset({"answers"}), observe, compare)
