"""Changes of the prefix cache on their way from the engine's thread to the bus."""

from __future__ import annotations

import asyncio
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh_decode.events import BlockLog, net

CHANGES = st.lists(st.tuples(st.sampled_from([bytes([i]) for i in range(6)]), st.booleans()), max_size=40)


@settings(max_examples=200, deadline=None)
@given(CHANGES, st.sets(st.sampled_from([bytes([i]) for i in range(6)])))
def test_what_a_row_of_changes_amounts_to_is_what_it_does_one_by_one(changes, before):
    slow = set(before)
    for block_id, is_stored in changes:
        (slow.add if is_stored else slow.discard)(block_id)
    removed, stored = net(changes)

    assert slow == (before - set(removed)) | set(stored)
    assert not set(removed) & set(stored)
    assert len(removed) + len(stored) == len({b for b, _ in changes})


async def test_changes_of_another_thread_arrive_in_order_and_none_is_lost():
    log, num, got = BlockLog(asyncio.get_running_loop()), 20_000, []
    thread = threading.Thread(target=lambda: [log.append(i.to_bytes(4, "little"), i % 3 == 0) for i in range(num)])
    thread.start()
    while len(got) < num:
        await asyncio.wait_for(log.wait(), 5)
        changes, lost = log.take()
        got += changes
        assert not lost
    thread.join()

    assert got == [(i.to_bytes(4, "little"), i % 3 == 0) for i in range(num)]
    assert len(log) == 0


async def test_a_full_log_keeps_its_bound_and_says_once_that_it_lost_something():
    log = BlockLog(asyncio.get_running_loop(), max_waiting=10)
    for i in range(50):
        log.append(bytes([i]), True)
    await asyncio.wait_for(log.wait(), 1)

    assert len(log) == 10
    assert log.take()[1]
    log.append(b"x", True)
    assert log.take() == ([(b"x", True)], False)
