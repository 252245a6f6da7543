"""Trains codebooks on the KV of a text: `python -m plugmesh_million.train`.

Keys are taken after RoPE, as they are stored, but each is turned to a place of its own that is drawn over the whole context: slow pairs of RoPE turn keys
elsewhere at position 7,000 than at position 100, and a centroid must be near wherever a key may be. Places of whole windows would be too few: where no window
lay, such keys are far from every centroid, and the output is of no use.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import structlog

from plugmesh import models
from plugmesh.errors import ConfigError
from plugmesh.types import ModelConfig
from plugmesh_million import native, pq

if TYPE_CHECKING:
    from plugmesh_million.plugin import Settings

log = structlog.get_logger()

Scope = Literal["head", "layer", "merged"]
VERSION = 2  # of training and of the file; part of the file's name
POINTS = 16384  # that one codebook is trained on, at most
BATCH = 1024  # tokens whose inputs of all linears are in memory at once


@dataclass(frozen=True, slots=True)
class Codebooks:
    """What was trained.

    Attributes:
        centroids: (codebooks, M, 2, 256) uint16, bfloat16 bit patterns.
        index: (layers, 2, kv_heads) int32: which codebook K (0) and V (1) of a head use.
    """

    centroids: np.ndarray
    index: np.ndarray

    def digest(self) -> str:
        """Of all that decides what a code means."""
        return hashlib.sha256(self.centroids.tobytes() + self.index.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides how codebooks come out, beside the model."""

    scope: Scope = "layer"
    tokens: int = 8192
    iterations: int = 15
    seed: int = 0


def codebook_index(config: ModelConfig, scope: Scope) -> np.ndarray:
    """(layers, 2, kv_heads) int32."""
    layers, heads = config.num_layers, config.num_kv_heads
    everything = np.arange(layers * 2 * heads, dtype=np.int32).reshape(layers, 2, heads)
    if scope == "head":
        return everything
    index = np.arange(layers * 2, dtype=np.int32) if scope == "layer" else np.tile(np.arange(2, dtype=np.int32), layers)
    return np.broadcast_to(index.reshape(layers, 2, 1), everything.shape).copy()


