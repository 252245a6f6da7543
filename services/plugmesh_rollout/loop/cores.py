"""Which CPU cores a run's processes may use, where `[run] pin` asks for it: the trainer has its own, everybody else the rest.

Streams keep all cores busy, and the trainer is the one whom nobody can stand in for: without cores of its own it is moved about and waits whenever the table, the
verifiers or an engine wake up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager

import structlog

log = structlog.get_logger()


def shares(cores: Set[int], num_threads: int) -> tuple[set[int], set[int]]:
    """The trainer's cores and everybody else's: the last `num_threads`, and the others; all for both where that would leave nothing."""
    ordered = sorted(cores)
    if not 0 < num_threads < len(ordered):
        return set(cores), set(cores)
    return set(ordered[-num_threads:]), set(ordered[:-num_threads])


@contextmanager
def set_apart(num_threads: int) -> Iterator[set[int]]:
    """All threads of this process, and the processes that it starts, leave the trainer's cores alone until the end.

    Args:
        num_threads: Of the trainer.

    Yields:
        The trainer's cores, for its process; empty where the system knows no affinity.
    """
    if not hasattr(os, "sched_setaffinity"):
        log.warning("rl.not_pinned", reason="the system has no processor affinity")
        yield set()
        return
    cores = os.sched_getaffinity(0)
    trainers, others = shares(cores, num_threads)
    _keep_to(others)
    try:
        yield trainers
    finally:
        _keep_to(cores)


def _keep_to(cores: Set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:  # it has just ended
            continue
