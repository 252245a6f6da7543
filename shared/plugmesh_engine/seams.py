"""Where other code can take the engine's place: scheduler, draft method, executor, and below the torch executor attention backend and weight format.

Each is resolved once, when an engine is built; their methods run per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from plugmesh.types import KvLayout, ModelConfig
from plugmesh_engine.batch import Rows, StepResult, Tap
from plugmesh_engine.config import EngineConfig

if TYPE_CHECKING:  # the native path runs without torch
    import torch

    from plugmesh.records import KvCodecRecord
    from plugmesh_engine.executors.ragged import Batch


class TensorLike(Protocol):
    """One entry of a manifest: `num_bytes` of `dtype` at `offset` of the file `path`, C order."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def path(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class ManifestLike(Protocol):
    """The fields of `plugmesh_proto.v1.weightstore_pb2.ModelManifest` that the engine reads."""

    @property
    def version(self) -> str: ...
    @property
    def config_json(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def tensors(self) -> Sequence[TensorLike]: ...


class Model(Protocol):
    """Weights in the form that one kind of executor reads.

    Attributes:
        version: Names the weights; KV of different versions never mixes.
        num_mapped_bytes, num_copied_bytes: Weights that share the file's pages, and those that had to be converted or moved.
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def version(self) -> str: ...
    @property
    def num_mapped_bytes(self) -> int: ...
    @property
    def num_copied_bytes(self) -> int: ...

    def build_executor(self, config: EngineConfig, kv_codec: KvCodecRecord | None = None) -> Executor:
        """An executor with KV memory of its own, in a codec's form when there is one (an engine without a codec calls without the second argument).

        Raises:
            ConfigError: `config` asks for what the weights were not loaded for, or the executor has no place for a codec.
        """


class KvMemory(Protocol):
    """Blocks 0 to num_blocks of KV. Block 0 is the null block: always zero, never handed out."""

    def zero(self, block: int) -> None:
        """Makes every row of a block zero."""

    def copy(self, source: int, target: int) -> None:
        """Makes `target` equal to `source`."""

    def read(self, block: int) -> memoryview:
        """`KvLayout.block_bytes` bytes in the layout's own order; on a CPU the memory itself, else a copy."""

    def write(self, block: int, data: bytes | bytearray | memoryview, num_tokens: int) -> None:
        """Inverse of `read`; rows from `num_tokens` on become zero, whatever `data` holds for them."""

    def all_finite(self, blocks: Sequence[int]) -> bool:
        """Whether no NaN or infinity is in any of the blocks."""


class Executor(Protocol):
    """Runs the model. One object per engine, used by one thread.

    Attributes:
        layout: Of the blocks of `memory`; its key separates what different executors computed.
    """

    @property
    def layout(self) -> KvLayout: ...
    @property
    def memory(self) -> KvMemory: ...

    def run(self, rows: Sequence[Rows], taps: Sequence[Tap] = ()) -> StepResult:
        """One forward pass: writes the KV of all rows, gives outputs for the wanted ones and the hidden states that `taps` name.

        Raising means that no output can be trusted, and no more; ValueError for a tap of no such entry or layer, FailedPrecondition where the executor
        has no taps at all.
        """

    def probe(self, rows: Sequence[Rows], layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys of one layer, without the cost of those behind it.

        Computes the layers before `layer` on all rows, which writes their KV, then the projections of `layer`, and stops; nothing of `layer` and of those
        behind it is written, so rows that are to be read by all layers must be run again. `num_wanted` and `full` of the rows are ignored.

        Returns:
            q (T, heads, head_dim) and k (T, kv_heads, head_dim), float32 after RoPE, T rows in the order of `rows`.
        """

    def close(self) -> None:
        """Ends its threads. Called once, after the last step."""

    # An executor whose weights can be exchanged under its KV (`plugmesh_engine.swap`) also has
    #     prepare_weights(model) -> PreparedWeights: everything that takes long; on any thread, beside `run`. FailedPrecondition for a model of another kind.
    #     set_weights(prepared): between two runs; `prepared` then holds what was in force before. Neither copies nor frees anything, and `layout` is that of
    #         the new weights.
    # An executor may also have `sample`, with the signature of `plugmesh_engine.sampler.sample_rows`, to draw tokens on its own threads; and `begin_matches`,
    # which has matchers of grammars asked on one of them (`plugmesh_engine.native_checks`), or None where it has none to spare. With `keeps_logits` it takes
    # rows whose logits are `kept`, and finds the second draw of a greedy one by itself.


class PreparedWeights(Protocol):
    """Weights that an executor could run at once, or those that it ran before.

    Attributes:
        layout: The executor's, under these weights; only its `model`, and the weight format in its `codec`, differ from the present one's.
    """

    @property
    def layout(self) -> KvLayout: ...

    def close(self) -> None:
        """Gives up threads and memory of the weights; they cannot be used any more. May run on any thread."""


class DraftView(Protocol):
    """What a draft method sees of a decoding sequence. Read only, but for `memo`.

    Attributes:
        tokens: Prompt and output so far; grows in place from step to step.
        max_draft_tokens: Drafted tokens that could still be of use to it: the step's limit, the request's max_tokens and the context.
        memo: The method's own, None at first; lives as long as the sequence.
    """

    memo: Any

    @property
    def request_id(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def max_draft_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class DraftOutcome:
    """What became of one step's drafts.

    Attributes:
        views: As given to `propose`; sequences that ended in the step among them, with their last tokens.
        num_drafted, num_accepted: Per view; of what was proposed, memory may have cut the end.
        num_rows: Rows of the step: one per decode, the drafted ones, and those of prompts.
        num_prompt_rows: Rows of prompts among them.
        step_ms: Time of the forward pass and of sampling.
    """

    views: Sequence[DraftView]
    num_drafted: Sequence[int]
    num_accepted: Sequence[int]
    num_rows: int
    num_prompt_rows: int
    step_ms: float


class DraftMethod(Protocol):
    """Guesses the next tokens of decoding sequences, so that one forward pass can check several.

    The engine accepts a drafted token only where its own sampler chose the same one, so the output is that without drafts, token for token.
    What a method returns or raises costs time, never correctness: ids outside the vocabulary and what exceeds the limits are cut off, and a step whose
    `propose` raises goes on without drafts.
    """

    def propose(self, views: Sequence[DraftView], num_prompt_rows: int) -> Sequence[Sequence[int]]:
        """Drafted tokens for each view, at most its `max_draft_tokens`; empty for none. Called once per step that decodes, on the engine's thread.

        Args:
            views: The sequences that decode in this step, never empty.
            num_prompt_rows: Rows of prompts that share the step.
        """

    def observe(self, outcome: DraftOutcome) -> None:
        """What became of the step whose `propose` did not raise, also when nothing was drafted."""


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


class KvCodec(Protocol):
    """KV in a form of its own: the memory, and the attention over it. One object per engine, used by the engine's thread.

    A row's output must depend on its own sequence only, not on what else is in the step nor on how a prompt is cut into chunks, as far as the codec can: rows
    of one prompt may come in any chunks, one step may hold a sequence's row 17 alone and rows 0 to 400 of another. A step that failed is run again in
    parts, so the same positions may be stored twice, and rows of rejected drafts are overwritten by later ones: what counts is what was stored last, at
    positions below `num_computed` + rows of a step.

    Attributes:
        layout: `codec` is its name with everything that changes the bytes (a trained codebook: "million:1f3a9c"; at most 32 characters), `block_bytes` the
            exact size of one block over all layers, `model` the context's `model_version`. Blocks of equal layouts are interchangeable between
            processes, as opaque bytes: through the prefix cache, the kvstore and from prefill to decode. The engine adds the weight format to the codec's name.
        memory: Blocks 0 to num_blocks. `copy` serves forks and copy-on-write of half-filled blocks, `write` imports; `read` gives final bytes, so work that
            was put off is done by then. What belongs to a position lies in its block: nothing about a sequence may be kept elsewhere, but for caches.
        capsule: Optional. A PyCapsule "plugmesh.attention.v2" that the native executor calls, on all its threads at once, instead of `attend`:
            `void(void* ctx, int layer, const float* q, const float* k, const float* v, int t, float* out, int thread, int num_threads,
            void (*barrier)(void*), void* barrier_ctx)`, with the arrays of `attend`. Every thread must reach every barrier.
    """

    @property
    def layout(self) -> KvLayout: ...
    @property
    def memory(self) -> KvMemory: ...

    def plan(self, rows: Sequence[Rows]) -> None:
        """Learns which rows come, once per step, before the layers. The rows of `attend` are those of all entries after one another: entry i has
        `len(token_ids)` of them, at positions from `num_computed` on; position p lies in `blocks[p // 16]`, slot `p % 16`."""

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
        """Stores k and v of all rows of the step, then attends causally, each row over its own sequence up to itself, with scale 1 / sqrt(head_dim).

        Args:
            q: (T, heads, head_dim) float32 after RoPE; view, valid for the call. Query head h reads KV head h // (heads / kv_heads).
            k, v: (T, kv_heads, head_dim); k after RoPE.
            out: (T, heads, head_dim), to be filled.
        """

    def close(self) -> None:
        """Ends threads. Called once, after the last step."""


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
