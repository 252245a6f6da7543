"""The weight formats "dfloat11" and "dfloat11-plain": how a model is packed, and what stands for its matrices in an engine.

Two ways from containers to products, equal in every bit:

    tiles    each linear decodes a few rows at a time into the cache and multiplies by them; nothing is ever decoded as a whole
    layers   before each layer its matrices are decoded into one buffer that all layers share, before the head the head into one of its own (the paper's way)

An embedding's rows are decoded when a token asks for them, 16 at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import structlog

import plugmesh_kernels
from plugmesh.errors import DataLoss, FailedPrecondition
from plugmesh.records import Foreign, LoadedWeights, PackedTensor, PluginWeights, WeightFormatRecord, WeightSource
from plugmesh_dfloat11 import container, layout, native
from plugmesh_dfloat11.container import Container
from plugmesh_dfloat11.layout import EMBEDDING, FORMAT, HEAD, PLAIN, Matrix
from plugmesh_dfloat11.plugin import Settings
from plugmesh_engine.foreign import aligned
from plugmesh_kernels import jit
from plugmesh_kernels.pack import unpack

log = structlog.get_logger()

Buffer = tuple[str, tuple[int, ...], np.ndarray]


@dataclass(frozen=True, slots=True)
class Weights:
    """Implements `plugmesh.records.PluginWeights`. `kept` is what the capsules' contexts point at."""

    num_bytes: int
    linears: Mapping[str, Foreign] = field(default_factory=dict)
    buffers: Mapping[str, Buffer] = field(default_factory=dict)
    before_layer: Foreign | None = None
    embedding: Foreign | None = None
    kept: tuple[object, ...] = ()


def compressed(settings: Settings) -> WeightFormatRecord:
    """Containers."""
    return WeightFormatRecord(FORMAT, lambda source: _pack(source, settings), lambda weights: _load(weights, settings), is_lossless=True, variant="1")


def plain(settings: Settings) -> WeightFormatRecord:
    """The same values uncompressed, multiplied by the executor's own kernels: what the compressed ones are compared with."""
    return WeightFormatRecord(PLAIN, lambda source: _pack_plain(source, settings), _load_plain, is_lossless=True, variant="1")


# -- packing ------------------------------------------------------------------------------------------------------------------------------------------


def _pack(source: WeightSource, settings: Settings) -> Iterator[PackedTensor]:
    c = source.config
    for name in source.names():
        if len(source.shape(name)) == 1:
            yield source.native(name)
    for layer in range(c.num_layers):
        values = np.concatenate([_values(source, m.name, settings) for m in layout.layer_matrices(c, layer)])
        yield PackedTensor(layout.layer_name(layer), f"{FORMAT}/container", (len(values),), [container.encode(values)])
    for name in (EMBEDDING, HEAD):
        if name in source.names() and not (name == HEAD and c.tie_word_embeddings):
            yield PackedTensor(name, f"{FORMAT}/container", source.shape(name), [container.encode(_values(source, name, settings))])


def _pack_plain(source: WeightSource, settings: Settings) -> Iterator[PackedTensor]:
    for name in source.names():
        shape = source.shape(name)
        yield PackedTensor(name, "bf16x16", shape, [_values(source, name, settings).view(np.uint8)]) if len(shape) == 2 else source.native(name)


def _values(source: WeightSource, name: str, settings: Settings) -> np.ndarray:
    values = source.tensor(name)
    if not settings.round_to_bfloat16 and (count := layout.num_rounded(values)):
        raise FailedPrecondition(f"{name}: {count} values are no bfloat16 and round_to_bfloat16 is off", param="weight_format")
    return layout.packed(values)


# -- loading ------------------------------------------------------------------------------------------------------------------------------------------


def _load_plain(weights: LoadedWeights) -> PluginWeights:
    return Weights(sum(weights.entry(n)[2].nbytes for n in weights.names()))


def uses_tiles(settings: Settings) -> bool:
    """Whether linears decode for themselves: only where that gives the bits of the executor's own kernel.

    Raises:
        FailedPrecondition: The settings insist and the processor cannot.
    """
    library = native.library()
    can = library is not None and library.has_tiles and plugmesh_kernels.available() and plugmesh_kernels.native().isa() == "avx512"
    if settings.decode == "tiles" and not can:
        raise FailedPrecondition('decode = "tiles" needs a C++ compiler and a processor with AVX512_BF16; "auto" uses "layers" there', param="decode")
    return can and settings.decode != "layers"