def fit(config: ModelConfig, keys: np.ndarray, values: np.ndarray, recipe: Recipe) -> Codebooks:
    """Codebooks for K and V (layers, T, kv_heads, head_dim) float32."""
    index = codebook_index(config, recipe.scope)
    library = native.library()
    found = np.zeros((int(index.max()) + 1, config.head_dim // pq.DIM, pq.DIM, pq.CENTROIDS), np.uint16)
    kv = np.stack([keys, values], axis=1)  # (layers, 2, T, heads, D)
    for book in range(len(found)):
        rows = np.concatenate([kv[layer, part, :, head] for layer, part, head in np.argwhere(index == book)])
        rng = np.random.default_rng((recipe.seed, book))
        if len(rows) > POINTS:
            rows = rows[rng.choice(len(rows), POINTS, replace=False)]
        for m in range(found.shape[1]):
            points = np.ascontiguousarray(rows[:, pq.DIM * m : pq.DIM * (m + 1)])
            found[book, m] = pq.to_bfloat16(pq.kmeans(points, _assign_native if library else _assign, recipe.iterations, rng))
    return Codebooks(found, index)


def _assign(points: np.ndarray, book: np.ndarray) -> np.ndarray:
    return pq.encode(points, book[None])[:, 0]


def _assign_native(points: np.ndarray, book: np.ndarray) -> np.ndarray:
    library = native.library()
    assert library is not None
    book = np.ascontiguousarray(book, np.float32)
    codes = np.empty(len(points), np.uint8)
    library.million_assign(points.ctypes.data, len(points), book[0].ctypes.data, book[1].ctypes.data, codes.ctypes.data)
    return codes


# -- the KV of a text ------------------------------------------------------------------------------------------------------------------------------------


def kv_of(config: ModelConfig, weights: dict[str, np.ndarray], token_ids: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """K after RoPE, each at a random place of the context, and V, of a text in windows: each (layers, T, kv_heads, head_dim) float32."""
    from plugmesh_engine import calibration
    from plugmesh_engine.model.rope import rope_tables

    c = config
    keys = np.empty((c.num_layers, len(token_ids), c.num_kv_heads, c.head_dim), np.float32)
    values = np.empty_like(keys)
    cos, sin = rope_tables(c)
    rng = np.random.default_rng((seed, 1))
    for start in range(0, len(token_ids), BATCH):
        ids = token_ids[start : start + BATCH]
        inputs = calibration.linear_inputs(c, weights.__getitem__, ids)
        positions = (rng.random(len(ids)) ** 2 * c.max_position).astype(np.int64)  # a quarter of them in the first sixteenth, where most requests are
        at = slice(start, start + len(ids))
        for i in range(c.num_layers):
            name = f"model.layers.{i}.self_attn."
            k, v = (_linear(inputs, weights, f"{name}{part}_proj").reshape(len(ids), c.num_kv_heads, c.head_dim) for part in "kv")
            keys[i, at] = rotate(c, k, cos[positions][:, None], sin[positions][:, None])
            values[i, at] = v
    return keys, values


def _linear(inputs: dict[str, np.ndarray], weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    y: np.ndarray = inputs[f"{name}.weight"] @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def rotate(config: ModelConfig, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE of x (T, heads, D) with cos and sin (T, 1, D / 2)."""
    y = np.empty_like(x)
    half = config.head_dim // 2
    one, two = (slice(0, None, 2), slice(1, None, 2)) if config.rope_style == "interleaved" else (slice(0, half), slice(half, None))
    a, b = x[..., one], x[..., two]
    y[..., one], y[..., two] = a * cos - b * sin, a * sin + b * cos
    return y


def train_model(path: pathlib.Path, expected: ModelConfig, recipe: Recipe) -> Codebooks:
    """Codebooks of a GGUF file's model, from English that every CPython carries. About a minute for SmolLM2-135M on two cores.

    Raises:
        ConfigError: The file holds another model than `expected`.
    """
    from plugmesh_engine.calibration import windows_of
    from plugmesh_engine.testing import english, gguf_tokenizer, read_gguf

    start = time.monotonic()
    config, weights = read_gguf(path)
    for field in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_style"):
        if getattr(config, field) != getattr(expected, field):
            raise ConfigError(
                f"plugins.million.model: {path.name} has {field} {getattr(config, field)}, but the served model {getattr(expected, field)}", key="plugins.million.model"
            )
    ids = windows_of(gguf_tokenizer(path).encode(english(), add_special_tokens=False).ids, recipe.tokens, recipe.seed)
    books = fit(expected, *kv_of(expected, weights, ids, recipe.seed), recipe)
    log.info("million.trained", num_tokens=len(ids), num_codebooks=len(books.centroids), seconds=round(time.monotonic() - start, 1))
    return books


# -- files -----------------------------------------------------------------------------------------------------------------------------------------------


def file_of(folder: pathlib.Path, model_version: str, recipe: Recipe) -> pathlib.Path:
    """Where the codebooks of a model and recipe are kept."""
    named = json.dumps([VERSION, model_version, asdict(recipe)])
    return folder / f"{hashlib.sha256(named.encode()).hexdigest()[:24]}.safetensors"


def save(path: pathlib.Path, books: Codebooks) -> None:
    """At once and complete."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        save_file({"centroids": books.centroids, "index": books.index}, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: pathlib.Path, config: ModelConfig) -> Codebooks:
    """Raises ConfigError for a file that does not fit the model."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(path)
        books = Codebooks(found["centroids"], found["index"])
    except (OSError, SafetensorError, KeyError) as e:
        raise ConfigError(f"plugins.million.codebooks: {path} cannot be read: {e}", key="plugins.million.codebooks") from e
    shapes = (config.head_dim // pq.DIM, pq.DIM, pq.CENTROIDS), (config.num_layers, 2, config.num_kv_heads)
    is_right = books.centroids.dtype == np.uint16 and books.centroids.shape[1:] == shapes[0] and books.index.dtype == np.int32
    if not is_right or books.index.shape != shapes[1] or books.index.min() < 0 or books.index.max() >= len(books.centroids):
        raise ConfigError(f"plugins.million.codebooks: {path} is for a model of another shape", key="plugins.million.codebooks")
    return books


def codebooks(settings: Settings, config: ModelConfig, model_version: str) -> Codebooks:
    """The kept ones, or trained now and kept; processes that start together train once.

    Raises:
        ConfigError: There are none, and the setting `model` names no GGUF file of the served model on this machine.
    """
    recipe = Recipe(settings.scope, settings.tokens, settings.iterations, settings.seed)
    path = file_of(pathlib.Path(settings.codebooks).expanduser(), model_version, recipe)
    if path.is_file():
        return load(path, config)
    source = models.find(settings.model)
    if source is None or source.suffix != ".gguf":
        raise ConfigError(
            f"plugins.million.model: no codebooks are trained for model {model_version[:12]}, and {settings.model!r} is no GGUF file on this machine to train "
            f"them with ({path} would hold them)", key="plugins.million.model",
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_suffix(".lock")):
        if not path.is_file():
            save(path, train_model(source, config, recipe))
    return load(path, config)


class _alone:
    """Holds a file's lock; the end of the process lets go of it as well."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _entropies(books: Codebooks, keys: np.ndarray, values: np.ndarray) -> Iterator[float]:
    """Of the codes of each layer's first head, K and V, in bits, averaged over subspaces."""
    for layer in range(len(keys)):
        for part, x in enumerate((keys, values)):
            codes = pq.encode(x[layer, :, 0], pq.widen(books.centroids[books.index[layer, part, 0]]))
            shares = np.stack([np.bincount(column, minlength=pq.CENTROIDS) for column in codes.T]) / len(codes)
            yield float(-(shares * np.log2(np.maximum(shares, 1e-12))).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="known name or GGUF file")
    parser.add_argument("--version", required=True, help="of the model, as `plugmesh status` shows it")
    parser.add_argument("--scope", choices=("head", "layer", "merged"), default="layer")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="~/.cache/plugmesh/million")
    args = parser.parse_args()
    from plugmesh_engine.testing import read_gguf

    source = models.find(args.model)
    if source is None:
        parser.error(f"{args.model} is not on this machine")
    recipe = Recipe(args.scope, args.tokens, args.iterations, args.seed)
    books = train_model(source, read_gguf(source)[0], recipe)
    path = file_of(pathlib.Path(args.folder).expanduser(), args.version, recipe)
    save(path, books)
    print(path)


if __name__ == "__main__":
    main()
