"""Each kernel gives what its plain reference gives, whatever the shape, and keeps a row's values to that row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh_kernels.gpu import argmax, decode, linear, norm, pack, prefill, rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
pytestmark = pytest.mark.filterwarnings(  # of numpy, below the interpreter, on poisoned rows
    "ignore:invalid value encountered:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning"
)
few = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def close(actual: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal up to the rounding of the dtype, relative to the largest value."""
    assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
    size = max(1.0, float(wanted.float().abs().nan_to_num(0, 0, 0).max())) if wanted.numel() else 1.0
    return torch.allclose(actual.float(), wanted.float(), rtol=0, atol=TOLERANCE[wanted.dtype] * size, equal_nan=True)


class Paged:
    """Sequences of some lengths in random blocks of a pool whose unused blocks hold NaN."""

    def __init__(self, lengths: list[int], kv_heads: int, dim: int, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        width = max(1, -(-max([0, *lengths]) // 16))
        numbers = np.random.default_rng(seed).permutation(len(lengths) * width) + 1
        self.table = torch.zeros(len(lengths), width, dtype=torch.int32)
        self.pool = torch.full((len(numbers) + 1, 2, 2, 16, kv_heads, dim), math.nan, dtype=dtype)
        self.pool[0] = 0
        for i, length in enumerate(lengths):
            used = -(-length // 16)
            self.table[i, :used] = torch.from_numpy(numbers[i * width : i * width + used])
            for j in range(length):
                self.pool[int(self.table[i, j // 16]), :, :, j % 16] = randn(2, 2, kv_heads, dim, dtype=dtype, device="cpu", seed=1000 * i + j)
        self.pool, self.table = self.pool.to(device), self.table.to(device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)


def run_decode(p: Paged, q: torch.Tensor, rows: list[int], grid: int, pick: slice = slice(None)) -> torch.Tensor:
    """Attended rows of layer 1; rows that are not asked for stay -7."""
    out = torch.full_like(q, -7)
    at = torch.tensor(rows, dtype=torch.int32, device=q.device)
    scratch = decode.DecodeScratch(max(1, len(rows)), q.shape[1], q.shape[2], q.device)
    decode.decode_attention(q, p.pool, 1, at[pick], p.table[pick].contiguous(), p.lengths[pick].contiguous(), grid, scratch, out)
    return out


@few
@given(
    lengths=st.lists(st.sampled_from([0, 1, 15, 16, 17, 64, 65, 128, 129, 300]), max_size=3), kv_heads=st.integers(1, 3), group=st.sampled_from([1, 2, 5]),
    dim=st.sampled_from([2, 10, 16, 40]), dtype=st.sampled_from(DTYPES), grid=st.integers(1, 4),
)  # fmt: skip
def test_decode_attention_equals_attention_over_the_gathered_keys(
    device: str, lengths: list[int], kv_heads: int, group: int, dim: int, dtype: torch.dtype, grid: int
) -> None:
    p = Paged(lengths, kv_heads, dim, dtype, device)
    q = randn(len(lengths) + 1, kv_heads * group, dim, dtype=dtype, device=device)
    rows = list(range(len(lengths), 0, -1))
    wanted = torch.full_like(q, -7)
    decode.decode_attention_reference(q, p.pool, 1, torch.tensor(rows, dtype=torch.int32), p.table, p.lengths, wanted)

    assert close(run_decode(p, q, rows, grid), wanted)


def test_a_decode_row_is_the_same_to_the_bit_in_any_company_and_grid(device: str) -> None:
    p = Paged([300, 1, 140], 2, 16, torch.bfloat16, device)
    q = randn(3, 4, 16, dtype=torch.bfloat16, device=device)
    together = run_decode(p, q, [0, 1, 2], 3)

    for i in range(3):
        assert torch.equal(run_decode(p, q, [0, 1, 2], 1, slice(i, i + 1))[i], together[i])


def test_rows_longer_than_all_minimal_splits_get_longer_splits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MIN_SPLIT_KEYS", 16)
    monkeypatch.setattr(decode, "MAX_SPLITS", 4)
    p = Paged([65, 150, 64], 1, 16, torch.float32, device)
    q = randn(3, 2, 16, device=device)
    wanted = torch.full_like(q, -7)
    decode.decode_attention_reference(q, p.pool, 1, torch.arange(3), p.table, p.lengths, wanted)

    assert close(run_decode(p, q, [0, 1, 2], decode.num_splits(150)), wanted)


@few
@given(
    chunks=st.lists(st.tuples(st.sampled_from([1, 2, 63, 64, 65, 100]), st.sampled_from([0, 1, 16, 70])), max_size=3), kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3]), dim=st.sampled_from([10, 16]), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_prefill_attention_is_causal_over_prefix_and_chunk(
    device: str, chunks: list[tuple[int, int]], kv_heads: int, group: int, dim: int, dtype: torch.dtype
) -> None:
    p = Paged([n + before for n, before in chunks], kv_heads, dim, dtype, device)
    counts = np.array([n for n, _ in chunks], dtype=np.int32)
    starts = 2 + np.cumsum(counts) - counts  # two rows that belong to no chunk
    q = randn(2 + int(counts.sum()), kv_heads * group, dim, dtype=dtype, device=device)
    plan = prefill.Chunks.build(starts, counts, np.array([b for _, b in chunks]), p.table.cpu().numpy(), device)
    actual, wanted = torch.full_like(q, -7), torch.full_like(q, -7)
    prefill.prefill_attention(q, p.pool, 1, plan, actual)
    prefill.prefill_attention_reference(q, p.pool, 1, plan, wanted)

    assert close(actual, wanted)


def quantized(n: int, k: int, bits: int, device: str) -> pack.QuantWeight:
    """Random values with a group of equal ones and a group of zeros."""
    w = randn(n, k, device="cpu", seed=n + k)
    w[0, :32], w[-1, -20:] = 0.5, 0
    return pack.quantize(w, bits).to(device)


@few
@given(
    rows=st.sampled_from([0, 1, 3, 16, 17, 32, 33]), n=st.sampled_from([1, 63, 64, 130]), k=st.sampled_from([1, 32, 33, 64, 100, 576]),
    bits=st.sampled_from([4, 8]), dtype=st.sampled_from(DTYPES), biased=st.booleans(),
)  # fmt: skip
def test_products_with_packed_weights(device: str, rows: int, n: int, k: int, bits: int, dtype: torch.dtype, biased: bool) -> None:
    w, x = quantized(n, k, bits, device), randn(rows, k, dtype=dtype, device=device)
    bias = randn(n, dtype=dtype, device=device, seed=5) if biased else None

    assert close(linear.linear(x, w, bias), linear.linear_reference(x, w, bias))
    assert close(linear.expand(w, dtype), pack.dequantize(w).to(dtype))
    ids = torch.tensor([n - 1, 0, n // 2], device=device)
    assert close(linear.embed(ids, w, dtype), pack.dequantize(w)[ids].to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_a_product_is_the_same_to_the_bit_in_any_company(device: str, bits: int) -> None:
    w, x = quantized(70, 600, bits, device), randn(32, 600, device=device, dtype=torch.float16)
    together = linear.small_linear(x, w)

    assert linear.num_parts(70, w.num_groups // 2) > 1
    assert all(torch.equal(linear.small_linear(x[i : i + 1], w)[0], together[i]) for i in (0, 15, 16, 31))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(device: str, poison: float) -> None:
    w, x = quantized(40, 96, 4, device), randn(3, 96, device=device)
    clean = linear.small_linear(x, w)
    x[1, 5] = poison
    y = linear.small_linear(x, w)
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and not bool(torch.isfinite(y[1]).any())

    p, q = Paged([20, 130, 20], 1, 16, torch.float32, device), randn(3, 1, 16, device=device)
    clean = run_decode(p, q, [0, 1, 2], 2)
    p.pool[int(p.table[1, 8]), 1, 0, 1] = poison
    out = run_decode(p, q, [0, 1, 2], 2)
    assert torch.equal(out[[0, 2]], clean[[0, 2]]) and not bool(torch.isfinite(out[1]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_gate_and_rotation(device: str, dtype: torch.dtype) -> None:
    for rows, k in ((0, 36), (1, 36), (3, 576)):
        x, add, weight = (randn(rows, k, dtype=dtype, device=device, seed=s) for s in (1, 2, 3))
        weight = randn(k, dtype=dtype, device=device, seed=4)
        for a in (None, add):
            for actual, wanted in zip(norm.add_rms_norm(x, a, weight, 1e-5), norm.add_rms_norm_reference(x, a, weight, 1e-5), strict=True):
                assert close(actual, wanted)
        both = randn(rows, 2 * k, dtype=dtype, device=device)
        assert close(norm.silu_mul(both), norm.silu_mul_reference(both))


@few
@given(
    rows=st.integers(0, 4), kv_heads=st.integers(1, 3), group=st.integers(1, 3), dim=st.sampled_from([2, 6, 10, 64]), dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
)  # fmt: skip
def test_rotation_and_append(device: str, rows: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype, interleaved: bool) -> None:
    heads = kv_heads * group
    qkv = randn(rows, (heads + 2 * kv_heads) * dim, dtype=dtype, device=device)
    cos, sin = randn(50, dim // 2, device=device, seed=1), randn(50, dim // 2, device=device, seed=2)
    positions = torch.tensor([0, 49, 17, 33][:rows], dtype=torch.int32, device=device)
    blocks = torch.tensor([2, 1, -1, 4][:rows], dtype=torch.int32, device=device)
    memory = [torch.full((6, 2, 2, 16, kv_heads, dim), 3.0, dtype=dtype, device=device) for _ in range(2)]
    pools = [m[1:] for m in memory]  # what a block of -1 would hit is in front of them
    actual = rope.rope_append(qkv, heads, pools[0], 1, cos, sin, positions, blocks, interleaved)
    wanted = rope.rope_append_reference(qkv, heads, pools[1], 1, cos, sin, positions, blocks, interleaved)

    assert close(actual, wanted) and close(pools[0], pools[1])
    assert bool((memory[0][[0, 1, 4]] == 3).all()), "the row without a block was stored"


@pytest.mark.parametrize("n", [1, 4096, 4100, 9000])
def test_argmax_is_the_first_of_equals_and_refuses_rows_that_are_not_finite(device: str, n: int) -> None:
    x = randn(7, n, device=device)
    x[1, n // 2 :] = 9
    x[2, n - 1] = math.nan
    x[3, 0] = math.inf
    x[4] = -math.inf
    x[5, : n - 1] = -math.inf
    found = argmax.argmax(x)

    assert torch.equal(found, argmax.argmax_reference(x))
    assert found.tolist()[1:6] == [n // 2, -1, -1, -1, n - 1]