def _load(weights: LoadedWeights, settings: Settings) -> PluginWeights:
    """Checks every container, then hands out functions over them.

    Raises:
        DataLoss: A container is missing, damaged or of another size than the configuration asks for.
        FailedPrecondition: See `uses_tiles`.
    """
    c = weights.config
    matrices = [layout.layer_matrices(c, i) for i in range(c.num_layers)]
    layers = [_container(weights, layout.layer_name(i), sum(m.num_values for m in found)) for i, found in enumerate(matrices)]
    embedding_matrix, head_matrix = (Matrix(name, (c.vocab_size, c.hidden_size), 0) for name in (EMBEDDING, HEAD))
    embedding = _container(weights, EMBEDDING, embedding_matrix.num_values)
    head = embedding if c.tie_word_embeddings else _container(weights, HEAD, head_matrix.num_values)
    stored = sum(weights.entry(n)[2].nbytes for n in weights.names())
    tables = sum(one.table.nbytes for one in (*layers, embedding, head))
    if uses_tiles(settings):
        found = _with_tiles(matrices, layers, head_matrix, head, embedding_matrix, embedding, stored + tables)
    else:
        found = _with_buffers(matrices, layers, head_matrix, head, embedding_matrix, embedding, stored + tables)
    log.info("dfloat11.loaded", decode="tiles" if found.linears else "layers", reader="numpy" if native.library() is None else "native",
             stored_bytes=stored, num_bytes=found.num_bytes)  # fmt: skip
    return found


def _container(weights: LoadedWeights, name: str, num_values: int) -> Container:
    try:
        _, _, data = weights.entry(name)
    except KeyError:
        raise DataLoss(f"the manifest lacks tensor {name}", tensor=name) from None
    found = container.parse(data, name)
    if found.num_values != num_values:
        raise DataLoss(f"{name} holds {found.num_values} values, expected {num_values}", tensor=name)
    return found


def _with_tiles(
    matrices: list[list[Matrix]], layers: list[Container], head_matrix: Matrix, head: Container, embedding_matrix: Matrix, embedding: Container, num_bytes: int
) -> Weights:
    library = native.library()
    assert library is not None
    kept: list[object] = [layers, head, embedding]

    def context(*words: int) -> int:
        words_ = np.array(words, np.uint64)
        kept.append(words_)
        return int(words_.ctypes.data)

    def described(one: Container) -> int:
        return context(*(int(word) for word in native.describe(one)))

    linears: dict[str, Foreign] = {}
    for found, one in (*zip(matrices, layers, strict=True), ([head_matrix], head)):
        at = described(one)
        for m in found:
            linears[m.name] = jit.capsule(library.functions.df11_linear, "plugmesh.linear.v2", context(at, m.first // container.CHUNK))
    embed = jit.capsule(library.functions.df11_embedding, "plugmesh.embedding.v1", context(described(embedding), embedding_matrix.shape[1]))
    return Weights(num_bytes, linears=linears, embedding=embed, kept=tuple(kept))


def _with_buffers(
    matrices: list[list[Matrix]], layers: list[Container], head_matrix: Matrix, head: Container, embedding_matrix: Matrix, embedding: Container, num_bytes: int
) -> Weights:
    buffer = aligned(2 * max(one.num_values for one in layers)) if layers else aligned(0)
    head_buffer = aligned(2 * head.num_values)
    buffers: dict[str, Buffer] = {}
    for found in matrices:
        for m in found:
            buffers[m.name] = ("bf16x16", m.shape, buffer[2 * m.first : 2 * (m.first + m.num_values)])
    buffers[HEAD] = ("bf16x16", head_matrix.shape, head_buffer)
    targets = [*((one, buffer) for one in layers), (head, head_buffer)]
    num_bytes += buffer.nbytes + head_buffer.nbytes
    library = native.library()
    if library is None:
        return Weights(num_bytes, buffers=buffers, before_layer=_slow_layers(targets), embedding=_slow_embedding(embedding_matrix, embedding))
    descriptions = [native.describe(one) for one, _ in targets]
    words = [len(layers)]
    for description, (_, memory) in zip(descriptions, targets, strict=True):
        words += [description.ctypes.data, memory.ctypes.data]
    context = np.array(words, np.uint64)
    about = native.describe(embedding)
    embed_context = np.array([about.ctypes.data, embedding_matrix.shape[1]], np.uint64)
    return Weights(
        num_bytes, buffers=buffers, before_layer=jit.capsule(library.functions.df11_before_layer, "plugmesh.layer.v1", context.ctypes.data),
        embedding=jit.capsule(library.functions.df11_embedding, "plugmesh.embedding.v1", embed_context.ctypes.data),
        kept=(layers, head, embedding, targets, descriptions, context, about, embed_context),
    )  # fmt: skip


# -- without a compiler -------------------------------------------------------------------------------------------------------------------------------


def _slow_layers(targets: list[tuple[Container, np.ndarray]]) -> Foreign:
    def before(layer: int) -> None:
        one, memory = targets[layer]
        memory.view(np.uint16)[: one.num_values] = container.decode_slowly(one, 0, one.num_chunks)

    return before


def _slow_embedding(matrix: Matrix, one: Container) -> Foreign:
    hidden = matrix.shape[1]
    pieces = -(-hidden // 64)

    def embed(tokens: np.ndarray, x: np.ndarray) -> None:
        for row, token in zip(x, tokens, strict=True):
            block = int(token) // 16
            values = container.decode_slowly(one, block * pieces, (block + 1) * pieces)
            row[:] = unpack("bf16x16", values.view(np.uint8), 16, hidden)[int(token) % 16]

    return embed
