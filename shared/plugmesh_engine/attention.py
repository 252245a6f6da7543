"""Attention over paged blocks in plain torch: the reference for other backends, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from plugmesh.types import BLOCK_TOKENS
from plugmesh_engine.executors.ragged import Batch
from plugmesh_engine.kv.pool import NULL_BLOCK


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Single rows of sequences with similar lengths. rows: (B,); blocks: (B * nb,); mask: (B, 1, 1, nb * 16), 0 or -inf."""

    rows: torch.Tensor
    blocks: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive rows of one sequence. blocks: (nb,), None for a chunk that starts its prompt; mask: (1, 1, T, L)."""

    start: int
    end: int
    length: int
    blocks: torch.Tensor | None
    mask: torch.Tensor | None


class TorchAttention:
    """Gathers K and V of one layer and calls scaled_dot_product_attention.

    Decode rows run together, in groups whose block counts round up to the same power of two, so that padding at most doubles the work. Heads that share
    a KV head are handled as further query rows, which spares expanding K and V. Padding points at the null block, and blocks are zeroed when
    they are taken, so masked positions hold finite numbers.

    Args:
        storage: The pool's tensor (blocks, layers, 2, 16, kv_heads, head_dim).
        num_heads: Query heads, a multiple of kv_heads.
    """

    def __init__(self, storage: torch.Tensor, num_heads: int) -> None:
        self._storage = storage
        self._num_layers, _, _, self._num_kv_heads, self._head_dim = storage.shape[1:]
        self._group = num_heads // self._num_kv_heads
        self._flat = storage.view(storage.shape[0] * self._num_layers * 2, -1)  # one row: K or V of a layer of a block, contiguous
        self._decodes: list[_Decodes] = []
        self._chunks: list[_Chunk] = []
        self._batch: Batch | None = None

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        self._decodes, self._chunks = [], []
        by_size: dict[int, list[int]] = {}
        for i, r in enumerate(batch.rows):
            if len(r.token_ids) == 1 and r.num_computed > 0:
                needed = r.num_computed // BLOCK_TOKENS + 1
                by_size.setdefault(1 << (needed - 1).bit_length(), []).append(i)
            else:
                self._chunks.append(self._plan_chunk(batch, i))
        for members in by_size.values():
            self._decodes.append(self._plan_decodes(batch, members))

    def _plan_chunk(self, batch: Batch, i: int) -> _Chunk:
        r, start, end = batch.rows[i], batch.starts[i], batch.starts[i + 1]
        n, length = end - start, r.num_computed + end - start
        if r.num_computed == 0:
            return _Chunk(start, end, length, None, None)
        device, dtype = self._storage.device, self._storage.dtype
        blocks = torch.tensor(r.blocks[: -(-length // BLOCK_TOKENS)], dtype=torch.int64, device=device)
        future = torch.ones(n, length, dtype=torch.bool, device=device).triu(r.num_computed + 1)
        mask = torch.zeros(n, length, dtype=dtype, device=device).masked_fill_(future, float("-inf"))
        return _Chunk(start, end, length, blocks, mask.repeat(self._group, 1)[None, None])

    def _plan_decodes(self, batch: Batch, members: Sequence[int]) -> _Decodes:
        device, dtype = self._storage.device, self._storage.dtype
        lengths = [batch.rows[i].num_computed + 1 for i in members]
        width = -(-max(lengths) // BLOCK_TOKENS)
        table = np.full((len(members), width), NULL_BLOCK, dtype=np.int64)
        for row, (i, length) in enumerate(zip(members, lengths, strict=True)):
            used = -(-length // BLOCK_TOKENS)
            table[row, :used] = batch.rows[i].blocks[:used]
        beyond = torch.arange(width * BLOCK_TOKENS, device=device)[None] >= torch.tensor(lengths, device=device)[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=device).masked_fill_(beyond, float("-inf"))
        rows = torch.tensor([batch.starts[i] for i in members], dtype=torch.int64, device=device)
        return _Decodes(rows, torch.from_numpy(table.reshape(-1)).to(device), mask[:, None, None])

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        batch = self._batch
        assert batch is not None, "plan() comes first"
        # K and V of the new tokens go into the pool before anything reads it, so that one gather gives past and present.
        self._storage[:, layer, 0].index_put_((batch.blocks, batch.offsets), k)
        self._storage[:, layer, 1].index_put_((batch.blocks, batch.offsets), v)
        out = torch.empty_like(q)
        for decodes in self._decodes:
            self._run_decodes(q, out, layer, decodes)
        for chunk in self._chunks:
            self._run_chunk(q, k, v, out, layer, chunk)
        return out

    def _gather(self, blocks: torch.Tensor, num_sequences: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V (B, kv_heads, L, head_dim) of one layer, L a multiple of 16."""
        rows = blocks * (2 * self._num_layers) + 2 * layer
        shape = (num_sequences, -1, self._num_kv_heads, self._head_dim)
        k, v = self._flat.index_select(0, rows).view(shape), self._flat.index_select(0, rows + 1).view(shape)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _run_decodes(self, q: torch.Tensor, out: torch.Tensor, layer: int, d: _Decodes) -> None:
        b = len(d.rows)
        k, v = self._gather(d.blocks, b, layer)
        queries = q.index_select(0, d.rows).view(b, self._num_kv_heads, self._group, self._head_dim)
        result = F.scaled_dot_product_attention(queries, k, v, attn_mask=d.mask)
        out.index_copy_(0, d.rows, result.reshape(b, -1, self._head_dim))

    def _run_chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layer: int, c: _Chunk) -> None:
        n = c.end - c.start
        if c.blocks is None:
            hq, hk, hv = (x[c.start : c.end].transpose(0, 1)[None] for x in (q, k, v))
            result = F.scaled_dot_product_attention(hq, hk, hv, is_causal=True, enable_gqa=self._group > 1)
            out[c.start : c.end] = result[0].transpose(0, 1)
            return
        keys, values = self._gather(c.blocks, 1, layer)
        queries = q[c.start : c.end].view(n, self._num_kv_heads, self._group, self._head_dim).permute(1, 2, 0, 3)
        queries = queries.reshape(1, self._num_kv_heads, self._group * n, self._head_dim)
        result = F.scaled_dot_product_attention(queries, keys[:, :, : c.length], values[:, :, : c.length], attn_mask=c.mask)
        result = result.view(self._num_kv_heads, self._group, n, self._head_dim).permute(2, 0, 1, 3)
        out[c.start : c.end] = result.reshape(n, -1, self._head_dim)
