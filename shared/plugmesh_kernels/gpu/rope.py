"""Rotation of Q and K, and the append of K and V to the pool, out of the joint output of the QKV product.

Tensors
    qkv: (T, (heads + 2 kv_heads) * head_dim), contiguous: all Q heads, all K heads, all V heads.
    cos, sin: (max_position, head_dim / 2) float32. positions, blocks: (T,) int32; a block of -1 stores nothing (rows that pad a captured graph).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from plugmesh_kernels.gpu.decode import BLOCK_TOKENS


@triton.jit
def _rope_append(
    qkv, q, pool, cos, sin, positions, blocks, layer_offset, block_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program (row, head): a head of Q, or a head of K with its V. HALF: a power of two that covers D / 2 pairs."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, HALF)
    pair = i < D // 2
    position = tl.load(positions + row)
    first = 2 * i if INTERLEAVED else i
    second = first + (1 if INTERLEAVED else D // 2)
    source = qkv + row * ((HEADS + 2 * KV_HEADS) * D) + head * D
    a = tl.load(source + first, mask=pair, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=pair, other=0.0).to(tl.float32)
    angle = position.to(tl.int64) * (D // 2) + i
    c, s = tl.load(cos + angle, mask=pair, other=0.0), tl.load(sin + angle, mask=pair, other=0.0)
    a, b = a * c - b * s, a * s + b * c
    if head < HEADS:
        target = q + row * (HEADS * D) + head * D
        tl.store(target + first, a.to(q.dtype.element_ty), mask=pair)
        tl.store(target + second, b.to(q.dtype.element_ty), mask=pair)
    else:
        block = tl.load(blocks + row).to(tl.int64)
        stored = pair & (block >= 0)
        target = pool + block * block_stride + layer_offset + (position % TOKENS) * (KV_HEADS * D) + (head - HEADS) * D
        tl.store(target + first, a.to(pool.dtype.element_ty), mask=stored)
        tl.store(target + second, b.to(pool.dtype.element_ty), mask=stored)
        value = source + KV_HEADS * D
        target += TOKENS * KV_HEADS * D
        tl.store(target + first, tl.load(value + first, mask=pair, other=0.0).to(pool.dtype.element_ty), mask=stored)
        tl.store(target + second, tl.load(value + second, mask=pair, other=0.0).to(pool.dtype.element_ty), mask=stored)


def rope_append(
    qkv: torch.Tensor, num_heads: int, pool: torch.Tensor, layer: int, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    blocks: torch.Tensor, interleaved: bool,
) -> torch.Tensor:  # fmt: skip
    """Rotated Q (T, heads, head_dim); K and V go into the pool at (blocks, positions % 16)."""
    num_rows, (kv_heads, dim) = qkv.shape[0], pool.shape[4:]
    assert qkv.is_contiguous() and pool.is_contiguous() and qkv.shape[1] == (num_heads + 2 * kv_heads) * dim
    q = torch.empty(num_rows, num_heads, dim, dtype=qkv.dtype, device=qkv.device)
    if num_rows:
        _rope_append[(num_rows, num_heads + kv_heads)](
            qkv, q, pool, cos, sin, positions, blocks, layer * 2 * pool.stride(2), pool.stride(0),
            HEADS=num_heads, KV_HEADS=kv_heads, D=dim, TOKENS=BLOCK_TOKENS, INTERLEAVED=interleaved, HALF=triton.next_power_of_2(dim // 2), num_warps=1,
        )  # fmt: skip
    return q


def rope_append_reference(
    qkv: torch.Tensor, num_heads: int, pool: torch.Tensor, layer: int, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    blocks: torch.Tensor, interleaved: bool,
) -> torch.Tensor:  # fmt: skip
    kv_heads, dim = pool.shape[4:]
    heads = qkv.view(len(qkv), num_heads + 2 * kv_heads, dim)
    turned = heads[:, : num_heads + kv_heads].float()
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    c, s = cos[positions.long()][:, None], sin[positions.long()][:, None]
    a, b = a * c - b * s, a * s + b * c
    turned = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    for row, (block, position) in enumerate(zip(blocks.tolist(), positions.tolist(), strict=True)):
        if block >= 0:
            pool[block, layer, 0, position % BLOCK_TOKENS] = turned[row, num_heads:].to(pool.dtype)
            pool[block, layer, 1, position % BLOCK_TOKENS] = heads[row, num_heads + kv_heads :].to(pool.dtype)
    return turned[:, :num_heads].to(qkv.dtype)
