"""The rows of one step and what comes back for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of one sequence.

    Attributes:
        token_ids: The tokens to compute.
        num_computed: Tokens before them, whose KV is in `blocks`.
        blocks: The sequence's blocks in order, with room for the new tokens.
        num_wanted: The last so many rows give an output: 0 for a chunk that ends before its prompt, 1 usually, 1 + k with k drafted tokens.
        full: The logits of the wanted rows are needed; otherwise their best token is enough.
        kept: Nobody wants those logits but a matcher that may refuse the best token: the executor keeps what it takes to find the next best
            (`seams.Executor.begin_matches`). Not with `full`; only for an executor that `keeps_logits`.
    """

    token_ids: Sequence[int]
    num_computed: int
    blocks: Sequence[int]
    num_wanted: int = 0
    full: bool = False
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Tap:
    """Hidden states that a step is to give beside its outputs.

    Attributes:
        entry: Index of the `Rows` whose hidden states are wanted, all of them.
        layer: The residual stream that enters this layer; the number of layers for what leaves the last one (before the final norm).
    """

    entry: int
    layer: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an executor gives for the wanted rows of a step.

    Attributes:
        best: (R,) int32, the token with the largest logit of every wanted row, in the order of the rows; the first of equals. -1 where the
            maximum is not finite or a NaN is among the logits.
        logits: (F, vocab) float32, the wanted rows of entries with `full`, in order. The caller may change it; it may be overwritten by the next run.
        hidden: Per tap, (rows of its entry, hidden size) float32 of the caller's own.
    """

    best: np.ndarray
    logits: np.ndarray
    hidden: tuple[np.ndarray, ...] = ()
