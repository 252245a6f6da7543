"""The KV codec "qserve-kv4": four-bit keys and values per token and head, and attention on the codes.

A head of a token is head_dim / 2 bytes of codes, a scale and an offset in half precision: x = code * scale + offset, scale = (max - min) / 15, offset = min.
The paper stores scale and a zero point -min / scale that is not rounded; the offset says the same, is as exact for heads far from zero with a small range,
and needs no division by a range of zero. Source: QServe, arXiv:2405.04532, section 4.2; csrc/kv4.cpp has the order of the bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plugmesh.errors import ConfigError
from plugmesh.records import KvCodecContext, KvCodecRecord
from plugmesh.types import BLOCK_TOKENS, KvLayout, ModelConfig
from plugmesh_engine.batch import Rows
from plugmesh_kernels import jit
from plugmesh_qserve.weights import library

NAME = "qserve-kv4"
KEYS, VALUES = 0, 1
_LARGEST = np.float32(65504)  # of half precision


def record() -> KvCodecRecord:
    return KvCodecRecord(NAME, Kv4)


def encode(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Heads (..., D) as codes (..., D) uint8, scales and offsets (...) float16, as the kernel makes them. A head that is not finite has NaN for both."""
    x = np.asarray(x, np.float32)
    finite = np.isfinite(x).all(-1)
    safe = np.where(finite[..., None], x, np.float32(0))
    low, high = safe.min(-1) + np.float32(0), safe.max(-1)  # one zero, whichever sign it has
    with np.errstate(over="ignore"):
        scales = np.minimum((high - low) / np.float32(15), _LARGEST).astype(np.float16)
    offsets = np.clip(low, -_LARGEST, _LARGEST).astype(np.float16)
    s, o = scales.astype(np.float32)[..., None], offsets.astype(np.float32)[..., None]
    codes = np.clip(np.rint((safe - o) / np.where(s > 0, s, np.float32(1))), 0, 15) * (s > 0) * finite[..., None]
    nan = np.float16(np.nan)
    return codes.astype(np.uint8), np.where(finite, scales, nan), np.where(finite, offsets, nan)


