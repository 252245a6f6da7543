"""Accuracy against tokens of DeepConf, self-consistency and greedy: `python -m plugmesh_deepconf.bench`.

Traces of the real model on generated arithmetic (`plugmesh_deepconf.tasks`, answers checked by the program) are recorded once in `--traces`; every strategy is
then the plugin's own code, run on the same traces in several orders, with early stops where it makes them. Tokens are all that were generated, warm-up,
stopped traces and end tokens included. "d accuracy" compares with self-consistency at the same tokens (interpolated between numbers of traces), "random"
stops as many traces at the same lengths, but chosen by chance. Intervals are 95 %, bootstrapped over problems, paired. Nothing is timed but with `--cost`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plugmesh.records import StrategyEvent
from plugmesh.testing.strategies import ReplayApi, Script, strategy_request
from plugmesh_deepconf.confidence import scores
from plugmesh_deepconf.plugin import Settings
from plugmesh_deepconf.strategy import DeepConf
from plugmesh_deepconf.tasks import TASKS, Problem, problems
from plugmesh_deepconf.traces import load, record
from plugmesh_deepconf.vote import weighted_vote

Recorded = tuple[Problem, Script, list[Script]]
MEASURES = ("lowest", "bottom", "tail", "mean")
NUM_BOOTSTRAPS = 1000


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy over all problems: (problems,) means over orders."""

    name: str
    is_right: np.ndarray
    num_tokens: np.ndarray
    share_stopped: float = 0.0


