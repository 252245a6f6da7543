"""Attention of decode rows over paged blocks, with the keys of a row split across programs.

Few sequences with long contexts would leave most of a GPU idle if one program walked through all keys of a head, so each walks through a piece and a
second kernel merges the pieces (flash-decoding: Dao et al., 2023; the online softmax is Milakov & Gimelshein, arXiv:1805.02867).

Tensors
    pool: (blocks, layers, 2, 16, kv_heads, head_dim), contiguous; float32, bfloat16 or float16.
    q, out: (T, heads, head_dim) in the pool's dtype.
    rows: (B,) int32, the row of q of each entry. table: (B, width) int32, its blocks. lengths: (B,) int32, keys it attends to; 0 gives zeros.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from plugmesh_kernels.gpu.dot import dot

BLOCK_TOKENS = 16
MIN_SPLIT_KEYS = 128  # one sequence of 4,096 tokens with 8 KV heads then makes 256 programs, enough for 132 multiprocessors
MAX_SPLITS = 64  # bounds the memory for partials; longer rows get longer splits


@triton.jit
def _decode_split(
    q, pool, rows, table, lengths, part_max, part_sum, part_out,
    layer_offset, table_width, block_stride, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, MIN_SPLIT: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (entry, KV head, s): splits s, s + grid, ... of the entry for all query heads that share the KV head."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    entry, kv_head, first_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + entry)
    row = tl.load(rows + entry).to(tl.int64)
    # Keys per split follow from the row's length alone, so that the batch does not change the order of sums.
    split_keys = (tl.maximum(length, 1) + SPLITS * MIN_SPLIT - 1) // (SPLITS * MIN_SPLIT) * MIN_SPLIT
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + g
    inside = (g[:, None] < GROUP) & (d[None, :] < D)
    query = tl.load(q + row * HEADS * D + head[:, None] * D + d[None, :], mask=inside, other=0.0)
    for split in range(first_split, (length + split_keys - 1) // split_keys, tl.num_programs(2)):
        best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        end = tl.minimum((split + 1) * split_keys, length)
        for n0 in range(split * split_keys, end, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            block = tl.load(table + entry.to(tl.int64) * table_width + n // TOKENS, mask=n < end, other=0).to(tl.int64)
            base = pool + block * block_stride + layer_offset + (n % TOKENS) * (KV_HEADS * D) + kv_head * D
            key = tl.load(base[None, :] + d[:, None], mask=(n[None, :] < end) & (d[:, None] < D), other=0.0)
            score = dot(query, key) * scale_log2
            score = tl.where(n[None, :] < end, score, float("-inf"))
            new_best = tl.maximum(best, tl.max(score, 1))
            keep = tl.exp2(best - new_best)
            p = tl.exp2(score - new_best[:, None])
            value = tl.load(base[:, None] + TOKENS * KV_HEADS * D + d[None, :], mask=(n[:, None] < end) & (d[None, :] < D), other=0.0)
            acc = acc * keep[:, None] + dot(p.to(value.dtype), value)
            total = total * keep + tl.sum(p, 1)
            best = new_best
        part = (entry.to(tl.int64) * HEADS + head) * SPLITS + split
        tl.store(part_max + part, best, mask=g < GROUP)
        tl.store(part_sum + part, total, mask=g < GROUP)
        tl.store(part_out + part[:, None] * D + d[None, :], acc, mask=inside)


@triton.jit
def _decode_merge(
    part_max, part_sum, part_out, rows, lengths, out,
    HEADS: tl.constexpr, D: tl.constexpr, MIN_SPLIT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (entry, head): its splits in their order."""
    entry, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + entry)
    row = tl.load(rows + entry).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    best = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    first = (entry.to(tl.int64) * HEADS + head) * SPLITS
    split_keys = (tl.maximum(length, 1) + SPLITS * MIN_SPLIT - 1) // (SPLITS * MIN_SPLIT) * MIN_SPLIT  # as in `_decode_split`
    for split in range(0, (length + split_keys - 1) // split_keys):
        m = tl.load(part_max + first + split)
        new_best = tl.maximum(best, m)
        keep, take = tl.exp2(best - new_best), tl.exp2(m - new_best)
        acc = acc * keep + take * tl.load(part_out + (first + split) * D + d, mask=d < D, other=0.0)
        total = total * keep + take * tl.load(part_sum + first + split)
        best = new_best
    # Not `total > 0`: a NaN has to come through.
    result = tl.where(length > 0, acc / total, 0.0)
    tl.store(out + row * HEADS * D + head * D + d, result.to(out.dtype.element_ty), mask=d < D)


def num_splits(max_length: int) -> int:
    """Programs per row and KV head that give each split of the longest row its own."""
    return max(1, min(MAX_SPLITS, triton.cdiv(max_length, MIN_SPLIT_KEYS)))


class DecodeScratch:
    """Memory for the partials of up to `max_entries` rows: 0.26 MB per row with 8 heads of 128."""

    def __init__(self, max_entries: int, num_heads: int, head_dim: int, device: torch.device | str) -> None:
        shape = (max_entries, num_heads, MAX_SPLITS)
        self.max_entries = max_entries
        self.best = torch.empty(shape, dtype=torch.float32, device=device)
        self.total = torch.empty_like(self.best)
        self.out = torch.empty((*shape, head_dim), dtype=torch.float32, device=device)


def decode_attention(
    q: torch.Tensor, pool: torch.Tensor, layer: int, rows: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, grid_splits: int,
    scratch: DecodeScratch, out: torch.Tensor,
) -> None:  # fmt: skip
    """Writes the attended rows into `out`; other rows of it stay as they are. See the module for shapes.

    Args:
        grid_splits: Programs per row and KV head, at best `num_splits(longest row)`. Any number of at least 1 gives the same result.
    """
    entries, (_, heads, dim), kv_heads = len(lengths), q.shape, pool.shape[4]
    if entries == 0:
        return
    assert entries <= scratch.max_entries and q.is_contiguous() and out.is_contiguous() and pool.is_contiguous()
    block_d = max(16, triton.next_power_of_2(dim))
    _decode_split[(entries, kv_heads, grid_splits)](
        q, pool, rows, table, lengths, scratch.best, scratch.total, scratch.out,
        layer * 2 * pool.stride(2), table.stride(0), pool.stride(0), math.log2(math.e) / math.sqrt(dim),
        HEADS=heads, KV_HEADS=kv_heads, D=dim, TOKENS=BLOCK_TOKENS, MIN_SPLIT=MIN_SPLIT_KEYS, SPLITS=MAX_SPLITS,
        BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK_D=block_d, BLOCK_N=64, num_warps=4,
    )  # fmt: skip
    _decode_merge[(entries, heads)](
        scratch.best, scratch.total, scratch.out, rows, lengths, out,
        HEADS=heads, D=dim, MIN_SPLIT=MIN_SPLIT_KEYS, SPLITS=MAX_SPLITS, BLOCK_D=block_d, num_warps=1,
    )  # fmt: skip


def decode_attention_reference(
    q: torch.Tensor, pool: torch.Tensor, layer: int, rows: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor
) -> None:
    """The same, one row at a time in float32."""
    group = q.shape[1] // pool.shape[4]
    for row, blocks, length in zip(rows.tolist(), table.long(), lengths.tolist(), strict=True):
        if length == 0:
            out[row] = 0
            continue
        used = blocks[: -(-length // BLOCK_TOKENS)]
        k, v = (pool[used, layer, part].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1) for part in (0, 1))
        scores = torch.einsum("hd,nhd->hn", q[row].float(), k) / math.sqrt(q.shape[2])
        out[row] = torch.einsum("hn,nhd->hd", scores.softmax(dim=1), v).to(out.dtype)
