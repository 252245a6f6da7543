"""The index against a slow oracle, its bounds, and events that are wrong in every way."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.records import KvEvent
from plugmesh.types import block_chain
from plugmesh_aibrix_routing.index import CONFIRM_S, PrefixIndex

KEY = b"k" * 32


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def chain(*parts: int) -> tuple[bytes, ...]:
    """Blocks of a prompt that is made of whole blocks, each of one repeated token."""
    return tuple(block_chain(KEY, [p for p in parts for _ in range(16)]))


def told(kind: str, blocks: tuple[bytes, ...] = (), name: str = "d0", life: str = "1") -> KvEvent:
    return KvEvent(name, life, 0, kind, blocks)  # type: ignore[arg-type]


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(PROMPTS, st.sampled_from(["d0", "d1"])), max_size=8), PROMPTS)
def test_the_match_is_the_longest_true_common_beginning(stored, asked):
    """Fuzzed against prompts compared token by token: a block of the same text after another beginning must not match."""
    index = PrefixIndex(1000, 0.0)
    for parts, name in stored:
        index.on_event(told("stored", chain(*parts), name))
    for name in ("d0", "d1"):
        longest = 0
        for parts, at in stored:
            if at == name:
                same = 0
                while same < min(len(parts), len(asked)) and parts[same] == asked[same]:
                    same += 1
                longest = max(longest, same)

        assert index.num_matched(chain(*asked), ["d0", "d1"])[name] == longest


BLOCKS = chain(*range(6))
EVENTS = st.lists(
    st.builds(
        lambda kind, blocks, name, life: told(kind, tuple(blocks), name, life),
        st.sampled_from(["stored", "removed", "cleared"]), st.lists(st.sampled_from(BLOCKS), max_size=6), st.sampled_from(["d0", "d1", "d2"]),
        st.sampled_from(["1", "2"]),
    ),
    max_size=30,
)  # fmt: skip
SENT = st.lists(
    st.tuples(st.sampled_from(["expect", "started", "ended", "later"]), st.integers(0, 4), st.sampled_from(["d0", "d1"]), st.integers(0, 6)), max_size=20
)


@settings(max_examples=80, deadline=None)
@given(EVENTS, SENT, st.integers(1, 8), st.randoms(use_true_random=False))
def test_events_and_requests_of_any_order_keep_the_bounds_and_the_counts(events, sent, max_blocks, rng):
    clock = Clock()
    index = PrefixIndex(max_blocks, 30.0, clock)
    todo = [*events, *sent]
    rng.shuffle(todo)
    for item in todo:
        if isinstance(item, KvEvent):
            index.on_event(item)
        else:
            kind, request, name, num = item
            match kind:
                case "expect":
                    index.expect(f"r{request}", name, BLOCKS[:num])
                case "started":
                    index.started(f"r{request}")
                case "ended":
                    index.ended(f"r{request}")
                case _:
                    clock.now += 7.0
        found = index.num_matched(BLOCKS, ["d0", "d1", "nobody"])
        known = sum(index.num_blocks(n) for n in ("d0", "d1", "d2"))

        assert known == index.num_known <= max_blocks
        assert index.num_expected <= max_blocks
        assert index.num_expected == sum(sum(c.values()) for c in index._counts.values()) == sum(len(e.block_ids) for e in index._expected.values())
        assert found["nobody"] == 0
        assert all(0 <= n <= len(BLOCKS) for n in found.values())
    clock.now += 60.0
    index.num_matched((), [])
    for name in ("d0", "d1", "d2"):
        index.on_event(told("cleared", (), name))

    assert (index.num_known, index.num_expected, index._known, index._counts, index._expected) == (0, 0, {}, {}, {})
    assert [len(e) for e in index._ends] == [0, 0]


def test_a_full_index_forgets_the_ends_of_what_was_useful_longest_ago():
    index = PrefixIndex(6, 0.0)
    index.on_event(told("stored", chain(1, 2, 3)))
    index.on_event(told("stored", chain(7, 8, 9)))
    index.expect("r", "d0", chain(1, 2, 3))  # of use just now
    index.on_event(told("stored", chain(5)))

    assert index.num_matched(chain(1, 2, 3), ["d0"])["d0"] == 3
    assert index.num_matched(chain(7, 8, 9), ["d0"])["d0"] == 2
    assert index.num_matched(chain(5), ["d0"])["d0"] == 1


def test_another_life_starts_from_nothing_and_removals_of_an_unknown_one_change_nothing():
    index = PrefixIndex(100, 30.0, Clock())
    index.on_event(told("stored", BLOCKS, life="1"))
    index.expect("r", "d0", chain(9))
    index.on_event(told("removed", BLOCKS, life="0"))
    assert index.num_matched(BLOCKS, ["d0"]) == {"d0": 6}
    index.on_event(told("stored", BLOCKS[:2], life="2"))

    assert index.num_matched(BLOCKS, ["d0"]) == {"d0": 2}
    assert index.num_matched(chain(9), ["d0"]) == {"d0": 0}  # it was sent to the life that is over


def test_what_an_instance_was_sent_counts_until_its_events_tell():
    clock = Clock()
    index = PrefixIndex(100, 30.0, clock)
    index.on_event(told("stored", ()))  # followed, and empty
    index.expect("r", "d0", BLOCKS)
    clock.now += 10.0
    assert index.num_matched(BLOCKS, ["d0", "d1"]) == {"d0": 6, "d1": 0}
    index.started("r")
    clock.now += CONFIRM_S + 0.01

    assert index.num_matched(BLOCKS, ["d0"]) == {"d0": 0}  # it did not keep them


def test_of_an_instance_that_tells_nothing_the_guess_holds_for_its_time():
    clock = Clock()
    index = PrefixIndex(100, 30.0, clock)
    index.expect("r", "d0", BLOCKS)
    index.started("r")
    index.ended("r")
    clock.now += 29.0
    assert index.num_matched(BLOCKS, ["d0"]) == {"d0": 6}
    clock.now += 1.5

    assert index.num_matched(BLOCKS, ["d0"]) == {"d0": 0}


def test_a_request_that_ended_without_a_token_leaves_no_guess():
    index = PrefixIndex(100, 30.0, Clock())
    index.expect("r", "d0", BLOCKS)
    index.ended("r")

    assert index.num_matched(BLOCKS, ["d0"]) == {"d0": 0}
