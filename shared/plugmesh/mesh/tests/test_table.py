"""The table of instances: states, fencing, watchers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from plugmesh.mesh.table import MAX_FENCED, InstanceTable
from plugmesh.types import InstanceInfo


def info(instance: str = "d1", incarnation: str = "a", started: float = 1.0, **kwargs: object) -> InstanceInfo:
    return InstanceInfo("decode", instance, incarnation, "127.0.0.1:1", "h", 1, started_unix_s=started, **kwargs)  # type: ignore[arg-type]


def watched(table: InstanceTable) -> list[tuple[str, str, str]]:
    events: list[tuple[str, str, str]] = []
    table.watch(lambda event, i: events.append((event, i.instance_id, i.incarnation)))
    return events


def test_life_of_an_instance_as_watchers_see_it() -> None:
    table = InstanceTable(5.0)
    events = watched(table)
    table.put(info(), "in", 0.0)
    table.put(info(), "in", 1.0)                                       # a renewal is no event
    table.put(info(load={"num_running": 1.0}), "in", 2.0)
    table.remove("decode", "d1")

    assert [e[0] for e in events] == ["joined", "updated", "left"]
    assert not table.is_fenced("d1/a")                                 # it said goodbye


def test_overdue_lease_is_suspect_and_comes_back() -> None:
    table = InstanceTable(5.0)
    events = watched(table)
    table.put(info(), "in", 0.0)
    assert not table.overdue(5.0)
    (entry,) = table.overdue(5.1)
    table.suspect(entry)

    assert table.live("decode") == [] and len(table.live("decode", include_suspect=True)) == 1
    table.put(info(), "in", 6.0)
    assert [e[0] for e in events] == ["joined", "suspect", "updated"] and table.live("decode")[0].state == "ready"


def test_a_dead_incarnation_cannot_come_back() -> None:
    table = InstanceTable(5.0)
    table.put(info(), "in", 0.0)
    table.declare_dead(table.overdue(6.0)[0])
    table.put(info(), "in", 7.0)

    assert table.live("decode") == [] and table.is_fenced("d1/a")
    table.put(info(incarnation="b", started=2.0), "in", 8.0)
    assert [i.incarnation for i in table.live("decode")] == ["b"]


def test_a_new_incarnation_replaces_and_fences_the_old_one_and_never_the_other_way_round() -> None:
    table = InstanceTable(5.0)
    events = watched(table)
    table.put(info(incarnation="a", started=1.0), "in", 0.0)
    table.put(info(incarnation="b", started=2.0), "in", 1.0)
    table.put(info(incarnation="a", started=1.0), "in", 2.0)

    assert events == [("joined", "d1", "a"), ("left", "d1", "a"), ("joined", "d1", "b")]
    assert table.is_fenced("d1/a") and not table.is_fenced("d1/b")


def test_an_older_life_that_is_heard_late_is_fenced() -> None:
    table = InstanceTable(5.0)
    table.put(info(incarnation="b", started=2.0), "in", 0.0)
    table.put(info(incarnation="a", started=1.0), "in", 1.0)

    assert [i.incarnation for i in table.live("decode")] == ["b"] and table.is_fenced("d1/a")


def test_a_raising_watcher_does_not_stop_the_others() -> None:
    table = InstanceTable(5.0)
    table.watch(lambda event, i: 1 / 0)
    events = watched(table)
    table.put(info(), "in", 0.0)

    assert [e[0] for e in events] == ["joined"]


def test_memory_of_the_dead_is_bounded() -> None:
    table = InstanceTable(5.0)
    for i in range(MAX_FENCED + 10):
        table.fence(str(i))

    assert not table.is_fenced("x/0") and table.is_fenced(f"x/{MAX_FENCED + 9}")


@given(st.lists(st.tuples(st.sampled_from(["put", "remove", "overdue"]), st.integers(0, 2), st.integers(0, 3)), max_size=40))
def test_events_always_describe_the_table(steps: list[tuple[str, int, int]]) -> None:
    """Replaying joined and left gives what is in the table, whatever happened; and nobody fenced is in it."""
    table = InstanceTable(5.0)
    present: set[tuple[str, str]] = set()

    def replay(event: str, i: InstanceInfo) -> None:
        key = (i.instance_id, i.incarnation)
        if event == "joined":
            assert key not in present
            present.add(key)
        elif event == "left":
            present.remove(key)
        else:
            assert key in present

    table.watch(replay)
    now = 0.0
    for step, who, life in steps:
        now += 1.0
        if step == "put":
            table.put(info(f"d{who}", f"{who}-{life}", float(life)), "in", now)
        elif step == "remove":
            table.remove("decode", f"d{who}")
        else:
            for entry in table.overdue(now + 4.5):
                table.suspect(entry)
                table.declare_dead(entry)
    live = table.live("", include_suspect=True)

    assert {(i.instance_id, i.incarnation) for i in live} == present
    assert not any(table.is_fenced(f"{i.instance_id}/{i.incarnation}") for i in live)
