"""Element-wise work between the products: residual addition with RMS norm, and the SiLU gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_rms_norm(x, add, weight, total, out, eps, ADD: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    value = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(add + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * K + k, rounded, mask=k < K)
        value = rounded.to(tl.float32)  # the norm of what is kept, as if the addition had been a step of its own
    value = value / tl.sqrt(tl.sum(value * value, 0) / K + eps)
    value *= tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


def add_rms_norm(x: torch.Tensor, add: torch.Tensor | None, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + add, its RMS norm times weight), both (T, K) in x's dtype; without `add` the sum is x itself."""
    num_rows, k = x.shape
    assert x.is_contiguous() and (add is None or add.is_contiguous())
    total, out = x if add is None else torch.empty_like(x), torch.empty_like(x)
    if num_rows:
        block = triton.next_power_of_2(k)
        _add_rms_norm[(num_rows,)](
            x, x if add is None else add, weight, total, out, eps, ADD=add is not None, K=k, BLOCK_K=block, num_warps=max(1, min(8, block // 512))
        )
    return total, out


def add_rms_norm_reference(x: torch.Tensor, add: torch.Tensor | None, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = x if add is None else x + add
    wide = total.float()
    return total, (wide / (wide.square().mean(dim=1, keepdim=True) + eps).sqrt() * weight.float()).to(x.dtype)


@triton.jit
def _silu_mul(gate_up, out, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=n < N)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of each row of (T, 2 N)."""
    num_rows, n = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = torch.empty(num_rows, n, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        block = min(1024, triton.next_power_of_2(n))
        _silu_mul[(num_rows, triton.cdiv(n, block))](gate_up, out, N=n, BLOCK=block, num_warps=4)
    return out


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)
