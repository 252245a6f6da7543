"""The native mask of forbidden tokens against numpy's bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugmesh_kernels
from plugmesh_engine.sampler import draw_allowed, mask_rows, sample_rows

if not plugmesh_kernels.available():
    pytest.skip(plugmesh_kernels.why_not(), allow_module_level=True)

native = plugmesh_kernels.native()
each_isa = pytest.mark.parametrize("isa", [isa for isa in plugmesh_kernels.ISAS if native.supports(isa)])


@each_isa
@given(n=st.integers(1, 300), rows=st.integers(1, 4), density=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]), seed=st.integers(0, 2**32))
@settings(max_examples=120, deadline=None)
def test_forbids_what_has_no_bit_and_leaves_the_rest(isa, n, rows, density, seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, n)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.05] = np.nan  # its bits must survive too
    words = -(-n // 32) + int(rng.integers(2))
    bits = rng.random((rows, words * 32)) < density  # bits beyond the vocabulary are of no matter
    masks = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    at = np.sort(rng.permutation(rows)[: int(rng.integers(1, rows + 1))]).astype(np.int32)
    wanted = logits.copy()
    for row in at:
        wanted[row, ~bits[row, :n]] = -np.inf
    found, slow = logits.copy(), logits.copy()
    native.mask_rows(found, np.ascontiguousarray(masks[at]), at, isa)
    mask_rows(slow, np.ascontiguousarray(masks[at]), at)
    assert found.tobytes() == wanted.tobytes() == slow.tobytes()


def test_arguments_are_checked():
    logits, mask = np.zeros((2, 40), np.float32), np.zeros((1, 2), np.uint32)
    with pytest.raises(ValueError, match="row out of range"):
        native.mask_rows(logits, mask, np.array([2], np.int32))
    with pytest.raises(ValueError, match="one bit per token"):
        native.mask_rows(logits, mask[:, :1].copy(), np.array([0], np.int32))
    with pytest.raises(TypeError):  # a converted copy would be masked in place of the logits
        native.mask_rows(logits.astype(np.float64), mask, np.array([0], np.int32))


@each_isa
@given(
    n=st.integers(1, 600), density=st.sampled_from([0.0, 0.01, 0.12, 0.5, 1.0]), temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    u=st.floats(0, 1, exclude_max=True), spoil=st.sampled_from(["", "nan", "all"]), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_draw_of_what_is_allowed_is_that_of_the_masked_row(isa, n, density, temperature, u, spoil, seed):
    """Few allowed tokens are gathered, many are masked in a copy: both are what masking the row and sampling it gives, but for rounding at a border."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(n).astype(np.float32)
    bits = np.zeros(-(-n // 32) * 32, bool)
    bits[:n] = rng.random(n) < density
    if spoil:  # where it must not matter, or everywhere
        logits[~bits[:n] | (spoil == "all")] = np.nan
    mask = np.packbits(bits, bitorder="little").view(np.uint32)
    before = logits.copy()
    found = native.draw_allowed(logits, mask, temperature, u, isa)
    assert logits.tobytes() == before.tobytes()
    masked = logits.copy()[None]
    mask_rows(masked, mask[None], np.zeros(1, np.int32))
    one, none = np.ones(1, np.float32), np.zeros(1, np.float32)
    around = {int(sample_rows(masked, temperature * one, np.zeros(1, np.int32), one, none, np.array([min(max(u + d, 0.0), 1 - 2**-53)]))[0]) for d in (-1e-9, 0.0, 1e-9)}
    assert found in around and draw_allowed(logits, mask, temperature, u) in around
    assert (found == -1) == (not bits.any() or spoil == "all") and (found < 0 or bits[found])
