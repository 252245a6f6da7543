"""Digest, check 1: real processes, kill -9 of workers and of the table; every task gets every row once, with the right values.

With PLUGMESH_TRANSFERQUEUE_PYTHON naming a Python that has TransferQueue, `-m peers` runs the same workload against it as well.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterable

import pytest

from plugmesh.client.rollout import RolloutClient
from plugmesh_rollout import bench
from plugmesh_rollout.table.ledger import Ledger

PEER_WORKER = pathlib.Path(__file__).with_name("peer_worker.py")
PEER_PYTHON = os.environ.get("PLUGMESH_TRANSFERQUEUE_PYTHON", "")
WORKER = pathlib.Path(__file__).with_name("conservation_worker.py")
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "GRPC_VERBOSITY": "NONE", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Processes:
    """All of a run: the table and its workers, by name."""

    def __init__(self, folder: pathlib.Path, durability: str) -> None:
        self.folder = folder
        self.durability = durability
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.address = ""

    def table(self) -> None:
        port = self.address.rpartition(":")[2] or "0"
        arguments = ["-m", "plugmesh_rollout.alone", "--folder", str(self.folder), "--port", port, "--durability", self.durability]
        process = self.running["table"] = subprocess.Popen([sys.executable, *arguments], env=ENV, stdout=subprocess.PIPE)
        assert process.stdout is not None
        self.address = process.stdout.readline().decode().strip()
        assert self.address, "the table did not start"

    def worker(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.err").open("ab") as err:
            kind, *rest = arguments
            self.running[name] = subprocess.Popen([sys.executable, str(WORKER), kind, self.address, *rest], env=ENV, stderr=err)

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()

    def close(self) -> None:
        for name in list(self.running):
            self.kill(name)


async def conserve(folder: pathlib.Path, *, num_rows: int, num_producers: int, num_consumers: int, num_kills: int, kill_every_s: float, table_every: int, limit_s: float, pace: float = 0.0) -> dict[str, collections.Counter[str]]:  # fmt: skip
    """By task, how often the ledger says that it is done with each row, after workers and the table were killed."""
    rng = random.Random(3)
    processes = Processes(folder, "commit")
    each = num_rows // num_producers
    commands = {f"p{k}": ("produce", str(k), "0", str(each), str(pace)) for k in range(num_producers)}
    commands |= {f"{task}{k}": ("consume", task, str(folder / f"{task}{k}.log"), str(pace)) for task in "xyz" for k in range(num_consumers)}
    with contextlib.closing(processes):
        processes.table()
        async with RolloutClient(processes.address, retry_s=60.0) as client:
            await client.create_topic("t", {"payload": "int32", "score": "float"}, list("xyz"), capacity_rows=max(64, num_rows // 10))
            for name, command in commands.items():
                processes.worker(name, *command)
            deadline = time.monotonic() + limit_s
            killed: collections.Counter[str] = collections.Counter()
            while True:
                await asyncio.sleep(kill_every_s)
                if killed.total() < num_kills:
                    number = killed.total() + 1
                    victim = "table" if number % table_every == 0 else rng.choice(sorted(commands))
                    if victim == "table":
                        processes.kill("table")
                        processes.table()
                    elif victim in processes.running and (victim[0] != "p" or processes.running[victim].poll() is None):
                        processes.kill(victim)
                        processes.worker(victim, *commands[victim])
                    killed["table" if victim == "table" else victim[0]] += 1
                state = await client.status("t")
                if all(t.num_done == num_rows for t in state.tasks.values()) and killed.total() >= num_kills:
                    break
                assert time.monotonic() < deadline, f"not done: {state}; errors: {[p.read_text()[-500:] for p in folder.glob('*.err')]}"
            await asyncio.sleep(0.2)
            assert (await client.status("t")).num_rows == 0
            assert killed["table"] >= 1 and killed.total() > killed["table"]
    return check(folder, num_rows, {f"p{k}-{i}" for k in range(num_producers) for i in range(each)})


def check(folder: pathlib.Path, num_rows: int, produced: set[str]) -> dict[str, collections.Counter[str]]:
    ledger = Ledger(folder / "rollout")
    try:
        (topic,) = ledger.load()
    finally:
        ledger.close()
    ids = {row.index: row.id for row in topic.rows}
    assert len(ids) == num_rows and set(ids.values()) == produced, "each id has one row"
    leases = {lease: (task, [ids[i] for i in indexes]) for task, lease, indexes in topic.acks}
    all_done: dict[str, collections.Counter[str]] = {}
    for task in "xyz":
        tried: dict[str, list[str]] = {}
        confirmed: collections.Counter[str] = collections.Counter()
        for path in folder.glob(f"{task}*.log"):
            for line in path.read_text().splitlines():
                kind, lease, *rest = line.split()
                assert kind != "bad", f"task {task} got a wrong value: {lease}"
                if kind == "try":
                    tried[lease] = rest
                else:
                    confirmed.update(tried[lease])
                    assert leases[lease][0] == task and sorted(leases[lease][1]) == sorted(tried[lease]), "what was confirmed is in the ledger"
        all_done[task] = done = collections.Counter(i for of, rows in leases.values() if of == task for i in rows)
        assert done == collections.Counter(produced), f"task {task} is done with each row once"
        assert max(confirmed.values()) == 1, "no row was confirmed to two consumers"
        assert {i for rows in tried.values() for i in rows} == produced
    return all_done


@pytest.mark.timeout(90)
async def test_500_rows_survive_kills_of_workers_and_of_the_table(tmp_path):
    await conserve(tmp_path, num_rows=500, num_producers=1, num_consumers=1, num_kills=4, kill_every_s=0.5, table_every=2, limit_s=60)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_10000_rows_4_producers_12_consumers_survive_random_kills(tmp_path):
    await conserve(tmp_path, num_rows=10_000, num_producers=4, num_consumers=4, num_kills=30, kill_every_s=1.0, table_every=5, limit_s=500)


def tally(done: dict[str, collections.Counter[str]], produced: Iterable[str]) -> dict[str, int]:
    """Over all tasks: rows that a task never finished, and how many times too often rows were finished."""
    produced = set(produced)
    return {
        "lost": sum(len(produced - of.keys()) for of in done.values()),
        "doubled": sum(n - 1 for of in done.values() for n in of.values()),
    }


def peer_lines(folder: pathlib.Path, kind: str) -> dict[str, collections.Counter[str]]:
    return {
        task: collections.Counter(
            number for path in folder.glob(f"{task}*.log") for line in path.read_text().splitlines() if line.startswith(kind) for number in line.split()[1:]
        )
        for task in "xyz"
    }


def conserve_peer(folder: pathlib.Path, python: str, *, num_rows: int, num_producers: int, num_consumers: int, num_kills: int, kill_every_s: float, limit_s: float, pace: float) -> dict[str, collections.Counter[str]]:  # fmt: skip
    """As `conserve`, of TransferQueue. Only workers are killed: it keeps rows in memory, so killing its controller or storage would lose all of them."""
    rng = random.Random(3)
    each = num_rows // num_producers
    commands = {f"p{k}": ("produce", str(k * each), str((k + 1) * each), str(folder / f"p{k}.put"), str(pace)) for k in range(num_producers)}
    commands |= {f"{task}{k}": ("consume", task, str(folder / f"{task}{k}.log"), str(pace)) for task in "xyz" for k in range(num_consumers)}
    running: dict[str, subprocess.Popen[str]] = {}
    env = {k: v for k, v in bench.ENV.items() if k != "PYTHONPATH"}

    def begin(name: str, address: str) -> None:
        kind, *rest = commands[name]
        with (folder / f"{name}.err").open("ab") as err:
            running[name] = subprocess.Popen([python, str(PEER_WORKER), kind, address, *rest], env=env, stdin=subprocess.DEVNULL, stdout=err, stderr=err, text=True)

    with bench.transferqueue(python) as address:
        try:
            for name in commands:
                begin(name, address)
            deadline = time.monotonic() + limit_s
            while not all(peer_lines(folder, "done").values()):  # its clients take seconds to start; kills begin when all tasks are at work
                time.sleep(0.5)
                assert time.monotonic() < deadline and not any(w.poll() for w in running.values()), f"no row in time; errors: {[p.read_text()[-500:] for p in folder.glob('*.err')]}"
            num, quiet_since, seen = 0, time.monotonic(), -1
            while True:
                time.sleep(kill_every_s)
                victim = rng.choice(sorted(commands))
                if num < num_kills and (victim[0] != "p" or running[victim].poll() is None):
                    bench.end(running.pop(victim))
                    begin(victim, address)
                    num += 1
                now = sum(c.total() for c in peer_lines(folder, "done").values())
                if now != seen:
                    seen, quiet_since = now, time.monotonic()
                producers_done = all(running[n].poll() == 0 for n in commands if n[0] == "p")
                if (num == num_kills and producers_done and time.monotonic() - quiet_since > 20) or time.monotonic() > deadline:
                    break
            assert producers_done, f"its producers did not end; errors: {[p.read_text()[-500:] for p in folder.glob('p*.err')]}"
            assert not any(peer_lines(folder, "bad").values())
        finally:
            for process in running.values():
                bench.end(process)
    return peer_lines(folder, "done")


@pytest.mark.peers
@pytest.mark.timeout(900)
@pytest.mark.skipif(not PEER_PYTHON, reason="PLUGMESH_TRANSFERQUEUE_PYTHON names no Python that has transferqueue")
async def test_nothing_is_lost_or_doubled_where_the_peer_loses_rows_under_the_same_kills_of_workers(tmp_path, record_property, capsys):
    found = subprocess.run([PEER_PYTHON, "-c", "import transfer_queue"], capture_output=True, text=True, timeout=120, check=False)
    if found.returncode:
        pytest.skip(f"{PEER_PYTHON} cannot import transfer_queue: {found.stderr[-200:]}")
    work = {"num_rows": 1600, "num_producers": 2, "num_consumers": 2, "num_kills": 10, "kill_every_s": 1.0, "limit_s": 300, "pace": 0.1}
    folders = [tmp_path / "ours", tmp_path / "peer"]
    for folder in folders:
        folder.mkdir()
    ours = tally(await conserve(folders[0], table_every=5, **work), {f"p{k}-{i}" for k in range(2) for i in range(800)})
    peer = tally(await asyncio.to_thread(conserve_peer, folders[1], PEER_PYTHON, **work), map(str, range(1600)))
    record_property("ours", ours)
    record_property("peer", peer)
    with capsys.disabled():
        print(f"\n1600 rows, 3 tasks, 10 kills -9: plugmesh {ours} (2 of the kills its table's), transferqueue {peer} (workers only)")

    assert ours == {"lost": 0, "doubled": 0}
