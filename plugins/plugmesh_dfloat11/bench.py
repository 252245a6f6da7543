"""Measures what the format saves and costs: `python -m plugmesh_dfloat11.bench size|decode|engine|transfer`.

    size      bits per weight against the entropy bound, of the default model and of a bfloat16 model with random weights (see samples.py)
    decode    GB/s of bfloat16 that one core decodes, beside copying them
    engine    tokens/s and resident weights: the default format, plain bfloat16, and containers decoded in tiles and in layers; interleaved, and their tokens compared
    transfer  bytes and time of a copy from a weightstore over gRPC

Prints a table; --json prints all figures for programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from plugmesh.config import MeshConfig
from plugmesh.errors import FailedPrecondition
from plugmesh.host import PluginHost
from plugmesh.models import pull
from plugmesh_dfloat11 import container, native, samples
from plugmesh_dfloat11.layout import FORMAT, PLAIN
from plugmesh_engine import EngineConfig, EnginePlugins, build_engine
from plugmesh_engine.bench import load_manifest, run_closed_loop

Row = dict[str, Any]


def stored(manifest: Any, name: str) -> np.ndarray:
    """The bytes of a tensor of a manifest."""
    t = next(t for t in manifest.tensors if t.name == name)
    return np.memmap(t.path, np.uint8, "r", t.offset, (t.num_bytes,))


def size(model: pathlib.Path, store: pathlib.Path) -> Row:
    """What containers take and what they could take at least, over all matrices."""
    packed, plain = (load_manifest(model, f, store, ["dfloat11"]) for f in (FORMAT, PLAIN))
    values_bits = bound = num_values = 0.0
    longest, distinct = 0, set()
    for t in packed.tensors:
        if t.dtype != f"{FORMAT}/container":
            continue
        one = container.parse(stored(packed, t.name), t.name)
        values = container.decode(one)
        measured = container.size_of(values, one.num_bytes)
        num_values += measured.num_values
        values_bits += measured.bits * measured.num_values
        bound += measured.bound_bits * measured.num_values
        longest = max(longest, int(one.code.lengths.max()))
        distinct.update(np.flatnonzero(one.code.lengths).tolist())
    total, before = (sum(t.num_bytes for t in m.tensors) for m in (packed, plain))
    return {
        "model": model.name, "values": int(num_values), "bits_per_value": values_bits / num_values, "bound_bits": bound / num_values,
        "over_bound": values_bits / bound - 1, "ratio": total / before, "bytes": total, "bf16_bytes": before, "exponents": len(distinct), "longest_code": longest,
    }  # fmt: skip


def best(call: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of several calls."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def decode(model: pathlib.Path, store: pathlib.Path, rounds: int) -> list[Row]:
    """One thread, one layer's container at a time."""
    manifest = load_manifest(model, FORMAT, store, ["dfloat11"])
    one = container.parse(np.array(stored(manifest, next(t.name for t in manifest.tensors if t.name.startswith("dfloat11.layers.")))))
    library = native.library()
    out, copy = np.zeros(one.num_values, np.uint16), np.ones(one.num_values, np.uint16)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: np.copyto(out, copy), "numpy": lambda: container.decode_slowly(one, 0, one.num_chunks)}
    if library is not None:
        calls["native"] = lambda: library.decode(one, 0, one.num_chunks, out)
    return [{"reader": name, "gb_s": 2e-9 * one.num_values / best(call, 3 if name == "numpy" else rounds), "mb": 2e-6 * one.num_values} for name, call in calls.items()]


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def engine(model: pathlib.Path, store: pathlib.Path, streams: Sequence[int], num_tokens: int, rounds: int, threads: int, clock: Callable[[], float]) -> list[Row]:
    """All variants in one process, in turn within every round.

    Raises:
        FailedPrecondition: The formats of bfloat16 differ in a token.
    """
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "default format": ("", {}), "bf16": (PLAIN, {}), "dfloat11 tiles": (FORMAT, {"decode": "tiles"}), "dfloat11 layers": (FORMAT, {"decode": "layers"}),
    }  # fmt: skip
    config = EngineConfig(executor="native", num_threads=threads, num_blocks=1024, prefix_cache=False)
    engines: dict[str, Any] = {}
    rows: dict[tuple[str, int], Row] = {}
    for name, (format, settings) in variants.items():
        plugins = None
        if format:
            host = PluginHost.load(["dfloat11"], MeshConfig(plugins={"dfloat11": settings} if settings else {}), service="decode")
            plugins = EnginePlugins.from_host(host, format)
        manifest = load_manifest(model, format or "native", store, ["dfloat11"] if format else [])
        try:
            engines[name] = build_engine(manifest, config, plugins)
        except FailedPrecondition as error:
            if "tiles" not in name:
                raise
            print(f"{name}: {error.message}", file=sys.stderr)
    try:
        rng = np.random.default_rng(3)
        vocab = next(iter(engines.values())).model.config.vocab_size
        rates: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            for n in streams:
                prompts = [[{"prompt": rng.integers(3, vocab, 24).tolist(), "max_tokens": num_tokens}] for _ in range(n)]
                said: dict[str, Any] = {}
                for name, e in engines.items():
                    start = clock()
                    answer = run_closed_loop(e, prompts, n, use_cache=False, want_tokens=True)
                    rates.setdefault((name, n), []).append(n * num_tokens / (clock() - start))
                    said[name] = sorted(answer["tokens"])
                    if name != "default format" and said[name] != said["bf16"]:
                        raise FailedPrecondition(f"{name} gives other tokens than bf16")
        for (name, n), found in rates.items():
            plugin = engines[name].model.plugin
            resident = plugin.weights.num_bytes if plugin else engines[name].model.num_mapped_bytes + engines[name].model.num_copied_bytes
            against = [a / b for a, b in zip(found, rates["bf16", n], strict=True)]
            rows[name, n] = {
                "variant": name, "streams": n, "tok_s": statistics.median(found), "low": min(found), "high": max(found), "ratio_to_bf16": statistics.median(against),
                "ratio_low": min(against), "ratio_high": max(against), "resident_mb": resident / 1e6,
            }  # fmt: skip
    finally:
        for e in engines.values():
            e.close()
    return list(rows.values())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns."""
    texts = [list(rows[0])] + [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["size", "decode", "engine", "transfer"])
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF file or a folder of Hugging Face; by default SmolLM2-135M-Instruct")
    parser.add_argument("--store", type=pathlib.Path, help="a weightstore folder to keep what is packed")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu (with --threads 1): processor time, for a machine that others use")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = args.model or pull("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        store = args.store or pathlib.Path(folder) / "store"
        store.mkdir(parents=True, exist_ok=True)
        rows: list[Row]
        if args.what == "size":
            rows = [size(model, store), *([] if args.model else [size(samples.write_llama(pathlib.Path(folder) / "random-llama"), store)])]
        elif args.what == "decode":
            rows = decode(model, store, args.rounds)
        elif args.what == "engine":
            rows = engine(model, store, args.streams, args.tokens, args.rounds, args.threads, CLOCKS[args.clock])
        else:
            from plugmesh_dfloat11 import transfer  # starts processes

            rows = [dataclasses.asdict(c) for c in transfer.measure(model, ["native", "bfloat16", PLAIN, FORMAT], args.rounds)]
    print(json.dumps(rows) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
