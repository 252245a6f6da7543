"""What each sampler promises, and the staleness bound over whole runs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh.client.rollout_values import encode
from plugmesh.errors import InvalidRequest
from plugmesh_rollout.table.controller import Topic
from plugmesh_rollout.table.samplers import balanced, build_core, complete_groups, karmarkar_karp
from plugmesh_rollout.table.topic import NewRow, TopicSpec

ONE = encode(1)


def topic_of(group_size: int = 1, **changes: Any) -> Topic:
    return Topic(TopicSpec(**{"name": "t", "fields": {"a": "", "r": "", "n": ""}, "tasks": ("x",), "group_size": group_size, **changes}))


def fill(topic: Topic, rows: list[tuple[str, int | None]], **cells: Any) -> None:
    """Rows as (group, version)."""
    start = topic.next_index
    _, new = topic.sort_out([NewRow(f"{start + i}", {"a": ONE, **{k: encode(v[i]) for k, v in cells.items()}}, v, g) for i, (g, v) in enumerate(rows)])
    topic.put(new)


def take(topic: Topic, sampler: Any, n: int, lease: str, **kwargs: Any) -> list[int]:
    got = topic.take("x", kwargs.pop("fields", ("a",)), n, sampler, lease_id=lease, expires_at=1.0, **kwargs)
    return list(got.rows) if got else []


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 4))
def test_complete_groups_are_those_that_counting_finds(labels: list[int], size: int) -> None:
    counts: dict[int, int] = {}
    rows = []
    for i, g in enumerate(labels):
        if counts.get(g, 0) < size:
            counts[g] = counts.get(g, 0) + 1
            rows.append(type("R", (), {"index": i, "group": str(g)}))
    found = [{r.group for r in group} for group in complete_groups(rows, size)]
    assert all(len(g) == 1 for g in found) or size == 1
    assert len(found) == (len(rows) if size == 1 else sum(n == size for n in counts.values()))


def test_all_ranks_of_a_batch_get_the_same_rows_and_the_first_ones_acknowledgement_counts() -> None:
    topic, sampler = topic_of(), build_core("rank_aware")
    fill(topic, [("", None)] * 8)
    first = take(topic, sampler, 3, "0-0", rank=0, num_ranks=2, batch_index=0)
    assert take(topic, sampler, 3, "1-0", rank=0, num_ranks=2, batch_index=1) == [3, 4, 5]
    assert take(topic, sampler, 3, "0-1", rank=1, num_ranks=2, batch_index=0) == first == [0, 1, 2]
    assert topic.ack("0-1", "x", first, 0.0) == []
    assert topic.ack("0-0", "x", first, 0.0) == first
    with pytest.raises(InvalidRequest):
        take(topic, sampler, 3, "no number")


@given(st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_karmarkar_karp_deals_every_item_once_and_equal_counts(parts: int, each: int, rng: random.Random) -> None:
    weights = [rng.choice([0, 1, rng.random(), 1000]) for _ in range(parts * each)]
    for deal in (karmarkar_karp, balanced):
        shares = deal(weights, parts)
        assert sorted(i for s in shares for i in s) == list(range(parts * each))
        assert [len(s) for s in shares] == [each] * parts


def test_balanced_shares_are_never_more_uneven_than_the_naive_split_on_100_lognormal_batches() -> None:
    """Digest, check 7: groups of 4 whole, 4 ranks, 16 groups."""
    rng = np.random.default_rng(7)
    better = 0
    for _ in range(100):
        topic, sampler = topic_of(4), build_core("length_balanced", {"field": "r"})
        lengths = rng.lognormal(5, 1, 64).astype(int) + 1
        fill(topic, [(str(i // 4), None) for i in range(64)], r=[np.zeros(n, np.int8) for n in lengths])
        shares = [take(topic, sampler, 16, str(rank), fields=("a", "r"), rank=rank, num_ranks=4, batch_index=0) for rank in (2, 0, 3, 1)]
        assert sorted(i for s in shares for i in s) == list(range(64))
        assert all(set(range(i - i % 4, i - i % 4 + 4)) <= set(s) for s in shares for i in s), "groups whole"
        sums = [int(lengths[s].sum()) for s in shares]
        naive = [int(lengths[i * 16 : i * 16 + 16].sum()) for i in range(4)]
        assert max(sums) / min(sums) <= max(naive) / min(naive)
        better += max(sums) / min(sums) < 0.8 * max(naive) / min(naive)
    assert better > 80


def test_a_rank_that_died_finds_its_share_again_and_other_batches_do_not_touch_it() -> None:
    topic, sampler = topic_of(), build_core("length_balanced", {"field": "n"})
    fill(topic, [("", None)] * 8, n=[9, 1, 8, 2, 7, 3, 6, 4])
    args: Any = {"fields": ("a", "n"), "num_ranks": 2}
    one = take(topic, sampler, 2, "1", rank=0, batch_index=0, **args)
    assert take(topic, sampler, 2, "2", rank=0, batch_index=1, **args) == [4, 5], "the first four rows belong to batch 0; 7 + 3, 6 + 4"
    topic.release("1")
    sampler.forget(one)  # type: ignore[attr-defined] # as the table does
    assert take(topic, sampler, 2, "3", rank=0, batch_index=0, **args) == one
    two = take(topic, sampler, 2, "4", rank=1, batch_index=0, **args)
    assert sorted(one + two) == [0, 1, 2, 3]


def test_version_orders_and_single_versions() -> None:
    versions = [3, 1, 2, 1, 3, 2]
    for options, expected in (({}, [1, 3]), ({"order": "newest"}, [0, 4])):
        topic = topic_of()
        fill(topic, [("", v) for v in versions])
        assert take(topic, build_core("version_window", options), 2, "1") == expected
    topic = topic_of(2)
    fill(topic, [("p", 1), ("p", 2), ("q", 2), ("q", 2), ("r", 1), ("r", 1)])
    assert take(topic, build_core("same_version"), 4, "1") == []
    assert take(topic, build_core("same_version"), 4, "1", min_rows=2) == [4, 5]
    for name, options in (("sequential", {"x": 1}), ("version_window", {"order": "up"})):
        with pytest.raises(InvalidRequest):
            build_core(name, options)


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_no_row_is_ever_trained_too_late_and_none_is_dropped(staleness: int, seed: int) -> None:
    """Digest, checks 2, 3 and 5: heavy-tailed generation, one row 50 times slower than the rest, training that waits where it must."""
    rng = random.Random(seed)
    group, batch, total, workers = 2, 4, 400, 6
    topic = Topic(TopicSpec("t", {"a": "", "r": ""}, ("generate", "train"), group, batch * (staleness + 1), staleness=staleness, batch_rows=batch, admission_task="train"))
    groups, window = build_core("grpo_groups"), build_core("version_window")
    topic.publish_version(0)
    lags: list[int] = []
    trained: list[int] = []
    generated: dict[int, float] = {}
    running: list[tuple[float, str, list[int]]] = []
    now, num, step_ends, put = 0.0, 0, 0.0, 0
    training: str | None = None
    for _ in range(200_000):
        while put < total and topic.has_room(group, topic.storage.cost({"a": ONE}) * group):
            fill(topic, [(f"g{put}", None)] * group)
            put += group
        while len(running) < workers:
            num += 1
            got = topic.take("generate", ("a",), group, groups, lease_id=f"g{num}", expires_at=1e9, stamp_version=topic.latest_version)
            if got is None:
                break
            took = rng.lognormvariate(0, 1.2) * (50 if 10 in got.rows else 1)
            generated.update(dict.fromkeys(got.rows, took))
            running.append((now + took, got.lease_id, list(got.rows)))
        if training is None:
            num += 1
            least = batch if total - len(trained) >= batch else group
            got = topic.take("train", ("r",), batch, window, lease_id=f"t{num}", expires_at=1e9, min_rows=least)
            if got:
                assert topic.latest_version is not None
                training, step_ends = got.lease_id, now + 1.0
                lags += [topic.latest_version - (topic.rows[i].version or 0) for i in got.rows]
                trained += got.rows
                assert len({topic.rows[i].group for i in got.rows}) * group == len(got.rows), "whole groups"
        if len(trained) == total:
            break
        events = [(t, "g", x) for t, *x in running] + ([(step_ends, "t", [])] if training else [])
        assert events, f"stuck after {len(trained)} rows"
        now, kind, rest = min(events, key=lambda e: e[0])
        if kind == "t":
            assert training is not None and topic.latest_version is not None
            topic.publish_version(topic.latest_version + 1)
            done = topic.ack(training, "train", topic.leases[training].rows, 0.0)
            topic.clear(topic.finished(done))
            training = None
        else:
            lease_id, rows = rest
            topic.put_fields(rows, [{"r": ONE}] * len(rows), lease_id=str(lease_id), task="generate")
            running = [r for r in running if r[1] != lease_id]
    assert sorted(trained) == list(range(total)), "every row once: the straggler, too"
    assert max(lags) <= staleness
    assert set(lags) == set(range(staleness + 1)), "the bound is used"
    assert topic.num_in_flight <= batch * (staleness + 1)
