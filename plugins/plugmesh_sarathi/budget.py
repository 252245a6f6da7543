"""The largest token budget whose step still meets a time between tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import structlog

log = structlog.get_logger()

STEP = 16  # candidates are this far apart


def profile_budget(
    measure_step_ms: Callable[[int, int, int], float], target_ms: float, *, lowest: int, highest: int, num_blocks: int, num_decodes: int, kv_tokens: int
) -> int:
    """Largest budget from `lowest` to `highest` (in steps of 16) whose mixed step takes at most `target_ms`.

    A mixed step has `num_decodes` decodes and one chunk of the rest of the budget, each behind `kv_tokens` tokens. Bisects, as the time grows
    with the budget; each candidate is the median of three after one to warm up. Returns `lowest`, with a warning, when even that is too slow.

    Args:
        measure_step_ms: See `plugmesh.records.SchedulerContext`.
        num_blocks: Of the engine's pool; `kv_tokens` is cut so that the synthetic step fits half of it.
    """
    while kv_tokens > 0 and (num_decodes + 1) * (kv_tokens // 16 + 2) + highest // 16 > num_blocks // 2:
        kv_tokens //= 2

    def step_ms(budget: int) -> float:
        shape = (budget - num_decodes, num_decodes, kv_tokens)
        measure_step_ms(*shape)
        return statistics.median(measure_step_ms(*shape) for _ in range(3))

    low, high = 0, (highest - lowest) // STEP  # candidate i is lowest + STEP * i
    best_ms = step_ms(lowest)
    if best_ms > target_ms:
        log.warning("sarathi.target_out_of_reach", target_ms=target_ms, step_ms=round(best_ms, 1), budget=lowest)
        return lowest
    while low < high:
        middle = (low + high + 1) // 2
        ms = step_ms(lowest + STEP * middle)
        if ms <= target_ms:
            low, best_ms = middle, ms
        else:
            high = middle - 1
    budget = lowest + STEP * low
    log.info("sarathi.profiled", target_ms=target_ms, step_ms=round(best_ms, 1), budget=budget, kv_tokens=kv_tokens)
    return budget
