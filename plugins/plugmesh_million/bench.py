"""Speed and quality on the default model: `python -m plugmesh_million.bench speed|quality [--json]`.

Speed: milliseconds of one decode step of the native executor behind 512, 2,048 and 7,168 tokens of KV, and of 8 sequences behind 2,048 each; and of a chunk of
256 prompt tokens behind 0 and 1,792. KV in bfloat16, int8, and as codes; variants take turns, figures are medians. The KV is that of 512 tokens of text, over
and over: attention does the same work for it.

Quality: perplexity of held-out text that no codebook was trained on (documentation strings, and source text, of the standard library), in windows of 512
tokens: each row reads all closed blocks as codes. "int4" keeps the same 4 bits a value as integers with a scale and offset per token and head.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from plugmesh import models
from plugmesh.errors import NotFound
from plugmesh.records import KvCodecContext, KvCodecRecord
from plugmesh_engine import EngineConfig
from plugmesh_engine.batch import Rows
from plugmesh_engine.bench import load_manifest
from plugmesh_engine.executors import native as native_executor
from plugmesh_engine.testing import gguf_tokenizer
from plugmesh_engine.testing_plugins import HalfRows
from plugmesh_million.codec import build_codec
from plugmesh_million.plugin import Settings

MODULES = ("argparse", "decimal", "difflib", "doctest", "email.message", "fractions", "heapq", "inspect", "logging", "mailbox", "optparse", "pickle", "random",
           "statistics", "tarfile", "threading", "turtle", "typing", "unittest.mock", "zipfile")  # fmt: skip
WINDOW = 512


class Int4Rows(HalfRows):
    """Rows rounded to 16 steps between their smallest and largest value, kept as float16."""

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
        super().attend(layer, q, int4(k), int4(v), out)


def int4(x: np.ndarray) -> np.ndarray:
    """Each last axis in 16 even steps."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    step = np.maximum((high - low) / 15, 1e-12)
    rounded: np.ndarray = np.rint((x - low) / step) * step + low
    return rounded


def codec(**changes: Any) -> KvCodecRecord:
    """The plugin's, with settings."""
    settings = Settings(**changes)

    def build(context: KvCodecContext) -> Any:
        return build_codec(settings, context)

    return KvCodecRecord("million", build)