def decode(codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Inverse of `encode`, float32."""
    values: np.ndarray = codes.astype(np.float32) * scales.astype(np.float32)[..., None] + offsets.astype(np.float32)[..., None]
    return values


class Memory:
    """Blocks of packed KV. Implements `plugmesh_engine.seams.KvMemory`.

    Attributes:
        units: (blocks, layers, 2, kv_heads) records of codes (16 * D / 2), scales (16) and offsets (16).
    """

    def __init__(self, config: ModelConfig, num_blocks: int) -> None:
        c = config
        self._half = c.head_dim // 2
        unit = np.dtype([("codes", "u1", (BLOCK_TOKENS * self._half,)), ("scales", "f2", (BLOCK_TOKENS,)), ("offsets", "f2", (BLOCK_TOKENS,))])
        self.units = np.zeros((num_blocks + 1, c.num_layers, 2, c.num_kv_heads), unit)

    def zero(self, block: int) -> None:
        self._bytes(block)[:] = 0

    def copy(self, source: int, target: int) -> None:
        self._bytes(target)[:] = self._bytes(source)

    def read(self, block: int) -> memoryview:
        return self._bytes(block).data

    def write(self, block: int, data: bytes | bytearray | memoryview, num_tokens: int) -> None:
        self._bytes(block)[:] = np.frombuffer(data, np.uint8)
        units = self.units[block]
        shape = units.shape[:1] + units.shape[2:]
        keys = units["codes"][:, KEYS].reshape(*shape, self._half, BLOCK_TOKENS)
        values = units["codes"][:, VALUES].reshape(*shape, BLOCK_TOKENS, self._half)
        keys[..., num_tokens:], values[..., num_tokens:, :] = 0, 0
        units["scales"][..., num_tokens:], units["offsets"][..., num_tokens:] = 0, 0
        units["codes"][:, KEYS], units["codes"][:, VALUES] = keys.reshape(*shape, -1), values.reshape(*shape, -1)  # in case the reshape was a copy

    def all_finite(self, blocks: Sequence[int]) -> bool:
        units = self.units[list(blocks)]
        return bool(np.isfinite(units["scales"]).all() and np.isfinite(units["offsets"]).all())

    def _bytes(self, block: int) -> np.ndarray:
        flat: np.ndarray = self.units[block].reshape(-1).view(np.uint8)
        return flat

    def put(self, layer: int, kind: int, block: int, slot: int, heads: np.ndarray) -> None:
        """Stores one token, (kv_heads, D)."""
        codes, scales, offsets = encode(heads)
        both = codes[:, : self._half] | codes[:, self._half :] << 4
        at = self.units[block, layer, kind]
        for h in range(len(heads)):
            place = at["codes"][h]
            if kind == KEYS:
                place[slot::BLOCK_TOKENS] = both[h]
            else:
                place[slot * self._half : (slot + 1) * self._half] = both[h]
        at["scales"][:, slot], at["offsets"][:, slot] = scales, offsets

    def rows(self, layer: int, kind: int, blocks: Sequence[int], length: int) -> np.ndarray:
        """(length, kv_heads, D) float32 of the first positions of a sequence."""
        at = self.units[list(blocks)[: -(-length // BLOCK_TOKENS)], layer, kind]  # (blocks, kv_heads)
        if kind == KEYS:
            both = at["codes"].reshape(*at.shape, self._half, BLOCK_TOKENS).swapaxes(-1, -2)
        else:
            both = at["codes"].reshape(*at.shape, BLOCK_TOKENS, self._half)
        values = decode(np.concatenate((both & 15, both >> 4), axis=-1), at["scales"], at["offsets"])  # (blocks, kv_heads, 16, D)
        found: np.ndarray = values.swapaxes(1, 2).reshape(-1, at.shape[1], 2 * self._half)[:length]
        return found


class Kv4:
    """Implements `plugmesh_engine.seams.KvCodec`; with a compiler by a capsule, else in numpy.

    Args:
        kernels: Gives the compiled code for flags of the compiler, or None for numpy; tests give others than this machine's.
    """

    def __init__(self, context: KvCodecContext, kernels: Callable[..., ctypes.CDLL | None] = library) -> None:
        c = context.config
        if c.head_dim % 2:
            raise ConfigError(f"plugin qserve packs two channels into a byte, but the heads of this model have {c.head_dim}")
        self._config = c
        self.memory = Memory(c, context.num_blocks)
        self.layout = KvLayout(
            model=context.model_version, codec=NAME, dtype="uint4", num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim,
            block_tokens=BLOCK_TOKENS, block_bytes=self.memory.units[0].nbytes,
        )  # fmt: skip
        self._rows: Sequence[Rows] = ()
        self._lib: Any = kernels()
        if self._lib is not None and c.head_dim % self._lib.qserve_width():
            self._lib = kernels("-DQSERVE_PORTABLE=1")
        self._plan = np.zeros(10, np.int64)  # the struct of csrc/kv4.cpp
        self._plan[:5] = self.memory.units.ctypes.data, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim
        self._arrays: tuple[np.ndarray, ...] = ()
        if self._lib is not None:
            self._attention = self._lib.qserve_attention
            self._tile = int(self._lib.qserve_tile())
            self.capsule = jit.capsule(self._attention, "plugmesh.attention.v2", self._plan.ctypes.data)

    def plan(self, rows: Sequence[Rows]) -> None:
        self._rows = rows
        if self._lib is None:
            return
        counts = [len(r.token_ids) for r in rows]
        positions = np.concatenate([np.arange(r.num_computed, r.num_computed + n, dtype=np.int32) for r, n in zip(rows, counts, strict=True)])
        begins = np.cumsum([0, *(len(r.blocks) for r in rows)])[:-1]
        tables = np.repeat(begins, counts).astype(np.int64)
        blocks = np.concatenate([np.asarray(r.blocks, np.int32) for r in rows])
        tiles: list[tuple[int, int]] = []
        first = 0
        for n in counts:
            tiles += [(first + i, min(self._tile, n - i)) for i in range(0, n, self._tile)]
            first += n
        tile_array = np.array(tiles, np.int32)
        self._arrays = (positions, tables, blocks, tile_array)  # as long as the kernel may read them
        self._plan[5:10] = *(a.ctypes.data for a in self._arrays), len(tiles)

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
        if self._lib is None:
            self._attend_slowly(layer, q, k, v, out)
            return
        q, k, v = (np.ascontiguousarray(x, np.float32) for x in (q, k, v))
        into = out if out.flags.c_contiguous else np.empty(out.shape, np.float32)
        p = ctypes.c_void_p
        self._attention(
            p(self._plan.ctypes.data), layer, p(q.ctypes.data), p(k.ctypes.data), p(v.ctypes.data), len(q), p(into.ctypes.data), 0, 1, None, None,
        )  # fmt: skip
        if into is not out:
            out[:] = into

    def _attend_slowly(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
        """Row by row, each as if it were alone."""
        c, at = self._config, 0
        for r in self._rows:
            end = at + len(r.token_ids)
            for row, position in zip(range(at, end), range(r.num_computed, r.num_computed + end - at), strict=True):
                block, slot = r.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS
                self.memory.put(layer, KEYS, block, slot, k[row])
                self.memory.put(layer, VALUES, block, slot, v[row])
            for row, position in zip(range(at, end), range(r.num_computed, r.num_computed + end - at), strict=True):
                keys, values = (self.memory.rows(layer, kind, r.blocks, position + 1) for kind in (KEYS, VALUES))
                grouped = q[row].reshape(c.num_kv_heads, -1, c.head_dim)
                scores = np.einsum("gnd,tgd->gnt", grouped, keys) / np.sqrt(np.float32(c.head_dim))
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[row] = np.einsum("gnt,tgd->gnd", weights / weights.sum(-1, keepdims=True), values).reshape(out[row].shape)
            at = end

    def close(self) -> None:
        pass
