"""Measures what a long prompt does to running streams: `python -m plugmesh_sarathi.bench`.

On the real model, in one process: 8 streams generate; when each has 8 tokens, a 2,000-token prompt arrives. The same load runs under each
scheduler in turn, several rounds, so that drift of the machine hits all alike. Prints a table and, with --json, every run.

Gap: time between two tokens of one stream. "While it arrives" are the gaps that overlap the time from the prompt's arrival to its first token.
With `--clock cpu` (and one thread) all times are processor time of this process: for a machine that others use meanwhile.
Throughput: prompt and generated tokens of the whole run over its time; the work is the same for all.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from plugmesh.models import pull
from plugmesh.types import SamplingParams
from plugmesh_engine import (
    Engine,
    EngineConfig,
    EngineRequest,
    FcfsScheduler,
    KvView,
    SequenceView,
    plan_prompts,
)
from plugmesh_engine.executors.torch import TorchModel
from plugmesh_engine.testing import model_in_memory, read_gguf
from plugmesh_sarathi.scheduler import SarathiScheduler

NUM_STREAMS, STREAM_PROMPT, STREAM_TOKENS, LONG_TOKENS, HEAD_START = 8, 48, 128, 16, 8
MIN_PREFILL, MAX_SEQUENCES = 8, 64
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class ChunkOnly:
    """For the ablation: chunks of a budget, but never in one step with decodes; the two kinds of step alternate."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._was_chunk = False

    def schedule(self, waiting: Sequence[SequenceView], running: Sequence[SequenceView], kv: KvView) -> list[tuple[SequenceView, int]]:
        decodes: list[tuple[SequenceView, int]] = [(s, 1) for s in running if s.is_decode]
        prompts = plan_prompts(waiting, running, kv, self.budget, MAX_SEQUENCES)
        self._was_chunk = bool(prompts) and not (self._was_chunk and decodes)
        return prompts if self._was_chunk else decodes


@dataclass(frozen=True, slots=True)
class Run:
    """One run; times in milliseconds. `arriving_*` are over gaps that overlap the long prompt's prefill, `all_*` over every gap of the run."""

    variant: str
    arriving_p50: float
    arriving_p99: float
    arriving_max: float
    all_p50: float
    all_p99: float
    ttft: float
    seconds: float
    tokens_per_s: float


def run(model: TorchModel, variant: str, scheduler: Any, long_prompt: int, clock: Callable[[], float]) -> Run:
    """The load under one scheduler, on a fresh engine."""
    rng = np.random.default_rng(0)
    engine = Engine(model, EngineConfig(executor="torch", dtype=model.dtype, num_blocks=512, prefix_cache=False), scheduler=scheduler)

    def request(name: str, length: int, max_tokens: int) -> EngineRequest:
        ids = tuple(rng.integers(1000, model.config.vocab_size, length).tolist())
        return EngineRequest(name, ids, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))

    for i in range(NUM_STREAMS):
        engine.add(request(str(i), STREAM_PROMPT, STREAM_TOKENS))
    long = request("long", long_prompt, LONG_TOKENS)
    times: dict[str, list[float]] = {name: [] for name in [*map(str, range(NUM_STREAMS)), "long"]}
    arrived = 0.0
    start = clock()
    while engine.has_work():
        if not arrived and min(len(times[str(i)]) for i in range(NUM_STREAMS)) >= HEAD_START:
            arrived = clock()
            engine.add(long)
        output = engine.step()
        now = clock()
        for event in output.tokens:
            times[event.request_id].append(now)
    seconds = clock() - start
    first = times["long"][0]
    pairs = [(a, b) for i in range(NUM_STREAMS) for a, b in zip(times[str(i)], times[str(i)][1:], strict=False)]
    gaps = np.array([(b - a) * 1e3 for a, b in pairs])
    arriving = np.array([(b - a) * 1e3 for a, b in pairs if b > arrived and a < first])
    num_tokens = NUM_STREAMS * (STREAM_PROMPT + STREAM_TOKENS) + long_prompt + LONG_TOKENS
    assert engine.stats().num_scheduler_errors == 0
    return Run(
        variant, float(np.percentile(arriving, 50)), float(np.percentile(arriving, 99)), float(arriving.max()), float(np.percentile(gaps, 50)),
        float(np.percentile(gaps, 99)), (first - arrived) * 1e3, seconds, num_tokens / seconds,
    )  # fmt: skip


def variants(budgets: Sequence[int], ablation_budget: int, long_prompt: int) -> dict[str, Callable[[], Any]]:
    """The engine's default with the whole prompt in one step comes first; ratios are against it."""
    whole = long_prompt + NUM_STREAMS * STREAM_PROMPT
    made: dict[str, Callable[[], Any]] = {
        "whole prompt beside decodes": lambda: FcfsScheduler(whole, MAX_SEQUENCES),
        "whole prompt, decodes wait": lambda: FcfsScheduler(whole, MAX_SEQUENCES, mix=False),
        f"chunks of {ablation_budget}, alternating": lambda: ChunkOnly(ablation_budget),
    }
    for b in budgets:
        made[f"sarathi, budget {b}"] = functools.partial(SarathiScheduler, b, MIN_PREFILL, MAX_SEQUENCES)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--ablation-budget", type=int, default=128)
    parser.add_argument("--no-ablation", action="store_true", help="leave out the variants between the default and Sarathi")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--long-prompt", type=int, default=2000)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = variants(args.budgets, args.ablation_budget, args.long_prompt)
    if args.no_ablation:
        made = {n: b for n, b in made.items() if n.startswith(("whole prompt beside", "sarathi"))}
    model = model_in_memory(*read_gguf(pull("smollm2")), dtype=args.dtype)
    runs: list[Run] = []
    for _ in range(args.rounds):
        for name, build in made.items():
            runs.append(run(model, name, build(), args.long_prompt, CLOCKS[args.clock]))
    if args.json:
        print(json.dumps([asdict(r) for r in runs], indent=1))
        return
    print_table(runs, list(made))


def print_table(runs: Sequence[Run], names: Sequence[str]) -> None:
    """Medians over the rounds; the ratios are medians of ratios within a round, with their range."""
    by_name = {n: [r for r in runs if r.variant == n] for n in names}
    base = by_name[names[0]]

    def ratios(name: str, key: Callable[[Run, Run], float]) -> str:
        values = sorted(key(b, r) for b, r in zip(base, by_name[name], strict=True))
        return f"{statistics.median(values):.2f} ({values[0]:.2f}-{values[-1]:.2f})"

    print("| scheduler | gap while it arrives: p50 | p99 | max | p99 of the whole run | TTFT of the long prompt | tokens/s | p99 gap smaller by | throughput ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        m = {f: statistics.median(getattr(r, f) for r in by_name[name]) for f in Run.__dataclass_fields__ if f != "variant"}
        cells = [f"{m[f]:.0f} ms" for f in ("arriving_p50", "arriving_p99", "arriving_max", "all_p99", "ttft")] + [f"{m['tokens_per_s']:.0f}"]
        cells += [ratios(name, lambda b, r: b.arriving_p99 / r.arriving_p99), ratios(name, lambda b, r: r.tokens_per_s / b.tokens_per_s)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
