"""What is sent: seeded conversations of token ids, and when they arrive.

Prompts are ids and not text, so that their lengths are exact on every system that reads the same vocabulary; `usage` is checked against
them afterwards. The same seed gives the same prompts everywhere, another seed gives prompts that share no cached prefix with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from plugmesh.errors import FailedPrecondition, InvalidRequest

TOKEN_IDS = range(1000, 40_000)  # ordinary words of most vocabularies; below them lie control tokens and single bytes


@dataclass(frozen=True, slots=True)
class Call:
    """One request: a prompt and how many tokens to generate, exactly. Its caller waits `pause_s` before it sends it.

    With a `schema` the answer is to obey it; the schema must not let it end before `max_tokens`.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    pause_s: float = 0.0
    schema: Mapping[str, Any] | None = None


Conversation = tuple[Call, ...]
"""Calls that follow one another; most have one."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a workload.

    Attributes:
        num_conversations: How many; each is one request, except in "multi-turn".
        num_in, num_out: Tokens of a prompt (of a whole one in "prefix-tree", of what a turn adds in "multi-turn") and of an answer.
        spread: Lengths vary uniformly by this share around the sizes above; 0 keeps them equal.
        num_turns: Turns of a conversation in "multi-turn".
        prefix_tokens: Of the prompt in "prefix-tree", shared along the tree's levels.
        depth, branching: Levels of the tree and children per node.
    """

    num_conversations: int = 32
    num_in: int = 128
    num_out: int = 64
    spread: float = 0.0
    num_turns: int = 4
    prefix_tokens: int = 96
    depth: int = 2
    branching: int = 4
    token_ids: range = field(default=TOKEN_IDS)


def random_prompts(shape: Shape, seed: int) -> list[Conversation]:
    """Fresh random mixes: nothing can be found in a prefix cache."""
    rng = random.Random(f"random {seed}")
    return [
        (Call(_ids(rng, shape, _length(rng, shape.num_in, shape)), _length(rng, shape.num_out, shape)),) for _ in range(shape.num_conversations)
    ]


def with_pauses(conversations: list[Conversation], longest_s: float, seed: int) -> list[Conversation]:
    """The same calls, each after a pause between 0 and `longest_s`, so that they come at any moment of a step and not at its end."""
    rng = random.Random(f"pauses {seed}")
    return [tuple(Call(c.prompt, c.max_tokens, rng.uniform(0, longest_s), c.schema) for c in conversation) for conversation in conversations]


def prefix_tree(shape: Shape, seed: int) -> list[Conversation]:
    """Prompts that share beginnings as agents and few-shot prompts do: a path from the root of a random tree, then an end of their own.

    Of `prefix_tokens`, each level holds an equal part; the rest of `num_in` is fresh. Depth 1 and branching 1 is one prefix for all.
    """
    if not 0 < shape.prefix_tokens < shape.num_in:
        raise InvalidRequest(f"a prefix of {shape.prefix_tokens} tokens leaves nothing of {shape.num_in} for the prompt's own end")
    rng = random.Random(f"tree {seed}")
    sizes = [shape.prefix_tokens * (i + 1) // shape.depth - shape.prefix_tokens * i // shape.depth for i in range(shape.depth)]
    nodes: dict[tuple[int, ...], tuple[int, ...]] = {}
    found: list[Conversation] = []
    for _ in range(shape.num_conversations):
        path: tuple[int, ...] = ()
        prompt: tuple[int, ...] = ()
        for size in sizes:
            path = (*path, rng.randrange(shape.branching))
            if path not in nodes:
                nodes[path] = _ids(rng, shape, size)
            prompt += nodes[path]
        own = _length(rng, shape.num_in - shape.prefix_tokens, shape)
        found.append((Call(prompt + _ids(rng, shape, own), _length(rng, shape.num_out, shape)),))
    return found


def multi_turn(shape: Shape, seed: int) -> list[Conversation]:
    """Chats: every turn's prompt is the last one's, a stand-in for its answer (random, of the answer's length), and a new question.

    The stand-in keeps the workload independent of what a system answers; what can be found in a cache is the prompts, not the answers.
    """
    rng = random.Random(f"turns {seed}")
    found = []
    for _ in range(shape.num_conversations):
        prompt: tuple[int, ...] = ()
        calls = []
        for _ in range(shape.num_turns):
            prompt += _ids(rng, shape, _length(rng, shape.num_in, shape))
            calls.append(Call(prompt, _length(rng, shape.num_out, shape)))
            prompt += _ids(rng, shape, calls[-1].max_tokens)
        found.append(tuple(calls))
    return found


def long_context(shape: Shape, seed: int) -> list[Conversation]:
    """One long text that all requests share except their last 16 tokens: decoding at depth, whose prefill is paid once per system."""
    rng = random.Random(f"long {seed}")
    num_own = min(16, shape.num_in)
    base = _ids(random.Random(f"long base {shape.num_in}"), shape, shape.num_in - num_own)
    return [(Call(base + _ids(rng, shape, num_own), shape.num_out),) for _ in range(shape.num_conversations)]


RECORD_SCHEMA: Mapping[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "job", "active"],
    "properties": {
        "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "job": {"enum": ["nurse", "teacher", "pilot", "cook", "other"]}, "active": {"type": "boolean"},
    },
}  # fmt: skip


