"""One step of a given shape timed, for schedulers that derive their budget from it; the logits of a given text, for measures of quality."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from plugmesh.errors import Overloaded
from plugmesh.types import BLOCK_TOKENS
from plugmesh_engine.batch import Rows
from plugmesh_engine.kv.pool import BlockPool, OutOfBlocks
from plugmesh_engine.seams import Executor


def measure_step_ms(executor: Executor, pool: BlockPool, vocab_size: int, num_prefill_tokens: int, num_decodes: int, kv_tokens: int) -> float:
    """Wall time of a step of one chunk beside decodes, the chunk and every decode having `kv_tokens` before them.

    Blocks are taken from the pool for the time of the call. Raises Overloaded when there are not enough.
    """
    taken: list[int] = []
    try:
        rows: list[Rows] = []
        for length, computed in [(num_prefill_tokens, kv_tokens)] * (num_prefill_tokens > 0) + [(1, kv_tokens)] * num_decodes:
            start = len(taken)
            for _ in range(-(-(length + computed) // BLOCK_TOKENS)):
                taken.append(pool.take())
            blocks = taken[start:]
            rows.append(Rows([i % vocab_size for i in range(length)], computed, blocks, num_wanted=int(length == 1 or num_decodes == 0)))
        if not rows:
            return 0.0
        began = time.perf_counter()
        executor.run(rows)
        return (time.perf_counter() - began) * 1e3
    except OutOfBlocks:
        raise Overloaded(f"{len(taken)} free blocks are too few to measure a step of this size") from None
    finally:
        pool.drop(taken)


def teacher_forced(executor: Executor, pool: BlockPool, token_ids: Sequence[int], chunk_tokens: int) -> Iterator[np.ndarray]:
    """Logits after every token of a text, (n, vocab) float32 per chunk, in order; each array is valid until the next.

    Blocks are taken from the pool until the iterator ends or is closed. Raises Overloaded when there are not enough.
    """
    taken: list[int] = []
    try:
        for _ in range(-(-len(token_ids) // BLOCK_TOKENS)):
            taken.append(pool.take())
        for start in range(0, len(token_ids), chunk_tokens):
            ids = list(token_ids[start : start + chunk_tokens])
            yield executor.run([Rows(ids, start, taken, num_wanted=len(ids), full=True)]).logits
    except OutOfBlocks:
        raise Overloaded(f"{len(taken)} free blocks are too few for a text of {len(token_ids)} tokens") from None
    finally:
        pool.drop(reversed(taken))
