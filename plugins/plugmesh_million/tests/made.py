"""Codebooks and rows for the tests: made up, with the strong channels that keys of models have."""

from __future__ import annotations

import numpy as np

from plugmesh.records import KvCodecContext
from plugmesh.types import ModelConfig
from plugmesh_engine.testing import tiny_config
from plugmesh_million import train
from plugmesh_million.codec import MillionKv

CONFIG = tiny_config(hidden_size=96, intermediate_size=64, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16, max_position=2048)


def rows(config: ModelConfig, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v of n rows."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, heads, config.head_dim)).astype(np.float32) for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads))
    k[..., :2] *= 4
    return q, k, v


def books(config: ModelConfig, recipe: train.Recipe | None = None, num_tokens: int = 1500) -> train.Codebooks:
    """Trained on rows like those of `rows`; layer i sees them times i + 1, as the conformance suite feeds them."""
    parts = [[(1 + layer) * x for layer in range(config.num_layers)] for x in rows(config, num_tokens, 1234)[1:]]
    return train.fit(config, np.stack(parts[0]), np.stack(parts[1]), recipe or train.Recipe(iterations=4))


def codec(found: train.Codebooks, *, is_native: bool | None = None, asynchronous: bool = True, num_blocks: int = 64, limit: int = 64,
          config: ModelConfig = CONFIG) -> MillionKv:  # fmt: skip
    return MillionKv(KvCodecContext(config, "made", num_blocks, 1), found, asynchronous, limit, is_native)
