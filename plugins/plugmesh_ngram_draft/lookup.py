"""Finds where the end of a text occurred before, at a cost per token that does not grow with the text."""

from __future__ import annotations

from collections.abc import Sequence

MAX_TRIED = 8  # earlier places that are compared, newest first; texts full of one short run have thousands


class SuffixIndex:
    """Every place where each run of `min_match` tokens ended.

    As in Lempel-Ziv compressors: a table from a run to its newest place, and a chain from each place to the one before.

    Args:
        min_match, max_match: Shortest and longest run that counts.
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        self._min = min_match
        self._max = max_match
        self._newest: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []  # per number of tokens: the place before with the same run behind it, or -1

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes in what was appended since the last call."""
        newest, before, n = self._newest, self._before, self._min
        for end in range(len(before), len(tokens) + 1):
            if end < n:
                before.append(-1)
                continue
            run = tuple(tokens[end - n : end])
            before.append(newest.get(run, -1))
            newest[run] = end

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """(place, length): the longest run that ends both `tokens` and tokens[:place], the newest such place; (-1, 0) for none.

        `extend` has seen all of `tokens`.
        """
        size = len(tokens)
        best, longest = -1, 0
        place = self._before[size]
        for _ in range(MAX_TRIED):
            if place < 0:
                break
            length, limit = self._min, min(self._max, place)
            while length < limit and tokens[place - 1 - length] == tokens[size - 1 - length]:
                length += 1
            if length > longest:
                best, longest = place, length
                if length == self._max:
                    break
            place = self._before[place]
        return best, longest


def follow(tokens: Sequence[int], place: int, num: int) -> list[int]:
    """`num` tokens from `place` on; where the text ends they go on with themselves, as a text that repeats with that period would."""
    out = list(tokens[place : place + num])
    period = len(tokens) - place
    while len(out) < num:
        out.append(out[len(out) - period])
    return out
