"""What a step with so many rows takes: measured when the engine starts, corrected by every step."""

from __future__ import annotations

import bisect
from collections.abc import Callable

from plugmesh.errors import Overloaded

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
KV_TOKENS = 64
NUM_TRIES = 2
RATE = 0.1  # of a new time in the corrections
COUPLING = 0.7  # of a correction that the other kind of step gets too: context and load change both
UNMEASURED = ((1, 1.0), (2, 1.3), (64, 12.0))  # shape of a step bound by arithmetic after few rows; the corrections do the rest


class StepCost:
    """Milliseconds of a step by its number of rows.

    The profile is piecewise linear between measured sizes. Steps with and without drafts have corrections of their own (running means of what they took
    longer than the profile says: context, sampling, another load of the machine), so that drafts whose rows cost more than profiled are seen to.

    Args:
        profile: (rows, ms), at least two, rows ascending.
    """

    def __init__(self, profile: list[tuple[int, float]]) -> None:
        self._rows = [r for r, _ in profile]
        self._ms = [ms for _, ms in profile]
        for i in range(1, len(self._ms)):  # more rows never take less; noise does
            self._ms[i] = max(self._ms[i], self._ms[i - 1])
        self._shift = {False: 0.0, True: 0.0}
        self._num = 0

    @classmethod
    def measure(cls, measure_step_ms: Callable[[int, int, int], float] | None, max_rows: int) -> StepCost:
        """Times steps of up to `max_rows` decodes, the best of two each after one to warm up; without a stopwatch or blocks for it, a guess."""
        profile: list[tuple[int, float]] = []
        try:
            for rows in SIZES:
                if measure_step_ms is None or (rows > max_rows and len(profile) >= 2):
                    break
                measure_step_ms(0, rows, KV_TOKENS)
                profile.append((rows, min(measure_step_ms(0, rows, KV_TOKENS) for _ in range(NUM_TRIES))))
        except Overloaded:
            pass  # a pool too small to measure more in it
        return cls(profile if len(profile) >= 2 else list(UNMEASURED))

    def ms(self, rows: int, *, drafted: bool) -> float:
        """Expected time of a step."""
        return max(1e-3, self._profile(rows) + self._shift[drafted])

    def learn(self, rows: int, *, drafted: bool, ms: float) -> None:
        """Takes in what a step took."""
        self._num += 1
        expected = self.ms(rows, drafted=drafted)
        error = ms - expected
        if self._num == 1:
            self._shift = {False: error, True: error}
            return
        # One step in a while is late by a multiple (another process, a page fault); it counts for at most double.
        error = RATE * min(error, expected)
        self._shift[drafted] += error
        self._shift[not drafted] += COUPLING * error

    def _profile(self, rows: int) -> float:
        i = min(max(bisect.bisect_right(self._rows, rows), 1), len(self._rows) - 1)
        (r0, r1), (t0, t1) = self._rows[i - 1 : i + 1], self._ms[i - 1 : i + 1]
        return max(t0 + (t1 - t0) * (rows - r0) / (r1 - r0), self._ms[0] if rows >= self._rows[0] else 0.0)
