"""Encoded values: round trips, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plugmesh.client.rollout_values import decode, dtype_name, encode, inspect
from plugmesh.errors import InvalidRequest

arrays = hnp.arrays(hnp.integer_dtypes() | hnp.unsigned_integer_dtypes() | hnp.floating_dtypes() | hnp.boolean_dtypes(), hnp.array_shapes(min_dims=0, min_side=0, max_dims=4))


@given(arrays)
def test_arrays_come_back_with_dtype_and_shape(array: np.ndarray) -> None:
    cell = encode(array)
    got = decode(cell)
    assert isinstance(got, np.ndarray)
    assert got.shape == array.shape and got.dtype == array.dtype.newbyteorder("<")
    assert got.tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()
    assert (inspect(cell).size, inspect(cell).num_dimensions) == (array.size, array.ndim)
    assert encode(array[::-1] if array.ndim else array)  # no need to be contiguous


@given(st.binary() | st.text() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False) | st.booleans())
def test_other_values_come_back_as_they_were(value: Any) -> None:
    got = decode(encode(value))
    assert got == value and type(got) is type(value)
    assert (inspect(encode(value)).scalar is not None) == isinstance(value, int | float)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_value_or_a_typed_error(data: bytes) -> None:
    try:
        value = decode(data)
    except InvalidRequest:
        with pytest.raises(InvalidRequest):
            inspect(data)
        return
    inspect(data)
    assert isinstance(value, np.ndarray | bytes | str | int | float | bool)


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, 1 << 63, np.array(["a"]), np.array([object()]), np.zeros((1,) * 9)])
def test_what_is_no_value_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest):
        encode(value)


def test_declared_dtypes_are_written_as_values_write_them() -> None:
    assert [dtype_name(d) for d in ("int32", ">f4", "", "str", "bool")] == ["<i4", "<f4", "", "str", "bool"]
    for bad in ("object", "nonsense", "U8"):
        with pytest.raises(InvalidRequest):
            dtype_name(bad)
