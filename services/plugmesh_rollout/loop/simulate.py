"""A loop of many workers on a virtual clock: how much overlap gains as clusters grow.

    python -m plugmesh_rollout.loop.simulate [--json]

Nothing is computed; times are drawn. A quarter of the workers train, the rest generate; the batch grows with the cluster (weak scaling), so that with more workers
a step waits for the slowest of more responses. The rules are those of the loop: admission of (staleness + 1) batches, groups stamped at hand-out with the newest
published weights, whole groups of the oldest weights first, a step held back where taking others would make a group that is still generated too old
(`table.admission.must_wait`, the same function).

The synchronous system of the comparison generates and trains by turns. Colocated, as verl does it, all workers do the one, then the other; separate, the generating
ones wait while the others train.
"""

from __future__ import annotations

import argparse
import collections
import heapq
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from plugmesh_rollout.table.admission import in_window, must_wait


@dataclass(frozen=True, slots=True)
class Shape:
    """Times in units of a mean response.

    Attributes:
        groups_per_worker: Groups of one step for each worker of the cluster.
        slots: Groups that a generating worker runs at a time.
        sigma: Of the log-normal response times; 1 gives a longest of a thousand that is some 15 times the mean.
        train_cost: Training work of a step over its generation work.
        train_share: Of the workers, in separate systems.
        shift_cost: Of a step, of a colocated system: weights and KV moved when all workers change from one to the other.
        publish_cost: From a step's end until generating workers can start with its weights.
    """

    groups_per_worker: int = 4
    slots: int = 4
    sigma: float = 0.8
    train_cost: float = 0.4
    train_share: float = 0.25
    shift_cost: float = 0.1
    publish_cost: float = 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one system: groups per unit of time and generating or training worker, idle shares, and how many groups were how far behind."""

    throughput: float
    idle_rollout: float
    idle_train: float
    lags: dict[int, int]


def times(num: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Log-normal with mean 1."""
    return rng.lognormal(-sigma * sigma / 2, sigma, num)


def train_time(groups: int, num_train: int, shape: Shape) -> float:
    """Work spread evenly over the training workers; a group's generation costs 1 / slots of a worker's time."""
    return shape.train_cost * groups / shape.slots / num_train


def colocated(workers: int, steps: int, shape: Shape, seed: int) -> Outcome:
    """All workers generate a batch, then all train it."""
    rng, batch = np.random.default_rng(seed), workers * shape.groups_per_worker
    clock = busy = 0.0
    for _ in range(steps):
        drawn = times(batch, shape.sigma, rng)
        end = _finish(drawn, workers * shape.slots)
        training = train_time(batch, workers, shape)
        clock += end + training + shape.shift_cost
        busy += float(drawn.sum()) / shape.slots / workers + training
    return Outcome(steps * batch / clock / workers, 1 - busy / clock, 1 - busy / clock, {0: steps * batch})


def _finish(drawn: Sequence[float] | np.ndarray, lanes: int) -> float:
    """When the last of jobs is done that are handed to the first free lane, in order."""
    free = [0.0] * lanes
    for t in drawn:
        heapq.heapreplace(free, free[0] + float(t))
    return max(free)


