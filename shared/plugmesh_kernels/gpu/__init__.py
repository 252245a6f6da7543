"""Triton kernels for the engine on a CUDA device, each in one file with its plain torch reference.

| file | kernel | reference |
|---|---|---|
| `decode.py` | attention of single rows over paged KV, keys split across programs | `decode_attention_reference` |
| `prefill.py` | attention of ragged chunks over cached prefix and themselves | `prefill_attention_reference` |
| `linear.py` | products of few rows with 4- and 8-bit weights, dequantisation | `linear_reference`, `pack.dequantize` |
| `norm.py` | residual addition + RMS norm, SiLU-gate | `add_rms_norm_reference`, `silu_mul_reference` |
| `rope.py` | rotation of Q and K + append to the KV pool | `rope_append_reference` |
| `argmax.py` | best token of each row of logits | `argmax_reference` |

What a row gets depends on that row alone: splits over keys and over K follow from the row's own length and the weight's shape, and partial sums meet in
a fixed order without atomics. Shapes need not be multiples of anything.

Without a CUDA device the same kernels run, slowly, in Triton's interpreter: set TRITON_INTERPRET=1 before triton is first imported.
"""

from __future__ import annotations

import os


def is_interpreted() -> bool:
    """Whether the kernels were made for Triton's interpreter, so that they take tensors on a CPU."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    # The library's own functions were decorated when triton was first imported; the variable may have come too late for them.
    return os.environ.get("TRITON_INTERPRET") == "1" and isinstance(triton.language.standard.cdiv, InterpretedFunction)


def available(device: str = "cuda") -> bool:
    """Whether the kernels can run on tensors of this device."""
    try:
        import torch
        import triton  # noqa: F401 # asks whether it is installed
    except ImportError:
        return False
    where = torch.device(device)
    return (where.index or 0) < torch.cuda.device_count() if where.type == "cuda" else is_interpreted()
