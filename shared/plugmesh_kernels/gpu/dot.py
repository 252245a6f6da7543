"""Matrix product of tiles, for all kernels."""

import triton
import triton.language as tl

from plugmesh_kernels.gpu import is_interpreted

# The interpreter multiplies bfloat16 tiles as if their bits were integers. In float32 the products are the same, and both sum in float32.
_WIDEN = tl.constexpr(is_interpreted())


@triton.jit
def dot(a, b):
    """a @ b summed in float32; float32 tiles are not rounded to TF32."""
    if _WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def as_float(q, DTYPE: tl.constexpr):
    """Small integers in the dtype that `dot` will multiply them in; exact."""
    if _WIDEN:
        return q.to(tl.float32)
    else:
        return q.to(DTYPE)
