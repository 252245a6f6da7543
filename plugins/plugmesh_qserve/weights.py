"""The weight format "qserve": packing a model, and the linears of a packed one."""

from __future__ import annotations

import ctypes
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog

from plugmesh.errors import ConfigError, FailedPrecondition
from plugmesh.records import Foreign, LoadedWeights, PackedTensor, WeightFormatRecord, WeightSource
from plugmesh_kernels import jit
from plugmesh_qserve import smooth
from plugmesh_qserve.quantise import Progressive, quantise

NAME = "qserve"
VERSION = "1"  # of the packing; another one packs anew
LANES = 16     # rows of a block, and of a vector

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is packed.

    Attributes:
        group: Weights of a row that share a second-level scale.
        is_rotated: Turn the inputs of all linears by Hadamard blocks, on the way into int8.
        key_alpha: SmoothAttention's exponent; 0 is off.
        down_alpha, down_beta: Smoothing of the down projection's input; both 0 is off.
        is_searched, is_compensated: As `quantise`, the latter with a Hessian.
        calibration_tokens: 0 uses no calibration at all.
    """

    group: int = 32
    is_rotated: bool = True
    key_alpha: float = 0.5
    down_alpha: float = 0.0
    down_beta: float = 0.0
    is_searched: bool = True
    is_compensated: bool = True
    calibration_tokens: int = 1024


def record(recipe: Recipe) -> WeightFormatRecord:
    return WeightFormatRecord(NAME, functools.partial(pack, recipe=recipe), load, is_lossless=False, variant=f"{VERSION} {recipe}")


# -- packing: in the weightstore


def is_ours(name: str) -> bool:
    return name.endswith("_proj.weight")


def pack(source: WeightSource, recipe: Recipe) -> Iterator[PackedTensor]:
    """Every linear of the layers in two levels; embedding, head and norms as the kernels have them.

    Raises:
        ConfigError: The groups do not divide the model's widths.
    """
    c = source.config
    for width in (c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim):
        if width % recipe.group:
            raise ConfigError(f"plugins.qserve.group: {recipe.group} does not divide {width}", key="plugins.qserve.group")
    calibration: Mapping[str, np.ndarray] = source.activations(recipe.calibration_tokens, 0) if recipe.calibration_tokens else {}
    order = source.names()
    for name in order:
        if not name.startswith("model.layers."):
            yield source.native(name)
    for i in range(c.num_layers):
        prefix = f"model.layers.{i}."
        names = [n for n in order if n.startswith(prefix)]
        tensors = {n: source.tensor(n) for n in names}
        factors = fold(tensors, i, source, recipe, calibration)
        hessians: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        for name in names:
            if not is_ours(name):
                yield PackedTensor(name, "float32", tensors[name].shape, [tensors[name].astype(np.float32).tobytes()])
                continue
            yield _packed(name, tensors[name], recipe, _inputs(name, calibration, factors), hessians)


def fold(tensors: dict[str, np.ndarray], layer: int, source: WeightSource, recipe: Recipe, calibration: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Smooths a layer in place of its tensors; gives what the down projection's input is divided by from now on, None for nothing."""
    prefix = f"model.layers.{layer}."
    if not recipe.calibration_tokens:
        return None
    if recipe.key_alpha:
        keys = smooth.keys_of(calibration[f"{prefix}self_attn.k_proj.weight"], tensors, layer)
        smooth.smooth_attention(tensors, layer, source.config, smooth.key_factors(keys, source.config, recipe.key_alpha))
    if recipe.down_alpha or recipe.down_beta:
        highest = np.abs(calibration[f"{prefix}mlp.down_proj.weight"]).max(0)
        return smooth.smooth_block_output(tensors, layer, highest, recipe.down_alpha, recipe.down_beta)
    return None


def _inputs(name: str, calibration: Mapping[str, np.ndarray], factors: np.ndarray | None) -> np.ndarray | None:
    if not calibration:
        return None
    x = calibration[name]
    return x / factors if factors is not None and name.endswith("mlp.down_proj.weight") else x


def _packed(name: str, w: np.ndarray, recipe: Recipe, x: np.ndarray | None, hessians: dict[int, Any]) -> PackedTensor:
    width = smooth.rotation_width(w.shape[1]) if recipe.is_rotated else 1
    importance = hessian = None
    if x is not None:
        if id(x) not in hessians:  # one for all linears of an input; the entry keeps x, so that no other gets its id
            turned = smooth.rotated(x, width) if width > 1 else x
            hessians[id(x)] = (x, np.mean(turned**2, 0), turned.T @ turned / len(turned) if recipe.is_compensated else None)
        _, importance, hessian = hessians[id(x)]
    turned_w = smooth.for_rotated_inputs(w, width) if width > 1 else w
    try:
        p = quantise(turned_w, recipe.group, importance=importance, hessian=hessian, is_searched=recipe.is_searched)
    except ValueError as e:
        raise FailedPrecondition(f"{name} cannot be packed: {e}") from e
    return PackedTensor(name, f"{NAME}/g{recipe.group}r{width}", w.shape, to_bytes(p))


