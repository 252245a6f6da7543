"""How far generation may run ahead of training.

Two bounds, both needed. At *admission* at most (staleness + 1) * batch_rows rows are in flight, so that generation never makes more than training can use in
time; it paces and discards nothing, which would starve slow prompts (tinker-cookbook, pull request 822). At *selection* a task gets rows of versions in
[latest - staleness, latest] only. With both numbers 0 the loop is the synchronous one; the recipe that came with the paper skips its window then, by testing
them for truth.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping


def in_window(version: int | None, latest: int, staleness: int) -> bool:
    """Whether a row may be used now; one without a version always."""
    return version is None or latest - staleness <= version <= latest


def must_wait(left: Mapping[int, int], pending: Mapping[int, int], latest: int, staleness: int, batch_rows: int) -> bool:
    """Whether training now would make a row that is still being generated too old.

    A row of version x can be trained up to version x + staleness. After this step that leaves (x + staleness - latest) steps of `batch_rows` rows for all rows
    of versions up to x (deadlines in order; Liu and Layland's condition for equal jobs). Where they do not suffice and some of those rows are pending, the step
    waits for them: that keeps every row within its bound and drops none.

    Args:
        left: Version to rows that are ready and that the step would not take.
        pending: Version to rows that are not ready yet.
    """
    total: collections.Counter[int] = collections.Counter()
    for counts in (left, pending):
        for version, n in counts.items():
            total[version] += n
    owed = slow = 0
    for version in sorted(v for v in total if latest - staleness <= v <= latest):
        owed += total[version]
        slow += pending.get(version, 0)
        if slow and owed > (version + staleness - latest) * batch_rows:
            return True
    return False
