"""The KV codec: blocks of codes, exact rows of the block that a sequence is filling, and the attention over both.

A row at position p reads the rows of its own block exactly and all closed blocks (positions below p rounded down to 16) as codes. So what a row sees follows
from its position alone, not from how far the encoder is; and since only closed blocks are ever shared, a prefix found in the cache gives the same bits as one
computed anew. Exact rows of open blocks lie beside the blocks; of those that are gone (a half block came from another process) the codes are read.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from plugmesh.errors import ConfigError
from plugmesh.records import KvCodecContext
from plugmesh.types import BLOCK_TOKENS, KvLayout
from plugmesh_engine.batch import Rows
from plugmesh_kernels import jit
from plugmesh_million import native, pq, train
from plugmesh_million.train import Codebooks

if TYPE_CHECKING:
    from plugmesh_million.plugin import Settings

MAX_DIM, MAX_GROUP = 256, 16  # of csrc/million.h
_FIELDS = 7  # of an Entry there


def build_codec(settings: Settings, context: KvCodecContext) -> MillionKv:
    """Raises ConfigError where there are no codebooks and none can be trained, or for a model of an unusual shape."""
    c = context.config
    if c.head_dim % 16 or c.head_dim > MAX_DIM or c.num_heads > MAX_GROUP * c.num_kv_heads:
        raise ConfigError(f"plugin million needs a head_dim that 16 divides, up to {MAX_DIM}, not {c.head_dim}", plugin="million")
    return MillionKv(context, train.codebooks(settings, c, context.model_version), settings.asynchronous, settings.max_open_blocks)


class MillionKv:
    """Implements `plugmesh_engine.seams.KvCodec` and is its own `KvMemory`.

    Args:
        asynchronous: Rows of open blocks are encoded on a thread between the steps.
        is_native: None takes the compiled code where it can run; False never.
    """

    def __init__(self, context: KvCodecContext, books: Codebooks, asynchronous: bool = True, max_open_blocks: int = 64, is_native: bool | None = None) -> None:
        c = self._config = context.config
        self._shape = (c.num_layers, 2, c.num_kv_heads, c.head_dim // pq.DIM, BLOCK_TOKENS)
        self.blocks = np.zeros((context.num_blocks + 1, int(np.prod(self._shape))), np.uint8)
        self._bad = np.zeros(context.num_blocks + 1, np.uint8)
        self.layout = KvLayout(
            model=context.model_version, codec=f"million:{books.digest()[:20]}", dtype="uint8", num_layers=c.num_layers, num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim, block_tokens=BLOCK_TOKENS, block_bytes=self.blocks.shape[1],
        )  # fmt: skip
        self.books = books
        self.open = OpenBlocks((c.num_layers, 2, BLOCK_TOKENS, c.num_kv_heads, c.head_dim), max_open_blocks)
        self._library = None if is_native is False else native.library()
        if is_native and self._library is None:
            raise ConfigError("plugin million: the compiled code cannot run here", plugin="million")
        self._entries: list[_Entry] = []
        self._numpy_books: np.ndarray | None = None
        self.capsule: object | None = None
        self._handle: int | None = None
        if self._library is not None:
            self._open_native(self._library, asynchronous)

    def _open_native(self, library: ctypes.CDLL, asynchronous: bool) -> None:
        c, books = self._config, self.books
        shape = np.array([c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim], np.int32)
        self._handle = library.million_open(
            shape.ctypes.data, self.blocks.ctypes.data, self.blocks.shape[1], self._bad.ctypes.data, books.centroids.ctypes.data, len(books.centroids),
            books.index.ctypes.data, asynchronous,
        )  # fmt: skip
        held = (self.blocks, self._bad, books)  # the thread must end before the memory that it writes goes
        self._finalizer = weakref.finalize(self, lambda close, handle, _: close(handle), library.million_close, self._handle, held)
        self.capsule = jit.capsule(library.million_attention, "plugmesh.attention.v2", self._handle)
        from plugmesh_engine import capsules

        self._call = capsules.attention(self.capsule)

    @property
    def memory(self) -> MillionKv:
        return self

    def set_delay(self, seconds: float) -> None:
        """For tests: the encoder waits so long before it starts."""
        if self._library is not None and self._handle is not None:
            self._library.million_set_delay(self._handle, int(seconds * 1e6))

    def counts(self) -> tuple[int, int]:
        """Rows encoded on the encoder's thread, and how often a step had to wait for it."""
        found = np.zeros(2, np.int64)
        if self._library is not None and self._handle is not None:
            self._library.million_counts(self._handle, found.ctypes.data)
        return int(found[0]), int(found[1])

    # -- the attention

    def plan(self, rows: Sequence[Rows]) -> None:
        self._drain()
        table: list[int] = []
        slots: list[int] = []
        fields: list[tuple[int, ...]] = []
        entries: list[_Entry] = []
        at = 0
        self.open.start_step()
        for r in rows:
            n, position = len(r.token_ids), r.num_computed
            last = position + n - 1
            first_open = position // BLOCK_TOKENS if r.num_wanted > 1 else last // BLOCK_TOKENS  # drafts may be taken back into any of their blocks
            held = self.open.enter(r.blocks, position)
            begin = len(slots)
            for index in range(position // BLOCK_TOKENS, last // BLOCK_TOKENS + 1):
                block = r.blocks[index]
                if index >= first_open or (index == position // BLOCK_TOKENS and held):
                    lowest, highest = max(position, index * BLOCK_TOKENS), min(last, index * BLOCK_TOKENS + BLOCK_TOKENS - 1)
                    slots.append(self.open.take(block, lowest % BLOCK_TOKENS, highest % BLOCK_TOKENS + 1))
                else:
                    slots.append(0)
            fields.append((at, n, position, len(table), begin, held, last // BLOCK_TOKENS * BLOCK_TOKENS))
            entries.append(_Entry(at, n, position, tuple(r.blocks), held))
            table.extend(r.blocks[: last // BLOCK_TOKENS + 1])
            at += n
        self._entries = entries
        for e in entries:
            for index in range(e.position // BLOCK_TOKENS, (e.position + e.num_rows - 1) // BLOCK_TOKENS + 1):
                if index * BLOCK_TOKENS >= e.position:
                    self._bad[e.blocks[index]] = 0
        if self._library is not None:
            given = np.array(fields, np.int64).reshape(-1, _FIELDS), np.array(table, np.int32), np.array(slots, np.int64)
            self._library.million_plan(
                self._handle, given[0].ctypes.data, len(fields), given[1].ctypes.data, len(table), given[2].ctypes.data, len(slots)
            )

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
        if self.capsule is not None:
            made = np.empty(q.shape, np.float32)
            self._call(layer, np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v), made)
            out[:] = made
            return
        k, v = pq.round_bfloat16(k), pq.round_bfloat16(v)
        for e in self._entries:
            self._store(layer, e, k, v)
        for e in self._entries:
            for row in range(e.num_rows):
                out[e.row + row] = self._attend_row(layer, e, e.position + row, q[e.row + row], k, v)

    def _store(self, layer: int, e: _Entry, k: np.ndarray, v: np.ndarray) -> None:
        """The numpy form; all rows are encoded at once."""
        for row in range(e.num_rows):
            position = e.position + row
            block, slot = e.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS
            opened = self.open.rows(block)
            for part, x in enumerate((k[e.row + row], v[e.row + row])):
                if opened is not None:
                    opened[layer, part, slot] = pq.to_bfloat16(x)
                for head in range(self._config.num_kv_heads):
                    self.blocks[block].reshape(self._shape)[layer, part, head, :, slot] = pq.encode(x[head], self._book(layer, part, head))
                if not np.isfinite(x).all():
                    self._bad[block] = 1

    def _attend_row(self, layer: int, e: _Entry, position: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        c = self._config
        closed = position // BLOCK_TOKENS
        codes = self.blocks[list(e.blocks[:closed])].reshape(closed, *self._shape)[:, layer].transpose(1, 2, 0, 4, 3).reshape(2, c.num_kv_heads, -1, self._shape[3])
        exact = np.stack([self._exact_row(layer, e, p, k, v) for p in range(closed * BLOCK_TOKENS, position + 1)])  # (r, 2, kv_heads, D)
        heads = []
        for h in range(c.num_heads):
            g = h // (c.num_heads // c.num_kv_heads)
            with np.errstate(all="ignore"):
                heads.append(pq.attend(q[h], codes[0, g], codes[1, g], self._book(layer, 0, g), self._book(layer, 1, g), exact[:, 0, g], exact[:, 1, g]))
        return np.stack(heads)

    def _exact_row(self, layer: int, e: _Entry, position: int, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """(2, kv_heads, D) of a position of the open block."""
        slot = position % BLOCK_TOKENS
        if position >= e.position:
            return np.stack([k[e.row + position - e.position], v[e.row + position - e.position]])
        block = e.blocks[position // BLOCK_TOKENS]
        opened = self.open.rows(block)
        if opened is not None and e.held >> slot & 1:
            return pq.widen(opened[layer, :, slot])
        codes = self.blocks[block].reshape(self._shape)[layer, :, :, :, slot]
        return np.stack([[pq.decode(codes[part, g], self._book(layer, part, g)) for g in range(self._config.num_kv_heads)] for part in range(2)])

    def _book(self, layer: int, part: int, head: int) -> np.ndarray:
        """(M, 2, 256) float32."""
        if self._numpy_books is None:
            self._numpy_books = pq.widen(self.books.centroids)
        found: np.ndarray = self._numpy_books[self.books.index[layer, part, head]]
        return found

    def _drain(self) -> None:
        """Codes are final after it."""
        if self._library is not None and self._handle is not None:
            self._library.million_drain(self._handle)

    def close(self) -> None:
        if self._handle is not None:
            self._finalizer()
            self._handle = None

    # -- the memory

    def zero(self, block: int) -> None:
        self._drain()
        self.blocks[block] = 0
        self._bad[block] = 0
        self.open.drop(block)

    def copy(self, source: int, target: int) -> None:
        self._drain()
        self.blocks[target] = self.blocks[source]
        self._bad[target] = self._bad[source]
        self.open.copy(source, target)

    def read(self, block: int) -> memoryview:
        self._drain()
        return self.blocks[block].data

    def write(self, block: int, data: bytes | bytearray | memoryview, num_tokens: int) -> None:
        self._drain()
        self.blocks[block] = np.frombuffer(data, np.uint8)
        self.blocks[block].reshape(-1, BLOCK_TOKENS)[:, num_tokens:] = 0
        self._bad[block] = 0
        self.open.drop(block)

    def all_finite(self, blocks: Sequence[int]) -> bool:
        """Codes are always finite; what is meant is what they stand for."""
        return not self._bad[list(blocks)].any()


class _Entry:
    """Rows of one sequence in a step; see Entry in csrc/million.h."""

    __slots__ = ("blocks", "held", "num_rows", "position", "row")

    def __init__(self, row: int, num_rows: int, position: int, blocks: tuple[int, ...], held: int) -> None:
        self.row, self.num_rows, self.position, self.blocks, self.held = row, num_rows, position, blocks, held


class OpenBlocks:
    """Exact rows of the blocks that sequences are filling, bfloat16 (layers, 2, 16, kv_heads, head_dim) each.

    A block's rows go when its sequence has moved on to the next one, when the block is written or zeroed, or when more than `limit` are held and others were
    used later: what is lost is read as codes then.
    """

    def __init__(self, shape: tuple[int, ...], limit: int) -> None:
        self._shape, self._limit = shape, limit
        self._held: OrderedDict[int, tuple[np.ndarray, int]] = OrderedDict()  # block to rows and the slots that are valid, least recently used first
        self._free: list[np.ndarray] = []
        self._in_step: set[int] = set()

    @property
    def num_bytes(self) -> int:
        return (len(self._held) + len(self._free)) * int(np.prod(self._shape)) * 2

    def start_step(self) -> None:
        self._in_step.clear()

    def enter(self, blocks: Sequence[int], position: int) -> int:
        """Bits of the slots before `position` that are held of its block; what was held of the blocks just before goes."""
        index, slot = divmod(position, BLOCK_TOKENS)
        for block in blocks[max(0, index - 2) : index]:
            if block not in self._in_step:
                self.drop(block)
        if slot == 0 or blocks[index] not in self._held:
            return 0
        return self._held[blocks[index]][1] & ((1 << slot) - 1)

    def take(self, block: int, first: int, end: int) -> int:
        """The address of a block's rows, of which those from slot `first` to `end` are about to be stored; what was held behind them is void."""
        rows, valid = self._held.pop(block, (None, 0))
        if rows is None:
            while len(self._held) >= self._limit:
                oldest = next(iter(self._held))
                if oldest in self._in_step:  # all of them are needed now
                    break
                self.drop(oldest)
            rows = self._free.pop() if self._free else np.empty(self._shape, np.uint16)
        self._held[block] = rows, (valid & ((1 << first) - 1)) | (((1 << end) - 1) & ~((1 << first) - 1))
        self._in_step.add(block)
        address: int = rows.ctypes.data
        return address

    def rows(self, block: int) -> np.ndarray | None:
        found = self._held.get(block)
        return None if found is None else found[0]

    def drop(self, block: int) -> None:
        found = self._held.pop(block, None)
        if found is not None and len(self._free) < 2:
            self._free.append(found[0])

    def copy(self, source: int, target: int) -> None:
        self.drop(target)
        found = self._held.get(source)
        if found is not None:
            self._held[target] = found[0].copy(), found[1]


