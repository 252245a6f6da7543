"""Tasks end even when they lose a cancellation."""

from __future__ import annotations

import asyncio

from plugmesh.supervisor import tasks


async def test_a_task_that_swallows_a_cancellation_is_cancelled_again() -> None:
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 3:
                    raise

    async def failing() -> None:
        raise ValueError

    work = [asyncio.create_task(stubborn()), asyncio.create_task(failing())]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await tasks.cancel(*work, patience_s=0.01)

    assert swallowed == 3
    assert all(t.done() for t in work)