def texts() -> dict[str, str]:
    """Held-out text by kind."""
    docs, code = [], []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        source = pathlib.Path(spec.origin).read_text()
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docs += [d for d in (ast.get_docstring(n) for n in nodes) if d and len(d) > 200]
        code.append(source[len(source) // 3 :])
    return {"prose": "\n\n".join(docs), "code": "\n\n".join(code)}


def token_windows(path: pathlib.Path, text: str, num: int) -> list[list[int]]:
    """Pieces spread over the text."""
    ids = gguf_tokenizer(path).encode(text, add_special_tokens=False).ids
    stride = max(WINDOW, len(ids) // num)
    return [w for w in (ids[i * stride : i * stride + WINDOW] for i in range(num)) if len(w) == WINDOW]


def nll(executor: Any, ids: Sequence[int]) -> np.ndarray:
    """(T - 1,) in nats."""
    blocks = list(range(1, 2 + len(ids) // 16))
    found = []
    for at in range(0, len(ids), 128):
        part = ids[at : at + 128]
        logits = executor.run([Rows(part, at, blocks, len(part), True)]).logits.astype(np.float64)
        targets = ids[at + 1 : at + 1 + len(part)]
        logits = logits[: len(targets)]
        top = logits.max(1, keepdims=True)
        found.append(np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(targets)), targets])
    return np.concatenate(found)


def quality(model: Any, path: pathlib.Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    variants: dict[str, tuple[str, KvCodecRecord | None]] = {"bfloat16": ("bfloat16", None), "int8": ("int8", None)}
    for scope in args.scopes:
        variants[f"million, codebooks per {scope}"] = ("bfloat16", codec(scope=scope))
    if args.int4:
        variants["int4 per token and head"] = ("bfloat16", KvCodecRecord("int4", Int4Rows))
    windows = {kind: token_windows(path, text, args.windows) for kind, text in texts().items()}
    found: dict[tuple[str, str], np.ndarray] = {}
    rows = []
    for name, (dtype, record) in variants.items():
        executor = model.build_executor(_config(dtype, args.threads, 64), record)
        for kind, pieces in windows.items():
            found[name, kind] = np.concatenate([nll(executor, ids) for ids in pieces])
            base, mine = found["bfloat16", kind], found[name, kind]
            rows.append({
                "variant": name, "text": kind, "num_tokens": len(mine), "perplexity": float(np.exp(mine.mean())),
                "ratio": float(np.exp((mine - base).mean())), "ratio_error": float(np.std(mine - base) / np.sqrt(len(mine))),
            })  # fmt: skip
        executor.close()
    return rows


def _config(dtype: str, threads: int, num_blocks: int) -> EngineConfig:
    return EngineConfig(executor="native", kv_dtype=dtype, num_threads=threads, num_blocks=num_blocks)


def speed(model: Any, path: pathlib.Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    num_blocks = 8 * 2176 // 16 + 8
    variants = {
        "bfloat16": ("bfloat16", None), "int8": ("int8", None), "million": ("bfloat16", codec()),
        "million, encoded within the step": ("bfloat16", codec(asynchronous=False)),
    }  # fmt: skip
    executors = {name: model.build_executor(_config(dtype, args.threads, num_blocks), record) for name, (dtype, record) in variants.items()}
    (ids,) = token_windows(path, texts()["prose"], 1)
    for e in executors.values():
        e.run([Rows(ids, 0, list(range(1, 33)), 1)])
        pieces = [bytes(e.memory.read(b)) for b in range(1, 33)]
        for b in range(33, num_blocks + 1):
            e.memory.write(b, pieces[b % 32], 16)
    timed: dict[tuple[str, str], list[float]] = {}
    clock = {"wall": time.perf_counter, "thread": time.thread_time}[args.clock]
    decodes = {"decode behind 512": (1, 512), "decode behind 2048": (1, 2048), "decode behind 7168": (1, 7168), "decode of 8 behind 2048": (8, 2048)}
    for _ in range(args.rounds):
        for name, e in executors.items():
            for what, (streams, length) in decodes.items():
                each = length // 16 + 8
                sequences = [list(range(1 + i * each, 1 + (i + 1) * each)) for i in range(streams)]
                times = []
                for step in range(args.steps):
                    start = clock()
                    e.run([Rows(ids[step : step + 1], length + step, blocks, 1) for blocks in sequences])
                    times.append((clock() - start) * 1e3)
                timed.setdefault((name, what), []).append(statistics.median(times))
            for what, length in {"256 prompt tokens behind 0": 0, "256 prompt tokens behind 1792": 1792}.items():
                start = clock()
                e.run([Rows(ids[:256], length, list(range(1, 200)), 1)])
                timed.setdefault((name, what), []).append((clock() - start) * 1e3)
    rows = [
        {"variant": name, "what": what, "ms": statistics.median(ms), "least_ms": min(ms), "ratio": statistics.median(timed["bfloat16", what]) / statistics.median(ms),
         "kv_bytes_per_token": executors[name].layout.block_bytes // 16}
        for (name, what), ms in timed.items()
    ]  # fmt: skip
    for e in executors.values():
        e.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "quality"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall", help="thread: processor time of the engine's thread, for --threads 1 on a busy machine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="of a round and variant")
    parser.add_argument("--windows", type=int, default=50, help="of each kind of text")
    parser.add_argument("--scopes", nargs="+", default=["layer"], choices=("head", "layer", "merged"), help="codebooks that are missing are trained first")
    parser.add_argument("--int4", action="store_true", help="also the int4 form, in numpy: some seconds per window")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    path = models.find("smollm2")
    if path is None:
        raise NotFound("the default model is not on this machine (plugmesh pull smollm2)", param="model")
    with tempfile.TemporaryDirectory() as folder:
        model = native_executor.load(load_manifest(path, "native", pathlib.Path(folder)))
        rows = (speed if args.part == "speed" else quality)(model, path, args)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    names = [n for n in rows[0] if isinstance(rows[0][n], int | float | str)]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(f'{row[n]:.4g}' if isinstance(row[n], float) else str(row[n]) for n in names)} |")


if __name__ == "__main__":
    main()
