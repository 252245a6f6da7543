"""Times the kernels and the whole decode step on a GPU, against its memory and against torch.

    python -m plugmesh_engine.gpu_bench [--shape smollm2-135m] [--json PATH] [--quick]

Shapes are those of SmolLM2-135M and of an 8-billion-parameter Llama, with random weights: times do not depend on values. Each time is the median over
repetitions between two CUDA events, with the L2 cache overwritten before each, so that weights come from memory as they do in a model. "of copy" is the
bytes a kernel has to read and write, per second, against a large copy on the same device; "against torch" is torch's time over ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from plugmesh.types import ModelConfig
from plugmesh_kernels.gpu import decode, linear, norm, pack, prefill, rope
from plugmesh_kernels.gpu.compile import LLAMA_8B, SMOLLM2, Shape
from plugmesh_kernels.gpu.model import GpuLayer, GpuLlama, Joined

Timer = Callable[[Callable[[], object]], float]
"""Runs a function repeatedly; seconds of one call."""


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table.

    Attributes:
        ours_us, torch_us: Medians; torch's is None where it has nothing to compare.
        num_bytes: What has to be read and written at least.
        flops: Of the products.
    """

    shape: str
    kernel: str
    case: str
    ours_us: float
    torch_us: float | None
    num_bytes: int
    flops: int

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / self.ours_us / 1e3

    @property
    def tflop_per_s(self) -> float:
        return self.flops / self.ours_us / 1e6


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: rows of products, (batch, context) of decodes, (rows, prefix) of prompts, batches of whole steps."""

    rows: Sequence[int] = (1, 4, 16, 32)
    decodes: Sequence[tuple[int, int]] = ((1, 1024), (1, 8192), (8, 1024), (32, 1024), (32, 8192))
    prompts: Sequence[tuple[int, int]] = ((512, 0), (2048, 0), (512, 2048))
    steps: Sequence[int] = (1, 8, 32)
    step_context: int = 512


QUICK = Plan(rows=(1, 16), decodes=((1, 1024), (32, 1024)), prompts=((512, 0),), steps=(1, 8))


def cuda_timer(repetitions: int = 50) -> Timer:
    """Seconds between two events; the overwriting of L2 before the first also keeps the launch itself out of the interval."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def measure(run: Callable[[], object]) -> float:
        for _ in range(5):
            run()
        times = []
        for _ in range(repetitions):
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    return measure


