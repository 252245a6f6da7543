"""What a grammar engine costs on the default model's vocabulary: compile, load, and each call of a matcher along a document."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from plugmesh.grammar.seams import GrammarEngine, GrammarVocabulary

OBJECT = 'root ::= "{\\"name\\": " string ", \\"age\\": " [0-9]{1,3} (", \\"city\\": " string)? "}"\nstring ::= "\\"" [^"\\\\\\x00-\\x1f]* "\\""\n'
JSON = (
    'root ::= value\nvalue ::= object | array | string | number | "true" | "false" | "null"\nobject ::= "{" ws (pair ("," ws pair)*)? ws "}"\npair ::= string ":" ws value\n'
    'array ::= "[" ws (value ("," ws value)*)? ws "]"\nstring ::= "\\"" ([^"\\\\\\x00-\\x1f] | "\\\\" ["\\\\/bfnrt])* "\\""\nnumber ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)?\n'
    'ws ::= (" " | "\\n" " "{0,32})?\n'
)
WORK = {
    "object": (OBJECT, '{"name": "Ada Lovelace of Marylebone, London", "age": 36, "city": "London"}'),
    "any JSON": (JSON, '{"name": "Ada Lovelace", "list": [1, 2.5, true, null], "more": {"text": "what is said in a sentence or two", "empty": []}}'),
}


def vocabulary() -> GrammarVocabulary:
    """The default model's. Raises SystemExit where its file is not."""
    from plugmesh.testing.conformance.grammar_engine import model_vocabulary

    found = model_vocabulary()
    if found is None:
        raise SystemExit("the default model is not here: plugmesh pull smollm2")
    return found


def measure(engine: GrammarEngine, v: GrammarVocabulary, source: str, text: str, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds and microseconds; of `fill` the largest, too."""
    assert v.encode is not None
    tokens = v.encode(text)
    mask = np.zeros(v.num_words, np.uint32)
    compiles, loads, times = [], [], {"fill": [], "accept": [], "forced": [], "matcher": [], "fork": []}  # type: ignore[var-annotated]

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = call()
        times[name].append((time.perf_counter() - began) * 1e6)
        return found

    for _ in range(rounds):
        began = time.perf_counter()
        form = engine.compile("ebnf", source)
        compiles.append((time.perf_counter() - began) * 1e3)
        began = time.perf_counter()
        compiled = engine.load(form)
        loads.append((time.perf_counter() - began) * 1e3)
        matcher = timed("matcher", compiled.matcher)
        for token in tokens:
            timed("fill", lambda: matcher.fill(mask))  # noqa: B023
            timed("forced", matcher.forced)
            assert timed("accept", lambda: matcher.accept(token))  # noqa: B023
        timed("fork", matcher.fork)
    row = {"compile_ms": statistics.median(compiles), "load_ms": statistics.median(loads), "form_bytes": len(form), "memory_bytes": compiled.num_bytes}
    row |= {f"{name}_us": statistics.median(values) for name, values in times.items()}
    return {**row, "fill_p90_us": sorted(times["fill"])[len(times["fill"]) * 9 // 10], "fill_max_us": max(times["fill"]), "num_tokens": len(tokens)}


def is_gil_released(engine: GrammarEngine, v: GrammarVocabulary) -> bool:
    """Whether another thread of Python gets on while a mask is filled: one that waits for the lock, which nobody takes away in the meantime."""
    matcher = engine.load(engine.compile("ebnf", JSON)).matcher()
    assert all(matcher.accept(t) for t in (v.encode or (lambda _: []))('{"a": "b'))
    mask, go, stop, seen = np.zeros(v.num_words, np.uint32), threading.Semaphore(0), threading.Event(), [0]

    def count() -> None:
        while not stop.is_set():
            go.acquire()
            seen[0] += 1

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    thread.start()
    sys.setswitchinterval(10)
    num_during = 0
    try:
        for _ in range(300):
            fresh, before = matcher.fork(), seen[0]
            go.release()
            fresh.fill(mask)
            num_during += seen[0] > before
            time.sleep(0.0005)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        go.release()
        thread.join()
    return num_during > 3


def main(build: Callable[[GrammarVocabulary], GrammarEngine]) -> None:
    """The command of an engine's plugin."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    v = vocabulary()
    engine = build(v)
    rows = {name: measure(engine, v, source, text, args.rounds) for name, (source, text) in WORK.items()}
    if args.json:
        print(json.dumps({"rows": rows, "releases_gil": is_gil_released(engine, v)}))
        return
    columns = ["compile_ms", "load_ms", "form_bytes", "memory_bytes", "matcher_us", "fill_us", "fill_p90_us", "fill_max_us", "accept_us", "forced_us", "fork_us"]
    print("| grammar | " + " | ".join(c.replace("_", " ") for c in columns) + " |\n|---" * 1 + "|---" * len(columns) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:,.0f}" if row[c] >= 100 else f"{row[c]:.1f}" for c in columns) + " |")
    print(f"\nother threads run while a mask is filled: {'yes' if is_gil_released(engine, v) else 'no'}")
