"""Progressive group quantisation: float to int8 per row, int8 to four bits per group, so that the way back to int8 needs no float.

Source: QServe, arXiv:2405.04532, section 4.1. Departures, each with its reason:
- a group's range is widened to hold zero: a group on one side of zero would otherwise be cut off, since the zero point has four bits;
- instead of one rule for scale and zero point, the neighbours of the rule's choice are tried and the one with the smallest error is taken;
- the scale of a row is float32: half precision has no place for rows below 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PROTECTED = 119
"""Largest magnitude of the int8 of the first level: at 120 a group that spans everything could round to 128."""


@dataclass(frozen=True, slots=True)
class Progressive:
    """A quantised matrix (N, K): w = (codes - zeros) * scales * row_scales, the first product within int8.

    Attributes:
        codes: (N, K) uint8, 0 to 15.
        scales, zeros: (N, K / group) uint8; scales at least 1, zeros at most 15.
        row_scales: (N,) float32; 0 for a row of zeros.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    row_scales: np.ndarray

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def int8(self) -> np.ndarray:
        """(N, K) int32 values of the second level; within int8 by construction."""
        wide = [np.repeat(x.astype(np.int32), self.group, axis=1) for x in (self.zeros, self.scales)]
        return (self.codes - wide[0]) * wide[1]

    def float32(self) -> np.ndarray:
        return self.int8().astype(np.float32) * self.row_scales[:, None]


def first_level(w: np.ndarray, protected: int = PROTECTED) -> tuple[np.ndarray, np.ndarray]:
    """Row scales (N,) float32, and (N, K) float32 of w in their units, within +-protected, not rounded.

    Raises:
        ValueError: Something is not finite.
    """
    if not np.isfinite(w).all():
        raise ValueError("a weight is not finite")
    highest = np.abs(w).max(1)
    row_scales = np.where(highest > 1e-36, highest / np.float32(protected), 0).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        units = np.where(row_scales[:, None] > 0, w / row_scales[:, None], 0).astype(np.float32)
    return row_scales, np.clip(units, -protected, protected)


def rule(units: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points of the paper, (N, K / group) float32: s = round(range / 15), z = round(-min / s)."""
    grouped = np.rint(units).reshape(len(units), -1, group)
    low, high = np.minimum(grouped.min(2), 0), np.maximum(grouped.max(2), 0)
    scales = np.maximum(np.rint((high - low) / 15), 1)
    return scales.astype(np.float32), np.clip(np.rint(-low / scales), 0, 15).astype(np.float32)


def limits(scales: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes from which the way back stays within int8, lowest and highest."""
    return np.maximum(0, zeros - 128 // scales), np.minimum(15, zeros + 127 // scales)


def search(units: np.ndarray, group: int, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points with the smallest squared error among the neighbours of the rule's.

    Args:
        importance: (K,) weights of the errors, such as the mean square of each input; all the same when None.
    """
    n, k = units.shape
    grouped = units.reshape(n, -1, group)
    weight = np.ones(k, np.float32) if importance is None else importance.astype(np.float32) / max(float(importance.mean()), 1e-30) + np.float32(1e-3)
    weight = weight.reshape(1, -1, group)
    base, _ = rule(units, group)
    low = np.minimum(grouped.min(2), 0)
    best = np.full(base.shape, np.inf, np.float32)
    scales, zeros = base.copy(), np.zeros_like(base)
    for down in range(4):  # a smaller scale cuts off the largest values and is finer for the rest
        s = np.maximum(base - down, 1)
        for shift in (0, -1, 1) if down else (0,):
            z = np.clip(np.rint(-low / s) + shift, 0, 15)
            lowest, highest = limits(s, z)
            q = np.clip(np.rint(grouped / s[..., None]) + z[..., None], lowest[..., None], highest[..., None])
            error = np.einsum("ngk,ngk->ng", ((q - z[..., None]) * s[..., None] - grouped) ** 2, np.broadcast_to(weight, grouped.shape))
            better = error < best
            best[better], scales[better], zeros[better] = error[better], s[better], z[better]
    return scales, zeros


def quantise(w: np.ndarray, group: int, *, importance: np.ndarray | None = None, hessian: np.ndarray | None = None, is_searched: bool = True) -> Progressive:
    """A matrix (N, K) float32 in two levels.

    Args:
        group: Divides K; a multiple of 8.
        importance: As in `search`.
        hessian: (K, K), the inputs' second moments; then each column's error is made good by the columns after it (GPTQ, arXiv:2210.17323).
        is_searched: False follows the paper's rule for scales and zero points to the letter, but for the zero in the range.

    Raises:
        ValueError: K is no multiple of the group, or something is not finite.
    """
    if w.shape[1] % group or group % 8:
        raise ValueError(f"groups of {group} do not divide a row of {w.shape[1]}")
    row_scales, units = first_level(w)
    scales, zeros = search(units, group, importance) if is_searched else rule(units, group)
    if hessian is None:
        lowest, highest = (np.repeat(x, group, axis=1) for x in limits(scales, zeros))
        codes = np.clip(np.rint((units if is_searched else np.rint(units)) / np.repeat(scales, group, 1)) + np.repeat(zeros, group, 1), lowest, highest)
    else:
        codes = _compensated(units, scales, zeros, group, hessian)
    return Progressive(codes.astype(np.uint8), scales.astype(np.uint8), zeros.astype(np.uint8), row_scales)


def _compensated(units: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: int, hessian: np.ndarray, damp: float = 0.01) -> np.ndarray:
    """(N, K) codes by GPTQ with fixed groups, in blocks of one group: later columns of the block at once, those behind it after the block."""
    k = units.shape[1]
    h = hessian.astype(np.float64)
    diagonal = np.diag(h).copy()
    h[np.diag_indices(k)] += damp * max(float(diagonal.mean()), 1e-12) + (diagonal <= 0) * 1.0
    upper = np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)  # inv(H) = U^T U
    w = units.T.copy()  # columns of the matrix become rows, which lie in one piece
    codes = np.empty_like(w)
    for start in range(0, k, group):
        g = start // group
        s, z = scales[:, g], zeros[:, g]
        lowest, highest = limits(s, z)
        errors = np.empty((group, units.shape[0]), np.float32)
        for i in range(start, start + group):
            codes[i] = np.clip(np.rint(w[i] / s) + z, lowest, highest)
            errors[i - start] = (w[i] - (codes[i] - z) * s) / upper[i, i]
            w[i + 1 : start + group] -= upper[i, i + 1 : start + group, None] * errors[i - start]
        w[start + group :] -= upper[start : start + group, start + group :].T @ errors
    return codes.T