def copy_gb_per_s(timer: Timer, device: str, num_bytes: int = 1 << 30) -> float:
    """Bytes read plus bytes written per second of a large copy, in GB/s."""
    source = torch.zeros(num_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / timer(lambda: target.copy_(source)) / 1e9


def _random_packed(bits: int, n: int, k: int, device: str) -> pack.QuantWeight:
    """Random integers with a small scale, made on the device: an 8B model would take minutes to quantise."""
    groups = -(-k // 64) * 2
    if bits == 4:
        data = torch.randint(0, 256, (groups // 2, n, 32), dtype=torch.uint8, device=device)
    else:
        data = torch.randint(-127, 128, (groups, n, 32), dtype=torch.int8, device=device)
    scale = torch.full((groups, n), 1 / (4 * math.sqrt(k) * (1 if bits == 4 else 16)), dtype=torch.float16, device=device)
    return pack.QuantWeight(bits, n, k, data, scale, -7.5 * scale if bits == 4 else None)


def linears(s: Shape, plan: Plan, timer: Timer, device: str, dtype: torch.dtype) -> list[Result]:
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    results = []
    for name, n, k in (
        ("qkv", q + 2 * kv, s.hidden), ("o", s.hidden, q), ("gate_up", 2 * s.intermediate, s.hidden), ("down", s.hidden, s.intermediate),
        ("head", s.vocab, s.hidden),
    ):  # fmt: skip
        dense = torch.randn(n, k, dtype=dtype, device=device)
        for bits in (4, 8):
            w = _random_packed(bits, n, k, device)
            for rows in plan.rows:
                x = torch.randn(rows, k, dtype=dtype, device=device)
                ours = timer(lambda x=x, w=w: linear.linear(x, w))  # type: ignore[misc]
                theirs = timer(lambda x=x, dense=dense: F.linear(x, dense))  # type: ignore[misc]
                num_bytes = w.nbytes + x.nbytes + rows * n * x.element_size()
                results.append(Result(s.name, f"linear {bits} bit", f"{name} {n}x{k} T={rows}", ours * 1e6, theirs * 1e6, num_bytes, 2 * rows * n * k))
    return results


def _pool(s: Shape, batch: int, length: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool of two layers, and blocks for each of `batch` sequences, scattered over it."""
    width = -(-length // 16)
    pool = torch.randn(batch * width + 1, 2, 2, 16, s.kv_heads, s.head_dim, dtype=dtype, device=device)
    table = torch.from_numpy(np.random.default_rng(0).permutation(batch * width).reshape(batch, width) + 1).to(device, torch.int32)
    return pool, table


def decodes(s: Shape, plan: Plan, timer: Timer, device: str, dtype: torch.dtype) -> list[Result]:
    """Against scaled_dot_product_attention on K and V that lie in one piece, so without the gathering that torch would need on a paged pool."""
    results = []
    for batch, length in plan.decodes:
        pool, table = _pool(s, batch, length, device, dtype)
        q = torch.randn(batch, s.heads, s.head_dim, dtype=dtype, device=device)
        rows = torch.arange(batch, dtype=torch.int32, device=device)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        scratch, out = decode.DecodeScratch(batch, s.heads, s.head_dim, device), torch.empty_like(q)
        grid = decode.num_splits(length)

        def ours(pool=pool, q=q, rows=rows, table=table, lengths=lengths, grid=grid, scratch=scratch, out=out) -> None:  # type: ignore[no-untyped-def]
            decode.decode_attention(q, pool, 1, rows, table, lengths, grid, scratch, out)

        k, v = (torch.randn(batch, s.kv_heads, length, s.head_dim, dtype=dtype, device=device) for _ in range(2))

        def theirs(q=q, k=k, v=v) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

        num_bytes = 2 * k.nbytes + 2 * q.nbytes
        flops = 4 * batch * s.heads * length * s.head_dim
        results.append(Result(s.name, "decode attention", f"B={batch} keys={length}", timer(ours) * 1e6, timer(theirs) * 1e6, num_bytes, flops))
    return results


def prompts(s: Shape, plan: Plan, timer: Timer, device: str, dtype: torch.dtype) -> list[Result]:
    """Against scaled_dot_product_attention; with a prefix it gets a mask, as it has no causal form that ends at the last key."""
    results = []
    for n, before in plan.prompts:
        pool, table = _pool(s, 1, n + before, device, dtype)
        q = torch.randn(n, s.heads, s.head_dim, dtype=dtype, device=device)
        chunks = prefill.Chunks.build(np.array([0]), np.array([n]), np.array([before]), table.cpu().numpy(), device)
        out = torch.empty_like(q)
        k, v = (torch.randn(1, s.kv_heads, n + before, s.head_dim, dtype=dtype, device=device) for _ in range(2))
        mask = torch.ones(n, n + before, dtype=torch.bool, device=device).tril(before) if before else None

        def ours(pool=pool, q=q, chunks=chunks, out=out) -> None:  # type: ignore[no-untyped-def]
            prefill.prefill_attention(q, pool, 1, chunks, out)

        def theirs(q=q, k=k, v=v, mask=mask) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

        flops = 4 * s.heads * s.head_dim * (n * before + n * (n + 1) // 2)
        num_bytes = 2 * k.nbytes + 2 * q.nbytes
        results.append(Result(s.name, "prefill attention", f"T={n} prefix={before}", timer(ours) * 1e6, timer(theirs) * 1e6, num_bytes, flops))
    return results


def small_kernels(s: Shape, plan: Plan, timer: Timer, device: str, dtype: torch.dtype) -> list[Result]:
    """Norm and rotation against torch's operations for the same."""
    results = []
    pool, _ = _pool(s, 4, 64, device, dtype)
    cos, sin = (torch.rand(64, s.head_dim // 2, device=device) for _ in range(2))
    weight = torch.ones(s.hidden, dtype=dtype, device=device)
    for rows in plan.rows:
        x, add = (torch.randn(rows, s.hidden, dtype=dtype, device=device) for _ in range(2))
        ours = timer(lambda x=x, add=add: norm.add_rms_norm(x, add, weight, 1e-5))  # type: ignore[misc]
        theirs = timer(lambda x=x, add=add: F.rms_norm(x + add, (s.hidden,), weight, 1e-5))  # type: ignore[misc]
        results.append(Result(s.name, "add + norm", f"T={rows}", ours * 1e6, theirs * 1e6, 4 * x.nbytes, 0))
        qkv = torch.randn(rows, (s.heads + 2 * s.kv_heads) * s.head_dim, dtype=dtype, device=device)
        positions = torch.arange(rows, dtype=torch.int32, device=device)
        blocks = 1 + positions // 16
        ours = timer(lambda a=qkv, p=positions, b=blocks: rope.rope_append(a, s.heads, pool, 1, cos, sin, p, b, False))  # type: ignore[misc]
        results.append(Result(s.name, "rope + append", f"T={rows}", ours * 1e6, None, 2 * qkv.nbytes, 0))
    return results


def random_model(s: Shape, bits: int, num_layers: int, max_position: int, device: str, dtype: torch.dtype) -> GpuLlama:
    """A model of a shape with random packed weights and an 8-bit tied head."""
    config = ModelConfig(
        architecture="llama", vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.intermediate, num_layers=num_layers, num_heads=s.heads,
        num_kv_heads=s.kv_heads, head_dim=s.head_dim, max_position=max_position, rms_norm_eps=1e-5, rope_theta=1e4, rope_style="half",
        tie_word_embeddings=True, eos_token_ids=(2,), name=s.name,
    )  # fmt: skip
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    ones = torch.ones(s.hidden, device=device)

    def weight(n: int, k: int) -> Joined:
        return Joined((_random_packed(bits, n, k, device),), None)

    layers = [
        GpuLayer(ones, weight(q + 2 * kv, s.hidden), weight(s.hidden, q), ones, weight(2 * s.intermediate, s.hidden), weight(s.hidden, s.intermediate))
        for _ in range(num_layers)
    ]
    embedding = _random_packed(8, s.vocab, s.hidden, device)
    angles = torch.outer(torch.arange(max_position, device=device), 1e4 ** (-torch.arange(0, s.head_dim, 2, device=device) / s.head_dim))
    return GpuLlama(config, dtype, embedding, tuple(layers), ones, Joined((embedding,), None), angles.cos(), angles.sin())


def steps(s: Shape, plan: Plan, timer: Timer, device: str, num_layers: int) -> list[Result]:
    """Whole decode steps of the executor, with and without captured graphs; the second column is without. The host's part is in both."""
    from plugmesh_engine import EngineConfig
    from plugmesh_engine.batch import Rows
    from plugmesh_engine.executors.cuda import CudaExecutor, CudaModel

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = "bfloat16" if device == "cuda" else "float32"
    graph = random_model(s, 4, num_layers, plan.step_context + 16, device, dtype)
    model = CudaModel(graph, graph.config, "random", name, device, 0, graph.nbytes)
    width = -(-plan.step_context // 16) + 1
    config = EngineConfig(executor="cuda", dtype=name, device=device, num_blocks=max(plan.steps) * width, max_num_sequences=max(plan.steps))
    results = []
    for batch in plan.steps:
        times = []
        for graphs in (device == "cuda", False):
            executor = CudaExecutor(model, config, graphs=graphs)
            executor.memory.storage.zero_()
            rows = [Rows([3], plan.step_context, list(range(1 + i * width, 1 + (i + 1) * width)), 1) for i in range(batch)]
            times.append(timer(lambda executor=executor, rows=rows: executor.run(rows)))  # type: ignore[misc]
            executor.close()
        kv_bytes = 2 * batch * plan.step_context * s.kv_heads * s.head_dim * num_layers * dtype.itemsize
        case = f"{num_layers} layers, B={batch} keys={plan.step_context}"
        results.append(Result(s.name, "decode step", case, times[0] * 1e6, times[1] * 1e6, graph.nbytes + kv_bytes, 0))
    return results


def run(s: Shape, plan: Plan, timer: Timer, device: str, num_layers: int) -> list[Result]:
    """All measurements of one shape."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    results: list[Result] = []
    with torch.inference_mode():
        for part in (linears, decodes, prompts, small_kernels):
            print(f"{s.name}: {part.__name__.replace('_', ' ')} ...", file=sys.stderr, flush=True)
            results += part(s, plan, timer, device, dtype)
    print(f"{s.name}: steps ...", file=sys.stderr, flush=True)
    return results + steps(s, plan, timer, device, num_layers)


def table(results: Sequence[Result], copy: float) -> str:
    """The results as text; `copy` in GB/s."""
    lines = [f"{'shape':13} {'kernel':17} {'case':32} {'us':>9} {'torch us':>9} {'torch/ours':>10} {'GB/s':>7} {'of copy':>8} {'TFLOP/s':>8}"]
    for r in results:
        theirs = f"{r.torch_us:9.1f} {r.torch_us / r.ours_us:10.2f}" if r.torch_us is not None else f"{'':9} {'':10}"
        lines.append(f"{r.shape:13} {r.kernel:17} {r.case:32} {r.ours_us:9.1f} {theirs} {r.gb_per_s:7.0f} {r.gb_per_s / copy:8.0%} {r.tflop_per_s:8.1f}")
    return "\n".join([*lines, "", f"copy: {copy:.0f} GB/s; of a decode step the second column is the same step without a graph"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m plugmesh_engine.gpu_bench", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[SMOLLM2.name, LLAMA_8B.name], action="append", help="default: both")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results here")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: these figures exist only on a GPU (the interpreter's times say nothing)", file=sys.stderr)
        return 2
    timer = cuda_timer()
    copy = copy_gb_per_s(timer, "cuda")
    plan, results = QUICK if args.quick else Plan(), []
    for s, num_layers in ((SMOLLM2, 30), (LLAMA_8B, 32)):
        if not args.shape or s.name in args.shape:
            results += run(s, plan, timer, "cuda", num_layers)
    print(table(results, copy))
    if args.json:
        about = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "copy_gb_per_s": copy,
            "results": [dataclasses.asdict(r) | {"gb_per_s": r.gb_per_s, "of_copy": r.gb_per_s / copy, "tflop_per_s": r.tflop_per_s} for r in results],
        }  # fmt: skip
        args.json.write_text(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
