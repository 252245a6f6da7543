"""Measures what drafts bring and cost: `python -m plugmesh_ngram_draft.bench`.

On the real model, in one process: each workload runs without and with the plugin in turn, several rounds, so that drift of the machine hits both alike.
Prints a table and, with --json, every run. Both give the same tokens, which is checked.

Workloads are chats on English that every CPython carries. "copy" asks for a passage again, "edit" for a function with a name changed, "summary" for a summary of
a passage; "story" (temperature 1) and "noise" (random tokens in, temperature 1) repeat little: they show the cost. Tokens/s counts generated tokens over the
time from the first to the last step, prompts included. With `--clock cpu --threads 1` times are processor time of this process, for a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from plugmesh.models import pull
from plugmesh.records import DraftRecord
from plugmesh.types import SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest, Model, load_model, weight_format
from plugmesh_engine.bench import load_manifest
from plugmesh_engine.testing import english, gguf_tokenizer
from plugmesh_ngram_draft.draft import build_method
from plugmesh_ngram_draft.plugin import Settings

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
STORIES = ("a lighthouse", "a clockmaker", "two rivers", "an unusual library", "the last train", "a painter of maps", "winter bees", "a quiet robot")
CODE = '''def total_price(items, discount):
    """Sum of the prices, less the discount."""
    total = 0
    for item in items:
        total = total + item.price * item.quantity
    if discount is not None:
        total = total - total * discount.rate
    return total
'''


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one workload."""

    workload: str
    streams: int
    drafts: bool
    seconds: float
    num_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int


def chats(workload: str, encode: Callable[[str], list[int]], num: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Prompts; chat template by hand, ids 1 and 2 begin and end a message."""
    rng = np.random.default_rng(7)
    text = english()
    prompts = []
    for i in range(num):
        if workload == "noise":
            prompts.append(tuple(rng.integers(1000, vocab_size, 150).tolist()))
            continue
        start = 1000 + 4001 * i
        passage = text[start : start + 700].strip()
        ask = {
            "copy": f"Repeat the following text exactly, word for word:\n\n{passage}",
            "summary": f"Summarise the following text, quoting its own words:\n\n{passage}",
            "edit": f"Rename the variable total to amount_{i} in this Python function, and give the whole function:\n\n{CODE}",
            "story": f"Write a long story about {STORIES[i % len(STORIES)]}.",
        }[workload]
        prompts.append((1, *encode(f"user\n{ask}"), 2, *encode("\n"), 1, *encode("assistant\n")))
    return prompts


def run(model: Model, config: EngineConfig, workload: str, prompts: Sequence[tuple[int, ...]], method: Any, max_tokens: int, clock: Callable[[], float]) -> tuple[Run, list[Any]]:
    """All prompts at once, `max_tokens` each."""
    engine = Engine(model, config, drafts=method)
    temperature = 1.0 if workload in ("story", "noise") else 0.0
    for i, p in enumerate(prompts):
        engine.add(EngineRequest(str(i), p, SamplingParams(temperature=temperature, seed=i, max_tokens=max_tokens, ignore_eos=True)))
    tokens: dict[str, list[int]] = {}
    began = clock()
    while engine.has_work():
        for event in engine.step().tokens:
            assert event.error is None
            tokens.setdefault(event.request_id, []).extend(t.token_id for t in event.tokens)
    seconds = clock() - began
    stats = engine.stats()
    engine.close()
    assert stats.num_draft_errors == 0
    done = Run(
        workload, len(prompts), method is not None, seconds, stats.num_tokens_generated, stats.num_steps, stats.num_draft_tokens, stats.num_draft_tokens_accepted
    )  # fmt: skip
    return done, sorted(tokens.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=["copy", "edit", "summary", "story", "noise"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    path = pull("smollm2")
    encode_text: Any = gguf_tokenizer(path)

    def encode(text: str) -> list[int]:
        return list(encode_text.encode(text, add_special_tokens=False).ids)

    config = EngineConfig(executor=args.executor, dtype=args.dtype, num_threads=args.threads, num_blocks=2048, prefix_cache=False)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as store:
        model = load_model(load_manifest(path, weight_format(config), pathlib.Path(store)), config)
        # One method for all runs, as in a process that serves: its profile and its record of the engine stay.
        kept: list[Any] = []

        def build(context: Any) -> Any:
            if not kept:
                kept.append(build_method(Settings(), context))
            return kept[0]

        record = DraftRecord("ngram", build)
        Engine(model, config, drafts=record).close()
        for streams in args.streams:
            for workload in args.workloads:
                prompts = chats(workload, encode, streams, model.config.vocab_size)
                for i in range(args.rounds):
                    outputs = []
                    for method in (None, record) if i % 2 else (record, None):
                        done, tokens = run(model, config, workload, prompts, method, args.tokens, CLOCKS[args.clock])
                        runs.append(done)
                        outputs.append(tokens)
                    assert outputs[0] == outputs[1] or config.executor == "torch", "drafts changed the output"
                if not args.json:
                    print_rows([r for r in runs if (r.workload, r.streams) == (workload, streams)], first=len(runs) == 2 * args.rounds)
    if args.json:
        print(json.dumps([asdict(r) for r in runs], indent=1))


def print_rows(runs: Sequence[Run], *, first: bool) -> None:
    """A line of the table: medians over the rounds; the ratio is the median of the rounds' ratios, with its range."""
    if first:
        print("| workload | streams | tokens/s without | with | ratio | tokens per sequence and step | drafted tokens accepted |")
        print("|---|---|---|---|---|---|---|")
    without, drafted = [r for r in runs if not r.drafts], [r for r in runs if r.drafts]
    ratios = sorted(a.seconds / b.seconds for a, b in zip(without, drafted, strict=True))
    speed = [statistics.median(r.num_tokens / r.seconds for r in part) for part in (without, drafted)]
    r = drafted[-1]
    per_step = r.num_tokens / r.streams / r.num_steps
    print(
        f"| {r.workload} | {r.streams} | {speed[0]:.0f} | {speed[1]:.0f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) "
        f"| {per_step:.2f} | {r.num_accepted} of {r.num_drafted} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
