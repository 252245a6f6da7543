"""The engine's own settings."""

from __future__ import annotations

import os
from dataclasses import dataclass

from plugmesh.errors import ConfigError

EXECUTORS = ("auto", "native", "torch", "cuda")
NATIVE_FAMILIES = frozenset({"llama"})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine.

    Attributes:
        executor: "native" (CPU kernels), "torch" (the reference, any device), "cuda" (Triton kernels), or "auto"; see `resolve_executor`.
        dtype: "bfloat16" or "float32", of weights, activations and KV under the torch executor. bfloat16 is the default because it is
            faster at every batch size on a CPU with AVX512-BF16: the linears of SmolLM2-135M on one core of an AMD EPYC (Zen 4, torch 2.13,
            2026-11) take 28 ms for 2 rows against 51 ms in float32, 35 against 53 for 8, and 560 against 1,730 for 512. A single
            bfloat16 row alone is slow (47 ms, against 36 in float32), so it runs as two (see `model.linear`).
        kv_dtype: "bfloat16" or "int8", of the KV under the native executor.
        device: A torch device; the native executor runs on "cpu" only.
        num_blocks: KV blocks of 16 tokens. Memory is committed as blocks are first used; 4,096 blocks of SmolLM2 in bfloat16
            (360 KiB each) reach 1.4 GiB when all have been used.
        commit_kv: Commit the native executor's KV memory when it is built. Otherwise whoever first uses a block waits for its pages: in a virtual
            machine whose host backs memory as it is touched, up to 30 ms for a prompt of 512 tokens.
        max_num_sequences: Sequences that run together, those of an `n > 1` request counted one by one.
        max_tokens_per_step: Prompt tokens that the default scheduler computes in one step.
        max_model_len: Longest prompt plus output; 0 takes the model's.
        max_waiting: Requests that may wait; `Overloaded` above it.
        prefix_cache: Whether blocks stay findable after their sequence ended.
        num_threads: Threads of the executor; 0 takes all cores that the process may run on (torch: leaves the process's setting).
        max_held: Sequences that may be held after their end (`EngineRequest.hold`); Overloaded above it.
        jump_forward: Append text that a grammar leaves no choice about without a forward pass for each token.
        overlap_masks: Compute what grammars allow beside the forward pass. Else a mask is computed only where it is needed (`sampler.draws_freely`), and as soon
            as the token before it is accepted. Outputs are the same. None: beside it where the pass leaves a core to that; threads that wait for one another at
            every layer lose more by being interrupted than the masks take.
        grammar_timeout_s: A grammar's matcher that takes longer for one step costs its request, so that the others go on.
        max_draft_tokens: Most tokens that a draft method may add to one sequence's step; 0 switches drafting off.
    """

    executor: str = "auto"
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    device: str = "cpu"
    num_blocks: int = 4096
    commit_kv: bool = False
    max_num_sequences: int = 64
    max_tokens_per_step: int = 512
    max_model_len: int = 0
    max_waiting: int = 256
    prefix_cache: bool = True
    num_threads: int = 0
    max_draft_tokens: int = 16
    max_held: int = 64
    jump_forward: bool = True
    overlap_masks: bool | None = None
    grammar_timeout_s: float = 1.0


def leaves_a_core(config: EngineConfig) -> bool:
    """Whether a core of this process is free while the model computes."""
    if config.device != "cpu" or config.executor == "cuda":
        return True
    return 0 < config.num_threads < num_cpus()


def num_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_executor(config: EngineConfig, architecture: str = "llama") -> str:
    """The executor that runs a model of this architecture: "native", "torch" or "cuda".

    "auto" takes native where the kernels can be used, the device is a CPU and the family is one of theirs; else torch.

    Raises:
        ConfigError: No such executor, or it was named and cannot run here.
    """
    if config.executor not in EXECUTORS:
        raise ConfigError(f"no executor {config.executor!r}; known: {', '.join(EXECUTORS)}")
    if config.executor in ("torch", "cuda"):
        return config.executor
    missing = _why_not_native(config, architecture)
    if missing and config.executor == "native":
        raise ConfigError(f"the native executor cannot be used: {missing}")
    return "torch" if missing else "native"


def weight_format(config: EngineConfig, architecture: str = "llama") -> str:
    """The format to ask the weightstore for: "native" for the executors that multiply by packed weights, else the dtype."""
    return config.dtype if resolve_executor(config, architecture) == "torch" else "native"


def _why_not_native(config: EngineConfig, architecture: str) -> str:
    if config.device != "cpu":
        return f"it runs on a CPU, not on {config.device}"
    if architecture not in NATIVE_FAMILIES:
        return f"it knows {', '.join(sorted(NATIVE_FAMILIES))}, not {architecture}"
    try:
        import plugmesh_kernels
    except ImportError as e:
        return f"plugmesh_kernels cannot be imported ({e.name or type(e).__name__})"
    return "" if plugmesh_kernels.available() else plugmesh_kernels.why_not()
