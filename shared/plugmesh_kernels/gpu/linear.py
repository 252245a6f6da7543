"""Products of few rows with 4- and 8-bit weights, at the speed at which the weights are read.

One program takes BLOCK_N rows of the weight and a range of K; the weight is the left operand, so that the few rows of x fill the narrow side of the tensor
cores. The integers go into the product as they are (bfloat16 and half precision hold -128..127 exactly) and each group of 32 is scaled in float32:
    y[t, n] = sum over groups of  d[n] * (q[n] . x[t])  +  m[n] * sum(x[t])
so nothing of the weight is rounded. Small weights are also split along K, into a number of ranges that follows from the weight's shape alone; a second kernel
adds the ranges in order. Above SMALL_ROWS rows the tensor cores are the limit, not the memory: the weight is expanded into the activations' dtype and torch
multiplies, so there the weight's values are rounded to that dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from plugmesh_kernels.gpu.dot import as_float, dot
from plugmesh_kernels.gpu.pack import QuantWeight, dequantize

SMALL_ROWS = 32
BLOCK_N = 64
TARGET_PROGRAMS = 264  # two for each multiprocessor of an H100


@triton.jit
def _small_linear(
    x, data, scale, minimum, bias, y, num_rows, n_total, k_total, pairs, pairs_per_part,
    BITS: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (rows of the weight, part of K). With SPLIT, y is (parts, T, N) float32 and gets plain sums."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    t, i = tl.arange(0, BLOCK_T), tl.arange(0, 32)
    row_ok = n < n_total
    n64 = n.to(tl.int64)  # data is counted in bytes, which may exceed 31 bits
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    # Sums of x by the tensor cores, which have nothing else to do, rather than by shuffles between threads.
    ones = as_float(tl.full((BLOCK_N, 32), 1.0, tl.float32), x.dtype.element_ty)
    for pair in range(part * pairs_per_part, tl.minimum((part + 1) * pairs_per_part, pairs)):
        k = pair * 64 + i
        at = t[None, :].to(tl.int64) * k_total + k[:, None]
        x0 = tl.load(x + at, mask=(t[None, :] < num_rows) & (k[:, None] < k_total), other=0.0)
        x1 = tl.load(x + at + 32, mask=(t[None, :] < num_rows) & (k[:, None] + 32 < k_total), other=0.0)
        if BITS == 4:
            packed = tl.load(data + (pair * n_total + n64[:, None]) * 32 + i[None, :], mask=row_ok[:, None], other=0)
            q0, q1 = packed & 15, packed >> 4
        else:
            first = (2 * pair * n_total + n64[:, None]) * 32 + i[None, :]
            q0 = tl.load(data + first, mask=row_ok[:, None], other=0)
            q1 = tl.load(data + first + n_total * 32, mask=row_ok[:, None], other=0)
        g = 2 * pair * n_total + n
        d0 = tl.load(scale + g, mask=row_ok, other=0.0).to(tl.float32)
        d1 = tl.load(scale + g + n_total, mask=row_ok, other=0.0).to(tl.float32)
        acc += d0[:, None] * dot(as_float(q0, x0.dtype), x0)
        acc += d1[:, None] * dot(as_float(q1, x1.dtype), x1)
        if BITS == 4:
            m0 = tl.load(minimum + g, mask=row_ok, other=0.0).to(tl.float32)
            m1 = tl.load(minimum + g + n_total, mask=row_ok, other=0.0).to(tl.float32)
            acc += m0[:, None] * dot(ones, x0)
            acc += m1[:, None] * dot(ones, x1)
    ok = row_ok[:, None] & (t[None, :] < num_rows)
    if SPLIT:
        tl.store(y + (part.to(tl.int64) * num_rows + t[None, :]) * n_total + n[:, None], acc, mask=ok)
    else:
        if BIAS:
            acc += tl.load(bias + n, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        tl.store(y + t[None, :].to(tl.int64) * n_total + n[:, None], acc.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _add_parts(parts, bias, y, num_parts, size, n_total, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, num_parts):
        acc += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    if BIAS:
        acc += tl.load(bias + at % n_total, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=at < size)


@triton.jit
def _expand(
    data, scale, minimum, rows, out, n_total, k_total, BITS: tl.constexpr, GATHER: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Program (row or BLOCK_R rows of the output, pair of groups): the weight's values as floats."""
    r, pair = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1)
    i = tl.arange(0, 32)
    if GATHER:
        n = tl.load(rows + r).to(tl.int64)
        ok = n >= 0
    else:
        n = r.to(tl.int64)
        ok = n < n_total
    if BITS == 4:
        packed = tl.load(data + (pair * n_total + n[:, None]) * 32 + i[None, :], mask=ok[:, None], other=0)
        q0, q1 = packed & 15, packed >> 4
    else:
        first = (2 * pair * n_total + n[:, None]) * 32 + i[None, :]
        q0 = tl.load(data + first, mask=ok[:, None], other=0)
        q1 = tl.load(data + first + n_total * 32, mask=ok[:, None], other=0)
    g = 2 * pair * n_total + n
    w0 = q0.to(tl.float32) * tl.load(scale + g, mask=ok, other=0.0).to(tl.float32)[:, None]
    w1 = q1.to(tl.float32) * tl.load(scale + g + n_total, mask=ok, other=0.0).to(tl.float32)[:, None]
    if BITS == 4:
        w0 += tl.load(minimum + g, mask=ok, other=0.0).to(tl.float32)[:, None]
        w1 += tl.load(minimum + g + n_total, mask=ok, other=0.0).to(tl.float32)[:, None]
    k = pair * 64 + i
    target = out + r[:, None].to(tl.int64) * k_total + k[None, :]
    tl.store(target, w0.to(out.dtype.element_ty), mask=ok[:, None] & (k[None, :] < k_total))
    tl.store(target + 32, w1.to(out.dtype.element_ty), mask=ok[:, None] & (k[None, :] + 32 < k_total))