def policies(num_traces: int, window: int) -> dict[str, dict[str, Any]]:
    """Name to the strategy's options."""
    sizes = [n for n in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64) if n <= num_traces]
    found: dict[str, dict[str, Any]] = {f"self-consistency {n}": {"mode": "majority", "traces": n} for n in sizes}
    half = max(2, num_traces // 2)
    common = {"window": window, "traces": num_traces}
    found[f"weighted {num_traces}"] = {**common, "mode": "offline", "keep_percent": 100}
    for keep in (90, 50, 10):
        found[f"offline {num_traces}, keep {keep} %"] = {**common, "mode": "offline", "keep_percent": keep}
    for keep in (90, 50, 10):
        found[f"online {half}+{num_traces - half}, keep {keep} %"] = {
            **common, "mode": "online", "warmup": half, "batch": num_traces, "keep_percent": keep, "consensus": 1}
    quarter = max(2, num_traces // 4)
    for keep in (90, 50):
        found[f"online {quarter}+{num_traces - quarter}, keep {keep} %, consensus"] = {
            **common, "mode": "online", "warmup": quarter, "batch": quarter, "keep_percent": keep, "consensus": 0.95}
    return found


async def run_strategy(options: Mapping[str, Any], scripts: Sequence[Script]) -> tuple[Mapping[str, Any], int]:
    """What the strategy tells of its answer, and the tokens it took."""
    request = strategy_request({"answer": "number", **options}, max_tokens=1 << 10)
    api = ReplayApi(request, lambda child, _: scripts[child], late_steps=1)
    events: list[StrategyEvent] = [e async for e in DeepConf(Settings()).run(request, api)]
    return events[-1].detail, api.ledger.num_tokens


def num_tokens(script: Script) -> int:
    return len(script.tokens) + (script.finish_reason.value == "stop")


def random_stop(detail: Mapping[str, Any], scripts: Sequence[Script], answers: Sequence[tuple[str | None, float]], warmup: int, rng: np.random.Generator) -> tuple[str | None, int]:
    """The control: as many of the same traces dropped and cut as in `detail`, at the same lengths, but others."""
    rows = detail["traces"]
    later = list(range(warmup, len(rows)))
    cuts = [rows[i]["num_tokens"] for i in later if rows[i]["end"] == "stopped"]
    stopped = dict(zip((int(i) for i in rng.permutation(later)[: len(cuts)]), (int(c) for c in rng.permutation(cuts)), strict=True)) if cuts else {}
    num_dropped = sum(not rows[i]["is_kept"] for i in range(warmup))
    dropped = {int(i) for i in rng.permutation(warmup)[:num_dropped]}
    tokens = sum(min(num_tokens(scripts[i]), stopped[i] + 1) if i in stopped else num_tokens(scripts[i]) for i in range(len(rows)))
    votes = weighted_vote(answers[i] for i in range(len(rows)) if i not in stopped and i not in dropped)
    return next(iter(votes), None), tokens


async def measure(recorded: Sequence[Recorded], orders: int, window: int) -> list[Outcome]:
    """Every policy on every problem, its traces in `orders` different orders."""
    num_traces = min(len(s) for _, _, s in recorded)
    chosen = policies(num_traces, window)
    names = ["greedy", *chosen, *(f"random, as {n}" for n in chosen if n.startswith("online") and "consensus" not in n)]
    right = {n: np.zeros(len(recorded)) for n in names}
    used = {n: np.zeros(len(recorded)) for n in names}
    stopped = {n: 0.0 for n in names}
    for p, (problem, greedy, pool) in enumerate(recorded):
        rng = np.random.default_rng(p)
        detail, tokens = await run_strategy({"mode": "majority", "traces": 1}, [greedy])
        right["greedy"][p], used["greedy"][p] = detail["answer"] == problem.answer, tokens
        for _ in range(orders):
            scripts = [pool[i] for i in rng.permutation(len(pool))[:num_traces]]
            full, _ = await run_strategy({"mode": "offline", "keep_percent": 100, "traces": num_traces, "window": window}, scripts)
            answers = [(t["answer"], t["score"]) for t in full["traces"]]
            for name, options in chosen.items():
                detail, tokens = await run_strategy(options, scripts)
                right[name][p] += (detail["answer"] == problem.answer) / orders
                used[name][p] += tokens / orders
                rows = detail["traces"]
                stopped[name] += sum(t["end"] == "stopped" for t in rows) / len(rows) / orders / len(recorded)
                control = f"random, as {name}"
                if control in right:
                    answer, tokens = random_stop(detail, scripts, answers, options["warmup"], rng)
                    right[control][p] += (answer == problem.answer) / orders
                    used[control][p] += tokens / orders
                    stopped[control] = stopped[name]
    return [Outcome(n, right[n], used[n], stopped[n]) for n in names]


def interval(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return float(low), float(high)


def compare(outcomes: Sequence[Outcome], seed: int = 0, num_draws: int = NUM_BOOTSTRAPS) -> list[dict[str, Any]]:
    """Rows with accuracy, tokens, and the difference to self-consistency at equal tokens, with intervals."""
    curve = [o for o in outcomes if o.name.startswith("self-consistency")]
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(curve[0].is_right), (num_draws, len(curve[0].is_right)))
    rows = []
    for o in outcomes:
        def gap(at: Any, o: Outcome = o) -> tuple[float, float]:
            xs, ys = [c.num_tokens[at].mean() for c in curve], [c.is_right[at].mean() for c in curve]
            return float(o.is_right[at].mean() - np.interp(o.num_tokens[at].mean(), xs, ys)), float(o.is_right[at].mean())
        everything = slice(None)
        samples = np.array([gap(d) for d in draws])
        delta, accuracy = gap(everything)
        largest = curve[-1]
        rows.append({
            "policy": o.name, "accuracy": accuracy, "accuracy_95": interval(samples[:, 1]), "tokens": float(o.num_tokens.mean()),
            "share_stopped": o.share_stopped, "tokens_of_largest": float(o.num_tokens.mean() / largest.num_tokens.mean()),
            "delta_at_equal_tokens": delta, "delta_at_equal_tokens_95": interval(samples[:, 0]),
        })  # fmt: skip
    return rows


def auroc(values: np.ndarray, labels: np.ndarray) -> float:
    """How often a right one has the higher value than a wrong one; ties count half; NaN when there is only one kind."""
    num_right = int(labels.sum())
    num_wrong = len(labels) - num_right
    if not num_right or not num_wrong:
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[labels].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def discrimination(recorded: Sequence[Recorded], window: int, seed: int = 0) -> list[dict[str, Any]]:
    """AUROC of each measure for a trace's being right: over all traces, within problems, and with shuffled labels."""
    from plugmesh_deepconf.answers import extract

    values: dict[str, list[np.ndarray]] = {m: [] for m in MEASURES}
    labels = []
    for problem, _, pool in recorded:
        measured = [scores([t.confidence for t in s.tokens], window) for s in pool]
        labels.append(np.array([extract("".join(s.texts), "number") == problem.answer for s in pool]))
        for m in MEASURES:
            values[m].append(np.array([getattr(x, m) for x in measured]))
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(labels), len(labels)) for _ in range(200)]
    flat = np.concatenate(labels)
    shuffled = rng.permutation(flat)
    rows = []
    for m in MEASURES:
        boot = np.array([auroc(np.concatenate([values[m][i] for i in d]), np.concatenate([labels[i] for i in d])) for d in draws])
        inside = np.array([auroc(v, y) for v, y in zip(values[m], labels, strict=True)])
        within = np.array([np.nanmean(inside[d]) for d in draws])
        everything = np.concatenate(values[m])
        rows.append({
            "measure": m, "auroc": auroc(everything, flat), "auroc_95": interval(boot), "within_problems": float(np.nanmean(inside)),
            "within_problems_95": interval(within), "shuffled_labels": auroc(everything, shuffled)})
    return rows


