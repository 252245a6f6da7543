"""Measures what the selection keeps, what it saves and what it costs: `python -m plugmesh_gemfilter.bench`.

On the real model, in one process, on English that every CPython carries with one sentence hidden in it ("The secret number of the green owl is 4448") and a question
about it at the end. Four ways to read each prompt, interleaved: whole ("full"), the attention's choice ("gem"), the last tokens ("recent") and random ones
("random"), the latter three of equal size and with the same protected ends; `--protect 0 0` is the paper's form without protection.

    recall     of the sentence's tokens, how many are in the selection; "number": prompts whose whole answer is
    answers    right number in the greedy answer; what the model can do at all stands in the row "full"
    completes  right number after an answer that was begun for it ("The secret number of the green owl is"), greedy
    log p      log-probability of the right number's tokens there, mean per token: finer where the model is weak
    ttft       from the request to its first token, one request at a time; for "recent" and "random" without their stage one, which they do not need
    KV         held while the answer is generated, and the most that was held at once

`--layers 4 8 12 ...` compares layers instead: recall by the layer that is looked at. With --json the raw figures come out, one object.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import structlog

from plugmesh.models import pull
from plugmesh.records import PromptFilterRecord
from plugmesh.types import SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest, Model, load_model, weight_format
from plugmesh_engine.bench import load_manifest
from plugmesh_engine.testing import english, gguf_tokenizer
from plugmesh_gemfilter.needles import Needle, needle
from plugmesh_gemfilter.plugin import Settings
from plugmesh_gemfilter.selection import GemFilter, choose

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
ANSWER_TOKENS = 12


class Chosen:
    """A filter that does what the bench says, and keeps what was chosen last. Implements `plugmesh.records.PromptFilter`."""

    def __init__(self, made: GemFilter, method: str) -> None:
        self.made, self.method = made, method
        self.dice = np.random.default_rng(0)
        self.last: np.ndarray = np.array([], int)
        self.chosen_s = 0.0

    def layers(self, num_prompt_tokens: int) -> int:
        if num_prompt_tokens <= self.made.keep:
            return 0
        return self.made.layer if self.method == "gem" else 1

    def select(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        f = self.made
        if self.method == "gem":
            self.last = f.select(q, k)
        else:
            values = np.arange(len(k)) if self.method == "recent" else self.dice.random(len(k))
            self.last = choose(values, f.keep, f.keep_first, f.keep_last)
        self.chosen_s = time.perf_counter()
        return self.last


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt read in one way."""

    method: str
    length: int
    depth: float
    num_read: int
    recall: float
    has_number: bool
    question_kept: float
    answers: bool
    completes: bool
    logprob: float
    ttft_ms: float
    kv_bytes: int
    peak_kv_bytes: int


class Reader:
    """An engine that reads prompts in one way.

    Args:
        layer: Of "gem".
    """

    def __init__(self, model: Model, config: EngineConfig, method: str, settings: Settings, layer: int) -> None:
        self.method = method
        self.chosen = Chosen(gem(settings, layer), method)
        filter_ = None if method == "full" else PromptFilterRecord("bench", lambda _: self.chosen, num_queries=settings.num_queries)
        self.engine = Engine(model, config, prompt_filter=filter_)

    def read(self, asked: Needle, decode: Callable[[Sequence[int]], str]) -> Run:
        """One request, alone."""
        engine, chosen = self.engine, self.chosen
        engine.add(EngineRequest("r", asked.token_ids, SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS), hold=True))
        began, ttft_ms, held, peak = time.perf_counter(), 0.0, 0, 0
        tokens: list[int] = []
        while engine.has_work():
            output = engine.step()
            now, used = time.perf_counter(), engine.stats().kv_blocks_used
            peak = max(peak, used)
            for event in output.tokens:
                assert event.error is None, event.error
                if not tokens:
                    ttft_ms, held = (now - (chosen.chosen_s if self.method in ("recent", "random") else began)) * 1e3, used
                tokens += [t.token_id for t in event.tokens]
        assert engine.stats().num_filter_errors == 0
        kept = np.arange(len(asked.token_ids)) if self.method == "full" else chosen.last
        logprobs, completes = self._complete(asked, len(kept))
        engine.release("r")
        found, block = set(kept.tolist()), engine.layout.block_bytes
        return Run(
            self.method, len(asked.token_ids), asked.depth, len(kept), float(np.mean([i in found for i in asked.places])),
            all(i in found for i in asked.number_places), float(np.mean([i in found for i in range(asked.question, len(asked.token_ids))])),
            asked.answer in re.findall(r"\d+", decode(tokens).replace(",", "")), completes, logprobs, ttft_ms, held * block, peak * block,
        )  # fmt: skip

    def _complete(self, asked: Needle, num_read: int) -> tuple[float, bool]:
        """Mean log-probability of the right number's tokens after a begun answer, and whether each is the likeliest; goes on from the KV of the prompt."""
        given = (*asked.answer_start, *asked.number)
        score = EngineRequest("s", (), SamplingParams(temperature=0, max_tokens=len(given), top_logprobs=1), score=(given,))
        self.engine.fork("r", 0, score, num_read)
        told: list[Any] = []
        while self.engine.has_work():
            for event in self.engine.step().tokens:
                assert event.error is None, event.error
                told += event.tokens
        number = told[-len(asked.number) :]
        return statistics.mean(t.logprob for t in number), all(t.top[0][0] == t.token_id for t in number)


def gem(settings: Settings, layer: int) -> GemFilter:
    return GemFilter(layer, settings.keep_tokens, keep_first=settings.keep_first, keep_last=settings.keep_last, pool_width=settings.pool_width)


