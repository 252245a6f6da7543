"""The controller against a slow obvious model, and each law by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from plugmesh.client.rollout_values import decode, encode
from plugmesh.errors import AlreadyExists, InvalidRequest, LimitExceeded, NotFound, PluginError, StaleIncarnation
from plugmesh_rollout.table.controller import Topic
from plugmesh_rollout.table.samplers import build_core
from plugmesh_rollout.table.topic import ROW_OVERHEAD, NewRow, TopicSpec

FIELDS = {"a": "", "b": "", "c": ""}
SEQUENTIAL = build_core("sequential")


def topic_of(**changes: Any) -> Topic:
    return Topic(TopicSpec(**{"name": "t", "fields": FIELDS, "tasks": ("x", "y"), **changes}))


def put(topic: Topic, *rows: NewRow, **kwargs: Any) -> list[int]:
    indexes, new = topic.sort_out(rows, **kwargs)
    added = iter(topic.put(new))
    return [i if i >= 0 else next(added).index for i in indexes]


def row(id: str, version: int | None = None, group: str = "", **values: Any) -> NewRow:
    return NewRow(id, {k: encode(v) for k, v in values.items()}, version, group)


def take(topic: Topic, task: str = "x", fields: tuple[str, ...] = ("a",), n: int = 1, *, lease: str = "L", expires_at: float = 10.0, **kwargs: Any) -> list[int]:
    got = topic.take(task, fields, n, kwargs.pop("sampler", SEQUENTIAL), lease_id=lease, expires_at=expires_at, **kwargs)
    return list(got.rows) if got else []


class Machine(RuleBasedStateMachine):
    """The model keeps plain facts and computes every ready set by looking at all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.topic = topic_of(capacity_rows=12, staleness=1)
        self.ids: dict[str, tuple[int, bytes]] = {}             # id to index and digest, for ever
        self.live: dict[int, dict[str, Any]] = {}               # index to fields, version
        self.state: dict[tuple[str, int], str] = {}             # (task, index) to lease id or "done"
        self.leases: dict[str, tuple[str, list[int], float]] = {}
        self.acked: set[str] = set()
        self.latest: int | None = None
        self.now = 0.0
        self.num = 0
        self.times_done: dict[tuple[str, int], int] = {}

    def ready(self, task: str, fields: tuple[str, ...]) -> list[int]:
        def usable(version: int | None) -> bool:
            return version is None or self.latest is None or self.latest - 1 <= version <= self.latest

        return [i for i in sorted(self.live) if (task, i) not in self.state and set(fields) <= set(self.live[i]["f"]) and usable(self.live[i]["v"])]

    @rule(id=st.integers(0, 15), version=st.none() | st.integers(0, 3), value=st.integers(0, 1), more=st.booleans())
    def put(self, id: int, version: int | None, value: int, more: bool) -> None:
        new = row(str(id), version, a=value, **({"b": value} if more else {}))
        known = self.ids.get(new.id)
        if known is not None and known[1] != new.digest():
            with pytest.raises(AlreadyExists):
                put(self.topic, new)
            assert put(self.topic, new, keep_existing=True) == [known[0]]
            return
        if known is None and not self.topic.has_room(1, self.topic.storage.cost(new.cells)):
            assert len(self.live) == 12
            return
        (index,) = put(self.topic, new)
        if known is not None:
            assert index == known[0]
            return
        assert index == len(self.ids), "an index is used once"
        self.ids[new.id] = (index, new.digest())
        self.live[index] = {"f": {k: decode(v) for k, v in new.cells.items()}, "v": version}

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), value=st.integers(0, 1), version=st.none() | st.integers(0, 3))
    def put_fields(self, data: Any, value: int, version: int | None) -> None:
        index = data.draw(st.integers(0, len(self.ids) - 1))
        name = data.draw(st.sampled_from("bc"))
        args: Any = ([index], [{name: encode(value)}], [version])
        if index not in self.live:
            with pytest.raises(NotFound):
                self.topic.put_fields(*args)
        elif self.live[index]["f"].get(name, value) != value:
            with pytest.raises(AlreadyExists):
                self.topic.put_fields(*args)
        else:
            self.topic.put_fields(*args)
            self.live[index]["f"][name] = value
            if version is not None:
                self.live[index]["v"] = version

    @rule(task=st.sampled_from("xy"), fields=st.sampled_from([("a",), ("a", "b"), ("c",), ()]), n=st.integers(1, 4), least=st.integers(1, 4), life=st.integers(1, 5))
    def take(self, task: str, fields: tuple[str, ...], n: int, least: int, life: int) -> None:
        self.num += 1
        lease_id = f"L{self.num}"
        ready = self.ready(task, fields)
        expected = ready[:n] if len(ready) >= min(n, least) else []
        assert take(self.topic, task, fields, n, lease=lease_id, min_rows=least, expires_at=self.now + life) == expected
        for index in expected:
            assert self.topic.storage.read(index, fields) == [encode(self.live[index]["f"][f]) for f in fields]
            self.state[task, index] = lease_id
        if expected:
            self.leases[lease_id] = (task, expected, self.now + life)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), end=st.sampled_from(["ack", "ack", "release", "extend", "complete"]))
    def end_lease(self, data: Any, end: str) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        task, indexes, expires_at = self.leases[lease_id]
        held = [i for i in indexes if i in self.live and self.state.get((task, i)) == lease_id]
        if end == "extend":
            if expires_at <= self.now:
                with pytest.raises(StaleIncarnation):
                    self.topic.extend(lease_id, self.now + 9, self.now)
            else:
                self.topic.extend(lease_id, self.now + 9, self.now)
                self.leases[lease_id] = (task, indexes, self.now + 9)
            return
        if end == "release":
            assert sorted(self.topic.release(lease_id)) == sorted(held)
            for i in held:
                del self.state[task, i]
            del self.leases[lease_id]
            return
        if expires_at <= self.now:
            with pytest.raises(StaleIncarnation):
                self.topic.ack(lease_id, task, indexes, self.now)
            return
        if end == "complete" and held == indexes and all("c" not in self.live[i]["f"] for i in held):
            self.topic.put_fields(indexes, [{"c": encode(1)}] * len(indexes), lease_id=lease_id, task=task, now=self.now)
            for i in held:
                self.live[i]["f"]["c"] = 1
        else:
            self.topic.ack(lease_id, task, indexes, self.now)
        assert self.topic.ack(lease_id, task, indexes, self.now) == [], "again is no change"
        for i in held:
            self.state[task, i] = "done"
            self.times_done[task, i] = self.times_done.get((task, i), 0) + 1
        del self.leases[lease_id]

    @rule(by=st.integers(0, 3))
    def time_passes(self, by: int) -> None:
        self.now += by
        self.topic.expire(self.now)
        for lease_id, (task, indexes, expires_at) in list(self.leases.items()):
            if expires_at <= self.now:
                del self.leases[lease_id]
                for i in indexes:
                    if self.state.get((task, i)) == lease_id:
                        del self.state[task, i]

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def clear(self, data: Any) -> None:
        wanted = data.draw(st.sets(st.integers(0, len(self.ids) + 2), max_size=3))
        assert set(self.topic.clear(wanted)) == wanted & set(self.live)
        for i in wanted & set(self.live):
            del self.live[i]
            self.state.pop(("x", i), None)
            self.state.pop(("y", i), None)

    @rule(by=st.integers(0, 1))
    def publish(self, by: int) -> None:
        self.latest = by if self.latest is None else self.latest + by
        self.topic.publish_version(self.latest)

    @invariant()
    def agrees(self) -> None:
        status = self.topic.status()
        assert status.num_rows == len(self.live) == len(self.topic.storage)
        assert status.num_bytes == sum(ROW_OVERHEAD + sum(len(encode(v)) for v in r["f"].values()) for r in self.live.values())
        done = {i for i in self.live if all(self.state.get((t, i)) == "done" for t in "xy")}
        assert status.num_in_flight == len(self.live) - len(done)
        assert set(self.topic.finished(self.live)) == done
        assert max(self.times_done.values(), default=1) == 1
        for task, state in self.topic.tasks.items():
            assert status.tasks[task].num_held == sum(1 for (t, i), s in self.state.items() if t == task and s != "done" and i in self.live) or any(
                i not in self.live for _, rows, _ in self.leases.values() for i in rows
            )
            free = [i for i in self.live if (task, i) not in self.state]
            assert +state.free == {v: n for v in {r["v"] for r in self.live.values()} if (n := sum(self.live[i]["v"] == v for i in free))}
            for view in state.views.values():
                have = [i for i in sorted(free) if view.fields <= set(self.live[i]["f"])]
                assert [r.index for r in view.rows()] == have
                assert +view.by_version == {v: n for v in {r["v"] for r in self.live.values()} if (n := sum(self.live[i]["v"] == v for i in have))}


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


