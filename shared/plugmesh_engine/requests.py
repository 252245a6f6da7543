"""What goes into the engine and what comes out of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from plugmesh.errors import PlugmeshError
from plugmesh.types import FinishReason, SamplingParams, TokenInfo, Usage
from plugmesh_engine.constrained import Constraint


@dataclass(frozen=True, slots=True)
class KvSource:
    """KV of one block of the prompt that was computed elsewhere.

    `data` holds `KvLayout.block_bytes` bytes and must stay valid until `StepOutput.kv_imported` names the request. Bytes beyond
    `num_tokens` are ignored.
    """

    block_id: bytes
    num_tokens: int
    data: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt and how to go on with it.

    Attributes:
        priority: Lower runs earlier; equal ones first come, first served.
        prefill_only: Compute the prompt and sample the first token of each sequence, then finish. The prompt's blocks are
            announced by `BlockReady` and stay until `Engine.release`.
        kv: KV of a prefix of the prompt, in order: full blocks, and at most one partial block at the end.
        kv_layout: Key of the layout that `kv` was looked up under; KV of another one than the engine has by then is left alone. Empty: the engine's.
        resume: Per sequence, tokens that were generated and delivered before. They are not emitted again, count against
            max_tokens, and enter penalties and the position of the random numbers.
        resume_finished: Sequences that had ended already.
        use_prefix_cache: False neither finds nor leaves blocks in the engine's prefix cache.
        hold: Keep tokens and KV of sequences that ended by stop or length, to fork from, until `Engine.release`. Where memory is short the KV goes before
            anybody has to wait for it.
        score: Given continuations. Nothing is sampled: sequence i tells the tokens of continuation i with the log-probabilities of the model's own
            distribution and `sampling.top_logprobs`, and ends with LENGTH. The prompt is computed once for all of them.
        taps: Layers whose input (the number of layers: the last one's output) is told as `HiddenRows`, of prompt and output; of one sequence.
        tap_from: First position that is told.
        max_total_tokens: Tokens that all sequences may generate together, resumed ones included; 0 for no such limit. The token that reaches it ends them all.
        grammar: What each sequence's output obeys, resumed tokens included. It ends with STOP where nothing but an end token may follow, without one.
            Text that is forced comes as tokens of its own accord, several in an event, unless log-probabilities or confidences are asked for.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    prefill_only: bool = False
    kv: tuple[KvSource, ...] = ()
    kv_layout: bytes = b""
    resume: tuple[tuple[int, ...], ...] = ()
    resume_finished: tuple[bool, ...] = ()
    use_prefix_cache: bool = True
    hold: bool = False
    score: tuple[tuple[int, ...], ...] = ()
    taps: tuple[int, ...] = ()
    tap_from: int = 0
    max_total_tokens: int = 0
    grammar: Constraint | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.score) or self.sampling.num_sequences


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step did for one sequence.

    `index` is that of `tokens[0]` among the sequence's generated tokens, resumed ones included. `tokens` is empty when a sequence
    ends without a new one (error, or a resumed sequence that was complete). `request_done` comes exactly once per request that was not
    cancelled, with `usage`. A prefill_only request ends with a `finish_reason` of None where its sequence could go on.
    """

    request_id: str
    sequence: int
    index: int
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    request_done: bool = False
    usage: Usage | None = None
    error: PlugmeshError | None = None


@dataclass(frozen=True, slots=True)
class BlockReady:
    """A block of a prefill_only prompt is final; `Engine.export_block` gives its bytes until `Engine.release`.

    Announced chunk by chunk and in order. A partial tail comes last, under a `block_id` of its own.
    """

    request_id: str
    block_index: int
    block_id: bytes
    parent_id: bytes
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class HiddenRows:
    """Hidden states of consecutive tokens, told once each and in order; `values` is (tokens, hidden size) float32, the first at `position`."""

    request_id: str
    layer: int
    position: int
    values: np.ndarray


@dataclass(slots=True)
class StepOutput:
    """Everything that one step produced.

    `kv_imported` lists requests whose `EngineRequest.kv` buffers are no longer read, also because they ended before.
    `weight_version` names the weights that the step ran under, all of it.
    """

    step: int
    tokens: list[TokenEvent] = field(default_factory=list)
    blocks_ready: list[BlockReady] = field(default_factory=list)
    kv_imported: list[str] = field(default_factory=list)
    hidden: list[HiddenRows] = field(default_factory=list)
    weight_version: str = ""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges and counters; counters grow from the engine's start.

    Attributes:
        num_running, num_waiting: Sequences (a request with `n > 1` waits as one).
        num_pending_tokens: Prompt tokens still to compute plus the most that may still be generated.
        kv_blocks_used: Held by live sequences, retained prompts and finished sequences that are held. kv_blocks_cached: free to reuse, content findable.
        kv_blocks_leaked: Blocks whose reference count differs from what these account for.
        prefix_hit_tokens, prefix_query_tokens: Prompt tokens found in the own cache, of those looked up.
        num_imported_tokens: Tokens whose KV came with requests.
        num_scheduler_errors: Steps in which a plugin's scheduler raised or planned nonsense and the default one stood in.
        num_draft_tokens, num_draft_tokens_accepted: Drafted tokens that were computed, and those of them that became output.
        num_held: Finished sequences that are held.
        num_forks: Requests that began with another sequence's KV.
        num_scored_tokens: Given tokens whose log-probabilities were told.
        num_draft_errors: Calls of a draft method that raised or gave nonsense; their steps went on without drafts.
        num_filtered_prompts, num_tokens_left_out: Prompts that a filter chose tokens of, and their tokens that it did not choose.
        num_filter_errors: Prompts that were read whole because a filter raised or gave nonsense.
        num_checked, num_redrawn: Tokens of constrained sequences that were drawn without a mask and allowed, and those drawn anew because they were refused.
        num_masks_filled, num_masks_skipped: Rows of constrained sequences with a mask, and without because every token was allowed.
        num_masks_late: Steps that waited for masks when their forward pass was done.
        num_jumped_tokens: Tokens that grammars forced, without a forward pass of their own.
        num_grammar_errors: Requests that ended because their grammar's matcher raised, hung or contradicted itself.
        num_swaps: Times that the weights were exchanged.
    """

    num_running: int
    num_waiting: int
    num_pending_tokens: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    kv_blocks_leaked: int
    num_steps: int
    num_tokens_generated: int
    num_preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    num_imported_tokens: int
    num_scheduler_errors: int
    num_draft_tokens: int = 0
    num_draft_tokens_accepted: int = 0
    num_draft_errors: int = 0
    num_held: int = 0
    num_forks: int = 0
    num_scored_tokens: int = 0
    num_filtered_prompts: int = 0
    num_tokens_left_out: int = 0
    num_filter_errors: int = 0
    num_masks_filled: int = 0
    num_checked: int = 0
    num_redrawn: int = 0
    num_masks_skipped: int = 0
    num_masks_late: int = 0
    num_jumped_tokens: int = 0
    num_grammar_errors: int = 0
    num_swaps: int = 0
