"""Multiplying by weights that are kept as plain floats."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class FloatFormat:
    """Weights (N, K) in the dtype of the activations, as they lie in the mapped file."""

    def prepare_input(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """x and its row count; a lone bfloat16 row on a CPU is doubled.

        oneDNN's bfloat16 kernels take two rows in 28 ms per forward of SmolLM2-135M, torch's matrix-vector path takes one in 47 ms (see EngineConfig.dtype).
        """
        if x.shape[0] == 1 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            return x.repeat(2, 1), 1
        return x, x.shape[0]

    def linear(self, handle: tuple[torch.Tensor, int], packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x, num_rows = handle
        y = F.linear(x, packed, bias)
        return y if y.shape[0] == num_rows else y[:num_rows]