def test_a_task_gets_a_row_once_it_has_the_fields_and_never_again() -> None:
    topic = topic_of()
    put(topic, row("1", a=1), row("2", a=2))
    assert take(topic, fields=("a", "b"), n=2) == []
    topic.put_fields([1], [{"b": encode(5)}])
    assert take(topic, fields=("a", "b"), n=2, min_rows=1, lease="1") == [1]
    assert take(topic, fields=("a",), n=2, min_rows=1, lease="2") == [0]
    assert take(topic, fields=("a",), n=2, min_rows=1, lease="3") == []
    assert take(topic, "y", n=2, lease="4") == [0, 1], "tasks do not take from one another"


def test_an_expired_lease_gives_its_rows_to_the_next_one_and_its_holder_is_refused() -> None:
    topic = topic_of()
    put(topic, row("1", a=1))
    assert take(topic, lease="dead", expires_at=1.0) == [0]
    assert topic.expire(0.9) == []
    assert topic.expire(1.0) == [0]
    assert take(topic, lease="next", expires_at=9.0) == [0]
    with pytest.raises(StaleIncarnation):
        topic.ack("dead", "x", [0], 1.1)
    with pytest.raises(StaleIncarnation):
        topic.put_fields([0], [{"b": encode(1)}], lease_id="dead", task="x", now=1.1)
    assert "b" not in topic.rows[0].sizes
    assert topic.ack("next", "x", [0], 2.0) == [0]
    assert topic.ack("next", "x", [0], 99.0) == []