def streamed(workers: int, steps: int, shape: Shape, staleness: int, seed: int) -> Outcome:
    """Generation and training side by side. `staleness` 0 is the separate synchronous system."""
    num_train = max(1, round(workers * shape.train_share))
    num_rollout = workers - num_train
    batch = workers * shape.groups_per_worker
    rng = np.random.default_rng(seed)
    drawn = times(steps * batch, shape.sigma, rng)
    training = train_time(batch, num_train, shape)

    events: list[tuple[float, int, str, int]] = []  # time, tie, what, group
    generating: dict[int, int] = {}                 # group to version
    pending: collections.Counter[int] = collections.Counter()  # version to groups that are being generated
    ready: list[tuple[int, int]] = []               # (version, group), a heap
    waiting: collections.Counter[int] = collections.Counter()  # version to groups that are ready
    clock = rollout_busy = train_busy = 0.0
    handed = trained = version = 0
    is_training = False
    lags: collections.Counter[int] = collections.Counter()
    tie = 0

    def later(at: float, what: str, group: int) -> None:
        nonlocal tie
        tie += 1
        heapq.heappush(events, (at, tie, what, group))

    def pump() -> None:
        nonlocal handed, is_training, train_busy, rollout_busy
        while handed < len(drawn) and len(generating) < num_rollout * shape.slots and handed - trained < (staleness + 1) * batch:
            generating[handed] = version
            pending[version] += 1
            rollout_busy += float(drawn[handed]) / shape.slots
            later(clock + float(drawn[handed]), "generated", handed)
            handed += 1
        if is_training or len(ready) < batch:
            return
        left, wanted = collections.Counter(waiting), batch
        for v in sorted(left):
            taken = min(wanted, left[v])
            left[v] -= taken
            wanted -= taken
        if must_wait(left, pending, version, staleness, batch):
            return
        chosen = [heapq.heappop(ready) for _ in range(batch)]
        waiting.clear()
        waiting.update(left)
        assert all(in_window(v, version, staleness) for v, _ in chosen), "a group became too old"
        lags.update(version - v for v, _ in chosen)
        is_training = True
        train_busy += training
        later(clock + training, "trained", 0)

    pump()
    while events:
        clock, _, what, group = heapq.heappop(events)
        if what == "generated":
            made_by = generating.pop(group)
            pending[made_by] -= 1
            waiting[made_by] += 1
            heapq.heappush(ready, (made_by, group))
        elif what == "trained":
            later(clock + shape.publish_cost, "published", 0)
        else:
            version += 1
            trained += batch
            is_training = False
        pump()
    if trained != len(drawn):
        raise AssertionError("the loop came to a stop")
    return Outcome(trained / clock / workers, 1 - rollout_busy / clock / num_rollout, 1 - train_busy / clock, dict(sorted(lags.items())))


def table(sizes: Sequence[int], steps: int, shape: Shape, seeds: Sequence[int]) -> list[dict[str, object]]:
    """One row per number of workers: medians over the seeds, and the ratios to the colocated system."""
    rows: list[dict[str, object]] = []
    for workers in sizes:
        base = [colocated(workers, steps, shape, seed) for seed in seeds]
        row: dict[str, object] = {"workers": workers, "colocated": _median(base), "colocated_idle": statistics.median(o.idle_rollout for o in base)}
        for staleness in (0, 1, 2, 4):
            found = [streamed(workers, steps, shape, staleness, seed) for seed in seeds]
            row[f"staleness_{staleness}"] = _median(found)
            row[f"ratio_{staleness}"] = statistics.median(o.throughput / b.throughput for o, b in zip(found, base, strict=True))
            row[f"idle_{staleness}"] = statistics.median(o.idle_rollout for o in found)
            row[f"train_idle_{staleness}"] = statistics.median(o.idle_train for o in found)
        rows.append(row)
    return rows


def _median(outcomes: Sequence[Outcome]) -> float:
    return statistics.median(o.throughput for o in outcomes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m plugmesh_rollout.loop.simulate", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sigma", type=float, default=Shape().sigma)
    parser.add_argument("--train-cost", type=float, default=Shape().train_cost)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    shape = Shape(sigma=given.sigma, train_cost=given.train_cost)
    rows = table(given.workers, given.steps, shape, range(given.rounds))
    if given.json:
        print(json.dumps({"shape": asdict(shape), "steps": given.steps, "rows": rows}, indent=1))
        return
    print("| workers | colocated, by turns | separate, by turns | staleness 1 | 2 | 4 | idle: colocated | staleness 0 | 1 | 2 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        ratios = " | ".join(f"{r[f'ratio_{s}']:.2f}" for s in (0, 1, 2, 4))
        print(f"| {r['workers']} | 1 | {ratios} | {r['colocated_idle']:.0%} | " + " | ".join(f"{r[f'idle_{s}']:.0%}" for s in (0, 1, 2)) + " |")


if __name__ == "__main__":
    main()
