"""What overlap gains here: the same work by turns and as streams, one generating and one training process with one thread each.

    python -m plugmesh_rollout.loop.bench [--shape balanced] [--rounds 3] [--json]

Responses have drawn lengths with a heavy tail (log-normal), the same ones under every workflow: a seed and a group's number fix them. Both sides generate with the
native engine, score, train and publish as `plugmesh rl run` does. Warm-up steps are left out; sides take turns within each round, ratios are per round.

How much can be gained depends on the shape. Where generation takes G and training T seconds of a step by turns, streams take max(G, T) at least, so they gain at
most (G + T) / max(G, T), and what a full batch of responses costs less than one that is waiting for its longest. The bound printed is that of the first side's
measured G and T. Table, feed and scoring need CPU too, which by turns idle cores have to spare and streams do not: "all on two cores" is the bound by CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from plugmesh import logs
from plugmesh_rollout.loop import curves
from plugmesh_rollout.loop.folder import RunFolder
from plugmesh_rollout.loop.run import Progress, run_processes
from plugmesh_rollout.loop.settings import Settings, checked

SIDES: dict[str, dict[str, Any]] = {
    "synchronous": {"preset": "synchronous"},
    "one_step_off": {"preset": "one_step_off"},
    "streaming 1": {"staleness": 1, "policy": "weight_fifo"},
    "streaming 2": {"staleness": 2, "policy": "weight_fifo"},
}
SHAPES: dict[str, dict[str, int]] = {
    # a small model and long responses: generation and training take about as long, where overlap gains most
    "balanced": {"hidden": 64, "layers": 2, "groups": 8, "max_tokens": 2048},
    # a million parameters: training takes about three times as long as generation
    "training": {"hidden": 128, "layers": 5, "groups": 16, "max_tokens": 384},
}
_SKIPPED = 3  # steps at the start, in which processes and pages come up, and streams have not got ahead yet


def settings_of(folder: pathlib.Path, options: dict[str, Any], given: argparse.Namespace, seed: int) -> Settings:
    return checked({
        "run": {"folder": str(folder), "steps": given.steps, "seed": seed, "eval_every": 0, "eval_examples": 1, "plugins": ["asyncflow"], "checkpoint_every": given.steps, "pin": given.pin},
        "model": {"hidden_size": given.hidden, "intermediate_size": 3 * given.hidden, "num_layers": given.layers, "max_position": given.max_tokens + 32},
        "task": {"name": "copy"}, "reward": {"name": "partial"},
        "workflow": {"name": "asyncflow", "options": options},
        "rollout": {
            "group_size": 4, "groups_per_step": given.groups, "groups_at_once": given.at_once or 2 * given.groups, "max_tokens": given.max_tokens, "tail": given.tail,
        },
        "trainer": {"lr": 1e-5, "part_rows": 32},
    })  # fmt: skip


class CpuClock:
    """CPU seconds of a run's processes, by what they do; "table" is this process, which holds the table and the feed."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.samples: list[tuple[float, dict[str, float]]] = []

    async def keep(self, every_s: float = 0.2) -> None:
        """Looks until cancelled."""
        while True:
            self.samples.append((time.time(), {"table": time.process_time()} | {n: s for n, pid in self._progress.processes.items() if (s := cpu_seconds(pid))}))
            await asyncio.sleep(every_s)

    def between(self, begun: float, ended: float) -> dict[str, float]:
        """Seconds by process between the samples nearest to two moments."""
        _, first = min(self.samples, key=lambda x: abs(x[0] - begun))
        _, last = min(self.samples, key=lambda x: abs(x[0] - ended))
        return {name: last[name] - first.get(name, 0.0) for name in last}


