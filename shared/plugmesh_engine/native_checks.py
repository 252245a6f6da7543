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
        cursors: With `Cursor.native`.
        tokens: Drawn.
        positions: Generated tokens before each.
        logit_rows: `Planned.first_logits`.
        runs: What is under way: the first entry and the end of each, and what the kernels gave for it.
    """

    cursors: list[Cursor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)
    runs: list[tuple[int, int, Any]] = field(default_factory=list)

    def add(self, cursor: Cursor, token: int, position: int, logit_row: int) -> int:
        """The number of the new entry."""
        self.cursors.append(cursor)
        self.tokens.append(token)
        self.positions.append(position)
        self.logit_rows.append(logit_row)
        return len(self.tokens) - 1


class NativeChecks:
    """Asks matchers on another thread, which is given up on with a matcher that hangs, while the engine's goes on with what they said before.

    Best on one of the executor's own: it spins for a moment after a forward pass, and to wake another takes longer than all the matchers of a step.

    Args:
        kernels: `plugmesh_kernels.native()`.
        begin: `begin_matches` of an executor or of a `MatchThread`.
        timeout_s: For one matcher in one step.
        keeps_logits: `Rows.kept` may be asked of the executor.
    """

    def __init__(self, kernels: Any, begin: Callable[..., Any], timeout_s: float, counters: GrammarCounters, keeps_logits: bool = False) -> None:
        self.keeps_logits = keeps_logits
        self._kernels = kernels
        self._begin = begin
        self._timeout_s = timeout_s
        self._counters = counters
        self._redrawn = kernels.MATCH_REDRAWN
        self._nothing = kernels.MATCH_NOTHING
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
        begin = getattr(executor, "begin_matches", None) or kernels.MatchThread().begin_matches
        return cls(kernels, begin, timeout_s, counters, getattr(executor, "keeps_logits", False))

    def row(self, cursor: Cursor, seed: int, sequence: int, temperature: float, jumps: bool) -> Any:
        """The native side of a sequence, or None. `seed` and `sequence` name its random numbers; `jumps`: whether text is forced is to be told."""
        matcher = cursor.matcher
        native = getattr(matcher, "native", None)  # of a `NativeMatcher`
        capsule = native() if native is not None else None
        if capsule is None:
            return None
        return self._kernels.MatchRow(capsule, matcher, cursor.num_words, (seed ^ SECOND) & _64_BITS, sequence, temperature, jumps)

    def begin(self, c: Checking, logits: np.ndarray) -> None:
        """Hands over the entries that were added since the last call. Only the step's own matchers may be asked until `result` told of them.

        Args:
            logits: (R, vocab) float32 of the step, not to change meanwhile.
        """
        first, end = c.runs[-1][1] if c.runs else 0, len(c.cursors)
        if first < end:
            c.runs.append(self._run(c, first, end, logits))

    def _run(self, c: Checking, first: int, end: int, logits: np.ndarray) -> tuple[int, int, Any]:
        at = slice(first, end)
        run = self._begin([cursor.native for cursor in c.cursors[at]], c.tokens[at], c.positions[at], logits, c.logit_rows[at], self._timeout_s)
        return first, end, run

    def result(self, c: Checking, entry: int, logits: np.ndarray) -> tuple[int, bool]:
        """Waits for one that was begun; those that were begun together are asked for in order, each once.

        Returns:
            The accepted token, and whether the output may end behind it or text is forced. `Cursor.error` is set where there is none.
        """
        cursor = c.cursors[entry]
        cursor.num_ready = 0
        at = next(at for at, run in enumerate(c.runs) if run[1] > entry)
        first, end, run = c.runs[at]
        while (found := run.result(entry - first)) is None:
            hung = first + run.given_up_at
            log.error("engine.matcher_hangs", timeout_s=self._timeout_s)
            self._fail(c.cursors[hung], GrammarTimeout(f"the grammar engine did not come back within {self._timeout_s:g} s"))
            first = hung + 1
            if first < end:
                run = self._run(c, first, end, logits)[2]
                c.runs[at] = (first, end, run)
            if hung == entry:
                return -1, False
        token, flags = found
        counters = self._counters
        counters.num_forced_calls += cursor.jumps
        if flags & self._redrawn:
            counters.num_redrawn += 1
            counters.num_masks_filled += 1
        else:
            counters.num_checked += 1
        if flags & self._is_error:
            self._fail(cursor, InternalError(_WHY[bool(flags & self._nothing)]))
        return token, bool(flags & self._needs_look)

    def _fail(self, cursor: Cursor, error: PlugmeshError) -> None:
        cursor.error = error
        self._counters.num_errors += 1


_WHY: Sequence[str] = (
    "the grammar engine failed on this request",
    "the grammar refuses every token, or the model's logits of those that it allows are not finite",
)
