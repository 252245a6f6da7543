"""Threads that pass messages on ask for short slices of the processor."""

from __future__ import annotations

import threading

import pytest

from plugmesh.mesh import scheduling


@pytest.fixture
def in_thread():
    """Runs a function in a thread of its own, whose slice is nobody else's."""

    def run(function):
        found = []
        thread = threading.Thread(target=lambda: found.append(function()))
        thread.start()
        thread.join()
        return found[0]

    return run


def _is_taken() -> bool:
    return scheduling.shorten_slice() and scheduling.shorten_slice(0)


def test_a_thread_and_what_it_starts_have_the_slice_and_others_do_not(in_thread):
    if not in_thread(_is_taken):
        pytest.skip("the system gives threads no slices of their own")
    before = scheduling.slice_of_thread()

    def within() -> tuple[int, int, int]:
        with scheduling.short_slice():
            mine, inherited = scheduling.slice_of_thread(), in_thread(scheduling.slice_of_thread)
        return mine, inherited, scheduling.slice_of_thread()

    def already_short() -> int:
        scheduling.shorten_slice()
        with scheduling.short_slice():
            pass
        return scheduling.slice_of_thread()

    assert in_thread(within) == (scheduling.SHORT_SLICE_NS, scheduling.SHORT_SLICE_NS, before)
    assert in_thread(already_short) == scheduling.SHORT_SLICE_NS
    assert scheduling.slice_of_thread() == before


def test_where_the_system_cannot_do_it_nothing_happens(in_thread, monkeypatch):
    monkeypatch.setattr(scheduling.platform, "machine", lambda: "abacus")

    assert in_thread(scheduling.shorten_slice) is False
    with scheduling.short_slice():
        pass
