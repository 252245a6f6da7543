"""Attention of chunks of prompts over their cached prefix and themselves, ragged, in one launch.

torch's scaled_dot_product_attention is as fast on one chunk that starts its prompt, but it needs one call per sequence, and with a cached prefix it needs
the blocks gathered into one piece and a mask in memory. This kernel reads the blocks where they lie, so one launch serves any mix of chunks,
and what a row gets does not depend on how its prompt was cut. Source: FlashAttention-2, arXiv:2307.08691.

Tensors: q, out, pool as in `decode`. Per chunk, int32: starts (first row of q), counts (rows), computed (keys before the first row), table (C, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from plugmesh_kernels.gpu.decode import BLOCK_TOKENS
from plugmesh_kernels.gpu.dot import dot

TILE_ROWS = 64


@triton.jit
def _prefill(
    q, pool, out, tile_chunk, tile_first, starts, counts, computed, table,
    layer_offset, table_width, block_stride, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (tile, head): BLOCK_M rows of one chunk."""
    tile, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    chunk = tl.load(tile_chunk + tile)
    first, count, before = tl.load(tile_first + tile), tl.load(counts + chunk), tl.load(computed + chunk)
    m, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row = (tl.load(starts + chunk) + m).to(tl.int64)
    inside = (m[:, None] < count) & (d[None, :] < D)
    query = tl.load(q + row[:, None] * (HEADS * D) + head * D + d[None, :], mask=inside, other=0.0)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = before + tl.minimum(first + BLOCK_M, count)
    # Every row sees key 0, which lies in the first piece, so `best` is finite from then on wherever the input is.
    for n0 in range(0, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        block = tl.load(table + chunk.to(tl.int64) * table_width + n // TOKENS, mask=n < end, other=0).to(tl.int64)
        base = pool + block * block_stride + layer_offset + (n % TOKENS) * (KV_HEADS * D) + kv_head * D
        key = tl.load(base[None, :] + d[:, None], mask=(n[None, :] < end) & (d[:, None] < D), other=0.0)
        score = dot(query, key) * scale_log2
        score = tl.where(n[None, :] <= before + m[:, None], score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        keep = tl.exp2(best - new_best)
        p = tl.exp2(score - new_best[:, None])
        value = tl.load(base[:, None] + TOKENS * KV_HEADS * D + d[None, :], mask=(n[:, None] < end) & (d[None, :] < D), other=0.0)
        acc = acc * keep[:, None] + dot(p.to(value.dtype), value)
        total = total * keep + tl.sum(p, 1)
        best = new_best
    result = acc / total[:, None]
    tl.store(out + row[:, None] * (HEADS * D) + head * D + d[None, :], result.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Chunks:
    """Where the rows and keys of the chunks of a step are; all int32 on the device. Tiles are TILE_ROWS rows of one chunk."""

    tile_chunk: torch.Tensor
    tile_first: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    computed: torch.Tensor
    table: torch.Tensor

    @classmethod
    def build(cls, starts: np.ndarray, counts: np.ndarray, computed: np.ndarray, table: np.ndarray, device: torch.device | str) -> Chunks:
        """Cuts the chunks into tiles; the longest contexts first, so that they do not run alone at the end."""
        tiles = [(c, first) for c, n in enumerate(counts.tolist()) for first in range(0, n, TILE_ROWS)]
        tiles.sort(key=lambda t: -(int(computed[t[0]]) + t[1]))
        pairs = np.asarray(tiles, dtype=np.int32).reshape(-1, 2)

        def put(a: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(a, dtype=np.int32)).to(device)

        return cls(put(pairs[:, 0]), put(pairs[:, 1]), put(starts), put(counts), put(computed), put(table))


def prefill_attention(q: torch.Tensor, pool: torch.Tensor, layer: int, chunks: Chunks, out: torch.Tensor) -> None:
    """Writes the rows of the chunks into `out`; the K and V of their own tokens are in the pool already."""
    (_, heads, dim), kv_heads = q.shape, pool.shape[4]
    if len(chunks.tile_chunk) == 0:
        return
    assert q.is_contiguous() and out.is_contiguous() and pool.is_contiguous()
    _prefill[(len(chunks.tile_chunk), heads)](
        q, pool, out, chunks.tile_chunk, chunks.tile_first, chunks.starts, chunks.counts, chunks.computed, chunks.table,
        layer * 2 * pool.stride(2), chunks.table.stride(0), pool.stride(0), math.log2(math.e) / math.sqrt(dim),
        HEADS=heads, KV_HEADS=kv_heads, D=dim, TOKENS=BLOCK_TOKENS,
        BLOCK_M=TILE_ROWS, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_N=64, num_warps=4,
    )  # fmt: skip


def prefill_attention_reference(q: torch.Tensor, pool: torch.Tensor, layer: int, chunks: Chunks, out: torch.Tensor) -> None:
    """The same, one chunk at a time in float32."""
    group = q.shape[1] // pool.shape[4]
    for start, count, before, blocks in zip(chunks.starts.tolist(), chunks.counts.tolist(), chunks.computed.tolist(), chunks.table.long(), strict=True):
        length = before + count
        used = blocks[: -(-length // BLOCK_TOKENS)]
        k, v = (pool[used, layer, part].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1) for part in (0, 1))
        scores = torch.einsum("mhd,nhd->hmn", q[start : start + count].float(), k) / math.sqrt(q.shape[2])
        future = torch.ones(count, length, dtype=torch.bool, device=q.device).triu(before + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=2)
        out[start : start + count] = torch.einsum("hmn,nhd->mhd", weights, v).to(out.dtype)
