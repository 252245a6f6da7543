"""The forward pass of a Llama out of the fused kernels.

The same arithmetic as `plugmesh_engine.model.llama`, in fewer and larger pieces: products that share an input are one, and what lies between two products
is one kernel. On a GPU a step of a few rows is bounded by the number of launches and by memory, not by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from plugmesh.types import ModelConfig
from plugmesh_kernels.gpu.linear import embed, linear
from plugmesh_kernels.gpu.norm import add_rms_norm, silu_mul
from plugmesh_kernels.gpu.pack import QuantWeight, concat
from plugmesh_kernels.gpu.rope import rope_append

Weight = QuantWeight | torch.Tensor
Attend = Callable[[torch.Tensor, int], torch.Tensor]
"""Attention of Q (T, heads, head_dim) in a layer whose K and V are in the pool already; the same shape."""


@dataclass(frozen=True, slots=True)
class Joined:
    """Weights (N_i, K) that share their input, and their biases after one another (N,) or None. Those of one kind have become one weight."""

    parts: tuple[Weight, ...]
    bias: torch.Tensor | None

    @classmethod
    def build(cls, weights: Sequence[Weight], biases: Sequence[torch.Tensor | None] = ()) -> Joined:
        """Neighbours of one kind are put together. Either all have a bias or none."""
        parts: list[Weight] = []
        for w in weights:
            last = parts[-1] if parts else None
            if isinstance(w, QuantWeight) and isinstance(last, QuantWeight) and last.bits == w.bits:
                parts[-1] = concat([last, w])
            elif isinstance(w, torch.Tensor) and isinstance(last, torch.Tensor):
                parts[-1] = torch.cat((last, w))
            else:
                parts.append(w)
        given = [b for b in biases if b is not None]
        assert len(given) in (0, len(weights))
        return cls(tuple(parts), torch.cat(given) if given else None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.parts) == 1:
            return linear(x, self.parts[0], self.bias)
        y = torch.cat([linear(x, p) for p in self.parts], dim=1)
        return y if self.bias is None else y + self.bias

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """Weights of one layer."""

    input_norm: torch.Tensor
    qkv: Joined
    o: Joined
    mlp_norm: torch.Tensor
    gate_up: Joined
    down: Joined


@dataclass(frozen=True, slots=True)
class GpuLlama:
    """Weights on one device, and the pass over them.

    Attributes:
        cos, sin: (max_position, head_dim / 2) float32.
        dtype: Of activations and KV.
    """

    config: ModelConfig
    dtype: torch.dtype
    embedding: Weight
    layers: tuple[GpuLayer, ...]
    norm: torch.Tensor
    head: Joined
    cos: torch.Tensor
    sin: torch.Tensor

    def hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, blocks: torch.Tensor, pool: torch.Tensor, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the K and V of all rows, and gives two (T, hidden) whose sum goes into the final norm.

        Args:
            ids: (T,) int32 or int64. positions, blocks: (T,) int32; a block of -1 keeps the row's K and V out of the pool.
            pool: (blocks, layers, 2, 16, kv_heads, head_dim) in `dtype`.
        """
        c, rows = self.config, len(ids)
        x = embed(ids, self.embedding, self.dtype)
        add: torch.Tensor | None = None
        for i, w in enumerate(self.layers):
            x, h = add_rms_norm(x, add, w.input_norm, c.rms_norm_eps)
            q = rope_append(w.qkv(h), c.num_heads, pool, i, self.cos, self.sin, positions, blocks, c.rope_style == "interleaved")
            x, h = add_rms_norm(x, w.o(attend(q, i).view(rows, -1)), w.mlp_norm, c.rms_norm_eps)
            add = w.down(silu_mul(w.gate_up(h)))
        assert add is not None, "a model has layers"
        return x, add

    def logits(self, x: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
        """(R, vocab) in `dtype` for rows of what `hidden` gave."""
        return self.head(add_rms_norm(x, add, self.norm, self.config.rms_norm_eps)[1])

    @property
    def nbytes(self) -> int:
        """Of the matrices, a tied embedding once."""
        layers = sum(w.nbytes for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
        return layers + self.embedding.nbytes + (0 if self.config.tie_word_embeddings else self.head.nbytes)
