"""Slow, obvious counterparts of the native attention, elementwise and sampling kernels, in float64, for their tests.

Source of attention: plain softmax over all keys at once; of the sampling rule: `plugmesh_engine.sampler`.
"""

from __future__ import annotations

import numpy as np

BLOCK_TOKENS = 16
SPLIT_KEYS = 512


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Float32 values rounded to the nearest bfloat16 (to even), as float32. NaN stays."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(
        np.float32
    )
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def to_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., D) -> values and one scale per vector (max|x| / 127); a vector that is not finite has zeros and scale NaN."""
    highest = np.abs(x).max(axis=-1, keepdims=True).astype(np.float32)
    bad = ~np.isfinite(x).all(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        inverse = np.where(highest < 1e-30, np.float32(0), np.float32(127) / highest)
        q = np.where(bad, 0, np.rint(x.astype(np.float32) * inverse))
        scale = np.where(bad, np.float32(np.nan), highest / np.float32(127))
    return q.astype(np.int8), scale.astype(np.float32)


def kv_rounded(x: np.ndarray, int8: bool) -> np.ndarray:
    """What KV memory returns for the (..., D) that went in, as float64."""
    if not int8:
        return to_bf16(x).astype(np.float64)
    q, scale = to_int8(x)
    return q.astype(np.float64) * scale.astype(np.float64)


def kv_part(x: np.ndarray, is_key: bool, int8: bool) -> np.ndarray:
    """The bytes of the K or V part of one block and KV head, for x (16, D), as csrc/kernels.h lays them out."""
    tokens, dim = x.shape
    if not int8:
        half = (to_bf16(x).view(np.uint32) >> 16).astype(np.uint16)
        if is_key:  # (D/2, 16, 2)
            return np.ascontiguousarray(half.reshape(tokens, dim // 2, 2).transpose(1, 0, 2)).view(np.uint8).ravel()
        return np.ascontiguousarray(half.reshape(tokens // 2, 2, dim).transpose(0, 2, 1)).view(np.uint8).ravel()
    q, scale = to_int8(x)
    padded = -(-dim // 4) * 4
    body = np.zeros(tokens * padded, dtype=np.uint8)
    if is_key:  # (D/4, 16, 4)
        wide = np.zeros((tokens, padded), dtype=np.int8)
        wide[:, :dim] = q
        body[:] = np.ascontiguousarray(wide.reshape(tokens, padded // 4, 4).transpose(1, 0, 2)).view(np.uint8).ravel()
    else:
        body[: tokens * dim] = np.ascontiguousarray(q).view(np.uint8).ravel()
    return np.concatenate([scale.ravel().view(np.uint8), body])


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int, scale: float, split: int | None = None
) -> np.ndarray:
    """Causal attention of one KV head.

    Args:
        q: (rows, group, D); row i attends to keys 0 .. position + i.
        k, v: (keys, D).
        split: Look at these 512 keys only.

    Returns:
        (rows, group, D) float64; rows without a key are 0.
    """
    out = np.zeros(q.shape, dtype=np.float64)
    begin, limit = (0, len(k)) if split is None else (split * SPLIT_KEYS, (split + 1) * SPLIT_KEYS)
    for row in range(len(q)):
        end = min(position + row + 1, limit)
        if end <= begin:
            continue
        scores = q[row].astype(np.float64) @ k[begin:end].astype(np.float64).T * scale
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[row] = weights @ v[begin:end].astype(np.float64) / weights.sum(axis=1, keepdims=True)
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """(R, K) float64."""
    x = x.astype(np.float64)
    return x * weight.astype(np.float64) / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def silu_mul(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gate * sigmoid(gate) * up in float64."""
    gate = gate.astype(np.float64)
    return gate / (1.0 + np.exp(-gate)) * up.astype(np.float64)


def rope_head(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """One head (D,) turned by D/2 angles."""
    x = x.astype(np.float64)
    pairs = x.reshape(-1, 2).T if interleaved else x.reshape(2, -1)
    turned = np.stack([pairs[0] * cos - pairs[1] * sin, pairs[1] * cos + pairs[0] * sin])
    return turned.T.ravel() if interleaved else turned.ravel()


def admitted(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Masses (V,) float64 of the tokens that top-k, then top-p of what remains, then min-p let in; 0 for the others."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max()
    floor = np.log(min_p) if min_p > 0 else -np.inf
    order = np.sort(scaled)[::-1]
    kth = order[top_k - 1] if 0 < top_k < len(logits) else -np.inf
    floor = max(floor, kth)
    if top_p < 1.0:
        mass = np.exp(scaled)
        reached = int((np.exp(order).cumsum() < top_p * mass[scaled >= kth].sum()).sum())
        floor = max(floor, order[min(reached, len(order) - 1)])
    return np.where(scaled >= floor, np.exp(scaled), 0.0)


def sample_row(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """The token of the engine's rule; -1 when the maximum is not finite or a value is NaN."""
    if not np.isfinite(logits.max()):
        return -1
    if temperature == 0:
        return int(logits.argmax())
    cdf = admitted(logits, temperature, top_k, top_p, min_p).cumsum()
    target = min(u * cdf[-1], np.nextafter(cdf[-1], 0.0))
    return int(np.searchsorted(cdf, target, side="right"))
