"""Inputs of every linear of a model on a text, by plain float32 numpy: what weight formats are calibrated with.

Needs neither torch nor kernels, so the weightstore can run it on any machine. Memory holds all inputs at once: for SmolLM2-135M half a megabyte per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from plugmesh.types import ModelConfig
from plugmesh_engine.model.rope import rope_tables

WINDOW = 512
"""Tokens that attend to one another; texts are cut into pieces of this length."""


def linear_inputs(config: ModelConfig, tensor: Callable[[str], np.ndarray], token_ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Runs the model over the tokens, in windows of WINDOW tokens that do not see one another.

    Args:
        tensor: Float32 values by Hugging Face name; each is asked for once, layer by layer.

    Returns:
        Tensor name to (tokens, K) float32, read only; the head is "lm_head.weight", tied or not. Linears of one input share an array.
    """
    c = config
    limit = min(WINDOW, c.max_position)
    windows = [(a, min(a + limit, len(token_ids))) for a in range(0, len(token_ids), limit)]
    positions = np.concatenate([np.arange(b - a) for a, b in windows])
    cos, sin = (table[positions][:, None] for table in rope_tables(c))
    found: dict[str, np.ndarray] = {}

    def keep(x: np.ndarray, *names: str) -> np.ndarray:
        x.flags.writeable = False
        for name in names:
            found[name] = x
        return x

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        y = x @ tensor(f"{name}.weight").T
        return y + tensor(f"{name}.bias") if c.attention_bias and name.endswith(("q_proj", "k_proj", "v_proj")) else y

    x = tensor("model.embed_tokens.weight")[np.asarray(token_ids)]
    for i in range(c.num_layers):
        p = f"model.layers.{i}."
        a = f"{p}self_attn."
        h = keep(_norm(c, x, tensor(f"{p}input_layernorm.weight")), f"{a}q_proj.weight", f"{a}k_proj.weight", f"{a}v_proj.weight")
        q = _rotate(c, linear(f"{a}q_proj", h).reshape(-1, c.num_heads, c.head_dim), cos, sin)
        k = _rotate(c, linear(f"{a}k_proj", h).reshape(-1, c.num_kv_heads, c.head_dim), cos, sin)
        v = linear(f"{a}v_proj", h).reshape(-1, c.num_kv_heads, c.head_dim)
        heads = np.concatenate([_attend(q[s:e], k[s:e], v[s:e]) for s, e in windows])
        x = x + linear(f"{a}o_proj", keep(heads.reshape(len(x), -1), f"{a}o_proj.weight"))
        h = keep(_norm(c, x, tensor(f"{p}post_attention_layernorm.weight")), f"{p}mlp.gate_proj.weight", f"{p}mlp.up_proj.weight")
        gate = linear(f"{p}mlp.gate_proj", h)
        act = keep(gate / (1 + np.exp(-gate)) * linear(f"{p}mlp.up_proj", h), f"{p}mlp.down_proj.weight")
        x = x + linear(f"{p}mlp.down_proj", act)
    keep(_norm(c, x, tensor("model.norm.weight")), "lm_head.weight")
    return found


def windows_of(token_ids: Sequence[int], num_tokens: int, seed: int) -> list[int]:
    """`num_tokens` of a text in runs of WINDOW (the last one shorter) that start anywhere; the same seed draws the same runs."""
    rng = np.random.default_rng(seed)
    found: list[int] = []
    while len(found) < num_tokens:
        start = int(rng.integers(0, max(1, len(token_ids) - WINDOW)))
        found.extend(token_ids[start : start + min(WINDOW, num_tokens - len(found))])
    return found


def _norm(c: ModelConfig, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + np.float32(c.rms_norm_eps)) * weight
    return scaled


def _rotate(c: ModelConfig, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    half = c.head_dim // 2
    one, two = (slice(0, None, 2), slice(1, None, 2)) if c.rope_style == "interleaved" else (slice(0, half), slice(half, None))
    a, b = x[..., one], x[..., two]
    y[..., one], y[..., two] = a * cos - b * sin, a * sin + b * cos
    return y


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of one window: (T, heads, D) of q (T, heads, D) and k, v (T, kv_heads, D)."""
    n, heads, d = q.shape
    group = heads // k.shape[1]
    out = np.empty_like(q)
    future = np.triu(np.ones((n, n), bool), 1)
    for h in range(heads):
        scores = q[:, h] @ k[:, h // group].T / np.float32(np.sqrt(d))
        scores[future] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, h] = weights @ v[:, h // group] / weights.sum(1, keepdims=True)
    return out
