"""Compiles every kernel for a GPU that need not be there, and shows registers, spills and shared memory.

    python -m plugmesh_kernels.gpu.compile [--arch 90] [--json]

The shapes are those of SmolLM2-135M and of an 8-billion-parameter Llama in bfloat16. The wrappers run as they are, on tensors without memory, but the
launch stops after compilation; so what is compiled is what would run, down to the specialisation of arguments. Needs triton, which brings NVIDIA's
assembler along, and no driver.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from plugmesh_kernels.gpu import argmax, decode, is_interpreted, linear, norm, pack, prefill, rope


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel in one specialisation, as the assembler reports it."""

    kernel: str
    shape: str
    num_registers: int
    num_spilled_bytes: int
    shared_bytes: int
    mma: str


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model that kernels depend on."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SMOLLM2 = Shape("smollm2-135m", 576, 1536, 9, 3, 64, 49152)
LLAMA_8B = Shape("llama-8b", 4096, 14336, 32, 8, 128, 128256)


class _NoDevice:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compile_only(arch: int, found: dict[tuple[str, str], Any]) -> Iterator[None]:
    """Launches compile, note the kernel under its name and hash, and stop. The process's Triton is of no other use afterwards."""
    launch = JITFunction.run

    def compile_(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found[self.__name__, kernel.hash] = kernel
        return kernel

    triton.runtime.driver.set_active(_NoDevice(arch))
    JITFunction.run = compile_
    try:
        yield
    finally:
        JITFunction.run = launch


def _launches(s: Shape) -> list[Callable[[], object]]:
    """Every wrapper on tensors of a model's shape. Nothing is read or written, so the tensors are empty pages."""
    dtype = torch.bfloat16

    def t(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind)

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    def packed(bits: int, n: int, k: int) -> pack.QuantWeight:
        groups = -(-k // 64) * 2
        data = t(groups // 2, n, 32, kind=torch.uint8) if bits == 4 else t(groups, n, 32, kind=torch.int8)
        return pack.QuantWeight(bits, n, k, data, t(groups, n, kind=torch.float16), t(groups, n, kind=torch.float16) if bits == 4 else None)

    pool = t(32, 2, 2, 16, s.kv_heads, s.head_dim)
    q = t(4, s.heads, s.head_dim)
    rows, table = ints(4), ints(4, 16)
    scratch = decode.DecodeScratch(4, s.heads, s.head_dim, "cpu")
    chunks = prefill.Chunks.build(np.array([0]), np.array([4]), np.array([16]), np.zeros((1, 16)), "cpu")
    cos = t(64, s.head_dim // 2, kind=torch.float32)
    qkv = t(4, (s.heads + 2 * s.kv_heads) * s.head_dim)
    launches: list[Callable[[], object]] = [
        lambda: decode.decode_attention(q, pool, 1, rows, table, rows, 16, scratch, torch.empty_like(q)),
        lambda: prefill.prefill_attention(q, pool, 1, chunks, torch.empty_like(q)),
        lambda: rope.rope_append(qkv, s.heads, pool, 1, cos, cos, rows, rows, True),
        lambda: rope.rope_append(qkv, s.heads, pool, 1, cos, cos, rows, rows, False),
        lambda: norm.add_rms_norm(t(4, s.hidden), t(4, s.hidden), t(s.hidden, kind=torch.float32), 1e-5),
        lambda: norm.silu_mul(t(4, 2 * s.intermediate)),
        lambda: argmax.argmax(t(4, s.vocab)),
        lambda: linear.embed(rows, packed(8, s.vocab, s.hidden), dtype),
    ]
    for bits in (4, 8):
        launches.append(partial(linear.expand, packed(bits, s.hidden, s.hidden), dtype))
        for num_rows in (1, 4, 32):
            for n, k in ((s.hidden, s.intermediate), (2 * s.intermediate, s.hidden)):
                launches.append(partial(linear.small_linear, t(num_rows, k), packed(bits, n, k)))
    return launches


def _report(kernel: Any, name: str, shape: str, arch: int) -> Compiled:
    """Assembles the PTX once more, this time for the assembler's own account."""
    from triton.backends.nvidia.compiler import get_ptxas

    path = get_ptxas(arch).path
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        suffix = "a" if arch >= 90 else ""
        command = [path, "-v", f"--gpu-name=sm_{arch}{suffix}", str(source), "-o", str(source.with_suffix(".cubin"))]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text))
    registers = max((int(n) for n in re.findall(r"Used (\d+) registers", text)), default=0)
    ptx = kernel.asm["ptx"]
    mma = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    return Compiled(name, shape, registers, spills, kernel.metadata.shared, mma)


def compile_all(arch: int) -> list[Compiled]:
    """Every kernel for both shapes. About half a minute; less when Triton's cache holds them."""
    reports = []
    for s in (SMOLLM2, LLAMA_8B):
        found: dict[tuple[str, str], Any] = {}
        with _compile_only(arch, found):
            for launch in _launches(s):
                launch()
        reports += [_report(kernel, name, s.name, arch) for (name, _), kernel in found.items()]
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m plugmesh_kernels.gpu.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability without the point: 80, 86, 89, 90, ...")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if is_interpreted():
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 2
    reports = compile_all(args.arch)
    if args.json:
        print(json.dumps([dataclasses.asdict(r) for r in reports], indent=1))
        return 0
    print(f"{'kernel':18} {'shape':14} {'registers':>9} {'spilled B':>9} {'shared B':>9}  products")
    for r in reports:
        print(f"{r.kernel:18} {r.shape:14} {r.num_registers:9} {r.num_spilled_bytes:9} {r.shared_bytes:9}  {r.mma}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
