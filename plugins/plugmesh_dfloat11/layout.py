"""What lies in which container: one per layer, of its seven matrices in the kernels' own order, one for the embedding, one for a head that is not tied to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plugmesh.types import ModelConfig
from plugmesh_kernels.pack import pack, packed_num_bytes

FORMAT, PLAIN = "dfloat11", "dfloat11-plain"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix and its place in a container.

    Attributes:
        shape: (out, in) of the model; the container holds it padded to 16 rows and 64 columns.
        first: Its first value in the container; a multiple of 1,024.
    """

    name: str
    shape: tuple[int, int]
    first: int

    @property
    def num_values(self) -> int:
        return packed_num_bytes("bf16x16", *self.shape) // 2


def layer_matrices(config: ModelConfig, layer: int) -> list[Matrix]:
    """The matrices of one layer, in the order in which they are used and stored."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = ((q, c.hidden_size), (kv, c.hidden_size), (kv, c.hidden_size), (c.hidden_size, q), (c.intermediate_size, c.hidden_size),
              (c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size))  # fmt: skip
    found, at = [], 0
    for part, shape in zip(_PARTS, shapes, strict=True):
        found.append(Matrix(f"model.layers.{layer}.{part}.weight", shape, at))
        at += found[-1].num_values
    return found


def layer_name(layer: int) -> str:
    """Of the container's tensor."""
    return f"dfloat11.layers.{layer}"


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns, uint16, of float32 values: those that are bfloat16 already keep every bit, others go to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    odd = np.isnan(values)
    if odd.any():  # adding may carry a NaN over into infinity
        kept = (bits[odd] >> 16).astype(np.uint16)
        rounded[odd] = np.where(bits[odd] & 0xFFFF, kept | 0x40, kept)
    return rounded


def packed(values: np.ndarray) -> np.ndarray:
    """A matrix (n, k) of float32 as the kernels' bf16x16, (n,) uint16."""
    n, k = values.shape
    return pack("bfloat16", to_bfloat16(values), n, k, "bf16x16").view(np.uint16)


def num_rounded(values: np.ndarray) -> int:
    """How many of the float32 values are no bfloat16."""
    return int(np.count_nonzero(np.ascontiguousarray(values).view(np.uint32) & 0xFFFF))
