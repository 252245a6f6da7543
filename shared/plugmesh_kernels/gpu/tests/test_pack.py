"""Packing changes the order of the stored values and nothing else."""

import numpy as np
import pytest
import torch

from plugmesh_kernels import pack as native
from plugmesh_kernels.gpu import pack


def stored(bits: int, n: int, k: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Type, bytes as GGUF stores them, and float values, of random blocks."""
    rng = np.random.default_rng(n + k)
    d, m = rng.standard_normal((2, n, k // 32)).astype(np.float16)
    if bits == 4:
        q = rng.integers(0, 16, (n, k // 32, 32), dtype=np.uint8)
        raw = np.concatenate((d[..., None].view(np.uint8), m[..., None].view(np.uint8), q[..., :16] | q[..., 16:] << 4), axis=-1)
        values = d[..., None].astype(np.float32) * q + m[..., None].astype(np.float32)
    else:
        q8 = rng.integers(-128, 128, (n, k // 32, 32)).astype(np.int8)
        raw = np.concatenate((d[..., None].view(np.uint8), q8.view(np.uint8)), axis=-1)
        values = d[..., None].astype(np.float32) * q8
    return ("Q4_1" if bits == 4 else "Q8_0"), raw.reshape(-1), values.reshape(n, k)


@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 96), (40, 128)])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_survive_the_way_through_both_layouts(bits: int, n: int, k: int) -> None:
    kind, raw, values = stored(bits, n, k)
    dtype = native.native_dtype(kind, raw)
    w = pack.from_native(dtype, native.pack(kind, raw, n, k), n, k)

    assert (w.bits, w.n, w.k) == (bits, n, k)
    assert np.array_equal(pack.dequantize(w).numpy(), values)


@pytest.mark.parametrize("bits", [4, 8])
def test_joined_weights_hold_the_rows_of_all(bits: int) -> None:
    parts = [pack.quantize(torch.randn(n, 70, generator=torch.Generator().manual_seed(n)), bits) for n in (3, 1, 20)]

    assert torch.equal(pack.dequantize(pack.concat(parts)), torch.cat([pack.dequantize(p) for p in parts]))


@pytest.mark.parametrize(("bits", "steps"), [(4, 15), (8, 254)])
def test_rounding_is_off_by_half_a_step_at_most(bits: int, steps: int) -> None:
    w = torch.randn(9, 100, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(9, 128)
    padded[:, :100] = w
    groups = padded.view(9, 4, 32)
    span = groups.amax(2) - groups.amin(2) if bits == 4 else 2 * groups.abs().amax(2)
    off = (pack.dequantize(pack.quantize(w, bits)) - w).abs()
    limit = (span / steps * 0.5 + 0.002 * groups.abs().amax(2)).repeat_interleave(32, 1)[:, :100]  # scales are rounded to half precision

    assert bool((off <= limit + 1e-6).all())


@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 70), (32, 128)])
@pytest.mark.parametrize(("stored_as", "dtype"), [("bfloat16", "bf16x16"), ("float32", "f32x16")])
def test_floats_survive_the_native_layout(stored_as: str, dtype: str, n: int, k: int) -> None:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(getattr(torch, stored_as))
    data = w.view(torch.int16).numpy().view(np.uint16) if stored_as == "bfloat16" else w.numpy()

    assert torch.equal(pack.floats_from_native(dtype, native.pack(stored_as, data, n, k), n, k), w)
