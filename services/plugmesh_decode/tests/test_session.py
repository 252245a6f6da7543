"""Rows out: order kept, cost per step, a cap on what a slow consumer leaves unread."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.errors import Overloaded
from plugmesh_decode.session import MAX_MERGED_BYTES, MERGE_ABOVE_FRAMES, Session
from plugmesh_proto.v1 import decode_pb2 as pb


def row(index: int) -> pb.TokenRow:
    return pb.TokenRow(request_id="r", index=index)


async def test_all_rows_of_one_step_leave_in_one_frame():
    session = Session(100)
    session.put(7, [row(0), row(1), row(2)])
    session.close()
    frames = [f async for f in session.frames()]

    assert [(7, [0, 1, 2])] == [(f.step, [r.index for r in f.rows]) for f in frames]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=120), st.integers(0, 120))
def test_a_slow_consumer_gets_every_row_in_order(sizes, pause_after):
    async def scenario():
        session = Session(10_000)
        sent = got = 0
        received = []
        frames = session.frames()
        for step, size in enumerate(sizes):
            session.put(step, [row(sent + i) for i in range(size)])
            sent += size
            if step > pause_after and got < sent:
                frame = await anext(frames)
                received.extend(r.index for r in frame.rows)
                got = len(received)
        num_frames = 0
        session.close()
        async for frame in frames:
            received.extend(r.index for r in frame.rows)
            num_frames += 1

        assert list(range(sent)) == received
        assert num_frames <= MERGE_ABOVE_FRAMES

    asyncio.run(scenario())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([1, 5000, MAX_MERGED_BYTES // 3, MAX_MERGED_BYTES * 2 // 3]), min_size=MERGE_ABOVE_FRAMES, max_size=80))
def test_frames_are_merged_up_to_a_size_that_every_carrier_takes(sizes):
    async def scenario():
        session = Session(10_000)
        for step, size in enumerate(sizes):
            session.put(step, [pb.TokenRow(request_id="r", index=step, weight_version="x" * size)])
        session.close()
        frames = [f async for f in session.frames()]

        assert list(range(len(sizes))) == [r.index for f in frames for r in f.rows]
        assert all(f.ByteSize() <= MAX_MERGED_BYTES for f in frames)
        # Two neighbours that could have been one are so only among the first ones.
        assert all(a.ByteSize() + b.ByteSize() > MAX_MERGED_BYTES for a, b in zip(frames[MERGE_ABOVE_FRAMES - 1 :], frames[MERGE_ABOVE_FRAMES:], strict=False))

    asyncio.run(scenario())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_frames_sent_at_once_never_overtake_those_that_wait(steps):
    async def scenario():
        received = []
        is_open = True

        def send_at_once(frame: pb.TokenFrame) -> bool:
            if is_open:
                received.append(frame.step)
            return is_open

        session = Session(10_000, send_at_once)

        async def consume() -> None:
            async for frame in session.frames():
                await asyncio.sleep(0)  # it is on its way meanwhile
                await asyncio.sleep(0)
                received.append(frame.step)

        consumer = asyncio.create_task(consume())
        for step, (opens, waits) in enumerate(steps):
            is_open = opens
            session.put(step, [row(step)])
            if waits:
                await asyncio.sleep(0)
        session.close()
        await consumer

        assert list(range(len(steps))) == received or (len(steps) > MERGE_ABOVE_FRAMES and received == sorted(set(received)))

    asyncio.run(scenario())


async def test_a_consumer_that_leaves_too_many_rows_unread_is_ended_with_overloaded():
    session = Session(10)
    for step in range(11):
        session.put(step, [row(step)])

    assert session.overflowed
    with pytest.raises(Overloaded):
        await anext(session.frames())


async def test_a_waiting_consumer_wakes_up_for_rows_and_for_the_end():
    session = Session(10)
    got: list[int] = []

    async def consume() -> None:
        async for frame in session.frames():
            got.extend(r.index for r in frame.rows)

    task = asyncio.create_task(consume())
    await asyncio.sleep(0)
    session.put(0, [row(4)])
    await asyncio.sleep(0)
    session.close()
    await asyncio.wait_for(task, 5)

    assert [4] == got