def report(title: str, rows: Sequence[Mapping[str, Any]], measures: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"\n{title}", f"{'policy':44} {'accuracy':>22} {'tokens':>8} {'of max':>7} {'stopped':>8}  d accuracy at equal tokens"]
    for r in rows:
        low, high = r["accuracy_95"]
        d_low, d_high = r["delta_at_equal_tokens_95"]
        lines.append(
            f"{r['policy']:44} {100 * r['accuracy']:6.1f} % ({100 * low:4.1f}-{100 * high:4.1f}) {r['tokens']:8.1f} {r['tokens_of_largest']:7.2f} "
            f"{100 * r['share_stopped']:6.1f} %  {100 * r['delta_at_equal_tokens']:+5.1f} ({100 * d_low:+.1f} to {100 * d_high:+.1f})")
    lines.append(f"{'measure':10} {'AUROC':>22} {'within problems':>22} {'shuffled':>9}")
    for m in measures:
        lines.append(
            f"{m['measure']:10} {m['auroc']:6.3f} ({m['auroc_95'][0]:.3f}-{m['auroc_95'][1]:.3f})  {m['within_problems']:6.3f} "
            f"({m['within_problems_95'][0]:.3f}-{m['within_problems_95'][1]:.3f}) {m['shuffled_labels']:9.3f}")
    return "\n".join(lines)


def cost_us(rows: int = 16, vocab: int = 49152, rounds: int = 60) -> dict[str, float]:
    """Microseconds that sampling takes per row of random logits, without and with confidence, medians of interleaved rounds."""
    from plugmesh.types import SamplingParams
    from plugmesh_engine.sampler import SampleRow, sample

    logits = (np.random.default_rng(0).normal(size=(rows, vocab)) * 4).astype(np.float32)
    nothing = np.array([], np.int64)
    times: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name, k in (("without", 0), ("with", 20)):
            params = SamplingParams(temperature=0.8, top_p=0.95, confidence_top_k=k)
            batch = [SampleRow(params, i, 0, 0, lambda: nothing, {}, ()) for i in range(rows)]
            began = time.perf_counter()
            sample(logits, batch)
            times[name].append((time.perf_counter() - began) / rows * 1e6)
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=pathlib.Path, default=pathlib.Path("deepconf-traces"), help="folder; what is missing there is recorded")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
    parser.add_argument("--problems", type=int, default=250, help="of each task")
    parser.add_argument("--num-traces", type=int, default=16, help="of each problem")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--orders", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="of the engine that records")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--cost", action="store_true", help="only time what confidence costs the sampler")
    args = parser.parse_args()
    if args.cost:
        cost = cost_us()
        print(f"sampling a row: {cost['without']:.0f} us, with confidence {cost['with']:.0f} us")
        if args.json:
            args.json.write_text(json.dumps(cost) + "\n")
        return
    args.traces.mkdir(parents=True, exist_ok=True)
    recorded: dict[str, list[Recorded]] = {}
    for task in args.tasks:
        path = args.traces / f"{task}.jsonl"
        if not path.exists():
            part = path.with_suffix(".part")
            record(problems(task, args.problems, args.seed), args.num_traces, part, temperature=args.temperature, top_p=0.95, top_k=20, max_tokens=48, threads=args.threads)
            part.rename(path)
        recorded[task] = load(path)[: args.problems]
    if len(recorded) > 1:
        recorded["all"] = [r for rows in recorded.values() for r in rows]
    out: dict[str, Any] = {"window": args.window, "temperature": args.temperature, "orders": args.orders, "tasks": {}}
    for task, rows in recorded.items():
        compared = compare(asyncio.run(measure(rows, args.orders, args.window)))
        measures = discrimination(rows, args.window)
        print(report(f"{task}: {len(rows)} problems, groups of {args.window} tokens", compared, measures), flush=True)
        out["tasks"][task] = {"num_problems": len(rows), "policies": compared, "measures": measures}
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
