"""Prompts with a needle whose place is known to the token: what a selection is judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

COLOURS = ("red", "blue", "green", "golden", "silver", "purple", "white", "black")
ANIMALS = ("fox", "owl", "horse", "whale", "tiger", "rabbit", "eagle", "turtle")
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True, slots=True)
class Needle:
    """A question about a text.

    Attributes:
        token_ids: A chat of one message, up to where the answer starts.
        places: Of the tokens of the sentence that holds the answer. number_places: those of the answer itself. question: where the question begins.
        answer_start, number: An answer as the model likes to begin it, up to the number, and the number.
    """

    token_ids: tuple[int, ...]
    places: range
    number_places: range
    question: int
    answer: str
    depth: float
    answer_start: tuple[int, ...]
    number: tuple[int, ...]


def needle(encode: Callable[[str], list[int]], text: str, length: int, depth: float, seed: int) -> Needle:
    """A prompt of exactly `length` tokens, the needle at this share of its text."""
    rng = np.random.default_rng((seed, length, round(1000 * depth)))
    name = f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}"
    answer = str(rng.integers(1000, 10000))
    head = [1, *encode(f"system\n{SYSTEM}"), 2, *encode("\n"), 1, *encode("user\n")]
    before, number, after = encode(f"\n\nThe secret number of the {name} is"), encode(f" {answer}"), encode(".\n\n")
    tail = [*encode(f"\n\nWhat is the secret number of the {name}? Answer with the number."), 2, *encode("\n"), 1, *encode("assistant\n")]
    room = length - len(head) - len(before) - len(number) - len(after) - len(tail)
    if room < 1:
        raise ValueError(f"a prompt of {length} tokens has no room for a text")
    start = int(rng.integers(0, len(text) - 8 * length))
    hay = encode(text[start : start + 8 * length])[:room]
    if len(hay) < room:
        raise ValueError("the text is too short")
    at = int(depth * room)
    ids = [*head, *hay[:at], *before, *number, *after, *hay[at:], *tail]
    first = len(head) + at
    places = range(first, first + len(before) + len(number))
    said = tuple(encode(f"The secret number of the {name} is"))
    return Needle(tuple(ids), places, range(first + len(before), places.stop), length - len(tail), answer, depth, said, tuple(number))
