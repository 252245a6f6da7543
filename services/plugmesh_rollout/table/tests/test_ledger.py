"""What is durable, against a plain model: restarts at any point, journals that end in the middle of a frame, damage."""

from __future__ import annotations

import asyncio
import pathlib
import shutil
import tempfile
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from plugmesh.errors import ConfigError, DataLoss
from plugmesh_rollout.table.entries import (
    Acked,
    Cleared,
    Entry,
    FieldsPut,
    RowPut,
    TopicDropped,
    TopicMade,
    VersionPublished,
)
from plugmesh_rollout.table.journal import Journal
from plugmesh_rollout.table.ledger import Ledger

MEMORY = "/dev/shm" if pathlib.Path("/dev/shm").is_dir() else None  # many small ledgers: a disk would wait for each
Group = list[Entry]
CELLS = st.dictionaries(st.sampled_from(["a", "é"]), st.binary(max_size=300), max_size=2)


def fact(id: str, group: str, version: int | None, digest: bytes, cells: dict[str, bytes] | None) -> tuple[Any, ...]:
    """Of a row that was cleared only the id is remembered, and what it stood for."""
    return (id, digest) if cells is None else (id, digest, group, version, cells)


class Model:
    """What a ledger should hold, entry by entry."""

    def __init__(self) -> None:
        self.topics: dict[str, dict[str, Any]] = {}

    def take(self, e: Entry) -> None:
        if isinstance(e, TopicMade):
            self.topics[e.topic] = {"spec": e.spec, "rows": {}, "acks": [], "version": None}
            return
        if isinstance(e, TopicDropped):
            del self.topics[e.topic]
            return
        t = self.topics[e.topic]
        if isinstance(e, RowPut):
            t["rows"][e.index] = [e.id, e.group, e.version, e.digest, dict(e.cells)]
        elif isinstance(e, FieldsPut):
            row = t["rows"][e.index]
            row[2] = row[2] if e.version is None else e.version
            row[4].update(e.cells)
        elif isinstance(e, Acked):
            t["acks"].append((e.task, e.lease_id, e.indexes))
        elif isinstance(e, Cleared):
            for i in e.indexes:
                t["rows"][i][4] = None
        elif isinstance(e, VersionPublished):
            t["version"] = e.version

    def state(self) -> dict[str, Any]:
        return {n: (t["spec"], t["version"], {i: fact(*r) for i, r in t["rows"].items()}, t["acks"]) for n, t in self.topics.items()}


def loaded(ledger: Ledger) -> dict[str, Any]:
    return {
        t.name: (t.spec, t.latest_version, {r.index: fact(r.id, r.group, r.version, r.digest, r.cells) for r in t.rows}, t.acks) for t in ledger.load()
    }


@st.composite
def lives(draw: st.DrawFn) -> list[list[Group]]:
    """Groups of entries that a table could make, in some lives of the process."""
    rows: dict[str, dict[int, bool]] = {}  # topic to index to whether it is live
    number = iter(range(10**6))
    result: list[list[Group]] = []
    for _ in range(draw(st.integers(1, 3))):
        life: list[Group] = []
        for _ in range(draw(st.integers(0, 8))):
            group: Group = []
            for _ in range(draw(st.integers(1, 4))):
                live = [(t, i) for t, r in rows.items() for i, here in r.items() if here]
                kinds = ["made"] * (len(rows) < 2) + ["put", "put", "version", "drop"] * bool(rows) + ["fields", "clear", "ack"] * bool(live)
                kind = draw(st.sampled_from(kinds))
                if kind == "made":
                    name = draw(st.sampled_from([n for n in ("t", "u") if n not in rows]))
                    rows[name] = {}
                    group.append(TopicMade(name, f"spec {next(number)}"))
                    continue
                if kind in ("put", "version", "drop"):
                    name = draw(st.sampled_from(sorted(rows)))
                    if kind == "put":
                        index = len(rows[name])
                        rows[name][index] = True
                        version = draw(st.none() | st.integers(0, 9))
                        group.append(RowPut(name, index, f"r\u00e9{index}", draw(st.sampled_from(["", "g"])), version, bytes([index]) * 16, draw(CELLS)))
                    elif kind == "version":
                        group.append(VersionPublished(name, next(number)))
                    elif draw(st.integers(0, 5)) == 0:
                        del rows[name]
                        group.append(TopicDropped(name))
                    continue
                name, index = draw(st.sampled_from(live))
                if kind == "fields":
                    group.append(FieldsPut(name, index, draw(st.none() | st.integers(0, 9)), draw(CELLS)))
                elif kind == "ack":
                    group.append(Acked(name, "x", f"lease {next(number)}", (index,)))
                else:
                    rows[name][index] = False
                    group.append(Cleared(name, (index,)))
            if group:
                life.append(group)
        result.append(life)
    return result


