"""Times one step of a given shape on the real model, for schedulers that derive their budget from it."""

from __future__ import annotations

import time

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