def endless(item: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """The schema of an array that cannot end within so many tokens: an item takes more than two, with its comma, so answers have exactly the length asked for."""
    return {"type": "array", "items": dict(item), "minItems": max(64, max_tokens // 2)}


def json_schema(shape: Shape, seed: int) -> list[Conversation]:
    """Fresh random prompts whose answers are constrained: an array of records that goes on until the tokens are used up."""
    schema = endless(RECORD_SCHEMA, round(shape.num_out * (1 + shape.spread)))
    return [
        tuple(Call(c.prompt, c.max_tokens, c.pause_s, schema) for c in conversation) for conversation in random_prompts(shape, seed)
    ]


WORKLOADS: dict[str, Callable[[Shape, int], list[Conversation]]] = {
    "random": random_prompts, "prefix-tree": prefix_tree, "multi-turn": multi_turn, "long-context": long_context, "json-schema": json_schema,
}  # fmt: skip
NOT_YET = {
    "rollout-groups": "it needs the rollout service, which is not part of the mesh yet",
}


def make(name: str, shape: Shape, seed: int) -> list[Conversation]:
    """A workload by name. Raises FailedPrecondition for one that is planned, InvalidRequest for an unknown one or bad sizes."""
    if name in NOT_YET:
        raise FailedPrecondition(f"workload {name} is not available yet: {NOT_YET[name]}")
    if name not in WORKLOADS:
        raise InvalidRequest(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    if min(shape.num_conversations, shape.num_in, shape.num_out, shape.num_turns, shape.depth, shape.branching) < 1 or not 0 <= shape.spread < 1:
        raise InvalidRequest("sizes of a workload are at least 1, and the spread is from 0 up to, not including, 1")
    return WORKLOADS[name](shape, seed)


def arrivals(rate: float, seed: int, cv: float = 1.0) -> Iterator[float]:
    """Endless arrival times in seconds, from 0: gaps are gamma-distributed with mean 1/rate and coefficient of variation `cv`.

    cv 1 is a Poisson process; above it arrivals come in bursts, below it they are more even. Raises InvalidRequest when not positive.
    """
    if rate <= 0 or cv <= 0:
        raise InvalidRequest("rate and coefficient of variation of arrivals must be positive")
    return _arrivals(rate, random.Random(f"arrivals {seed}"), cv)


def _arrivals(rate: float, rng: random.Random, cv: float) -> Iterator[float]:
    shape = 1 / cv**2
    at = 0.0
    while True:
        yield at
        at += rng.gammavariate(shape, 1 / (shape * rate))


def _ids(rng: random.Random, shape: Shape, num: int) -> tuple[int, ...]:
    return tuple(rng.choices(shape.token_ids, k=num))


def _length(rng: random.Random, mean: int, shape: Shape) -> int:
    return mean if not shape.spread else max(1, round(mean * rng.uniform(1 - shape.spread, 1 + shape.spread)))
