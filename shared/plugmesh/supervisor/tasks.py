"""Ending tasks for certain."""

from __future__ import annotations

import asyncio


async def cancel(*tasks: asyncio.Task[object], patience_s: float = 0.5) -> None:
    """Cancels until every task has ended; their results and errors are dropped.

    Once is not enough: `asyncio.wait_for` (until Python 3.12) and code that catches too much lose a cancellation that comes
    at the wrong moment, and the task then goes on as if nothing had been said.
    """
    pending = {t for t in tasks if not t.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=patience_s)
    await asyncio.gather(*tasks, return_exceptions=True)  # marks the errors as seen
