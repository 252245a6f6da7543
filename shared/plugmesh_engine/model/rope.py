"""Rotary positions: the angles of every position and pair. Su et al., arXiv:2104.09864."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from plugmesh.errors import ConfigError
from plugmesh.types import ModelConfig


def rope_tables(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position and pair, (max_position, head_dim / 2) float32.

    Raises:
        ConfigError: A `rope_scaling` of a kind that this engine does not know, or an unknown `rope_style`.
    """
    if config.rope_style not in ("half", "interleaved"):
        raise ConfigError(f"unknown rope_style {config.rope_style!r}")
    inverse = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    kind = str(scaling.get("rope_type", scaling.get("type", "default"))) if scaling else "default"
    if kind == "linear":
        inverse = inverse / _number(scaling, "factor")
    elif kind == "llama3":
        inverse = _llama3(inverse, scaling)
    elif kind != "default":
        raise ConfigError(f"rope_scaling of type {kind!r} is not supported")
    angles = np.outer(np.arange(config.max_position, dtype=np.float64), inverse)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _number(scaling: Mapping[str, object] | None, key: str) -> float:
    value = (scaling or {}).get(key)
    if not isinstance(value, int | float):
        raise ConfigError(f"rope_scaling needs a number {key!r}")
    return float(value)


def _llama3(inverse: np.ndarray, scaling: Mapping[str, object] | None) -> np.ndarray:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    factor, low, high = (_number(scaling, k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = _number(scaling, "original_max_position_embeddings")
    turns = trained * inverse / (2 * np.pi)  # full turns within the trained context
    keep = ((turns - low) / (high - low)).clip(0, 1)
    return inverse * (keep + (1 - keep) / factor)