def test_a_lease_from_before_a_restart_counts_only_while_nobody_else_has_its_rows() -> None:
    topic = topic_of()
    put(topic, row("1", a=1), row("2", a=2), row("3", a=3))
    assert topic.ack("former", "x", [0], 0.0) == [0]
    take(topic, lease="new")
    with pytest.raises(StaleIncarnation):
        topic.ack("other former", "x", [1, 2], 0.0)
    assert topic.rows[2].holders == {}, "all or nothing"


def test_a_put_repeated_after_the_row_was_cleared_does_not_bring_it_back() -> None:
    topic = topic_of(remember_rows=2)
    put(topic, row("1", a=1))
    topic.clear([0])
    assert put(topic, row("1", a=1)) == [0]
    assert not topic.rows
    with pytest.raises(AlreadyExists):
        put(topic, row("1", a=2))


def test_staleness_0_and_version_0_are_a_window_like_any_other() -> None:
    topic = topic_of(staleness=0)
    put(topic, row("0", 0, a=1), row("1", 1, a=1))
    assert take(topic, n=2, min_rows=1, latest_version=0) == [0]
    topic.publish_version(1)
    assert take(topic, n=2, min_rows=1, lease="M") == [1]
    put(topic, row("late", 0, a=1))
    assert take(topic, n=1, lease="N") == []
    assert topic.stale() == [2]
    assert take(topic, n=1, lease="N", any_version=True) == [2]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"staleness": 1, "batch_rows": 8, "capacity_rows": 15}, "capacity_rows"),
        ({"group_size": 4, "capacity_rows": 3}, "capacity_rows"),
        ({"batch_rows": 8, "staleness": 0, "capacity_rows": 8, "capacity_bytes": 8 * ROW_OVERHEAD - 1}, "capacity_bytes"),
        ({"batch_rows": 8, "staleness": 0, "row_bytes": 1000, "capacity_bytes": 7999}, "capacity_bytes"),
        ({"batch_rows": 6, "group_size": 4}, "batch_rows"),
        ({"tasks": ()}, "tasks"),
        ({"fields": {}}, "fields"),
        ({"fields": {"a": "object"}}, ""),
        ({"admission_task": "z"}, "admission_task"),
        ({"staleness": -1}, "staleness"),
    ],
)
def test_a_topic_that_could_not_work_is_refused_when_it_is_made(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as info:
        topic_of(**changes)
    assert info.value.param == param
    if param == "capacity_rows" and "staleness" in changes:
        topic_of(**{**changes, "capacity_rows": 16})


def test_admission_counts_what_is_in_flight() -> None:
    topic = topic_of(staleness=1, batch_rows=2, admission_task="y")
    put(topic, *(row(str(i), 0, a=i) for i in range(4)))
    assert not topic.has_room(1, 0)
    take(topic, "x", lease="1")
    topic.ack("1", "x", [0], 0.0)
    assert not topic.has_room(1, 0)
    take(topic, "y", lease="2")
    topic.ack("2", "y", [0], 0.0)
    assert topic.has_room(1, 0)
    assert not topic.has_room(2, 0)
    with pytest.raises(LimitExceeded):
        topic.sort_out([row(str(i), 0, a=i) for i in range(10, 15)])


def test_groups_are_whole_or_not_at_all() -> None:
    topic, groups = topic_of(group_size=3), build_core("grpo_groups")
    put(topic, *(row(f"p{i}", group="p", a=1) for i in range(3)), *(row(f"q{i}", group="q", a=1) for i in range(2)))
    assert take(topic, n=6, sampler=groups) == []
    assert take(topic, n=6, min_rows=1, sampler=groups, lease="1") == [0, 1, 2]
    assert take(topic, n=3, sampler=groups, lease="2") == []
    put(topic, row("q2", group="q", a=1))
    assert take(topic, n=3, sampler=groups, lease="2") == [3, 4, 5]
    for bad in (row("q3", group="q", a=1), row("r", a=1)):
        with pytest.raises(InvalidRequest):
            put(topic, bad)
    topic.release("2")
    with pytest.raises(InvalidRequest):
        take(topic, n=4, sampler=groups, lease="3")
    assert take(topic, n=3, sampler=groups, lease="4") == [3, 4, 5]


def test_values_of_any_shape_come_back_and_another_dtype_is_an_error() -> None:
    topic = topic_of()
    ragged = [np.arange(n, dtype=np.int32) for n in (0, 3, 7)]
    put(topic, *(row(str(i), a=x, b="", c=b"") for i, x in enumerate(ragged)))
    for i, x in enumerate(ragged):
        got = decode(topic.storage.read(i, ("a",))[0])
        assert isinstance(got, np.ndarray)
        assert got.dtype == x.dtype and got.shape == x.shape and (got == x).all()
    for clash in (row("9", a=np.zeros(2, np.int64)), row("9", a=np.zeros((1, 2), np.int32)), row("9", a=1), row("9", b=b"")):
        with pytest.raises(InvalidRequest):
            put(topic, clash)
    with pytest.raises(InvalidRequest, match="no field 'z'"):
        put(topic, row("9", z=1))
    with pytest.raises(InvalidRequest, match="no field 'z'"):
        take(topic, fields=("z",))
    with pytest.raises(InvalidRequest, match="no task 'z'"):
        take(topic, "z")
    assert set(topic.clear([0, 77])) == {0}
    assert topic.clear([0]) == []


def test_a_sampler_that_errs_costs_its_request_only() -> None:
    class Greedy:
        def sample(self, ready: Any, batch_size: int, context: Any) -> tuple[list[int], list[int]]:
            return [0, 1], [0, 1]

    class Raises:
        def sample(self, ready: Any, batch_size: int, context: Any) -> tuple[list[int], list[int]]:
            raise KeyError("secret")

    topic = topic_of()
    put(topic, row("1", a=1), row("2", a=1))
    take(topic)
    for sampler in (Greedy(), Raises()):
        with pytest.raises(PluginError) as info:
            take(topic, lease="2", sampler=sampler)
        assert "secret" not in info.value.message
    assert take(topic, lease="3") == [1]
