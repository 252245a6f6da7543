"""Small generated tasks whose answers a program checks: copying words, adding, finding a fact in a list.

Each is shown with three solved examples and continued as plain text: that is what a small model can do, so that there is something to lose.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from plugmesh.quality import accuracy
from plugmesh.records import Observation, QualityDelta, QualityMetricRecord, QualitySubject

NUM_EACH, NUM_SHOTS = 40, 3
WORDS = (
    "river", "candle", "window", "garden", "silver", "monkey", "bridge", "pepper", "castle", "rocket", "pillow", "violin", "harbor", "desert", "ladder",
    "basket", "button", "forest", "island", "mirror", "orange", "pencil", "saddle", "tunnel",
)  # fmt: skip
NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Irene", "Jonas")
CITIES = ("Paris", "London", "Madrid", "Vienna", "Lisbon", "Dublin", "Athens", "Warsaw", "Prague", "Berlin")

Task = tuple[str, str]
"""What is asked, up to the point where the answer starts, and the right answer: the rest of the line."""


def copying(rng: np.random.Generator) -> Task:
    words = " ".join(rng.choice(WORDS, 5, replace=False))
    return f"Words: {words}\nAgain:", words


def adding(rng: np.random.Generator) -> Task:
    a, b = (int(x) for x in rng.integers(1, 10, 2))
    return f"{a} + {b} =", str(a + b)


def extracting(rng: np.random.Generator) -> Task:
    names, cities = rng.choice(NAMES, 3, replace=False), rng.choice(CITIES, 3, replace=False)
    at = int(rng.integers(0, 3))
    facts = " ".join(f"{n} lives in {c}." for n, c in zip(names, cities, strict=True))
    return f"{facts}\nWhere does {names[at]} live? In", str(cities[at])


TASKS: dict[str, Callable[[np.random.Generator], Task]] = {"copy": copying, "arithmetic": adding, "extraction": extracting}


def with_examples(make: Callable[[np.random.Generator], Task], rng: np.random.Generator) -> Task:
    """A task behind solved ones of its kind, all from the same generator."""
    examples = [make(rng) for _ in range(NUM_SHOTS)]
    asked, right = make(rng)
    return "".join(f"{q} {a}\n\n" for q, a in examples) + asked, right


def is_right(answer: str, right: str) -> bool:
    """The first line is the answer; white space and an end mark do not count."""
    first = answer.strip().split("\n")[0]
    return " ".join(first.split()).rstrip(".") == right


def observe(subject: QualitySubject) -> Observation:
    correct = {}
    for i, (name, make) in enumerate(TASKS.items()):
        rng = np.random.default_rng((subject.seed, 3, i))
        tasks = [with_examples(make, rng) for _ in range(2 if subject.is_quick else NUM_EACH)]
        answers = subject.complete([q for q, _ in tasks], 24)
        correct[name] = [is_right(answer, right) for answer, (_, right) in zip(answers, tasks, strict=True)]
    return accuracy.observation(correct)


def compare(without: Observation, with_: Observation) -> list[QualityDelta]:
    return accuracy.compare("tasks", without, with_)


RECORD = QualityMetricRecord("tasks", "generated tasks, % right", frozenset({"answers"}), observe, compare)
