"""Weights of 4 and 8 bits in the layout that the GPU kernels read.

Values are those of the stored formats, group by group of 32 along K, unchanged: w = d * q + m with q in 0..15, or w = d * q with q in -128..127.

Layout of a weight (N, K), K padded with zero groups to a multiple of 64 (a pair of groups):
    4 bits  data (K / 64, N, 32) uint8: byte i of row n holds q[n, 64 p + i] in its low and q[n, 64 p + 32 + i] in its high nibble.
    8 bits  data (K / 32, N, 32) int8: q[n, 32 g + i].
    scale, minimum (K / 32, N) float16; no minimum with 8 bits.
The rows that one program multiplies lie next to each other for each pair, so it reads whole pieces of 32 * rows bytes; a nibble's two halves belong to
different groups, so that each half is one tile of a matrix product and needs no shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

GROUP = 32


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """A weight (n, k) of `bits` 4 or 8; see the module for the layout."""

    bits: int
    n: int
    k: int
    data: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None

    @property
    def num_groups(self) -> int:
        """Even."""
        return self.scale.shape[0]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + (0 if self.minimum is None else self.minimum.nbytes)

    def to(self, device: torch.device | str) -> QuantWeight:
        return QuantWeight(
            self.bits, self.n, self.k, self.data.to(device), self.scale.to(device), None if self.minimum is None else self.minimum.to(device)
        )


def pack(q: np.ndarray, d: np.ndarray, m: np.ndarray | None, k: int) -> QuantWeight:
    """Lays out logical values on the CPU.

    Args:
        q: (N, groups, 32); 0..15 with `m`, else -128..127.
        d, m: (N, groups) of half precision.
        k: Columns in use; what lies beyond them in the last group must be zero in the values, q = 0 and, with a minimum, x is masked there.
    """
    n, groups, _ = q.shape
    assert d.shape == (n, groups) and groups == -(-k // GROUP)
    even = groups + groups % 2

    def padded(a: np.ndarray, dtype: type) -> np.ndarray:
        out = np.zeros((even, n, *a.shape[2:]), dtype)
        out[:groups] = np.moveaxis(a, 1, 0)
        return out

    scale = torch.from_numpy(padded(d, np.float16))
    if m is None:
        return QuantWeight(8, n, k, torch.from_numpy(padded(q, np.int8)), scale, None)
    nibbles = padded(q, np.uint8)
    data = nibbles[0::2] | nibbles[1::2] << 4
    return QuantWeight(4, n, k, torch.from_numpy(data), scale, torch.from_numpy(padded(m, np.float16)))


def concat(parts: list[QuantWeight]) -> QuantWeight:
    """Weights that share their input as one, rows after one another."""
    first = parts[0]
    assert all((p.bits, p.k) == (first.bits, first.k) for p in parts)
    minima = [p.minimum for p in parts if p.minimum is not None]
    return QuantWeight(
        first.bits, sum(p.n for p in parts), first.k, torch.cat([p.data for p in parts], 1), torch.cat([p.scale for p in parts], 1),
        torch.cat(minima, 1) if minima else None,
    )  # fmt: skip


def quantize(w: torch.Tensor, bits: int) -> QuantWeight:
    """Rounds a float weight (N, K) to the nearest values: each group's own range in 4 bits, symmetric in 8. On the CPU."""
    n, k = w.shape
    groups = -(-k // GROUP)
    values: np.ndarray = np.zeros((n, groups * GROUP), np.float32)
    values[:, :k] = w.detach().cpu().float().numpy()
    values = values.reshape(n, groups, GROUP)
    if bits == 4:
        low, high = values.min(2), values.max(2)
        d, m = ((high - low) / 15).astype(np.float16), low.astype(np.float16)
    else:
        d, m = (np.abs(values).max(2) / 127).astype(np.float16), None
    step: np.ndarray = np.where(d == 0, 1, d).astype(np.float32)[..., None]
    offset = 0 if m is None else m.astype(np.float32)[..., None]
    q = np.rint((values - offset) / step).clip(0 if bits == 4 else -127, 15 if bits == 4 else 127)
    q[(d == 0)] = 0
    return pack(q.astype(np.uint8 if bits == 4 else np.int8), d, m, k)


def dequantize(w: QuantWeight) -> torch.Tensor:
    """(n, k) float32, d * q + m. The reference for the kernels."""
    q = torch.stack((w.data & 15, w.data >> 4), dim=1).flatten(0, 1) if w.bits == 4 else w.data
    values = q.float() * w.scale.float()[..., None]
    if w.minimum is not None:
        values += w.minimum.float()[..., None]
    return values.permute(1, 0, 2).reshape(w.n, -1)[:, : w.k].contiguous()


def from_native(dtype: str, data: np.ndarray, n: int, k: int) -> QuantWeight:
    """From the bytes of the "native" weight store format, q4_1x16 or q8_0x16 (`csrc/kernels.h`); exact."""
    row_blocks, pieces = -(-n // 16), -(-k // 64)
    raw = np.asarray(data, np.uint8).reshape(row_blocks, pieces, -1)
    groups = -(-k // GROUP)

    def halves(at: int) -> np.ndarray:
        """f16 [2 groups][16 rows] of every piece as (N, groups)."""
        h = np.ascontiguousarray(raw[:, :, at : at + 64]).view(np.float16).reshape(row_blocks, pieces, 2, 16)
        return h.transpose(0, 3, 1, 2).reshape(row_blocks * 16, pieces * 2)[:n, :groups]

    def values(at: int, vectors: int) -> np.ndarray:
        """Vectors of [16 rows][4 values] of both groups as (N, groups, 4 * vectors)."""
        v = raw[:, :, at:].reshape(row_blocks, pieces, 2, vectors, 16, 4)
        return v.transpose(0, 4, 1, 2, 3, 5).reshape(row_blocks * 16, pieces * 2, vectors * 4)[:n, :groups]

    if dtype == "q4_1x16":
        v = values(128, 4)
        return pack(np.concatenate((v & 15, v >> 4), axis=2), halves(0), halves(64), k)
    assert dtype == "q8_0x16", dtype
    return pack((values(64, 8) ^ 128).view(np.int8), halves(0), None, k)


def floats_from_native(dtype: str, data: np.ndarray, n: int, k: int) -> torch.Tensor:
    """From the same, bf16x16 or f32x16: (n, k) bfloat16 or float32; exact."""
    blocks, pieces = -(-n // 16), -(-k // 64)
    raw = np.asarray(data, np.uint8)
    if dtype == "bf16x16":
        values: np.ndarray = raw.view(np.int16).reshape(blocks, pieces, 32, 16, 2).transpose(0, 3, 1, 2, 4)
    else:
        assert dtype == "f32x16", dtype
        values = raw.view(np.float32).reshape(blocks, pieces, 64, 16).transpose(0, 3, 1, 2)
    plain = torch.from_numpy(np.ascontiguousarray(values.reshape(blocks * 16, pieces * 64)[:n, :k]))
    return plain.view(torch.bfloat16) if dtype == "bf16x16" else plain
