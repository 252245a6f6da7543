"""Perplexity and speed of the plugin's parts on a real model: `python -m plugmesh_qserve.bench [--only quality,speed,kernels] [--json FILE]`.

Quality is perplexity through the engine, chunk after chunk of 32 tokens, so that what a codec did to earlier keys and values is in it. Speed is a closed loop in
this process, variants in turns. `plugmesh ab qserve` measures the plugin as a whole, with intervals; this is for what each part does.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plugmesh import logs, models
from plugmesh.ab.subject import EngineSubject, Text
from plugmesh.config import MeshConfig
from plugmesh.host import PluginHost
from plugmesh.quality.perplexity import negative_log_likelihoods, windows
from plugmesh_engine import Engine, EngineConfig, EnginePlugins, build_engine
from plugmesh_engine.bench import load_manifest, run_closed_loop
from plugmesh_engine.config import weight_format


@dataclass(frozen=True, slots=True)
class Variant:
    """`settings` of the plugin; None runs without it. `is_packed` False takes the codec alone, with the default weights."""

    name: str
    settings: Mapping[str, Any] | None
    is_packed: bool = True
    executor: str = "native"
    plain: Mapping[str, Any] = field(default_factory=dict)


_RTN = {"rotate": False, "search": False, "gptq": False}
_WEIGHTS = {"key_alpha": 0, "kv_bits": 16}
QUALITY = (
    Variant("float32 of the file", None, executor="torch"),
    Variant("default format", None),
    Variant("KV4 alone", {}, is_packed=False),
    Variant("W4A8 by the paper's rule, group 64, no calibration", {**_RTN, "group": 64, "calibration_tokens": 0, "kv_bits": 16}),
    Variant("W4A8 searched, group 64", {**_WEIGHTS, "group": 64, "rotate": False, "gptq": False}),
    Variant("W4A8 searched, group 64, rotated", {**_WEIGHTS, "group": 64, "gptq": False}),
    Variant("W4A8 searched, group 64, gptq", {**_WEIGHTS, "group": 64, "rotate": False}),
    Variant("W4A8 searched, group 64, gptq, rotated", {**_WEIGHTS, "group": 64}),
    Variant("W4A8 searched, group 32, gptq", {**_WEIGHTS, "rotate": False}),
    Variant("W4A8 searched, group 32, gptq, rotated", _WEIGHTS),
    Variant("W4A8 the last, down projection smoothed 0.3/0.7", {**_WEIGHTS, "down_alpha": 0.3, "down_beta": 0.7}),
    Variant("W4A8KV4, no SmoothAttention", {"key_alpha": 0}),
    Variant("W4A8KV4, SmoothAttention 0.25", {"key_alpha": 0.25}),
    Variant("W4A8KV4, SmoothAttention 0.5", {"key_alpha": 0.5}),
    Variant("W4A8KV4, SmoothAttention 0.75", {"key_alpha": 0.75}),
    Variant("W4A8KV4, as set by default", {}),
)
SPEED = (Variant("default format", None), Variant("KV4 alone", {}, is_packed=False), Variant("W4A8", {"kv_bits": 16}), Variant("W4A8KV4", {}))
LOADS = (("decode, 1 stream", 1, 1, 64, 128), ("decode, 8 streams", 8, 8, 64, 64), ("decode, 1 stream after 1500", 1, 1, 1500, 64), ("prefill 512", 1, 2, 512, 1))


def build(variant: Variant, model: pathlib.Path, store: pathlib.Path, threads: int) -> Engine:
    config = EngineConfig(executor=variant.executor, dtype="float32" if variant.executor == "torch" else "bfloat16", num_blocks=512, num_threads=threads)
    if variant.settings is None:
        return build_engine(load_manifest(model, weight_format(config), store), config)
    settings = {"qserve": variant.settings} if variant.settings else {}
    host = PluginHost.load(["qserve"], MeshConfig(plugins={k: dict(v) for k, v in settings.items()}), service="decode")
    format = "qserve" if variant.is_packed else ""
    manifest = load_manifest(model, format or weight_format(config), store, ["qserve"], settings)
    return build_engine(manifest, config, EnginePlugins.from_host(host, format))


def measure_quality(variants: Sequence[Variant], model: pathlib.Path, store: pathlib.Path, num: int, size: int, threads: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for v in variants:
        start = time.monotonic()
        engine = build(v, model, store, threads)
        took = time.monotonic() - start
        subject = EngineSubject(engine, Text(model))
        nll = np.concatenate([negative_log_likelihoods(subject, w) for w in windows(subject, num, size)])
        found.append({
            "variant": v.name, "perplexity": float(np.exp(nll.mean())), "num_tokens": len(nll), "kv_bytes_per_token": engine.layout.block_bytes / 16, "start_s": took,
        })  # fmt: skip
        engine.close()
        print(f"# {v.name}: {found[-1]['perplexity']:.3f} ({took:.0f} s to start)", file=sys.stderr)
    return found


def measure_speed(variants: Sequence[Variant], model: pathlib.Path, store: pathlib.Path, rounds: int, threads: int, only: Sequence[str]) -> list[dict[str, Any]]:
    engines = {v.name: build(v, model, store, threads) for v in variants}
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for load, streams, requests, prompt, out in LOADS:
        if only and not any(text in load for text in only):
            continue
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for round in range(rounds + 1):
            conversations = [[{"prompt": rng.integers(100, 40_000, prompt).tolist(), "max_tokens": out}] for _ in range(requests)]
            for name, engine in engines.items():
                records = run_closed_loop(engine, conversations, streams, use_cache=False)["records"]
                if not round:
                    continue  # warms up
                if out > 1:  # the steps behind the first token
                    first, last = (pick(r["times_s"][i] for r in records) for pick, i in ((max, 0), (min, -1)))
                    num = sum(1 for r in records for t in r["times_s"] if first < t <= last)
                    seconds[name].append((last - first) / num)
                else:
                    seconds[name].append(sum(r["times_s"][-1] - r["sent_s"] for r in records) / (requests * prompt))
        base = seconds[variants[0].name]
        for name, values in seconds.items():
            ratios = sorted(b / s for b, s in zip(base, values, strict=True))
            found.append({
                "load": load, "variant": name, "tokens_per_s": 1 / statistics.median(values), "ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1],
            })  # fmt: skip
            print(f"# {load}, {name}: {found[-1]['tokens_per_s']:.1f} tokens/s, {found[-1]['ratio']:.2f}", file=sys.stderr)
    for engine in engines.values():
        engine.close()
    return found


def measure_kernels(repeats: int = 40) -> list[dict[str, Any]]:
    """Best time of one linear on one thread, groups of 64, the input rotated and encoded as a layer's first linear does it."""
    import ctypes

    from plugmesh_qserve import smooth, weights
    from plugmesh_qserve.quantise import quantise

    lib, rng, pointer = weights.library(), np.random.default_rng(0), ctypes.c_void_p
    found: list[dict[str, Any]] = []
    if lib is None:
        return found
    for n, k in ((576, 576), (1536, 576), (576, 1536)):
        width = smooth.rotation_width(k)
        data = np.frombuffer(b"".join(weights.to_bytes(quantise(rng.standard_normal((n, k)).astype(np.float32), 64, is_searched=False))), np.uint8)
        _, context = weights.native(lib, packed := weights.Packed.read(f"{weights.NAME}/g64r{width}", (n, k), data))
        for t in (1, 8, 64, 256):
            x, y = rng.standard_normal((t, k)).astype(np.float32), np.empty((t, n), np.float32)
            best = float("inf")
            for _ in range(repeats):
                start = time.perf_counter()
                lib.qserve_linear(pointer(context.ctypes.data), pointer(x.ctypes.data), t, k, pointer(y.ctypes.data), n, 0, 1)
                best = min(best, time.perf_counter() - start)
            found.append({"n": n, "k": k, "tokens": t, "microseconds": best * 1e6, "gmac_per_s": t * packed.shape[0] * k / best / 1e9})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="quality,speed,kernels")
    parser.add_argument("--variant", action="append", default=[], help="only variants whose name holds this text; repeat for several")
    parser.add_argument("--load", action="append", default=[], help="the same of the loads of the speed part")
    parser.add_argument("--model", type=pathlib.Path, default=None)
    parser.add_argument("--store", type=pathlib.Path, default=pathlib.Path.home() / ".cache/plugmesh/bench-store", help="packed models are kept here")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    logs.configure("error")
    model = args.model or models.find("smollm2")
    if model is None:
        parser.error("the default model is not in the cache: plugmesh pull smollm2")

    def chosen(variants: Sequence[Variant]) -> list[Variant]:
        return [v for v in variants if not args.variant or any(text in v.name for text in args.variant)]

    result: dict[str, Any] = {}
    if "quality" in args.only:
        result["quality"] = measure_quality(chosen(QUALITY), model, args.store, args.windows, args.window_tokens, args.threads)
        print("| variant | perplexity | against the first | KV bytes per token |\n|---|---|---|---|")
        for r in result["quality"]:
            ratio = r["perplexity"] / result["quality"][0]["perplexity"]
            print(f"| {r['variant']} | {r['perplexity']:.2f} | {ratio:.3f} | {r['kv_bytes_per_token']:.0f} |")
    if "speed" in args.only:
        result["speed"] = measure_speed(chosen(SPEED), model, args.store, args.rounds, args.threads, args.load)
        print("\n| load | variant | tokens/s | against the first |\n|---|---|---|---|")
        for r in result["speed"]:
            print(f"| {r['load']} | {r['variant']} | {r['tokens_per_s']:.1f} | {r['ratio']:.2f} ({r['low']:.2f}-{r['high']:.2f}) |")
    if "kernels" in args.only:
        result["kernels"] = measure_kernels()
        print("\n| N x K | tokens | microseconds | 10^9 products/s |\n|---|---|---|---|")
        for r in result["kernels"]:
            print(f"| {r['n']} x {r['k']} | {r['tokens']} | {r['microseconds']:.0f} | {r['gmac_per_s']:.0f} |")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
