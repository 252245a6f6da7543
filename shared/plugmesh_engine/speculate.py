"""Drafted tokens in a step: asked for, kept within limits, and accounted for, whatever the draft method does."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from plugmesh_engine.batch import Rows
from plugmesh_engine.seams import DraftMethod, DraftOutcome
from plugmesh_engine.sequence import Sequence as Seq

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Planned:
    """One sequence's part of a step.

    Attributes:
        draft: Tokens to check behind the pending one; of decodes only.
        rows: As given to the executor.
        num_accepted: Of the draft.
        is_void: What was computed for it does not count.
        logits: (R, vocab) float32 of the whole step, until the next one; only where a second draw may come.
        first_logits: Its row in them; 1 + len(draft) rows are its own. -1 - i for wanted row i of the step, whose logits are kept by the executor.
    """

    seq: Seq
    num_tokens: int
    draft: Sequence[int] = ()
    rows: Rows | None = None
    num_accepted: int = 0
    is_void: bool = False
    logits: np.ndarray | None = None
    first_logits: int = 0


class Drafter:
    """Keeps a draft method at arm's length.

    Args:
        max_tokens: The engine's limit for one sequence and step.
    """

    def __init__(self, method: DraftMethod, name: str, *, max_tokens: int, max_model_len: int, vocab_size: int) -> None:
        self._method = method
        self._name = name
        self._max_tokens = max_tokens
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._asked: list[Planned] = []
        self.num_drafted = self.num_accepted = self.num_errors = 0

    def propose(self, plan: Iterable[Planned]) -> None:
        """Fills in `draft` of the decodes."""
        self._asked, num_prompt_rows = [], 0
        for p in plan:
            s = p.seq
            if not s.group.forked or not s.is_decode or s.group.request.prefill_only or s.to_score or s.group.request.taps:
                num_prompt_rows += p.num_tokens
                continue
            if s.skips_draft:
                s.skips_draft = False
                continue
            # The last token that may be generated is sampled behind the drafted ones.
            s.max_draft_tokens = min(self._max_tokens, s.sampling.max_tokens - s.num_generated - 1, self._max_model_len - len(s.tokens) - 1)
            self._asked.append(p)
        if not self._asked:
            return
        try:
            drafts = self._method.propose([p.seq for p in self._asked], num_prompt_rows)
            if len(drafts) != len(self._asked):
                raise ValueError(f"{len(drafts)} drafts for {len(self._asked)} sequences")
            checked = [self._check(d, p.seq.max_draft_tokens) if len(d) else () for p, d in zip(self._asked, drafts, strict=True)]
        except Exception as e:
            self._asked = []
            self._failed(e)
            return
        for p, draft in zip(self._asked, checked, strict=True):
            p.draft = draft

    def _check(self, draft: Sequence[int], limit: int) -> list[int]:
        """The head of a draft that is of use: within the limit, and of ids that exist."""
        good: list[int] = []
        for t in itertools.islice(draft, max(0, limit)):
            if not isinstance(t, int | np.integer) or not 0 <= t < self._vocab_size:
                break
            good.append(int(t))
        return good

    def observe(self, plan: Sequence[Planned], step_ms: float) -> None:
        """Tells the method what became of its drafts; call after the tokens were appended."""
        for p in plan:
            self.num_drafted += len(p.draft)
            self.num_accepted += p.num_accepted
        if not self._asked:
            return
        asked, self._asked = self._asked, []
        rows = [len(p.rows.token_ids) if p.rows else 0 for p in plan]
        decodes = sum(1 + len(p.draft) for p in asked)
        try:
            self._method.observe(
                DraftOutcome(
                    [p.seq for p in asked], [len(p.draft) for p in asked], [p.num_accepted for p in asked], sum(rows), max(0, sum(rows) - decodes), step_ms
                )
            )
        except Exception as e:
            self._failed(e)

    def _failed(self, error: Exception) -> None:
        self.num_errors += 1
        if self.num_errors & (self.num_errors - 1) == 0:  # the 1st, 2nd, 4th, ...: it may happen in every step
            log.warning("engine.draft_failed", method=self._name, error=type(error).__name__, count=self.num_errors)
