"""What overlap gains here: the same work by turns and as streams, one generating and one training process with one thread each.

    python -m plugmesh_rollout.loop.bench [--json] [--rounds 3]

Responses have drawn lengths with a heavy tail (log-normal), the same ones under every workflow: a seed and a group's number fix them. Both sides generate with the
native engine, score, train and publish as `plugmesh rl run` does. Warm-up steps are left out; sides take turns within each round, ratios are per round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import shutil
import statistics
import tempfile
from collections.abc import Sequence
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
_SKIPPED = 3  # steps at the start, in which processes and pages come up, and streams have not got ahead yet


def settings_of(folder: pathlib.Path, options: dict[str, Any], given: argparse.Namespace, seed: int) -> Settings:
    return checked({
        "run": {"folder": str(folder), "steps": given.steps, "seed": seed, "eval_every": 0, "eval_examples": 1, "plugins": ["asyncflow"], "checkpoint_every": given.steps},
        "model": {"max_position": given.max_tokens + 32},
        "task": {"name": "copy"}, "reward": {"name": "partial"},
        "workflow": {"name": "asyncflow", "options": options},
        "rollout": {
            "group_size": 4, "groups_per_step": given.groups, "groups_at_once": given.groups, "max_tokens": given.max_tokens, "tail": given.tail,
        },
        "trainer": {"lr": 1e-5, "part_rows": 16},
    })  # fmt: skip


def measure(folder: pathlib.Path, settings: Settings) -> dict[str, Any]:
    """Figures of one run, its first steps left out."""
    asyncio.run(run_processes(settings, Progress(settings.run.steps)))
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
        "idle": {worker: _idle_between(figures[worker], begun, ended) for worker in ("rollout-0", "trainer-0")},
    }


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
            "lags": runs[-1]["lags"],
        }
        for name, runs in found.items()
    ]
    return {"rows": rows, "runs": found, "options": {k: v for k, v in vars(given).items() if k != "json"}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m plugmesh_rollout.loop.bench", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", type=int, default=16, help="of four responses, in a step")
    parser.add_argument("--max-tokens", type=int, default=384)
    parser.add_argument("--tail", type=float, default=1.0, help="sigma of the log-normal lengths")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="the first is what the others are compared with")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    logs.configure("warning", service="rollout", instance="bench")
    result = compare(given)
    if given.json:
        print(json.dumps(result, indent=1))
        return
    print("| workflow | trained tokens/s | step | over the first | rollout idle | trainer idle | tokens by versions behind |")
    print("|---|---|---|---|---|---|---|")
    for r in result["rows"]:
        span = f"{min(r['ratios']):.2f}-{max(r['ratios']):.2f}"
        total = sum(r["lags"].values())
        lags = ", ".join(f"{lag}: {n / total:.0%}" for lag, n in r["lags"].items())
        print(
            f"| {r['workflow']} | {r['tokens_per_s']:.0f} | {r['step_s'] * 1000:.0f} ms | {r['ratio']:.2f} ({span}) | {r['idle_rollout']:.0%} | {r['idle_trainer']:.0%} | {lags} |"
        )


if __name__ == "__main__":
    main()
