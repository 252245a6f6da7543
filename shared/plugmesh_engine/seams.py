"""Where other code can take the engine's place: weight format, attention backend, scheduler.

Each is resolved once, when an engine is built; their methods run per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from plugmesh_engine.batch import Batch


class SequenceView(Protocol):
    """What a scheduler sees of a sequence. Read only.

    Attributes:
        arrival: Grows with every request added; siblings of one request share it.
        priority: Lower runs earlier.
        num_prompt_tokens: Without generated tokens.
        num_computed: Tokens whose KV is in the pool.
        num_pending: Tokens to compute before the next one can be sampled: 1 for a decode, more for a prompt, a resumed or a
            preempted sequence. Of a waiting sequence `KvView.pending` knows better, because it counts what the cache holds.
        is_decode: Has KV and exactly one token pending.
        num_slots: Sequences it stands for: an `n > 1` request is one until its prompt is computed.
    """

    @property
    def request_id(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def arrival(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_computed(self) -> int: ...
    @property
    def num_pending(self) -> int: ...
    @property
    def is_decode(self) -> bool: ...
    @property
    def num_slots(self) -> int: ...


class KvView(Protocol):
    """What a scheduler may ask about memory. Changes nothing.

    Attributes:
        num_free: Blocks that can be taken now, cached ones that nobody holds included.
        num_total: Size of the pool.
        watermark: Blocks that admissions should leave free, so that running sequences seldom run out.
    """

    @property
    def num_free(self) -> int: ...
    @property
    def num_total(self) -> int: ...
    @property
    def watermark(self) -> int: ...

    def pending(self, sequence: SequenceView) -> int:
        """Tokens to compute, after what the prefix cache or imported KV will save a waiting sequence; at least 1."""

    def blocks_for(self, sequence: SequenceView, num_tokens: int) -> int:
        """Blocks off `num_free` that computing `num_tokens` more of it takes."""


class Scheduler(Protocol):
    """Decides what one step computes.

    The engine carries the plan out in its order: it admits waiting sequences, takes blocks, and preempts the newest running sequence when blocks run out,
    so a plan is a wish that memory may shorten. A plan that names a sequence twice or an unknown one, or a count outside 1..pending,
    counts as an error; for that step the engine uses its own scheduler.
    """

    def schedule(self, waiting: Sequence[SequenceView], running: Sequence[SequenceView], kv: KvView) -> list[tuple[SequenceView, int]]:
        """(sequence, tokens to compute) in the order of importance.

        Called once per step by the engine's thread. A count below the sequence's pending tokens makes a non-final chunk, which samples nothing.

        Args:
            waiting: By priority, then arrival; preempted ones among them.
            running: By priority, then arrival.
        """


class AttentionBackend(Protocol):
    """Writes the K and V of a step into the pool and attends over it. One object per engine."""

    def plan(self, batch: Batch) -> None:
        """Prepares one step; called once, before the layers."""

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        """Stores k, v (T, kv_heads, head_dim), then attends.

        Args:
            q: (T, heads, head_dim) after RoPE, rows as in the batch.

        Returns:
            (T, heads, head_dim).
        """


class WeightFormat(Protocol):
    """Multiplies by the weights of one format."""

    def prepare_input(self, x: torch.Tensor) -> Any:
        """What all linears that share the input x (T, K) need of it; computed once for them."""

    def linear(self, handle: Any, packed: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(T, N) for a handle of (T, K) and a packed weight of (N, K)."""
