"""Which tokens the last one looks at, as one early layer sees it. Needs numpy only.

Algorithm 1 of GemFilter (Shi et al., arXiv:2409.17422) with protected ends: score_j = sum over heads of q_last . k_j, without scale and softmax, averaged over a
window of neighbours, the highest k in their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from plugmesh.errors import ConfigError
from plugmesh.records import PromptFilterContext

if TYPE_CHECKING:
    from plugmesh_gemfilter.plugin import Settings


def scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """(n,) float32: the products of all query heads with every key, summed over heads and queries.

    Because no softmax comes between, the heads that share a KV head can be summed before the product; that makes it 9 heads / 3 KV heads times cheaper.

    Args:
        q: (Q, heads, head_dim) of the tokens that ask.
        k: (n, kv_heads, head_dim).
    """
    num_queries, num_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    asked = q.reshape(num_queries, num_kv_heads, num_heads // num_kv_heads, dim).sum(axis=(0, 2), dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # `choose` refuses what is not finite
        return np.asarray(k.reshape(len(k), num_kv_heads * dim) @ asked.reshape(-1))


def pooled(values: np.ndarray, width: int) -> np.ndarray:
    """Means over windows of `width` (odd) around each value; outside of the array there are zeros, as in the authors' code."""
    padded = np.pad(values.astype(np.float64), width // 2)
    sums = np.concatenate([[0.0], np.cumsum(padded)])
    return (sums[width:] - sums[:-width]) / width


def choose(values: np.ndarray, keep: int, keep_first: int = 0, keep_last: int = 0) -> np.ndarray:
    """Ascending indices of the `keep` highest values, the first of equals, the ends among them whatever their values. All when there are not more.

    Raises:
        ValueError: A value is not finite, so that there is no highest.
    """
    n = len(values)
    if keep >= n:
        return np.arange(n)
    if not np.isfinite(values).all():
        raise ValueError("a score is not finite")
    ranked = values.astype(np.float64)
    ranked[:keep_first] = np.inf
    if keep_last:
        ranked[-keep_last:] = np.inf
    return np.sort(np.argsort(-ranked, kind="stable")[:keep])


class GemFilter:
    """Implements `plugmesh.records.PromptFilter`.

    Args:
        layer: Its queries and keys are compared; zero-based, those before it are computed.
        keep: Tokens that the whole model reads.
        min_prompt_tokens: Shorter prompts are read whole: two stages cost more than they save.
    """

    def __init__(self, layer: int, keep: int, *, keep_first: int = 0, keep_last: int = 0, pool_width: int = 5, min_prompt_tokens: int = 0) -> None:
        self.layer, self.keep, self.keep_first, self.keep_last = layer, keep, keep_first, keep_last
        self.pool_width, self.min_prompt_tokens = pool_width, min_prompt_tokens

    def layers(self, num_prompt_tokens: int) -> int:
        return self.layer if num_prompt_tokens >= max(self.min_prompt_tokens, self.keep + 1) else 0

    def select(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return choose(pooled(scores(q, k), self.pool_width), self.keep, self.keep_first, self.keep_last)


def build_filter(settings: Settings, engine: PromptFilterContext) -> GemFilter:
    """Raises ConfigError when the model has no such layer."""
    num_layers = engine.config.num_layers
    layer = settings.layer or min(max(1, round(settings.depth * num_layers)), num_layers - 1)
    if not 1 <= layer < num_layers:
        raise ConfigError(f"plugins.gemfilter.layer: {layer} must lie between 1 and {num_layers - 1}, the model's last layer", key="plugins.gemfilter.layer")
    return GemFilter(
        layer, settings.keep_tokens, keep_first=settings.keep_first, keep_last=settings.keep_last, pool_width=settings.pool_width,
        min_prompt_tokens=settings.min_prompt_tokens,
    )  # fmt: skip
