"""Requests for a cache of prefixes, by what of AIBrix's eviction they show. Names only: a request is a chain of block ids, as prompts of 16-token blocks have.

All are drawn by a seed and scaled by the number of blocks that the cache holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

Request = list[bytes]


def block(*name: object) -> bytes:
    return hashlib.sha256(repr(name).encode()).digest()


def chain(*name: object, length: int = 4) -> Request:
    """A prompt of its own, of so many blocks."""
    return [block(*name, i) for i in range(length)]


def ranks(rng: np.random.Generator, num: int, size: int, alpha: float) -> list[int]:
    """Draws from 0 to num - 1, the i-th with weight (i + 1) ** -alpha."""
    weights = np.arange(1, num + 1, dtype=np.float64) ** -alpha
    return [int(i) for i in rng.choice(num, size, p=weights / weights.sum())]


def zipf(capacity: int, num: int, seed: int) -> Iterator[Request]:
    """Popular and less popular prompts, twenty times what fits; nothing else."""
    rng = np.random.default_rng(seed)
    yield from (chain("p", i) for i in ranks(rng, 5 * capacity, num, 0.9))


def zipf_and_scan(capacity: int, num: int, seed: int) -> Iterator[Request]:
    """The same, and every now and then a run over prompts that never come again, each time as large as the cache (a benchmark, a batch of documents)."""
    every, length = capacity, capacity // 4
    for i, request in enumerate(zipf(capacity, num, seed)):
        yield request
        if i % every == every - 1:
            yield from (chain("scan", i, j) for j in range(length))


def systems(capacity: int, num: int, seed: int) -> Iterator[Request]:
    """Chat requests: capacity / 10 system prompts, 20 at least, of 8 blocks by Zipf, and behind each a text of 8 blocks that nobody sends again."""
    rng = np.random.default_rng(seed)
    yield from (chain("system", i, length=8) + chain("user", n, length=8) for n, i in enumerate(ranks(rng, max(20, capacity // 10), num, 0.8)))


def chats(capacity: int, num: int, seed: int) -> Iterator[Request]:
    """Conversations that grow by 2 blocks a turn for 8 turns, capacity / 12 of them at a time: what came last comes again, and then never."""
    rng = np.random.default_rng(seed)
    running = {i: 0 for i in range(max(1, capacity // 12))}
    new = len(running)
    for _ in range(num):
        name = int(rng.choice(list(running)))
        running[name] += 1
        yield chain("chat", name, length=2 * running[name])
        if running[name] == 8:
            del running[name]
            running[new] = 0
            new += 1


def drift(capacity: int, num: int, seed: int) -> Iterator[Request]:
    """A window of prompts as large as three quarters of the cache that moves on by one prompt in every eight requests."""
    rng = np.random.default_rng(seed)
    width = 3 * capacity // 16
    yield from (chain("d", n // 8 + int(rng.integers(width))) for n in range(num))


def handed_over(capacity: int, num: int, seed: int) -> Iterator[Request]:
    """`zipf_and_scan` in a mesh where prefill stores a prompt's KV and decode fetches it at once: every request is asked for twice in a row."""
    for request in zipf_and_scan(capacity, num, seed):
        yield request
        yield request


WORKLOADS: dict[str, Callable[[int, int, int], Iterator[Request]]] = {
    "zipf": zipf, "zipf+scan": zipf_and_scan, "system prompts": systems, "chats": chats, "drift": drift, "zipf+scan, handed over": handed_over,
}  # fmt: skip