def recall_by_layer(model: Model, config: EngineConfig, prompts: Sequence[Needle], layers: Sequence[int], settings: Settings) -> list[dict[str, Any]]:
    """What each layer's queries and keys would keep of the needles. Each layer costs a stage one of its own."""
    rows = []
    for layer in layers:
        recalls, numbers = [], []
        for asked in prompts:
            chosen = Chosen(gem(settings, layer), "gem")
            engine = Engine(model, config, prompt_filter=PromptFilterRecord("bench", lambda _, c=chosen: c, num_queries=settings.num_queries))  # type: ignore[misc]
            engine.add(EngineRequest("r", asked.token_ids, SamplingParams(temperature=0, max_tokens=1)))
            while not engine.stats().num_filtered_prompts:
                engine.step()
            engine.cancel("r")
            engine.close()
            found = set(chosen.last.tolist())
            recalls.append(float(np.mean([i in found for i in asked.places])))
            numbers.append(all(i in found for i in asked.number_places))
        rows.append({"layer": layer, "recall": statistics.mean(recalls), "number": statistics.mean(map(float, numbers)), "num_prompts": len(prompts)})
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def summary(runs: Sequence[Run]) -> list[list[str]]:
    """One row per length and way of reading; times are medians, the ratio is that of each prompt to the same prompt read whole."""
    rows = [["prompt", "read", "tokens read", "recall %", "number %", "question kept %", "answers %", "completes %", "log p", "ttft ms", "ttft / full", "KV MB", "peak KV MB"]]
    for length in sorted({r.length for r in runs}):
        full = {(r.depth, i): r.ttft_ms for i, r in _numbered(runs, "full", length)}
        for method in dict.fromkeys(r.method for r in runs):
            some = _numbered(runs, method, length)
            ratios = [r.ttft_ms / full[r.depth, i] for i, r in some if (r.depth, i) in full]
            mean = {f: statistics.mean(float(getattr(r, f)) for _, r in some) for f in ("recall", "has_number", "question_kept", "answers", "completes", "logprob", "num_read")}
            rows.append([
                str(length), method, f"{mean['num_read']:.0f}", f"{100 * mean['recall']:.0f}", f"{100 * mean['has_number']:.0f}", f"{100 * mean['question_kept']:.0f}",
                f"{100 * mean['answers']:.0f}", f"{100 * mean['completes']:.0f}", f"{mean['logprob']:.2f}", f"{statistics.median(r.ttft_ms for _, r in some):.0f}",
                f"{statistics.median(ratios):.2f}" if ratios else "", f"{some[0][1].kv_bytes / 1e6:.1f}", f"{some[0][1].peak_kv_bytes / 1e6:.1f}",
            ])  # fmt: skip
    return rows


def _numbered(runs: Sequence[Run], method: str, length: int) -> list[tuple[int, Run]]:
    """Runs of a kind with the number of the repetition at their depth."""
    counts: dict[float, int] = {}
    found = []
    for r in runs:
        if r.method == method and r.length == length:
            found.append((counts.setdefault(r.depth, 0), r))
            counts[r.depth] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8176])
    parser.add_argument("--methods", nargs="+", choices=("full", "gem", "recent", "random"), default=["full", "gem", "recent", "random"])
    parser.add_argument("--keep", type=int, default=Settings().keep_tokens)
    parser.add_argument("--protect", type=int, nargs=2, default=[Settings().keep_first, Settings().keep_last], metavar=("FIRST", "LAST"))
    parser.add_argument("--queries", type=int, default=Settings().num_queries)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="compare these layers by recall, and nothing else")
    parser.add_argument("--depths", type=float, nargs="+", default=list(DEPTHS))
    parser.add_argument("--repeats", type=int, default=2, help="prompts per length and depth")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--kv-dtype", default="bfloat16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    settings = Settings(keep_tokens=args.keep, keep_first=args.protect[0], keep_last=args.protect[1], num_queries=args.queries, layer=args.layer)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    path = pull("smollm2")
    tokenizer: Any = gguf_tokenizer(path)
    text = english()

    def encode(piece: str) -> list[int]:
        return list(tokenizer.encode(piece, add_special_tokens=False).ids)

    config = EngineConfig(
        executor=args.executor, kv_dtype=args.kv_dtype, num_threads=args.threads, num_blocks=max(args.lengths) // 16 + 64, prefix_cache=False, commit_kv=True
    )
    with tempfile.TemporaryDirectory() as store:
        model = load_model(load_manifest(path, weight_format(config), pathlib.Path(store)), config)
        num_layers = model.config.num_layers
        layer = args.layer or round(settings.depth * num_layers)
        result: dict[str, Any] = {"layer": layer, "num_layers": num_layers, **settings.model_dump(exclude={"layer"})}
        prompts = [(n, needle(encode, text, n, depth, seed)) for n in args.lengths for seed in range(args.repeats) for depth in args.depths]
        if args.layers:
            rows = [["prompt", "layer", "recall %", "number %"]]
            found = []
            for n in args.lengths:
                for r in recall_by_layer(model, config, [p for m, p in prompts if m == n], args.layers, settings):
                    found.append({"length": n, **r})
                    rows.append([str(n), str(r["layer"]), f"{100 * r['recall']:.0f}", f"{100 * r['number']:.0f}"])
            result["layers"] = found
        else:
            runs = []
            readers = [Reader(model, config, method, settings, layer) for method in args.methods]
            for _, asked in prompts:
                runs += [reader.read(asked, tokenizer.decode) for reader in readers]
            rows = summary(runs)
            result["runs"] = [asdict(r) for r in runs]
    print(json.dumps(result) if args.json else table(rows))


if __name__ == "__main__":
    main()
