"""The engine's own scheduler: first come, first served, prompts first, decodes along with them."""

from __future__ import annotations

from collections.abc import Sequence

from plugmesh_engine.seams import KvView, SequenceView


class FcfsScheduler:
    """Continuous batching with a limit on prompt tokens per step.

    Every step takes up to `max_tokens` tokens of prompts (those already begun, then waiting ones while they fit), a whole prompt when it fits, and one token of
    every decoding sequence beside them.

    Args:
        max_tokens: Prompt tokens of one step.
        max_num_sequences: Sequences that run together.
        mix: False lets decodes wait while prompts are computed, as engines did before hybrid batches; for comparisons.
    """

    def __init__(self, max_tokens: int, max_num_sequences: int, *, mix: bool = True) -> None:
        self.max_tokens = max_tokens
        self.max_num_sequences = max_num_sequences
        self.mix = mix

    def schedule(self, waiting: Sequence[SequenceView], running: Sequence[SequenceView], kv: KvView) -> list[tuple[SequenceView, int]]:
        prompts = plan_prompts(waiting, running, kv, self.max_tokens, self.max_num_sequences)
        decodes = [(s, 1) for s in running if s.is_decode]
        return prompts if prompts and not self.mix else decodes + prompts


def plan_prompts(
    waiting: Sequence[SequenceView], running: Sequence[SequenceView], kv: KvView, budget: int, max_num_sequences: int
) -> list[tuple[SequenceView, int]]:
    """Chunks of prompts within `budget` tokens: partly computed ones, then admissions in order.

    A waiting sequence is admitted only when its whole prompt fits beside what the running ones still need, above the watermark; the first that does not fit ends
    the admissions, so that nobody overtakes it. With nothing running the watermark does not count, so that a prompt that fits the pool always gets in.
    """
    plan: list[tuple[SequenceView, int]] = []
    for s in running:
        if not s.is_decode and budget > 0:
            n = min(s.num_pending, budget)
            plan.append((s, n))
            budget -= n
    if not waiting or budget <= 0:
        return plan
    free = kv.num_free - sum(kv.blocks_for(s, s.num_pending) for s in running)
    slots = max_num_sequences - sum(s.num_slots for s in running)
    for s in waiting:
        if budget <= 0:
            break
        pending = kv.pending(s)
        needed = kv.blocks_for(s, pending)
        keep = kv.watermark if running or plan else 0
        if s.num_slots > slots or needed > free - keep:
            break
        n = min(pending, budget)
        plan.append((s, n))
        budget -= n
        free -= needed
        slots -= s.num_slots
    return plan
