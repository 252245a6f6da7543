"""The idea: decodes first, then prompt chunks within what is left of a token budget. Nothing running ever waits for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from plugmesh.records import SchedulerContext
from plugmesh_engine import KvView, SequenceView, plan_prompts
from plugmesh_sarathi.budget import profile_budget

if TYPE_CHECKING:
    from plugmesh_sarathi.plugin import Settings

log = structlog.get_logger()


class SarathiScheduler:
    """Stall-free schedule with at most `budget` tokens in a step.

    Every step: (1) one token of each decoding sequence, (2) a chunk of prompts already begun, (3) admissions, first come, first served; (2) and (3) share what (1)
    left. To keep the promise when there are many decodes, at most `budget - min_prefill` sequences run, so that (1) never eats the whole budget and prompts go
    on by at least `min_prefill` tokens a step; the rest wait in the queue.

    Args:
        budget: The paper's tau.
        min_prefill: Tokens of the budget that decodes cannot take; below `budget`.
        max_num_sequences: The engine's own limit.

    Source: Agrawal et al., Sarathi-Serve, OSDI 2024, arXiv:2403.02310, algorithm 3.
    """

    def __init__(self, budget: int, min_prefill: int, max_num_sequences: int) -> None:
        assert 0 < min_prefill < budget
        self.budget = budget
        self.max_running = min(max_num_sequences, budget - min_prefill)

    def schedule(self, waiting: Sequence[SequenceView], running: Sequence[SequenceView], kv: KvView) -> list[tuple[SequenceView, int]]:
        decodes: list[tuple[SequenceView, int]] = [(s, 1) for s in running if s.is_decode]
        return decodes + plan_prompts(waiting, running, kv, self.budget - len(decodes), self.max_running)


def build_scheduler(settings: Settings, engine: SchedulerContext) -> SarathiScheduler:
    """The scheduler of one engine; profiles its budget first when a target is set, which takes some seconds."""
    budget = settings.token_budget
    if settings.tbt_target_ms > 0 and engine.measure_step_ms is not None:
        lowest = settings.expected_decodes + settings.min_prefill_tokens
        budget = profile_budget(
            engine.measure_step_ms, settings.tbt_target_ms, lowest=lowest, highest=max(lowest, budget), num_blocks=engine.num_blocks,
            num_decodes=settings.expected_decodes, kv_tokens=settings.expected_kv_tokens,
        )  # fmt: skip
    scheduler = SarathiScheduler(budget, settings.min_prefill_tokens, engine.max_num_sequences)
    if scheduler.max_running < engine.max_num_sequences:
        log.info("sarathi.fewer_sequences", budget=budget, max_running=scheduler.max_running, max_num_sequences=engine.max_num_sequences)
    return scheduler
