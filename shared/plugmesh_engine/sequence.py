"""What the engine remembers of a request and of each of its sequences."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plugmesh.types import BLOCK_TOKENS, FinishReason, SamplingParams, block_id
from plugmesh_engine.constrained import Cursor
from plugmesh_engine.kv.prefix import PrefixCache
from plugmesh_engine.requests import EngineRequest, KvSource
from plugmesh_engine.sampler import draws_freely, needs_logits


class State(enum.Enum):
    """Where a sequence stands. UNBORN: its prompt is computed by the request's first sequence, which it will be forked from."""

    UNBORN = "unborn"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Group:
    """One request: the sequences that share its prompt.

    Attributes:
        seed: Of the request, or drawn when it was added.
        forked: Every live sequence has its own KV. Until then the first live one computes the prompt for all.
        kv: Imported KV, until it is copied into the pool.
        num_cached_tokens: Prompt tokens whose KV was found when the request was first admitted; -1 before.
        num_blocks_announced: Of a prefill_only prompt.
        num_prompt, needs_logits: Of the request, kept because they are read in every step.
        is_checked_later: A constrained sequence's token, once `min_tokens` are there, may be drawn before its mask is known; its matcher is then asked for that
            token alone (`sampler.draws_freely`).
        rarely_reads_logits: Where its greedy token is refused then.
        num_shared: Tokens that the first sequence computes for all: the prompt, without its last token where continuations are scored, because that one's
            row tells the first token of each.
        inherited: Blocks of the sequence that the request was forked from, with a reference each, until it is admitted; they hold `num_inherited` tokens.
        num_total: Tokens that all its sequences have generated.
        num_given: Prompt tokens that the request came with; `num_prompt` of them were chosen where a filter leaves some out.
        spans_versions: Weights were exchanged while it ran, and it went on over the KV of the old ones.
    """

    request: EngineRequest
    arrival: int
    seed: int
    sequences: list[Sequence] = field(default_factory=list)
    forked: bool = False
    kv: tuple[KvSource, ...] = ()
    num_cached_tokens: int = -1
    num_blocks_announced: int = 0
    cache: bool = True
    num_prompt: int = 0
    num_shared: int = 0
    needs_logits: bool = False
    is_checked_later: bool = False
    rarely_reads_logits: bool = False
    inherited: list[int] = field(default_factory=list)
    num_inherited: int = 0
    num_total: int = 0
    num_given: int = 0
    spans_versions: bool = False
    _end_ids: tuple[int, ...] | None = None
    _distinct: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.num_prompt = self.num_given = len(self.request.token_ids)
        self.num_shared = self.num_prompt - (1 if self.request.score else 0)
        self.needs_logits = self.request.grammar is not None or needs_logits(self.request.sampling)
        self.is_checked_later = self.request.grammar is not None and draws_freely(self.request.sampling, self.request.sampling.min_tokens)
        self.rarely_reads_logits = self.is_checked_later and self.request.sampling.temperature <= 0

    def choose_prompt(self, token_ids: tuple[int, ...]) -> None:
        """Other tokens take the prompt's place, before any of it was computed. What was generated before (`EngineRequest.resume`) stays."""
        for s in self.sequences:
            s.tokens[: self.num_prompt] = token_ids
            s.block_ids.clear()
        self.request = dataclasses.replace(self.request, token_ids=token_ids)
        self.num_prompt = self.num_shared = len(token_ids)
        self._distinct = None

    @property
    def alive(self) -> list[Sequence]:
        return [s for s in self.sequences if s.state is not State.FINISHED]

    @property
    def waits_for_prompt_logits(self) -> bool:
        """Some sequence samples its first token from the prompt's last row."""
        return any(len(s.tokens) == self.num_prompt for s in self.alive)

    def end_ids(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens that end a sequence with STOP."""
        if self._end_ids is None:
            p = self.request.sampling
            self._end_ids = tuple(sorted({*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)}))
        return self._end_ids

    def distinct_prompt_ids(self) -> np.ndarray:
        """For the repetition penalty; computed when first used."""
        if self._distinct is None:
            self._distinct = np.unique(np.asarray(self.request.token_ids, dtype=np.int64))
        return self._distinct


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation of a request. Implements `plugmesh_engine.seams.SequenceView` and `DraftView`.

    Attributes:
        tokens: Prompt and generated tokens; the KV of the first `num_computed` is in `blocks`.
        block_ids: Names of the full blocks of `tokens`, as far as they were needed.
        num_resumed: Generated tokens that came with the request.
        num_registered: Full blocks already offered to the prefix cache.
        order: Sort key of service: priority, arrival, sequence.
        max_draft_tokens, memo: See `plugmesh_engine.seams.DraftView`.
        skips_draft: Its next step runs without a draft, to tell the draft's fault from its own.
        to_score: Given tokens; `tokens` ends with the last but one of them. `num_scored` of them were told.
        num_tapped: Position of the next hidden state to tell.
        grammar: Where it stands in its request's grammar.
    """

    group: Group
    index: int
    tokens: list[int]
    num_resumed: int = 0
    state: State = State.UNBORN
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    block_ids: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    counts: dict[int, int] | None = None
    finish_reason: FinishReason | None = None
    order: tuple[int, int, int] = (0, 0, 0)
    max_draft_tokens: int = 0
    memo: Any = None
    skips_draft: bool = False
    to_score: tuple[int, ...] = ()
    num_scored: int = 0
    num_tapped: int = 0
    grammar: Cursor | None = None

    def __post_init__(self) -> None:
        self.order = (self.group.request.priority, self.group.arrival, self.index)

    @property
    def request_id(self) -> str:
        return self.group.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        return self.group.request.sampling

    @property
    def arrival(self) -> int:
        return self.group.arrival

    @property
    def priority(self) -> int:
        return self.group.request.priority

    @property
    def num_prompt_tokens(self) -> int:
        return self.group.num_prompt

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.group.num_prompt

    @property
    def target(self) -> int:
        """Tokens to compute before something can be sampled or forked."""
        return len(self.tokens) if self.group.forked else self.group.num_shared

    @property
    def first_scored_row(self) -> int:
        """Position of the row that tells the next given token."""
        return self.group.num_shared + self.num_scored

    @property
    def num_left(self) -> int:
        """The most tokens that it may still tell."""
        return len(self.to_score) - self.num_scored if self.to_score else self.sampling.max_tokens - self.num_generated

    @property
    def num_pending(self) -> int:
        return self.target - self.num_computed

    @property
    def is_decode(self) -> bool:
        g = self.group  # in one piece: asked for every sequence in every step
        return self.num_computed > 0 and (len(self.tokens) if g.forked else g.num_shared) - self.num_computed == 1

    @property
    def num_slots(self) -> int:
        return 1 if self.group.forked else len(self.group.alive)

    def names_upto(self, num_tokens: int, layout_key: bytes) -> list[bytes]:
        """Names of the full blocks among the first `num_tokens` tokens, hashed at most once."""
        num_blocks = num_tokens // BLOCK_TOKENS
        while len(self.block_ids) < num_blocks:
            i = len(self.block_ids)
            parent = self.block_ids[-1] if i else layout_key
            self.block_ids.append(block_id(parent, self.tokens[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]))
        return self.block_ids[:num_blocks]

    def register(self, prefix: PrefixCache, layout_key: bytes) -> None:
        """Makes the blocks that have become full findable."""
        if self.num_computed // BLOCK_TOKENS == self.num_registered:
            return
        names = self.names_upto(self.num_computed, layout_key)
        for i in range(self.num_registered, len(names)):
            prefix.insert(names[i], self.blocks[i])
        self.num_registered = len(names)

    def count(self, token: int) -> None:
        """Keeps the counts of generated tokens that penalties need, when they are in use."""
        if self.counts is not None:
            self.counts[token] = self.counts.get(token, 0) + 1
