"""Tasks end even when they lose a cancellation."""

from __future__ import annotations

import asyncio

from plugmesh import tasks


async def test_a_task_that_swallows_a_cancellation_is_cancelled_again() -> None:
    swallowed = 0
    over = asyncio.Event()

    async def stubborn() -> None:
        nonlocal swallowed
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 3:
                    raise

    async def failing() -> None:
        raise ValueError

    work = [asyncio.create_task(stubborn()), asyncio.create_task(failing())]
    await asyncio.sleep(0)
    await tasks.end(*work, timeout_s=5, patience_s=0.01)
    all_ended = all(t.done() for t in work)
    over.set()  # or the test, too, would wait for ever

    assert (swallowed, all_ended) == (3, True)


async def test_a_task_that_will_not_end_is_waited_for_only_so_long() -> None:
    over = asyncio.Event()

    async def deaf() -> None:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                pass

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(5, over.set)
    await tasks.end(task, None, timeout_s=0.05, patience_s=0.01)

    assert not task.done()
    over.set()
    await tasks.end(task)
    assert task.done()


async def test_a_lost_request_to_end_is_found_by_who_asks() -> None:
    reached: list[str] = []

    async def loses_it() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            reached.append("lost")
        tasks.check_cancelled()
        reached.append("went on")

    task = asyncio.create_task(loses_it())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=5)

    assert (reached, task.cancelled()) == (["lost"], True)
    tasks.check_cancelled()  # nobody asked this one
