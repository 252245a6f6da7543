"""What the linear kernels compute, slowly and obviously: numpy in double precision, straight from the words of `csrc/kernels.h`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WEIGHT_TYPES = ("q4_1x16", "q8_0x16", "bf16x16", "f32x16")
"""Names of `pack` in the order of WeightType."""

_PIECE_BYTES = (640, 1088, 2048, 4096)
_TINY = np.float32(1e-30)  # QUANT_TINY: pieces below count as zero


@dataclass(frozen=True, slots=True)
class Quantized:
    """Activations as `Input` holds them: q (t, kp) int8, scale (t, kp / 64), sum and init (t, kp / 32)."""

    q: np.ndarray
    scale: np.ndarray
    sum: np.ndarray
    init: np.ndarray


@dataclass(frozen=True, slots=True)
class Decoded:
    """Values of a packed weight in float64, exactly, and what they are sums of: w = scaled + minimum, all (n, k)."""

    scaled: np.ndarray
    minimum: np.ndarray

    @property
    def values(self) -> np.ndarray:
        return self.scaled + self.minimum

    @property
    def magnitudes(self) -> np.ndarray:
        """|scaled| + |minimum|: what rounding errors are measured against, because the two may cancel."""
        return np.abs(self.scaled) + np.abs(self.minimum)


def pad(x: np.ndarray) -> np.ndarray:
    """(t, k) to (t, kp) with zeros."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % 64)))


def quantize(x: np.ndarray) -> Quantized:
    """(t, k) float32 in steps of single precision, as the kernels do: every bit is defined."""
    t, kp = pad(x).shape
    pieces = pad(x).reshape(t, kp // 64, 64)
    largest = np.abs(pieces).max(axis=2, initial=0)
    usable = np.isfinite(largest) & (largest >= _TINY)
    scale = np.where(
        usable, largest / np.float32(127), np.where(np.isfinite(largest), np.float32(0), np.float32(np.nan))
    )
    inverse = np.float32(127) / np.where(usable, largest, np.float32(1))
    q = np.rint(np.where(usable[..., None], pieces, np.float32(0)) * inverse[..., None]).astype(np.int8)
    total = q.reshape(t, kp // 32, 32).sum(axis=2, dtype=np.int32)
    return Quantized(q.reshape(t, kp), scale.astype(np.float32), total.astype(np.float32), -128 * total)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """(t, k) float32 to (t, kp) bit patterns: to nearest, ties to even; a NaN stays one."""
    bits = pad(x).view(np.uint32).astype(np.uint64)
    lower, upper = bits & 0xFFFF, bits >> 16
    upper += (lower > 0x8000) | ((lower == 0x8000) & (upper & 1 == 1))
    return np.where(np.isnan(pad(x)), (bits >> 16) | 0x40, upper).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def decode(type_: int, data: np.ndarray, n: int, k: int) -> Decoded:
    """The weight in `data` (packed bytes), each value looked up where the header says it lies."""
    row, col = np.indices((n, k))
    num_pieces = -(-k // 64)
    piece = (row // 16 * num_pieces + col // 64) * _PIECE_BYTES[type_]
    r, group, j, i = row % 16, col % 64 // 32, col % 32, col % 64

    def read(at: np.ndarray, dtype: str) -> np.ndarray:
        width = np.dtype(dtype).itemsize
        return data[at[..., None] + np.arange(width)].view(dtype)[..., 0].astype(np.float64)

    nothing = np.zeros((n, k))
    if n * k == 0:
        return Decoded(nothing, nothing)
    if type_ == 0:
        both = data[piece + 128 + group * 256 + j % 16 // 4 * 64 + 4 * r + j % 4]
        d, m = read(piece + 2 * (16 * group + r), "<f2"), read(piece + 64 + 2 * (16 * group + r), "<f2")
        return Decoded(d * np.where(j < 16, both & 15, both >> 4), m)
    if type_ == 1:
        byte = data[piece + 64 + group * 512 + j // 4 * 64 + 4 * r + j % 4]
        return Decoded(read(piece + 2 * (16 * group + r), "<f2") * (byte.astype(np.float64) - 128), nothing)
    if type_ == 2:
        upper = data[(piece + 64 * (i // 2) + 4 * r + 2 * (i % 2))[..., None] + np.arange(2)].view("<u2")[..., 0]
        return Decoded(from_bf16(upper).astype(np.float64), nothing)
    return Decoded(read(piece + 64 * i + 4 * r, "<f4"), nothing)


def activations(type_: int, x: np.ndarray) -> np.ndarray:
    """(t, k) float64: what is left of x (float32) in the encoding that a weight of this type is multiplied with."""
    k = x.shape[1]
    if type_ in (0, 1):
        found = quantize(x)
        return (found.q.astype(np.float64) * np.repeat(found.scale.astype(np.float64), 64, axis=1))[:, :k]
    return (from_bf16(to_bf16(x))[:, :k] if type_ == 2 else x).astype(np.float64)


def linear(type_: int, weight: Decoded, x: np.ndarray, bias: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """x @ w.T + bias for x (t, k) float32, and per result the largest error that single precision sums may have.

    A result is a sum of k products; each rounding on its way is at most 2**-24 of a partial sum, none of which exceeds the
    sum of magnitudes. Per piece of 64 at most 64 roundings (float weights) or 6 (integers) follow one another.
    """
    exact = activations(type_, x)
    with np.errstate(invalid="ignore", over="ignore"):
        y = exact @ weight.values.T
        size = np.abs(exact) @ weight.magnitudes.T
    if bias is not None:
        y, size = y + bias, size + np.abs(bias)
    roundings = (2 + -(-x.shape[1] // 64)) * (6 if type_ in (0, 1) else 64)
    # Denormal products and sums may be flushed (vdpbf16ps does).
    return y, size * roundings * 2.0**-24 + 2.0**-126 * (x.shape[1] + 1)