async def live(folder: pathlib.Path, groups: list[Group], apply_after: int) -> dict[str, Any]:
    """One life of a ledger; gives what it found. The tables are brought up to date after so many groups and at the end."""
    ledger = Ledger(folder, "batch", segment_bytes=500, apply_s=60.0)
    try:
        found = loaded(ledger)
        ledger.start()
        for i, group in enumerate(groups):
            number = ledger.append(group)
            await ledger.committed(number)
            if i == apply_after:
                await ledger.in_tables(number)
    finally:
        ledger.close()
    return found


@given(lives(), st.integers(0, 7))
@settings(max_examples=12, deadline=None)
def test_every_life_finds_what_the_ones_before_it_wrote(all_lives: list[list[Group]], apply_after: int) -> None:
    model = Model()
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        for life in [*all_lives, []]:
            found = asyncio.run(live(pathlib.Path(name), life, apply_after))
            assert found == model.state()
            for group in life:
                for entry in group:
                    model.take(entry)


@given(lives(), st.floats(0, 1))
@settings(max_examples=12, deadline=None)
def test_a_journal_that_ends_anywhere_gives_whole_groups_and_no_part_of_one(all_lives: list[list[Group]], cut: float) -> None:
    groups = [g for life in all_lives for g in life]
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = pathlib.Path(name)
        journal = Journal(folder, segment_bytes=1 << 20, fsync=False)
        ends = [p.end for p in (journal.append(groups) if groups else [])]
        journal.close()
        at = int(cut * ends[-1]) if groups else 0
        if groups:
            with journal.path(1).open("r+b") as file:
                file.truncate(at)
        model = Model()
        for group, end in zip(groups, ends, strict=True):
            for entry in group if end <= at else ():
                model.take(entry)

        for _ in range(2):  # the second life finds what the first one made of it
            ledger = Ledger(folder)
            assert loaded(ledger) == model.state()
            ledger.close()


def one_row(folder: pathlib.Path, *, applied: bool) -> pathlib.Path:
    """A ledger with one row, whose process was killed before or after its tables had it; gives the segment with its value."""
    groups: list[Group] = [[TopicMade("t", "spec"), RowPut("t", 0, "r0", "", None, bytes(16), {"a": b"value" * 10})]]
    if applied:
        asyncio.run(live(folder, groups, 0))
    else:
        journal = Journal(folder, segment_bytes=1 << 20, fsync=False)
        journal.append(groups)
        journal.close()
    (segment,) = folder.glob("*.values")
    return segment


def test_a_value_that_the_tables_point_at_and_that_is_damaged_or_gone_is_an_error_that_names_its_row(tmp_path: pathlib.Path) -> None:
    segment = one_row(tmp_path, applied=True)
    data = bytearray(segment.read_bytes())
    data[-3] ^= 1
    segment.write_bytes(data)
    ledger = Ledger(tmp_path)
    with pytest.raises(DataLoss, match="row 0 of topic 't'"):
        ledger.load()
    with pytest.raises(ConfigError, match="another process"):
        Ledger(tmp_path)
    ledger.close()
    segment.unlink()
    ledger = Ledger(tmp_path)
    with pytest.raises(DataLoss, match="missing"):
        ledger.load()
    ledger.close()


def test_a_damaged_frame_that_the_tables_do_not_have_ends_the_journal(tmp_path: pathlib.Path) -> None:
    segment = one_row(tmp_path, applied=False)
    data = bytearray(segment.read_bytes())
    data[-3] ^= 1
    segment.write_bytes(data)
    ledger = Ledger(tmp_path)
    assert ledger.load() == []
    ledger.close()


def test_a_segment_goes_with_the_last_row_that_has_a_value_in_it(tmp_path: pathlib.Path) -> None:
    groups: list[Group] = [[TopicMade("t", "spec")]]
    groups += [[RowPut("t", i, f"r{i}", "", None, bytes(16), {"a": bytes(400)})] for i in range(4)]
    asyncio.run(live(tmp_path, groups, 0))
    assert len(list(tmp_path.glob("*.values"))) == 4
    asyncio.run(live(tmp_path, [[Cleared("t", (0, 1, 2))], [VersionPublished("t", 1)]], 9))
    ledger = Ledger(tmp_path)
    (topic,) = ledger.load()
    assert len(list(tmp_path.glob("*.values"))) == 1 and [r.cells is None for r in topic.rows] == [True, True, True, False]
    ledger.close()


def test_a_segment_that_is_missing_between_others_is_an_error(tmp_path: pathlib.Path) -> None:
    journal = Journal(tmp_path, segment_bytes=100, fsync=True)
    for i in range(3):
        journal.append([[TopicMade(f"t{i}", "x" * 100)]])
    journal.close()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tmp_path.glob("*.values"):
        shutil.copy(path, copy)
    journal.path(2).unlink()
    ledger = Ledger(tmp_path)
    with pytest.raises(DataLoss, match="segment 2"):
        ledger.load()
    ledger.close()
    whole = Ledger(copy)
    assert [t.name for t in whole.load()] == ["t0", "t1", "t2"]
    whole.close()
