"""Which rows of a batch go through the model together: a pass is filled up to its longest row, so rows of like lengths belong together."""

from __future__ import annotations

from collections.abc import Sequence

PASS_TOKENS = 32  # a pass costs about as much as so many more tokens: dispatch of its operations, and a gradient that is added to every weight


def cut(lengths: Sequence[int], max_rows: int) -> list[tuple[int, int]]:
    """Ranges [begin, end) of at most `max_rows` rows that cost least in all: PASS_TOKENS each, and rows times the longest.

    Args:
        lengths: Of the rows, in ascending order.
    """
    best, begins = [0] * (len(lengths) + 1), [0] * (len(lengths) + 1)  # of the first n rows
    for end in range(1, len(lengths) + 1):
        longest = lengths[end - 1]
        best[end], begins[end] = min((best[begin] + PASS_TOKENS + (end - begin) * longest, begin) for begin in range(max(0, end - max_rows), end))
    found, end = [], len(lengths)
    while end:
        found.append((begins[end], end))
        end = begins[end]
    return found[::-1]
