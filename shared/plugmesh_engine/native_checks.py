"""Drawn tokens checked by matchers that need no Python: the quick half of "drawn first, checked then" (`sampler.draws_freely`).

What comes out is what `constrained.Grammars.advance` with `Advance.redraw` gives, token for token; that one is the reference, and what is used where a matcher
has no native side (`plugmesh.grammar.seams.NativeMatcher`) or the kernels are not compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from plugmesh.errors import GrammarTimeout, InternalError, PlugmeshError
from plugmesh_engine.sampler import SECOND

if TYPE_CHECKING:
    from plugmesh_engine.constrained import Cursor, GrammarCounters
    from plugmesh_engine.seams import Executor

log = structlog.get_logger()

_64_BITS = 0xFFFFFFFFFFFFFFFF


@dataclass(slots=True)
class Checking:
    """The tokens of one step that are to be checked, in parallel lists.

    Attributes:
        rows: From `NativeChecks.row`.
        tokens: Drawn; accepted ones once `NativeChecks.run` returns.
        positions: Generated tokens before each.
        logit_rows: Of the step's logits.
        asks_forced: Whether somebody wants to know if text is forced behind it.
        needs_look: Filled in: the output may end behind the token, or text is forced.
    """

    cursors: list[Cursor] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)
    asks_forced: list[bool] = field(default_factory=list)
    needs_look: list[bool] = field(default_factory=list)

    def add(self, cursor: Cursor, row: Any, token: int, position: int, logit_row: int) -> None:
        self.cursors.append(cursor)
        self.rows.append(row)
        self.tokens.append(token)
        self.positions.append(position)
        self.logit_rows.append(logit_row)
        self.asks_forced.append(cursor.jumps)


class NativeChecks:
    """Asks matchers on another thread, which is given up on with a matcher that hangs.

    Best on one of the executor's own: it spins for a moment after a forward pass, and to wake another takes longer than all the matchers of a step.

    Args:
        kernels: `plugmesh_kernels.native()`.
        check: `check_matches` of an executor or of a `MatchThread`.
        timeout_s: For one matcher in one step.
    """

    def __init__(self, kernels: Any, check: Callable[..., tuple[list[int], list[int]]], timeout_s: float, counters: GrammarCounters) -> None:
        self._kernels = kernels
        self._check = check
        self._timeout_s = timeout_s
        self._counters = counters
        self._is_error = kernels.MATCH_FAILED | kernels.MATCH_NOTHING
        self._needs_look = kernels.MATCH_COMPLETED | kernels.MATCH_TERMINATED | kernels.MATCH_IS_FORCED

    @classmethod
    def if_any(cls, executor: Executor, timeout_s: float, counters: GrammarCounters) -> NativeChecks | None:
        """None where the kernels are not compiled."""
        try:
            import plugmesh_kernels
        except ImportError:
            return None
        if not plugmesh_kernels.available():
            return None
        kernels = plugmesh_kernels.native()
        return cls(kernels, getattr(executor, "check_matches", None) or kernels.MatchThread().check_matches, timeout_s, counters)

    def row(self, cursor: Cursor, seed: int, sequence: int, temperature: float) -> Any:
        """The native side of a sequence, or None. `seed` and `sequence` name its random numbers."""
        matcher = cursor.matcher
        native = getattr(matcher, "native", None)  # of a `NativeMatcher`
        capsule = native() if native is not None else None
        if capsule is None:
            return None
        return self._kernels.MatchRow(capsule, matcher, cursor.num_words, (seed ^ SECOND) & _64_BITS, sequence, temperature)

    def run(self, c: Checking, logits: np.ndarray) -> None:
        """Fills in `tokens` and `needs_look`; sets `Cursor.error` of those that have no token.

        Args:
            logits: (R, vocab) float32 of the step.
        """
        tokens: list[int] = []
        flags: list[int] = []
        while len(tokens) < len(c.rows):
            n = len(tokens)
            more, told = self._check(c.rows[n:], c.tokens[n:], c.positions[n:], logits, c.logit_rows[n:], c.asks_forced[n:], self._timeout_s)
            tokens += more
            flags += told
            if len(tokens) < len(c.rows):
                log.error("engine.matcher_hangs", timeout_s=self._timeout_s)
                self._fail(c.cursors[len(tokens)], GrammarTimeout(f"the grammar engine did not come back within {self._timeout_s:g} s"))
                tokens.append(-1)
                flags.append(0)
        c.tokens, needs_look, is_error = tokens, self._needs_look, self._is_error
        c.needs_look = [bool(f & needs_look) for f in flags]
        for cursor in c.cursors:
            cursor.num_ready = 0
        redrawn = self._kernels.MATCH_REDRAWN
        num_redrawn = sum(f & redrawn for f in flags)
        self._counters.num_redrawn += num_redrawn
        self._counters.num_masks_filled += num_redrawn
        self._counters.num_checked += len(flags) - num_redrawn
        self._counters.num_forced_calls += sum(c.asks_forced)
        for at, f in enumerate(flags):
            if f & is_error:
                self._fail(c.cursors[at], InternalError(_WHY[bool(f & self._kernels.MATCH_NOTHING)]))

    def _fail(self, cursor: Cursor, error: PlugmeshError) -> None:
        cursor.error = error
        self._counters.num_errors += 1


_WHY: Sequence[str] = (
    "the grammar engine failed on this request",
    "the grammar refuses every token, or the model's logits of those that it allows are not finite",
)
