"""Ending tasks for sure.

A cancellation can get lost: `asyncio.wait_for` of Python 3.11 returns normally when its result arrives in the same turn of
the loop (this project uses `asyncio.timeout` in its place, which does not; ruff forbids the other), and nats-py, which uses
it, swallows CancelledError in places of its own. A loop that was cancelled that way would run on, and whoever waits for its
end would wait for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any


async def end(*tasks: asyncio.Task[Any] | None, timeout_s: float = 10.0, patience_s: float = 0.2) -> None:
    """Cancels tasks, again if need be, until they have ended or `timeout_s` is over. Their results and exceptions are dropped.

    Args:
        tasks: None stands for a task that never began.
        patience_s: How long a task has for its cleanup before it is cancelled again.
    """
    pending = {t for t in tasks if t is not None}
    deadline = asyncio.get_running_loop().time() + timeout_s
    while pending:
        for task in pending:
            task.cancel()  # of no effect on one that has ended
        done, pending = await asyncio.wait(pending, timeout=patience_s)
        for task in done:
            if not task.cancelled():
                task.exception()  # marks it as seen
        if asyncio.get_running_loop().time() >= deadline:
            return


def check_cancelled() -> None:
    """Raises CancelledError when the current task was asked to end and the request got lost on its way."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