def cpu_seconds(pid: int) -> float:
    """That all threads of a process have had so far; 0 for one that has ended."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(folder: pathlib.Path, settings: Settings) -> dict[str, Any]:
    """Figures of one run, its first steps left out."""
    progress = Progress(settings.run.steps)
    clock = CpuClock(progress)

    async def run() -> None:
        watching = asyncio.create_task(clock.keep())
        try:
            await run_processes(settings, progress)
        finally:
            watching.cancel()

    asyncio.run(run())
    figures = RunFolder(folder).read_figures()
    steps = curves.by_step(figures["trainer-0"])
    later = steps[_SKIPPED:]
    spent = later[-1]["time_s"] - steps[_SKIPPED - 1]["time_s"]
    begun, ended = steps[_SKIPPED - 1]["time_s"], later[-1]["time_s"]
    return {
        "tokens_per_s": sum(x["tokens"] for x in later) / spent,
        "step_s": spent / len(later),
        "tokens": sum(x["tokens"] for x in steps),
        "lags": curves.lag_histogram(later),
        "cpu_s_per_step": {name: s / len(later) for name, s in clock.between(begun, ended).items()},
        "busy_s_per_step": {name: _busy_between(figures[name], begun, ended) / len(later) for name in sorted(figures)},
        "idle": {worker: _idle_between(figures[worker], begun, ended) for worker in ("rollout-0", "trainer-0")},
    }


def _busy_between(lines: Sequence[Mapping[str, Any]], begun: float, ended: float) -> float:
    """Of the lines nearest to both moments."""
    first = min(lines, key=lambda x: abs(x["time_s"] - begun))
    last = min(lines, key=lambda x: abs(x["time_s"] - ended))
    return float(last["busy_s"] - first["busy_s"])


def _idle_between(lines: Sequence[dict[str, Any]], begun: float, ended: float) -> float:
    """Of the lines nearest to both moments."""
    first = min(lines, key=lambda x: abs(x["time_s"] - begun))
    last = min(lines, key=lambda x: abs(x["time_s"] - ended))
    alive = last["time_s"] - first["time_s"]
    return 1 - (last["busy_s"] - first["busy_s"]) / alive if alive > 0 else 0.0


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Every side in every round, in turning order."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in given.sides}
    names = list(given.sides)
    with tempfile.TemporaryDirectory() as root:
        for number in range(given.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                folder = pathlib.Path(root) / "run"
                found[name].append(measure(folder, settings_of(folder, SIDES[name], given, seed=number)))
                shutil.rmtree(folder)
    for number in range(given.rounds):
        if len({found[name][number]["tokens"] for name in names}) != 1:
            raise AssertionError("the sides did not train the same number of tokens")
    base = found[names[0]]
    rows = [
        {
            "workflow": name,
            "tokens_per_s": statistics.median(x["tokens_per_s"] for x in runs),
            "step_s": statistics.median(x["step_s"] for x in runs),
            "ratio": statistics.median(x["tokens_per_s"] / b["tokens_per_s"] for x, b in zip(runs, base, strict=True)),
            "ratios": [round(x["tokens_per_s"] / b["tokens_per_s"], 3) for x, b in zip(runs, base, strict=True)],
            "idle_rollout": statistics.median(x["idle"]["rollout-0"] for x in runs),
            "idle_trainer": statistics.median(x["idle"]["trainer-0"] for x in runs),
            "cpu_s_per_step": _medians([x["cpu_s_per_step"] for x in runs]),
            "busy_s_per_step": _medians([x["busy_s_per_step"] for x in runs]),
            "lags": runs[-1]["lags"],
        }
        for name, runs in found.items()
    ]
    return {"rows": rows, "bound": bounds(rows[0]), "runs": found, "options": {k: v for k, v in vars(given).items() if k != "json"}}


def bounds(by_turns: Mapping[str, Any]) -> dict[str, float]:
    """What overlap can gain at most over a side that takes turns.

    Returns:
        "generation_s" and "training_s" of a step; "overlap" of their sum over the longer; "two_cores" of the step over half the CPU time of all its processes.
    """
    generation, training = by_turns["busy_s_per_step"]["rollout-0"], by_turns["busy_s_per_step"]["trainer-0"]
    return {
        "generation_s": generation, "training_s": training, "overlap": (generation + training) / max(generation, training),
        "two_cores": by_turns["step_s"] / (sum(by_turns["cpu_s_per_step"].values()) / 2),
    }  # fmt: skip


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in runs[0]}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m plugmesh_rollout.loop.bench", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=list(SHAPES), default="balanced", help="sets the four sizes that are not given")
    parser.add_argument("--hidden", type=int, help="size of the model")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--groups", type=int, help="of four responses, in a step")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--at-once", type=int, default=0, help="groups that are generated together, as far as a side lets them in; 0: two steps'")
    parser.add_argument("--tail", type=float, default=1.0, help="sigma of the log-normal lengths")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="the first is what the others are compared with")
    parser.add_argument("--pin", action="store_true", help="the trainer has a core of its own, on all sides")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    for name, value in SHAPES[given.shape].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    given = parsed(arguments)
    logs.configure("warning", service="rollout", instance="bench")
    result = compare(given)
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)


def show(result: Mapping[str, Any]) -> None:
    bound = result["bound"]
    print(f"{result['rows'][0]['workflow']}: generation {bound['generation_s'] * 1000:.0f} ms and training {bound['training_s'] * 1000:.0f} ms of a step;", end=" ")
    print(f"overlap gains at most {bound['overlap']:.2f}, all on two cores {bound['two_cores']:.2f}")
    print("| workflow | trained tokens/s | step | over the first | rollout idle | trainer idle | CPU ms of a step: rollout, train, score, table | tokens by versions behind |")
    print("|---|---|---|---|---|---|---|---|")
    for r in result["rows"]:
        span = f"{min(r['ratios']):.2f}-{max(r['ratios']):.2f}"
        total = sum(r["lags"].values())
        lags = ", ".join(f"{lag}: {n / total:.0%}" for lag, n in r["lags"].items())
        cpu = ", ".join(f"{r['cpu_s_per_step'][name] * 1000:.0f}" for name in ("rollout:0", "train:0", "reward:0", "table"))
        print(
            f"| {r['workflow']} | {r['tokens_per_s']:.0f} | {r['step_s'] * 1000:.0f} ms | {r['ratio']:.2f} ({span}) | {r['idle_rollout']:.0%} | "
            f"{r['idle_trainer']:.0%} | {cpu} | {lags} |"
        )


if __name__ == "__main__":
    main()
