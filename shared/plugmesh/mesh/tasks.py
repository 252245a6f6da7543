"""Ending tasks for sure.

A cancellation can get lost: `asyncio.wait_for` of Python 3.11 returns normally when its result arrives in the same turn of
the loop, and nats-py swallows CancelledError in places. A loop that was cancelled that way would run on, and whoever
waits for its end would wait for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any


async def end(*tasks: asyncio.Task[Any] | None, timeout_s: float = 10.0) -> None:
    """Cancels tasks, again if need be, until they have ended or `timeout_s` is over. Their exceptions are dropped."""
    pending = {t for t in tasks if t is not None and not t.done()}
    deadline = asyncio.get_running_loop().time() + timeout_s
    while pending and asyncio.get_running_loop().time() < deadline:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=0.2)
        for task in done:
            if not task.cancelled():
                task.exception()


def check_cancelled() -> None:
    """Raises CancelledError when the current task was asked to end and the request got lost on its way."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
