"""Children without a mesh: `plugmesh.records.StrategyApi` over given traces, one token of each child per step as in an engine.

For the conformance suite, and for measuring a strategy on recorded traces. The gateway's own api is compared with it in a test.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugmesh.errors import PlugmeshError
from plugmesh.ledger import Ledger
from plugmesh.records import ChildEvent, StrategyRequest
from plugmesh.types import FinishReason, SamplingParams, TokenInfo


@dataclass(frozen=True, slots=True)
class Script:
    """What one child will generate.

    Attributes:
        tokens, texts: As many of each; the end token, which has no text, is only counted.
        finish_reason: STOP has an end token behind `tokens`.
        error: Raised in place of the token number `len(tokens)`.
    """

    tokens: Sequence[TokenInfo]
    texts: Sequence[str]
    finish_reason: FinishReason = FinishReason.STOP
    error: PlugmeshError | None = None


def strategy_request(options: Mapping[str, Any] | None = None, *, token_ids: Sequence[int] = (1, 2, 3), **sampling: Any) -> StrategyRequest:
    """A request as the gateway gives it to a strategy."""
    params = SamplingParams(**{"seed": 1, "max_tokens": 64, **sampling})
    return StrategyRequest("r", "tiny", tuple(token_ids), params, dict(options or {}), time.monotonic() + 60)


class ReplayApi:
    """See the module. `script(child, sampling)` is asked once per child that starts.

    Args:
        late_steps: Steps between a cancellation and its arrival; tokens computed meanwhile are charged, and not delivered.

    Attributes:
        open: Children that run now.
        samplings: Of every child, in the order of their numbers.
        num_steps: Steps made; what a strategy waits for.
    """

    def __init__(
        self, request: StrategyRequest, script: Callable[[int, SamplingParams], Script], *, budget_tokens: int = 1 << 20, budget_calls: int = 1 << 10,
        late_steps: int = 0,
    ) -> None:
        self.ledger = Ledger(budget_tokens, budget_calls)
        self.open: set[int] = set()
        self.samplings: list[SamplingParams] = []
        self.cancelled: set[int] = set()
        self.num_steps = 0
        self._request = request
        self._script = script
        self._late_steps = late_steps

    def cancel(self, child: int) -> None:
        if not 0 <= child < len(self.samplings):
            raise ValueError(f"there is no child {child}")
        if child in self.open:
            self.cancelled.add(child)

    async def generate(self, n: int, *, sampling: SamplingParams | None = None, prefix: Sequence[int] = ()) -> AsyncGenerator[ChildEvent, None]:
        params = sampling or self._request.sampling
        running: dict[int, Script] = {}
        grants: dict[int, int] = {}
        counts: dict[int, int] = {}
        while len(grants) < n and self.ledger.num_left >= params.max_tokens and (granted := self.ledger.reserve(params.max_tokens)):
            child = len(self.samplings)
            self.samplings.append(params)
            grants[child], counts[child] = granted, 0
            running[child] = self._script(child, params)
        self.open |= running.keys()
        try:
            while running:
                await asyncio.sleep(0)
                self.num_steps += 1
                for child, script in list(running.items()):
                    if child in self.cancelled:
                        counts[child] = min(counts[child] + self._late_steps, grants[child], len(script.tokens) + 1)
                        self._end(child, running, grants, counts)
                        yield ChildEvent(child, "", (), FinishReason.CANCELLED)
                        continue
                    at = counts[child]
                    if at >= len(script.tokens) and script.error is not None:
                        raise script.error
                    is_end = at >= len(script.tokens) and script.finish_reason is FinishReason.STOP
                    counts[child] += 1 if is_end or at < len(script.tokens) else 0
                    reason = FinishReason.STOP if is_end else FinishReason.LENGTH if counts[child] >= min(grants[child], len(script.tokens)) and (
                        script.finish_reason is FinishReason.LENGTH or counts[child] >= grants[child]) and script.error is None else None
                    text = script.texts[at] if at < len(script.tokens) else ""
                    tokens = tuple(script.tokens[at : at + 1])
                    if reason is not None:
                        self._end(child, running, grants, counts)
                    yield ChildEvent(child, text, tokens, reason)
        finally:
            for child in list(running):
                self._end(child, running, grants, counts)

    def _end(self, child: int, running: dict[int, Script], grants: dict[int, int], counts: dict[int, int]) -> None:
        del running[child]
        self.open.discard(child)
        self.ledger.settle(grants[child], counts[child])
