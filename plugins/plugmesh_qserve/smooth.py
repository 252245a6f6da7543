"""What is folded into the weights before they are quantised, so that the model computes the same and its numbers are easier to hold in few bits.

Every factor goes over a product that is linear on both sides, so without quantisation nothing changes but rounding. Source: QServe, sections 4.2 and 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import numpy as np

from plugmesh.types import ModelConfig


def rotation_width(k: int, limit: int = 512) -> int:
    """The largest power of two that divides k, at most `limit`: 64 for 576, 512 for 1536."""
    return min(k & -k, limit)


def rotated(x: np.ndarray, width: int) -> np.ndarray:
    """The Walsh-Hadamard transform of every piece of `width` along the last axis, not normalised, in the kernels' order of sums."""
    y = np.ascontiguousarray(x, np.float32).reshape(-1, width).copy()
    half = width // 2
    while half:
        parts = y.reshape(len(y), -1, 2, half)
        a, b = parts[:, :, 0].copy(), parts[:, :, 1].copy()
        parts[:, :, 0], parts[:, :, 1] = a + b, a - b
        half //= 2
    return y.reshape(x.shape)


def for_rotated_inputs(w: np.ndarray, width: int) -> np.ndarray:
    """Weights V with V @ rotated(x) = w @ x; the transform's square is `width` times one."""
    return rotated(w, width) / np.float32(width)


def key_factors(k: np.ndarray, config: ModelConfig, alpha: float) -> np.ndarray:
    """SmoothAttention's lambda, (kv_heads, head_dim): keys are divided by it, queries multiplied.

    Both channels of a RoPE pair share one, so that it goes through the rotation. From the length of the pair, which the rotation leaves alone, so keys from
    before it will do. Normalised to a geometric mean of 1 per head.

    Args:
        k: (T, kv_heads * head_dim) keys before RoPE.
    """
    heads = k.reshape(len(k), config.num_kv_heads, config.head_dim)
    half = config.head_dim // 2
    if config.rope_style == "interleaved":
        pairs = heads.reshape(len(k), config.num_kv_heads, half, 2)
    else:
        pairs = np.stack((heads[..., :half], heads[..., half:]), axis=-1)
    highest = np.maximum(np.sqrt((pairs**2).sum(-1)).max(0), 1e-6)
    log = alpha * np.log(highest)
    factors = np.exp(log - log.mean(1, keepdims=True)).astype(np.float32)
    return np.repeat(factors, 2, axis=1) if config.rope_style == "interleaved" else np.concatenate((factors, factors), axis=1)


def smooth_attention(tensors: MutableMapping[str, np.ndarray], layer: int, config: ModelConfig, factors: np.ndarray) -> None:
    """Divides the rows (and biases) that make keys, multiplies those that make queries. In place of the mapping, by new arrays."""
    a = f"model.layers.{layer}.self_attn."
    of_queries = np.repeat(factors, config.num_heads // config.num_kv_heads, axis=0).reshape(-1)
    for name, by in ((f"{a}q_proj", of_queries), (f"{a}k_proj", 1 / factors.reshape(-1))):
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * by[:, None]
        if f"{name}.bias" in tensors:
            tensors[f"{name}.bias"] = tensors[f"{name}.bias"] * by


def smooth_block_output(tensors: MutableMapping[str, np.ndarray], layer: int, highest: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Moves the range of the down projection's input into its weights, through the rows of the up projection.

    Args:
        highest: (intermediate,) largest magnitudes of the input.

    Returns:
        The factors that the input is divided by, geometric mean 1.
    """
    up, down = (f"model.layers.{layer}.mlp.{n}_proj.weight" for n in ("up", "down"))
    log = alpha * np.log(np.maximum(highest, 1e-5)) - beta * np.log(np.maximum(np.abs(tensors[down]).max(0), 1e-5))
    factors = np.exp(log - log.mean()).astype(np.float32)
    tensors[up] = tensors[up] / factors[:, None]
    tensors[down] = tensors[down] * factors
    return factors


def keys_of(inputs: np.ndarray, tensors: Mapping[str, np.ndarray], layer: int) -> np.ndarray:
    """(T, kv_heads * head_dim) keys before RoPE of calibration inputs."""
    a = f"model.layers.{layer}.self_attn.k_proj"
    k = inputs @ tensors[f"{a}.weight"].T
    return k + tensors[f"{a}.bias"] if f"{a}.bias" in tensors else k
