"""Four-bit KV: bytes and attention of all three ways against one another, and exact sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plugmesh.errors import ConfigError
from plugmesh.records import KvCodecContext
from plugmesh_engine.batch import Rows
from plugmesh_engine.testing import tiny_config
from plugmesh_qserve import kv4
from plugmesh_qserve.weights import library


def portable(*flags: str) -> ctypes.CDLL | None:
    return library("-DQSERVE_PORTABLE=1")


def numpy_only(*flags: str) -> None:
    return None


def context(head_dim: int = 64) -> KvCodecContext:
    return KvCodecContext(tiny_config(num_heads=6, num_kv_heads=2, head_dim=head_dim), "v", 24, 1)


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.float32, (3, 16), elements=st.floats(-(2**15), 2**15, width=32)))
def test_a_head_comes_back_within_half_a_step(x: np.ndarray) -> None:
    codes, scales, offsets = kv4.encode(x)
    back = kv4.decode(codes, scales, offsets)
    step = (x.max(1) - x.min(1)) / 15
    rounding = np.abs(x).max(1) * 2**-11 * 2 + step * 15 * 2**-11 + 2**-20  # of offset and scale, in half precision

    assert codes.max() <= 15
    assert (np.abs(back - x).max(1) <= 0.5 * step * 1.001 + rounding).all()


def test_constant_heads_and_small_ranges_far_from_zero_are_kept() -> None:
    """Where a zero point of -min / scale would be infinite, or too large for half precision."""
    x = np.stack((np.full(64, 3.25), 1000 + np.linspace(0, 7.5, 64), np.zeros(64))).astype(np.float32)
    back = kv4.decode(*kv4.encode(x))

    assert np.array_equal(back[[0, 2]], x[[0, 2]])
    assert np.abs(back[1] - x[1]).max() <= 0.26


def test_sizes_are_those_of_the_readme() -> None:
    codec = kv4.Kv4(KvCodecContext(tiny_config(num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64), "v", 2, 1))

    assert codec.layout.block_bytes == 30 * 2 * 3 * 16 * (64 // 2 + 2 + 2) == 103_680
    assert codec.layout.block_bytes / 16 == 6480


@pytest.mark.parametrize("head_dim", [64, 32, 10])
@pytest.mark.parametrize("kernels", [library, portable], ids=["machine", "portable"])
def test_kernels_write_the_bytes_and_give_the_outputs_of_numpy(kernels: Callable[..., ctypes.CDLL | None], head_dim: int) -> None:
    if kernels() is None:
        pytest.skip("no compiler")
    fast, slow = (kv4.Kv4(context(head_dim), k) for k in (kernels, numpy_only))
    rng, num_layers = np.random.default_rng(1), 2
    tables = {0: [3, 9, 1, 7], 1: [2, 4, 6, 8]}
    done = {0: 0, 1: 0}
    for counts in ({0: 21, 1: 3}, {1: 1, 0: 1}, {0: 17, 1: 30}):
        rows = [Rows([0] * n, done[s], tables[s]) for s, n in counts.items()]
        total = sum(counts.values())
        fast.plan(rows)
        slow.plan(rows)
        for layer in range(num_layers):
            q, k, v = (rng.standard_normal((total, h, head_dim)).astype(np.float32) * f for h, f in ((6, 2), (2, 3), (2, 1)))
            k[0], v[0, 0, :3], v[0, 1] = 0, 1e-9, np.maximum(v[0, 1], -0.0)
            outs = [np.full(q.shape, np.nan, np.float32) for _ in range(2)]
            fast.attend(layer, q, k, v, outs[0])
            slow.attend(layer, q, k, v, outs[1])

            assert np.abs(outs[0] - outs[1]).max() < 2e-5
        for s, n in counts.items():
            done[s] += n
    assert fast.memory.units.tobytes() == slow.memory.units.tobytes()
    assert fast.memory.units.tobytes().count(0) < fast.memory.units.nbytes  # something was written


def test_a_stale_nan_behind_a_sequences_end_is_not_read() -> None:
    codec = kv4.Kv4(context())
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((5, h, 64)).astype(np.float32) for h in (6, 2, 2))
    outs = []
    for fill in (0, np.nan):
        codec.memory.units["scales"][1] = fill
        codec.memory.units["offsets"][1] = fill
        codec.plan([Rows([0] * 5, 0, [1])])
        out = np.empty_like(q)
        codec.attend(0, q, k, v, out)
        outs.append(out)

    assert np.isfinite(outs[1]).all()
    assert np.array_equal(outs[0], outs[1])


def test_heads_of_odd_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="two channels"):
        kv4.Kv4(context(7))
