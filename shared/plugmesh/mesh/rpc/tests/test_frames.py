"""The packet codec and the credit counters, by property."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh.errors import DataLoss
from plugmesh.mesh.rpc import frames
from plugmesh.mesh.rpc.flow import ReceiveWindow, SendWindow
from plugmesh.mesh.rpc.frames import Packet

U32 = st.integers(0, 2**32 - 1)
METADATA = st.lists(st.tuples(st.text(max_size=20), st.one_of(st.text(max_size=30), st.binary(max_size=30))), max_size=4).map(tuple)


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    """A packet with exactly the fields that its flags announce."""
    flags = draw(st.integers(0, frames.KNOWN_FLAGS))
    p = Packet(flags, draw(U32), draw(U32))
    if flags & frames.OPEN:
        p.method, p.timeout_ms, p.caller, p.metadata = draw(st.text()), draw(st.integers(-1, 2**62)), draw(st.text()), draw(METADATA)
    if flags & frames.PEER:
        p.peer_subject, p.peer_instance, p.peer_incarnation = draw(st.text()), draw(st.text()), draw(st.text())
    if flags & frames.INITIAL:
        p.initial = draw(METADATA)
    if flags & frames.CREDIT:
        p.credit = draw(st.tuples(U32, U32))
    if flags & frames.DATA:
        p.messages = draw(st.lists(st.binary(max_size=64), max_size=5))
    if flags & frames.STATUS:
        p.code, p.details, p.trailing = draw(st.integers(0, 255)), draw(st.text()), draw(METADATA)
    if flags & frames.CANCEL:
        p.reason = draw(st.text())
    return p


@given(packets())
def test_decoding_undoes_encoding(p: Packet) -> None:
    back = frames.decode(frames.encode(p))
    back.messages, p.messages = list(back.messages), list(p.messages)

    assert back == p


@given(packets(), st.data())
def test_every_shortened_packet_is_refused(p: Packet, data: st.DataObject) -> None:
    raw = frames.encode(p)
    cut = data.draw(st.integers(0, len(raw) - 1))

    with pytest.raises(DataLoss):
        frames.decode(raw[:cut])


@given(packets(), st.binary(min_size=1, max_size=8))
def test_trailing_bytes_are_refused(p: Packet, extra: bytes) -> None:
    with pytest.raises(DataLoss):
        frames.decode(frames.encode(p) + extra)


@given(packets(), st.data())
def test_flipped_bytes_give_a_packet_or_data_loss_and_nothing_else(p: Packet, data: st.DataObject) -> None:
    raw = bytearray(frames.encode(p))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        frames.decode(bytes(raw))
    except DataLoss:
        pass


@given(st.binary(max_size=200))
def test_noise_gives_a_packet_or_data_loss_and_nothing_else(raw: bytes) -> None:
    try:
        frames.decode(raw)
    except DataLoss:
        pass


def test_a_lying_count_does_not_allocate() -> None:
    raw = frames.encode(Packet(frames.DATA, messages=[])).replace(b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", 3)
    with pytest.raises(DataLoss):
        frames.decode(raw)


@given(packets())
def test_marking_again_changes_only_the_flag(p: Packet) -> None:
    back = frames.decode(frames.mark_again(frames.encode(p)))
    want = dataclasses.replace(p, flags=p.flags | frames.AGAIN)
    back.messages, want.messages = list(back.messages), list(want.messages)

    assert back == want


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3)), max_size=300), st.integers(1, 8), st.integers(1, 1000))
def test_sender_never_overruns_and_never_starves(steps: list[tuple[int, int]], window_messages: int, window_bytes: int) -> None:
    """Random sending and reading: what is under way is bounded, and once all is read the sender may go on."""
    receive, send = ReceiveWindow(window_messages, window_bytes), SendWindow()
    send.grant(*receive.first_grant())
    under_way: list[int] = []

    def take_one() -> None:
        grant = receive.taken(under_way.pop(0))
        if grant is not None:
            send.grant(*grant)

    for size, reads in steps:
        if send.is_open():
            send.spend(size)
            receive.arrived(size)  # raises when the sender overran
            under_way.append(size)
        assert len(under_way) <= window_messages
        assert sum(under_way) <= window_bytes + 400
        for _ in range(min(reads, len(under_way))):
            take_one()
    while under_way:
        take_one()

    assert send.is_open()


def test_a_sender_that_ignores_credit_is_found_out() -> None:
    receive = ReceiveWindow(2, 1000)
    receive.arrived(1)
    receive.arrived(1)

    with pytest.raises(DataLoss):
        receive.arrived(1)
