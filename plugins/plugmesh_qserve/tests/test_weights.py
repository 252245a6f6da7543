"""Packed bytes and kernels against plain numpy, and the folding that must change nothing."""

from __future__ import annotations

import ctypes
import pathlib

import numpy as np
import pytest

from plugmesh.errors import ConfigError, FailedPrecondition
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.testing import random_weights, tiny_config
from plugmesh_engine.testing_plugins import MemorySource, write_packed
from plugmesh_qserve import smooth, weights
from plugmesh_qserve.quantise import quantise

CONFIG = tiny_config(hidden_size=128, intermediate_size=192, num_heads=4, num_kv_heads=2, head_dim=32)


def library(flags: tuple[str, ...]) -> ctypes.CDLL:
    found = weights.library(*flags)
    if found is None:
        pytest.skip("no compiler")
    return found


KERNELS = pytest.mark.parametrize("flags", [(), ("-DQSERVE_PORTABLE=1",)], ids=["machine", "portable"])


def packed(w: np.ndarray, group: int, rotation: int) -> weights.Packed:
    data = np.frombuffer(b"".join(weights.to_bytes(quantise(w, group, is_searched=False))), np.uint8)
    assert data.nbytes == weights.num_bytes(*w.shape, group)
    return weights.Packed.read(f"qserve/g{group}r{rotation}", w.shape, data)


def run(lib: ctypes.CDLL, p: weights.Packed, x: np.ndarray, num_threads: int, *, is_raw: bool = False) -> np.ndarray:
    _, context = weights.native(lib, p, is_raw=is_raw)
    y = np.full((len(x), p.shape[0]), np.nan, np.float32)
    pointer = ctypes.c_void_p
    for thread in range(num_threads):
        lib.qserve_linear(
            pointer(context.ctypes.data), pointer(x.ctypes.data), len(x), x.shape[1], pointer(y.ctypes.data), p.shape[0], thread, num_threads,
        )  # fmt: skip
    return y


def test_packed_bytes_hold_the_matrix() -> None:
    w = np.random.default_rng(0).standard_normal((37, 192)).astype(np.float32)
    p = quantise(w, 32)
    data = np.frombuffer(b"".join(weights.to_bytes(p)), np.uint8)

    assert np.array_equal(weights.Packed.read("qserve/g32r1", w.shape, data).int8(), p.int8())
    for dtype, some in (("qserve/g64r1", data), ("qserve/g32r1", data[:-64]), ("qserve/v2", data), ("qserve/g36r1", data)):
        with pytest.raises(FailedPrecondition):
            weights.Packed.read(dtype, w.shape, some)


@KERNELS
@pytest.mark.parametrize(("n", "k", "group"), [(16, 64, 64), (50, 192, 32), (192, 576, 64), (64, 1536, 64), (33, 64, 8)])
def test_sums_and_outputs_are_those_of_numpy_bit_for_bit(flags: tuple[str, ...], n: int, k: int, group: int) -> None:
    lib, rng = library(flags), np.random.default_rng(n)
    w = rng.standard_normal((n, k)).astype(np.float32)
    w[0, :2] = 119, -119  # in one group: the largest scale
    for rotation in (1, smooth.rotation_width(k)):
        p = packed(w, group, rotation)
        for t in (1, 2, 3, 4, 5, 21, 40):
            x = (rng.standard_normal((t, k)) * 3).astype(np.float32)
            x[0, 3], x[-1, 0] = 3000, -500
            codes, _ = weights.encode(x, rotation)
            want = np.empty((t, n), np.float32)
            weights.reference(p)(x, want)

            assert np.array_equal(run(lib, p, x, 2, is_raw=True).view(np.int32), codes.astype(np.int32) @ p.int8().T)
            assert np.array_equal(run(lib, p, x, 3), want)


