"""The engine's own settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine.

    Attributes:
        dtype: "bfloat16" or "float32", of weights, activations and KV. bfloat16 is the default because it is faster at
            every batch size on a CPU with AVX512-BF16: the linears of SmolLM2-135M on one core of an AMD EPYC (Zen 4, torch 2.13,
            2026-11) take 28 ms for 2 rows against 51 ms in float32, 35 against 53 for 8, and 560 against 1,730 for 512. A single
            bfloat16 row alone is slow (47 ms, against 36 in float32), so it runs as two (see `model.linear`).
        device: A torch device.
        num_blocks: KV blocks of 16 tokens. Memory is committed as blocks are first used; 2,048 blocks of SmolLM2 in bfloat16
            (360 KiB each) reach 0.72 GiB when all have been used.
        max_num_sequences: Sequences that run together, those of an `n > 1` request counted one by one.
        max_tokens_per_step: Prompt tokens that the default scheduler computes in one step.
        max_model_len: Longest prompt plus output; 0 takes the model's.
        max_waiting: Requests that may wait; `Overloaded` above it.
        prefix_cache: Whether blocks stay findable after their sequence ended.
        num_threads: Threads of torch's CPU kernels; 0 leaves the process's setting. Process-wide.
    """

    dtype: str = "bfloat16"
    device: str = "cpu"
    num_blocks: int = 2048
    max_num_sequences: int = 64
    max_tokens_per_step: int = 512
    max_model_len: int = 0
    max_waiting: int = 256
    prefix_cache: bool = True
    num_threads: int = 0