def num_parts(n: int, pairs: int, block_n: int = BLOCK_N) -> int:
    """Ranges of K that a weight is split into: enough programs for the device, at least four pairs each."""
    wanted = max(1, TARGET_PROGRAMS // triton.cdiv(n, block_n))
    return max(1, min(wanted, pairs // 4))


def small_linear(x: torch.Tensor, w: QuantWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(T, N) in x's dtype for at most SMALL_ROWS rows x (T, K)."""
    rows, pairs = x.shape[0], w.num_groups // 2
    assert x.is_contiguous() and x.shape[1] == w.k and rows <= SMALL_ROWS
    y = torch.empty(rows, w.n, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    per_part = triton.cdiv(pairs, num_parts(w.n, pairs))
    parts = triton.cdiv(pairs, per_part)
    target = y if parts == 1 else torch.empty(parts, rows, w.n, dtype=torch.float32, device=x.device)
    _small_linear[(triton.cdiv(w.n, BLOCK_N), parts)](
        x, w.data, w.scale, w.scale if w.minimum is None else w.minimum, w.scale if bias is None else bias, target, rows, w.n, w.k, pairs, per_part,
        BITS=w.bits, SPLIT=parts > 1, BIAS=bias is not None, BLOCK_T=16 if rows <= 16 else 32, BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        _add_parts[(triton.cdiv(rows * w.n, 256),)](target, w.scale if bias is None else bias, y, parts, rows * w.n, w.n, BIAS=bias is not None, BLOCK=256)
    return y


def expand(w: QuantWeight, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The whole weight (N, K), or some `rows` (R,) of it, rounded once to `dtype`."""
    count = w.n if rows is None else len(rows)
    out = torch.empty(count, w.k, dtype=dtype, device=w.data.device)
    if count:
        block = 32 if rows is None else 1
        _expand[(triton.cdiv(count, block), w.num_groups // 2)](
            w.data, w.scale, w.scale if w.minimum is None else w.minimum, w.scale if rows is None else rows, out, w.n, w.k,
            BITS=w.bits, GATHER=rows is not None, BLOCK_R=block, num_warps=4 if rows is None else 1,
        )  # fmt: skip
    return out


def linear(x: torch.Tensor, w: QuantWeight | torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (T, K) times a weight of any kind, plus bias: (T, N) in x's dtype."""
    if isinstance(w, torch.Tensor):
        return F.linear(x, w, bias)
    return small_linear(x, w, bias) if x.shape[0] <= SMALL_ROWS else F.linear(x, expand(w, x.dtype), bias)


def embed(ids: torch.Tensor, w: QuantWeight | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (T, K) of an embedding of any kind in `dtype`; ids (T,) of any integer type."""
    return w.index_select(0, ids).to(dtype) if isinstance(w, torch.Tensor) else expand(w, dtype, ids)


class QuantFormat:
    """`plugmesh_engine.seams.WeightFormat` over `QuantWeight`s and plain tensors alike."""

    def prepare_input(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()

    def linear(self, handle: torch.Tensor, packed: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(handle, packed, bias)


def linear_reference(x: torch.Tensor, w: QuantWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In float32 with the weight's exact values."""
    return F.linear(x.float(), dequantize(w), None if bias is None else bias.float()).to(x.dtype)