@KERNELS
def test_a_row_that_is_zero_or_not_finite_touches_no_other(flags: tuple[str, ...]) -> None:
    lib, rng = library(flags), np.random.default_rng(5)
    p = packed(rng.standard_normal((32, 64)).astype(np.float32), 64, 64)
    x = rng.standard_normal((6, 64)).astype(np.float32)
    odd = x.copy()
    odd[1], odd[2, 5], odd[4, 7] = 0, np.nan, np.inf
    got = run(lib, p, odd, 1)

    assert np.array_equal(got[[0, 3, 5]], run(lib, p, x, 1)[[0, 3, 5]])
    assert not got[1].any()
    assert np.isnan(got[[2, 4]]).all()


@pytest.mark.parametrize("rope_style", ["interleaved", "half"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_folding_and_rotation_change_nothing_without_quantisation(rope_style: str, has_bias: bool) -> None:
    config = tiny_config(hidden_size=128, intermediate_size=192, num_heads=4, num_kv_heads=2, head_dim=32, rope_style=rope_style, attention_bias=has_bias)
    model = random_weights(config, seed=3)
    source = MemorySource(config, model)
    recipe = weights.Recipe(key_alpha=0.7, down_alpha=0.3, down_beta=0.7, calibration_tokens=64)
    calibration = source.activations(64, 0)
    changed = dict(model)
    for i in range(config.num_layers):
        tensors = {n: w for n, w in model.items() if n.startswith(f"model.layers.{i}.")}
        weights.fold(tensors, i, source, recipe, calibration)
        changed |= tensors
    ids = list(range(1, 40))
    want, got = (ReferenceLlama(config, m).next_logits(ids) for m in (model, changed))
    x, w = np.random.default_rng(1).standard_normal((5, 192)).astype(np.float32), model["model.layers.0.mlp.down_proj.weight"]

    assert any(not np.allclose(changed[n], model[n], rtol=0.1) for n in model if n.endswith("k_proj.weight"))
    assert np.abs(got - want).max() < 1e-3 * want.std()
    assert np.allclose(smooth.rotated(x, 64) @ smooth.for_rotated_inputs(w, 64).T, x @ w.T, atol=1e-4)


def test_smoothing_with_unequal_factors_in_a_rope_pair_would_be_noticed() -> None:
    """The check above is one that can fail."""
    model = random_weights(CONFIG, seed=3)
    factors = np.exp(np.random.default_rng(0).standard_normal((2, 32))).astype(np.float32)
    tensors = dict(model)
    smooth.smooth_attention(tensors, 0, CONFIG, factors)
    ids = list(range(1, 40))
    want, got = (ReferenceLlama(CONFIG, m).next_logits(ids) for m in (model, tensors))

    assert np.abs(got - want).max() > 1e-2 * want.std()


def test_the_engine_computes_what_the_packed_values_say(tmp_path: pathlib.Path) -> None:
    """The model that `int8() * row_scales` stands for, in float32, differs by the int8 of the activations alone."""
    from plugmesh_engine import EngineConfig, load_model
    from plugmesh_engine.batch import Rows
    from plugmesh_engine.testing_plugins import half_rows

    model = random_weights(CONFIG, seed=4)
    recipe = weights.Recipe(group=64, is_rotated=False, calibration_tokens=0, is_compensated=False)
    manifest = write_packed(tmp_path, MemorySource(CONFIG, model), weights.record(recipe))
    stands_for = {n: quantise(w, 64).float32() if weights.is_ours(n) else w for n, w in model.items()}
    ids = list(range(1, 40))
    config = EngineConfig(executor="torch", dtype="float32", num_blocks=8)
    loaded = load_model(manifest, config, weights.record(recipe))
    executor = loaded.build_executor(config, half_rows())
    got = executor.run([Rows(ids, 0, [1, 2, 3], 1, True)]).logits[-1]
    executor.close()
    want = ReferenceLlama(CONFIG, stands_for).next_logits(ids)
    of_source = ReferenceLlama(CONFIG, model).next_logits(ids)

    assert np.abs(got - want).max() < 0.12 * want.std()
    assert np.abs(got - of_source).max() > 0.3 * want.std()


def test_groups_that_do_not_divide_the_model_are_refused() -> None:
    source = MemorySource(CONFIG, random_weights(CONFIG, seed=1))
    with pytest.raises(ConfigError, match="128 does not divide 192"):
        list(weights.pack(source, weights.Recipe(group=128, calibration_tokens=0)))
