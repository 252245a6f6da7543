"""What is learned: generated tasks with verifiers, over one small vocabulary of characters or put to a base model in words.

| task | prompt | answer |
|---|---|---|
| add | 27+58= | 85 |
| copy | c:bdaf= | bdaf |
| reverse | r:bdaf= | fadb |
| sort | s:5172= | 1257 |
| ask_add | What is 3 + 5? Answer with the number only. | 8 |
| ask_largest | Which number is the largest: 12, 71, 35? Answer with the number only. | 71 |
| reasoning_gym | a question of the package's data set `dataset` and `suffix`, as far as the model's text can say it | its answer |

A prompt belongs to the held-out tenth or to training by its checksum, so the two never share one, whatever the seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plugmesh.errors import InvalidRequest
from plugmesh_rollout.loop.text import Text

PAD, BOS, EOS = 0, 1, 2
_CHARACTERS = "0123456789+-*=:,;.?!() \n'\"/abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
VOCAB_SIZE = 3 + len(_CHARACTERS)
_IDS = {c: i for i, c in enumerate(_CHARACTERS, 3)}


def encode(text: str) -> list[int]:
    """Raises InvalidRequest for a character that is not in the vocabulary."""
    try:
        return [_IDS[c] for c in text]
    except KeyError as e:
        raise InvalidRequest(f"character {e.args[0]!r} is not in the vocabulary of the loop's tasks") from None


def decode(token_ids: Sequence[int] | np.ndarray) -> str:
    """Up to the first end token; a padding or begin token, which no answer has, becomes "\\0"."""
    text = []
    for t in token_ids:
        if t == EOS:
            break
        text.append(_CHARACTERS[t - 3] if 3 <= t < VOCAB_SIZE else "\0")
    return "".join(text)


class Characters:
    """The way with text of models from scratch: a token is a character."""

    def prompt_ids(self, prompt: str) -> list[int]:
        return [BOS, *encode(prompt)]

    def answer_ids(self, answer: str) -> list[int]:
        return [*encode(answer), EOS]

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        return decode(token_ids)


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the answer that its verifier knows."""

    prompt: str
    answer: str


Make = Callable[[np.random.Generator, int], Example]
"""Draws an example; the number is that of the draw, for data sets that are a list."""


def _letters(rng: np.random.Generator, low: int, high: int, alphabet: str) -> str:
    return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), int(rng.integers(low, high + 1))))


def _add(options: Mapping[str, Any]) -> Make:
    digits = int(options.get("digits", 2))
    reverse = bool(options.get("reversed", False))

    def make(rng: np.random.Generator, _: int) -> Example:
        a, b = (int(x) for x in rng.integers(0, 10**digits, 2))
        total = str(a + b)
        return Example(f"{a}+{b}=", total[::-1] if reverse else total)

    return make


def _of_text(letter: str, alphabet: str, answer: Callable[[str], str]) -> Callable[[Mapping[str, Any]], Make]:
    def build(options: Mapping[str, Any]) -> Make:
        low, high = int(options.get("min_length", 2)), int(options.get("max_length", 5))

        def make(rng: np.random.Generator, _: int) -> Example:
            text = _letters(rng, low, high, alphabet)
            return Example(f"{letter}:{text}=", answer(text))

        return make

    return build


def _reasoning_gym(options: Mapping[str, Any]) -> Make:
    try:
        import reasoning_gym  # type: ignore[import-not-found]  # optional
    except ImportError as e:
        raise InvalidRequest("the task reasoning_gym needs the package reasoning-gym: pip install 'plugmesh[reasoning]'", param="task") from e
    options = dict(options)
    name, suffix = str(options.pop("dataset", "basic_arithmetic")), str(options.pop("suffix", "="))
    data = reasoning_gym.create_dataset(name, size=1 << 30, seed=0, **options)

    def make(rng: np.random.Generator, _: int) -> Example:
        entry = data[int(rng.integers(0, 1 << 30))]
        return Example(entry["question"] + suffix, entry["answer"])

    return make


def _ask_add(options: Mapping[str, Any]) -> Make:
    low, high, terms = int(options.get("low", 1)), int(options.get("high", 20)), int(options.get("terms", 2))
    question = str(options.get("question", "What is {}? Answer with the number only."))

    def make(rng: np.random.Generator, _: int) -> Example:
        numbers = [int(x) for x in rng.integers(low, high + 1, terms)]
        return Example(question.replace("{}", " + ".join(map(str, numbers))), str(sum(numbers)))

    return make


def _ask_pick(options: Mapping[str, Any]) -> Make:
    low, high, count = int(options.get("low", 1)), int(options.get("high", 99)), int(options.get("count", 3))
    question = str(options.get("question", "Which number is the largest: {}? Answer with the number only."))

    def make(rng: np.random.Generator, _: int) -> Example:
        numbers = [int(x) for x in rng.choice(np.arange(low, high + 1), count, replace=False)]
        return Example(question.replace("{}", ", ".join(map(str, numbers))), str(max(numbers)))

    return make


TASKS: dict[str, Callable[[Mapping[str, Any]], Make]] = {
    "add": _add,
    "copy": _of_text("c", "abcdef", lambda s: s),
    "reverse": _of_text("r", "abcdef", lambda s: s[::-1]),
    "sort": _of_text("s", "0123456789", lambda s: "".join(sorted(s))),
    "ask_add": _ask_add,
    "ask_largest": _ask_pick,
    "reasoning_gym": _reasoning_gym,
}


class Examples:
    """The examples of a task by number: the same seed and number always give the same one.

    Args:
        text: The model's way with text; what it cannot say is not asked.

    Raises:
        InvalidRequest: No such task.
    """

    def __init__(self, task: str, options: Mapping[str, Any], seed: int, text: Text | None = None) -> None:
        if task not in TASKS:
            raise InvalidRequest(f"no task {task!r}; known: {', '.join(TASKS)}", param="task")
        self._make = TASKS[task](options)
        self._seed = seed
        self.text = text or Characters()

    def prompt_ids(self, example: Example) -> list[int]:
        return self.text.prompt_ids(example.prompt)

    def train(self, number: int) -> Example:
        return self._draw(number, held_out=False)

    def held_out(self, number: int) -> Example:
        return self._draw(number, held_out=True)

    def _draw(self, number: int, *, held_out: bool) -> Example:
        rng = np.random.default_rng([self._seed, number, held_out])
        for _ in range(10_000):
            example = self._make(rng, number)
            if is_held_out(example.prompt) == held_out and self._fits(example):
                return example
        raise InvalidRequest("the task has too few prompts to hold some out", param="task")

    def _fits(self, example: Example) -> bool:
        try:
            return bool(self.text.prompt_ids(example.prompt)) and bool(self.text.answer_ids(example.answer))
        except InvalidRequest:
            return False


def is_held_out(prompt: str) -> bool:
    """A tenth of all prompts."""
    return zlib.crc32(prompt.encode()) % 10 == 0