def to_bytes(p: Progressive) -> list[bytes]:
    """Codes, second-level scales and row scales as csrc/linear.cpp reads them; rows are filled up to whole blocks."""
    n, k = p.codes.shape
    more = -n % LANES
    codes, scales, zeros = (np.pad(x, ((0, more), (0, 0))) for x in (p.codes, p.scales, p.zeros))
    by_eight = codes.reshape(-1, LANES, k // 8, 2, 4).transpose(0, 2, 3, 1, 4)  # (block, K / 8, half, row, byte)
    packed = by_eight[:, :, 0] | by_eight[:, :, 1] << 4
    offsets = (128 - zeros.astype(np.int32) * scales).astype(np.uint8)  # mod 256
    second = np.stack((scales, offsets)).reshape(2, -1, LANES, k // p.group).transpose(1, 3, 0, 2)
    return [packed.tobytes(), np.ascontiguousarray(second).tobytes(), np.pad(p.row_scales, (0, more)).tobytes()]


def num_bytes(n: int, k: int, group: int) -> int:
    rows = n + -n % LANES
    return rows * (k // 2 + 2 * (k // group) + 4)


# -- the engine


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed matrix over its file's pages.

    Attributes:
        codes: (blocks, K / 8, 16, 4) uint8.
        second: (blocks, K / group, 2, 16) uint8.
        row_scales: (rows filled up,) float32.
        rotation: Width of the Hadamard blocks that inputs go through; 1 for none.
    """

    shape: tuple[int, int]
    group: int
    rotation: int
    codes: np.ndarray
    second: np.ndarray
    row_scales: np.ndarray

    @classmethod
    def read(cls, dtype: str, shape: tuple[int, ...], data: np.ndarray) -> Packed:
        """Raises FailedPrecondition for another version's dtype, or a length that does not fit it."""
        found = re.fullmatch(rf"{NAME}/g(\d+)r(\d+)", dtype)
        n, k = shape
        if not found or k % int(found[1]) or k % int(found[2]) or data.nbytes != num_bytes(n, k, int(found[1])):
            raise FailedPrecondition(f"{data.nbytes} bytes of {dtype} do not hold {shape}")
        group, blocks = int(found[1]), -(-n // LANES)
        ends = np.cumsum([blocks * LANES * k // 2, blocks * LANES * 2 * (k // group)])
        codes, second, rows = np.split(data, ends)
        return cls((n, k), group, int(found[2]), codes.reshape(blocks, k // 8, LANES, 4), second.reshape(blocks, k // group, 2, LANES), rows.view(np.float32))

    def int8(self) -> np.ndarray:
        """(N, K) int32 of the second level, from the packed bytes."""
        halves = np.stack((self.codes & 15, self.codes >> 4), axis=2)  # (block, K / 8, half, row, byte)
        codes = halves.transpose(0, 3, 1, 2, 4).reshape(-1, self.shape[1]).astype(np.int32)
        scales, offsets = (np.repeat(self.second[:, :, i].transpose(0, 2, 1).reshape(len(codes), -1), self.group, axis=1).astype(np.int32) for i in (0, 1))
        wrapped: np.ndarray = ((codes * scales + offsets) & 255) - 128
        return wrapped[: self.shape[0]]


def encode(x: np.ndarray, rotation: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (T, K) as int8 with a scale (T,) each, bit for bit what the kernel makes of them. A row that is not finite has the scale NaN and codes 0."""
    turned = smooth.rotated(x, rotation) if rotation > 1 else np.asarray(x, np.float32)
    highest = np.abs(turned).max(1)
    usable = np.isfinite(highest) & (highest >= np.float32(1e-30))
    safe = np.where(usable, highest, np.float32(1))
    codes = np.rint(np.where(usable[:, None], turned, 0) * (np.float32(127) / safe)[:, None]).astype(np.int8)
    scales = np.where(usable, safe / np.float32(127), np.where(np.isfinite(highest), 0, np.nan)).astype(np.float32)
    return codes, scales


def reference(p: Packed) -> Foreign:
    """The linear in plain numpy: what the kernel is compared with, and what runs where no compiler is."""
    w = p.int8().T.astype(np.float64)  # exact for sums of products of int8, and numpy has a fast product of it

    def multiply(x: np.ndarray, y: np.ndarray) -> None:
        codes, scales = encode(x, p.rotation)
        np.multiply((codes.astype(np.float64) @ w).astype(np.float32) * scales[:, None], p.row_scales[: p.shape[0]], out=y)

    return multiply


@functools.cache
def library(*flags: str) -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no compiler."""
    try:
        found = jit.load(pathlib.Path(__file__).parent / "csrc", flags=flags)
    except jit.NoCompiler as e:
        log.warning("qserve.without_kernels", reason=str(e))
        return None
    return found


@dataclass(frozen=True, slots=True)
class Weights:
    """Implements `plugmesh.records.PluginWeights`."""

    linears: Mapping[str, Foreign]
    num_bytes: int
    kept: tuple[Any, ...]  # what the capsules' contexts point at
    buffers: Mapping[str, tuple[str, tuple[int, ...], np.ndarray]] = field(default_factory=dict)
    before_layer: Foreign | None = None
    embedding: Foreign | None = None


def native(lib: ctypes.CDLL, p: Packed, *, reuses: bool = False, is_raw: bool = False) -> tuple[Foreign, np.ndarray]:
    """A capsule "plugmesh.linear.v2", and its context, which must live as long as `p` and the capsule."""
    context = np.array([*(x.ctypes.data for x in (p.codes, p.second, p.row_scales)), p.group, p.rotation, reuses, is_raw], np.int64)
    return jit.capsule(lib.qserve_linear, "plugmesh.linear.v2", context.ctypes.data), context


def load(weights: LoadedWeights) -> Weights:
    linears: dict[str, Foreign] = {}
    kept: list[Any] = []
    total, lib = 0, library()
    for name in weights.names():
        dtype, shape, data = weights.entry(name)
        total += data.nbytes
        if not dtype.startswith(f"{NAME}/"):
            continue
        p = Packed.read(dtype, shape, data)
        if lib is None:
            linears[name] = reference(p)
            continue
        # The linear before these has the same input, and every thread still has its codes.
        linears[name], context = native(lib, p, reuses=name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")))
        kept += [p, context]
    return Weights(linears, total, tuple(kept))
