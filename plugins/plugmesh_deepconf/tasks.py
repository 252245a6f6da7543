"""Generated arithmetic with exact answers, few-shot, with work that is written out: what the measurements are made on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt that ends where the work begins, and what the work should come to."""

    task: str
    prompt: str
    answer: str


def _prompt(task: str, examples: Sequence[tuple[int, ...]], numbers: tuple[int, ...]) -> str:
    ask, work, _ = TASKS[task]
    shots = "".join(f"Question: {ask(e)}\nWork: {work(e)}\n\n" for e in examples)
    return f"{shots}Question: {ask(numbers)}\nWork:"


def problems(task: str, num: int, seed: int) -> list[Problem]:
    """`num` problems, all different as far as the task has so many."""
    rng = np.random.default_rng([seed, sorted(TASKS).index(task)])
    _, _, (low, high, count, examples) = TASKS[task]
    seen: dict[tuple[int, ...], None] = {}
    for _ in range(100 * num):
        if len(seen) == num:
            break
        numbers = tuple(int(n) for n in rng.integers(low, high + 1, count))
        if numbers not in examples:
            seen[numbers] = None
    return [Problem(task, _prompt(task, examples, numbers), str(max(numbers) if task == "largest" else sum(numbers))) for numbers in seen]


def _running_sums(numbers: tuple[int, ...]) -> str:
    steps, total = [], numbers[0]
    for n in numbers[1:]:
        steps.append(f"{total}+{n}={total + n}")
        total += n
    return f"{', '.join(steps)}. Answer: {total}"


def _running_maxima(numbers: tuple[int, ...]) -> str:
    steps, best = [], numbers[0]
    for n in numbers[1:]:
        steps.append(f"max({best},{n})={max(best, n)}")
        best = max(best, n)
    return f"{', '.join(steps)}. Answer: {best}"


def _sum_question(numbers: tuple[int, ...]) -> str:
    return f"What is {'+'.join(map(str, numbers))}?"


def _largest_question(numbers: tuple[int, ...]) -> str:
    return f"Which is the largest of {', '.join(map(str, numbers))}?"


Text = Callable[[tuple[int, ...]], str]
TASKS: dict[str, tuple[Text, Text, tuple[int, int, int, Sequence[tuple[int, ...]]]]] = {
    # name: question, work, (lowest number, highest number, how many, examples)
    "sum": (_sum_question, _running_sums, (1, 7, 3, ((3, 4, 2), (5, 1, 6), (2, 2, 5), (6, 4, 3), (1, 3, 3)))),
    "largest": (_largest_question, _running_maxima, (10, 98, 3, ((31, 45, 12), (77, 23, 64), (52, 19, 38), (15, 62, 90)))),
}
