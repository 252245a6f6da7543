"""The engine: `step()` schedules, drafts, runs, samples and emits."""

from __future__ import annotations

import bisect
import dataclasses
import secrets
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import structlog

from plugmesh.errors import AlreadyExists, InternalError, InvalidRequest, NotFound, Overloaded, PlugmeshError
from plugmesh.records import DraftContext, KvCodecRecord, PromptFilterContext, SchedulerContext
from plugmesh.types import BLOCK_TOKENS, FinishReason, TokenInfo, Usage, block_chain, block_id
from plugmesh_engine.admission import check_request
from plugmesh_engine.batch import StepResult
from plugmesh_engine.config import EngineConfig, leaves_a_core
from plugmesh_engine.constrained import Advance, Cursor, Grammars
from plugmesh_engine.filtering import Filtering
from plugmesh_engine.forks import Holds, Origin
from plugmesh_engine.kv.pool import BlockPool
from plugmesh_engine.kv.view import PoolView
from plugmesh_engine.measure import measure_step_ms, teacher_forced
from plugmesh_engine.native_checks import Checking, NativeChecks
from plugmesh_engine.obeying import Obeying
from plugmesh_engine.outcome import (
    MAX_SCORED_ROWS,
    Sampled,
    choose_tokens,
    cut_scored,
    drop_bad_drafts,
    hidden_rows,
    rows_of,
    taps_of,
)
from plugmesh_engine.requests import BlockReady, EngineRequest, EngineStats, StepOutput, TokenEvent
from plugmesh_engine.sampler import Choose, needs_counts
from plugmesh_engine.scheduler import FcfsScheduler
from plugmesh_engine.seams import Executor, Model, Scheduler, SequenceView
from plugmesh_engine.sequence import Group, State
from plugmesh_engine.sequence import Sequence as Seq
from plugmesh_engine.speculate import Drafter, Planned
from plugmesh_engine.swap import Swap, Swapping

log = structlog.get_logger()


class Engine(Obeying, Swapping):
    """Runs many requests together on one model.

    One thread owns an engine; nothing here locks. Knows nothing of text, deadlines, streams or the network.

    Args:
        scheduler: A `seams.Scheduler`, or a `plugmesh.records.SchedulerRecord` to build one from; None for the engine's own.
        drafts: A `seams.DraftMethod`, or a `plugmesh.records.DraftRecord` to build one from; None for no drafts.
        kv_codec: Keeps the KV in a plugin's form.
        prompt_filter: A `plugmesh.records.PromptFilterRecord`; None reads every prompt whole.
        executor: Used in place of the model's own.

    Raises:
        ConfigError: The model was loaded for another executor, dtype or device than `config` says.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        *,
        scheduler: Any = None,
        drafts: Any = None,
        kv_codec: KvCodecRecord | None = None,
        prompt_filter: Any = None,
        executor: Executor | None = None,
    ) -> None:
        c = model.config
        self.model = model
        self.config = config
        self.max_model_len = min(config.max_model_len or c.max_position, c.max_position)
        self._executor = executor or (model.build_executor(config, kv_codec) if kv_codec is not None else model.build_executor(config))
        self.layout = self._executor.layout
        self._layout_key = self.layout.key()
        self._pool = BlockPool(self.layout, config.num_blocks, self._executor.memory)
        self._view = PoolView(self._pool)
        self._holds = Holds(self._pool)
        self._choose: Choose | None = getattr(self._executor, "sample", None)
        self._eos = c.eos_token_ids
        self._groups: dict[str, Group] = {}
        self._retained: dict[str, list[int]] = {}
        self._waiting: list[Seq] = []  # by Seq.order
        self._running: list[Seq] = []  # by Seq.order
        self._out = StepOutput(step=0)
        self._arrivals = 0
        self._num_steps = self._num_generated = self._num_preemptions = self._num_scheduler_errors = 0
        self._num_forks = self._num_scored = 0
        self._prefix_hits = self._prefix_queries = self._num_imported = 0
        self._own_scheduler: Scheduler = FcfsScheduler(config.max_tokens_per_step, config.max_num_sequences)
        self._scheduler_name = getattr(scheduler, "name", type(scheduler).__name__)
        self._scheduler: Scheduler = self._own_scheduler if scheduler is None else scheduler
        if hasattr(scheduler, "build"):
            context = SchedulerContext(config.max_tokens_per_step, config.max_num_sequences, config.num_blocks, self.measure_step_ms)
            self._scheduler = scheduler.build(context)
        self._drafter: Drafter | None = None
        if drafts is not None and config.max_draft_tokens > 0:
            name = getattr(drafts, "name", type(drafts).__name__)
            if hasattr(drafts, "build"):
                drafts = drafts.build(
                    DraftContext(config.max_draft_tokens, config.max_num_sequences, config.num_blocks, c.vocab_size, self.measure_step_ms)
                )
            self._drafter = Drafter(drafts, name, max_tokens=config.max_draft_tokens, max_model_len=self.max_model_len, vocab_size=c.vocab_size)
        self._overlaps_masks = leaves_a_core(config) if config.overlap_masks is None else config.overlap_masks
        self._grammars = Grammars(
            c.vocab_size, c.eos_token_ids, jump=config.jump_forward, timeout_s=config.grammar_timeout_s, fill_ahead=not self._overlaps_masks
        )
        self._native_checks = None if self._overlaps_masks else NativeChecks.if_any(self._executor, config.grammar_timeout_s, self._grammars.counters)
        self._swap: Swap | None = None
        self._num_swaps = 0
        self._filling: list[Seq] = []
        self._checking: Checking | None = None
        self._filtering: Filtering | None = None
        if prompt_filter is not None:
            self._filtering = Filtering(
                prompt_filter, self._executor, self._pool, PromptFilterContext(c, self.max_model_len, config.max_tokens_per_step)
            )

    # -- requests in and out ---------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Nothing changes when it raises.

        Raises:
            AlreadyExists: The id is in use, by a retained prompt or a held sequence perhaps.
            Overloaded: `max_waiting` requests wait already, or as many sequences are held as may be.
            ContextLengthExceeded: Prompt plus max_tokens exceed the context, or the prompt the KV pool.
            InvalidRequest: A field is out of range; `param` names it.
            GrammarTimeout, InternalError: The grammar's matcher hung or raised.
        """
        self._add(request)

    def fork(self, request_id: str, sequence: int, new: EngineRequest, num_tokens: int | None = None) -> int:
        """Queues a request that goes on from another one's sequence, running or held, whose KV it shares until one of them writes.

        What it gives is what a fresh request over the same tokens would give.

        Args:
            new: Its `token_ids` follow the sequence's tokens; it may have none. Anything but prefill_only, resume and kv.
            num_tokens: Tokens of the sequence, prompt included, that are gone on from; None for all there are now.

        Returns:
            Tokens of the new prompt that came from the sequence.

        Raises:
            NotFound: The sequence neither runs nor is held.
            InvalidRequest: It has fewer tokens; and all that `add` raises.
        """
        origin = self._origin(request_id, sequence)
        if origin is None:
            raise NotFound(f"sequence {sequence} of request {request_id!r} neither runs nor is held")
        n = len(origin.tokens) if num_tokens is None else num_tokens
        if not 0 <= n <= len(origin.tokens):
            raise InvalidRequest(f"the sequence has {len(origin.tokens)} tokens, {n} are to be gone on from", param="num_tokens")
        if new.prefill_only or new.resume or new.kv:
            raise InvalidRequest("a fork brings no prefill_only, resume or kv", param="fork")
        mixed = request_id in self._groups and self._groups[request_id].spans_versions
        num_inherited = 0 if mixed else min(n, origin.num_computed)
        self._add(dataclasses.replace(new, token_ids=(*origin.tokens[:n], *new.token_ids)), origin, num_inherited)
        self._num_forks += 1
        return n

    def num_tokens_of(self, request_id: str, sequence: int) -> int:
        """Tokens, prompt included, of a sequence that could be forked from now. Raises NotFound."""
        origin = self._origin(request_id, sequence)
        if origin is None:
            raise NotFound(f"sequence {sequence} of request {request_id!r} neither runs nor is held")
        return len(origin.tokens)

    def _origin(self, request_id: str, sequence: int) -> Origin | None:
        held = self._holds.find(request_id, sequence)
        if held is not None or request_id not in self._groups:
            return held
        g = self._groups[request_id]
        if self._filtering is not None and g in self._filtering:  # nobody knows yet what its tokens will be
            return None
        s = next((s for s in g.alive if s.index == sequence and not s.to_score), None)
        if s is None:
            return None
        computed_by = s if g.forked else g.alive[0]  # siblings share the prompt that the first one computes
        if computed_by.state is State.WAITING and g.inherited:
            return Origin(s.tokens, g.num_inherited, g.inherited)
        return Origin(s.tokens, computed_by.num_computed, computed_by.blocks)

    def _add(self, request: EngineRequest, origin: Origin | None = None, num_inherited: int = 0) -> None:
        if request.request_id in self._groups or request.request_id in self._retained or request.request_id in self._holds:
            raise AlreadyExists(f"request id {request.request_id!r} is in use", param="request_id")
        is_stale = bool(request.kv and request.kv_layout) and request.kv_layout != self._layout_key  # the weights were exchanged meanwhile
        if is_stale:
            request = dataclasses.replace(request, kv=())
        check_request(request, self.model.config, self.config, self.max_model_len, self.layout)
        if self.num_waiting >= self.config.max_waiting:
            raise Overloaded(f"{self.num_waiting} requests wait already", retry_after_s=1.0)
        if request.hold:
            to_hold = sum(len(g.alive) for g in self._groups.values() if g.request.hold)
            if self._holds.num_sequences + to_hold + request.num_sequences > self.config.max_held:
                raise Overloaded(f"{self._holds.num_sequences} sequences are held and {to_hold} will be, at most {self.config.max_held}", retry_after_s=1.0)
        cursors: list[Cursor] = []
        if request.grammar is not None:
            cursors = self._grammars.open(request.grammar, request.resume or ((),) * request.num_sequences)
        sampling = request.sampling
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        group = Group(request, self._arrivals, seed, kv=request.kv, cache=request.use_prefix_cache and self.config.prefix_cache)
        self._arrivals += 1
        for i in range(request.num_sequences):
            old = request.resume[i] if request.resume else ()
            score = request.score[i] if request.score else ()
            seq = Seq(group, i, [*request.token_ids, *old, *score[:-1]], num_resumed=len(old), to_score=score, num_tapped=request.tap_from)
            if cursors:
                seq.grammar = cursors[i]
            if needs_counts(sampling):
                seq.counts = {}
                for token in old:
                    seq.count(token)
            group.num_total += len(old)
            group.sequences.append(seq)
        self._groups[request.request_id] = group
        if request.request_id in self._out.kv_imported:  # an earlier request of that name; its buffers are its owner's concern now
            self._out.kv_imported.remove(request.request_id)
        if origin is not None and num_inherited:
            group.inherited, group.num_inherited = origin.blocks[: -(-num_inherited // BLOCK_TOKENS)], num_inherited
            for block in group.inherited:
                self._pool.hold(block)
        if is_stale:
            self._out.kv_imported.append(request.request_id)
        self._finish_complete_resumes(group)
        if cursors:
            self._go_on_from_resumed(group)
        if group.alive and (self._filtering is None or origin is not None or not self._filtering.take(group)):
            self._enter(group)

    def cancel(self, request_id: str, sequence: int | None = None) -> bool:
        """Ends a request, or one sequence of it, and frees its blocks at once. No event follows for what was cancelled.

        Returns:
            Whether anything was alive; also True for a retained prompt and for held sequences, which are released.
        """
        group = self._groups.get(request_id)
        if group is None:
            return sequence is None and self.release(request_id)
        victims = [s for s in group.alive if sequence is None or s.index == sequence]
        for s in victims:
            self._end(s, FinishReason.CANCELLED)
        if sequence is None:
            self._holds.release(request_id)
        if not group.alive:
            self._close(group)
        return bool(victims)

    def release(self, request_id: str) -> bool:
        """Lets go of what a finished request left: a prefill_only prompt, or held sequences. True if there was any; calling it twice is harmless.

        Of a request that still runs, the sequences that ended are let go of, and those that run are not held when they end.
        """
        if request_id in self._groups and (request := self._groups[request_id].request).hold:
            self._groups[request_id].request = dataclasses.replace(request, hold=False)
        blocks = self._retained.pop(request_id, None)
        if blocks is None:
            return self._holds.release(request_id)
        self._pool.drop(reversed(blocks))
        return True

    def export_block(self, request_id: str, block_index: int) -> memoryview:
        """Bytes of one block of a prompt in `KvLayout` order.

        On a CPU this is the pool's own memory: valid while the request is alive or retained, and final once `BlockReady` announced the block.

        Raises:
            NotFound: No such request, or not that many blocks.
        """
        blocks = self._retained.get(request_id)
        if blocks is None and request_id in self._groups:
            blocks = next((s.blocks for s in self._groups[request_id].alive if s.blocks), None)
        if blocks is None or not 0 <= block_index < len(blocks):
            raise NotFound(f"request {request_id!r} holds no block {block_index}")
        return self._pool.read(blocks[block_index])

    def cached_prefix(self, token_ids: Sequence[int]) -> int:
        """Tokens at the start of a prompt whose KV the prefix cache holds; full blocks only. Changes nothing; other threads may ask."""
        if not self.config.prefix_cache:
            return 0
        return len(self._pool.prefix.match(block_chain(self._layout_key, token_ids))) * BLOCK_TOKENS

    def watch_blocks(self, observer: Callable[[bytes, bool], None]) -> list[bytes]:
        """Names of the blocks that the prefix cache holds; from now on `observer(name, is_stored)` hears of every change.

        It runs on the engine's thread in the middle of a step, so it must be quick and must not raise. There is one observer.
        """
        self._pool.prefix.observer = observer
        return self._pool.prefix.names()

    def is_filtered(self, num_prompt_tokens: int) -> bool:
        """Whether the plugin's filter would look at a prompt of this length; KV of the whole prompt is then of no use. Other threads may ask."""
        return self._filtering is not None and self._filtering.layers(num_prompt_tokens) > 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait, those whose prompt is being filtered among them."""
        return len(self._waiting) + (len(self._filtering) if self._filtering is not None else 0)

    @property
    def num_running(self) -> int:
        """Sequences that run; one whose siblings wait for their common prompt counts for all of them."""
        return sum(s.num_slots for s in tuple(self._running))

    def has_work(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return bool(self._waiting or self._running or self._out.tokens or self._out.kv_imported or self._filtering or self._swap)

    def stats(self) -> EngineStats:
        """Gauges and counters as of now; audits the reference counts, which costs tens of microseconds."""
        alive = [s for g in self._groups.values() for s in g.alive]
        held = chain(
            chain.from_iterable(s.blocks for s in alive), chain.from_iterable(self._retained.values()), self._holds.blocks(),
            chain.from_iterable(g.inherited for g in self._groups.values()), self._filtering.blocks() if self._filtering is not None else (),
        )  # fmt: skip
        pending = sum(
            max(0, g.num_shared - max((s.num_computed for s in g.alive), default=0)) + sum(s.num_left for s in g.alive if not g.request.prefill_only)
            for g in self._groups.values()
        )
        return EngineStats(
            num_running=sum(s.num_slots for s in self._running), num_waiting=self.num_waiting, num_pending_tokens=pending,
            kv_blocks_used=self._pool.num_used, kv_blocks_cached=self._pool.prefix.num_idle, kv_blocks_total=self._pool.num_total,
            kv_blocks_leaked=self._pool.leaked(held), num_steps=self._num_steps, num_tokens_generated=self._num_generated,
            num_preemptions=self._num_preemptions, prefix_hit_tokens=self._prefix_hits, prefix_query_tokens=self._prefix_queries,
            num_imported_tokens=self._num_imported, num_scheduler_errors=self._num_scheduler_errors,
            num_draft_tokens=self._drafter.num_drafted if self._drafter else 0,
            num_draft_tokens_accepted=self._drafter.num_accepted if self._drafter else 0,
            num_draft_errors=self._drafter.num_errors if self._drafter else 0,
            num_held=self._holds.num_sequences, num_forks=self._num_forks, num_scored_tokens=self._num_scored,
            num_filtered_prompts=self._filtering.num_prompts if self._filtering is not None else 0,
            num_tokens_left_out=self._filtering.num_tokens_left_out if self._filtering is not None else 0,
            num_filter_errors=self._filtering.num_errors if self._filtering is not None else 0,
            num_masks_filled=self._grammars.counters.num_masks_filled, num_checked=self._grammars.counters.num_checked,
            num_redrawn=self._grammars.counters.num_redrawn, num_masks_skipped=self._grammars.counters.num_masks_skipped,
            num_masks_late=self._grammars.counters.num_masks_late, num_jumped_tokens=self._grammars.counters.num_jumped_tokens,
            num_grammar_errors=self._grammars.counters.num_errors, num_swaps=self._num_swaps,
        )  # fmt: skip

    def measure_step_ms(self, num_prefill_tokens: int, num_decodes: int, kv_tokens: int) -> float:
        """Milliseconds of one synthetic step; see `plugmesh.records.SchedulerContext`. Leaves the engine as it was. Raises Overloaded when blocks are short."""
        return measure_step_ms(self._executor, self._pool, self.model.config.vocab_size, num_prefill_tokens, num_decodes, kv_tokens)

    def logits(self, token_ids: Sequence[int], *, chunk_tokens: int = 32) -> Iterator[np.ndarray]:
        """Logits after every token of a text, chunk by chunk, past scheduler, drafts and sampler; see `measure.teacher_forced`. No step may run meanwhile."""
        return teacher_forced(self._executor, self._pool, token_ids, chunk_tokens)

    def close(self) -> None:
        """Ends the executor's threads. No other method may be called afterwards."""
        self._grammars.close()
        self._executor.close()

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """One forward pass over what the scheduler chose. Safe to call without work."""
        if self._swap is not None:
            self._swap_when_due()
        if self._filtering and self._swap is None:
            self._advance_filtering(self._filtering)
        plan = self._schedule()
        self._draft(plan)
        began = time.perf_counter()
        plan, result = self._run(plan)
        sampled = self._sample(plan, result)
        self._append(sampled)
        if self._drafter is not None:
            self._drafter.observe(plan, (time.perf_counter() - began) * 1e3)
        return self._emit()

    def _schedule(self) -> list[Planned]:
        """Asks the scheduler, then admits, takes blocks and preempts until the plan can run."""
        self._make_way()
        waiting = self._offered()
        try:
            wishes = self._scheduler.schedule(waiting, tuple(self._running), self._view)
            if self._scheduler is not self._own_scheduler:
                self._check_plan(wishes)
        except Exception as e:
            if self._scheduler is self._own_scheduler:
                raise
            self._num_scheduler_errors += 1
            log.warning("engine.scheduler_failed", scheduler=self._scheduler_name, error=type(e).__name__, count=self._num_scheduler_errors)
            wishes = self._own_scheduler.schedule(waiting, tuple(self._running), self._view)
        plan: list[Planned] = []
        may_enter = {id(s) for s in self._waiting} if self._waiting else set()  # not those that this very step preempts
        rows_to_score = MAX_SCORED_ROWS
        for seq, num_tokens in wishes:
            assert isinstance(seq, Seq)
            if seq.state is State.WAITING and id(seq) in may_enter and not self._admit(seq):
                may_enter.clear()  # nobody overtakes the one that did not fit
            if seq.state is not State.RUNNING:
                continue
            part = Planned(seq, min(num_tokens, seq.num_pending))
            if seq.to_score:
                rows_to_score -= cut_scored(part, rows_to_score)
            if part.num_tokens and self._make_room(seq, part.num_tokens):
                plan.append(part)
        return [p for p in plan if p.seq.state is State.RUNNING]  # a later one may have preempted an earlier one

    def _check_plan(self, wishes: Sequence[tuple[SequenceView, int]]) -> None:
        known = {id(s) for s in chain(self._waiting, self._running)}
        for seq, num_tokens in wishes:
            if id(seq) not in known:
                raise ValueError("the plan names a sequence twice, or one that was not offered")
            known.discard(id(seq))
            if not 1 <= num_tokens <= self._view.pending(seq):
                raise ValueError(f"{num_tokens} tokens planned, {self._view.pending(seq)} pending")

    def _draft(self, plan: list[Planned]) -> None:
        """Asks the draft method, and takes blocks for what it gives; nobody is preempted for a draft, and admissions keep their margin."""
        if self._drafter is None:
            return
        self._drafter.propose(plan)
        constrained = [p for p in plan if p.draft and p.seq.grammar is not None]
        if constrained:
            drafts = self._grammars.cut([(p.seq.grammar, p.draft) for p in constrained if p.seq.grammar is not None])
            for p, draft in zip(constrained, drafts, strict=True):
                p.draft = draft
        for p in plan:
            if p.draft:
                s = p.seq
                while len(s.blocks) * BLOCK_TOKENS < s.num_computed + 1 + len(p.draft) and self._pool.num_free > self._view.watermark:
                    s.blocks.append(self._pool.take())
                p.draft = p.draft[: len(s.blocks) * BLOCK_TOKENS - s.num_computed - 1]

    def _run(self, plan: list[Planned]) -> tuple[list[Planned], StepResult | None]:
        """Computes the plan. When that raises, each sequence runs alone and without its draft, and those that raise again end with an error."""
        if not plan:
            return plan, None
        self._num_steps += 1
        result: StepResult | None
        self._fill_masks(plan)
        try:
            result = self._compute(plan)
            done = plan
        except Exception as e:
            log.warning("engine.step_failed", num_sequences=len(plan), error=type(e).__name__)
            parts, done, hidden = [], [], list[np.ndarray]()
            for p in plan:
                p.draft = ()
                if p.seq.state is not State.RUNNING:  # its sibling failed
                    continue
                try:
                    part = self._compute([p], keeps=False)  # what is kept is of one run
                    parts.append((part.best.copy(), part.logits.copy()))
                    hidden.extend(part.hidden)
                    done.append(p)
                except Exception as e1:
                    # Not the traceback: a renderer that shows local variables would put token ids into the log.
                    frame = traceback.extract_tb(e1.__traceback__)[-1]
                    log.error("engine.sequence_failed", request_id=p.seq.request_id, error=type(e1).__name__, where=f"{frame.name}:{frame.lineno}")
                    self._fail(p.seq.group, e1 if isinstance(e1, PlugmeshError) else InternalError("the model failed on this request"))
            done = [p for p in done if p.seq.state is State.RUNNING]
            result = StepResult(np.concatenate([b for b, _ in parts]), np.concatenate([x for _, x in parts]), tuple(hidden)) if parts else None
            if len(parts) != len(done):  # a sibling's failure took others of its request along; start over without them
                return self._run(done)
        if result is not None and result.hidden:
            self._out.hidden.extend(hidden_rows(done, result.hidden))
        for p in done:
            s = p.seq
            s.num_computed += p.num_tokens
            if not s.group.forked and s.to_score and s.num_computed >= s.group.num_shared:
                self._fork(s)
        return done, result

    def _compute(self, plan: list[Planned], *, keeps: bool = True) -> StepResult:
        keeps = keeps and self._native_checks is not None and self._native_checks.keeps_logits
        rows, taps = [rows_of(p, keeps=keeps) for p in plan], taps_of(plan)
        return self._executor.run(rows, taps) if taps else self._executor.run(rows)

    def _sample(self, plan: list[Planned], result: StepResult | None) -> list[Sampled]:
        """A token for every wanted row of every sequence whose pending tokens are all computed; prompts shared by siblings are forked here."""
        self._collect_masks()
        best = result.best.tolist() if result is not None else []
        if self._drafter is not None and -1 in best:
            drop_bad_drafts(plan, best, self._pool)
        self._check_best(plan, result, best)
        self._after_compute(plan)
        return [] if result is None else choose_tokens(
            plan, result, best, self._siblings, self._choose, self._eos, checks_later=not self._overlaps_masks
        )  # fmt: skip

    def _siblings(self, first: Seq) -> list[Seq]:
        self._fork(first)
        return [s for s in first.group.alive if s.num_computed == len(s.tokens)]

    def _append(self, sampled: list[Sampled]) -> None:
        """Appends the tokens, a drafted one only where the sampler chose the same, and ends what is complete."""
        for s, p, infos, advance in self._obey(sampled):
            if s.state is not State.RUNNING:  # a sibling's error ended the request, or its last token that all may generate together
                continue
            if s.to_score:
                self._append_scores(s, infos)
                continue
            if not self._extend(s, p, infos, advance):
                self._fail(s.group, InternalError("the model gave no finite logits for this request"))

    def _extend(self, s: Seq, p: Planned | None, infos: Sequence[TokenInfo | None], obeyed: Advance | None) -> bool:
        """Appends what a step gave, or a grammar alone (no part of a step then), tells it, and ends what is complete. False when there was no token."""
        g, index, draft = s.group, s.num_generated, p.draft if p is not None else ()
        limit = g.request.max_total_tokens
        reason: FinishReason | None = None
        told: list[TokenInfo] = []
        num_drafted = 0  # of the tokens told: what was computed already
        for info in infos:
            if info is None:  # at the first row that is the model's failure; behind it the next step will see
                break
            token = info.token_id
            is_drafted = num_drafted == len(told) < len(draft) and draft[num_drafted] == token
            num_drafted += is_drafted
            told.append(info)
            s.tokens.append(token)
            s.count(token)
            reason = self._finish_reason(s, token)
            if limit and reason is None and g.num_total + len(told) >= limit:
                reason = FinishReason.LENGTH
            if reason is not None or (obeyed is None and not is_drafted):
                break
        if not told:
            return False
        if obeyed is not None and obeyed.told is not None and obeyed.told.is_over and len(told) == len(obeyed.told.tokens):
            reason = FinishReason.STOP
        self._num_generated += len(told)
        g.num_total += len(told)
        num_accepted = min(num_drafted, len(told) - 1)  # one is left to compute
        if p is not None and num_accepted:  # the KV of accepted tokens is there already
            p.num_accepted = num_accepted
            s.num_computed += num_accepted
            if g.cache:
                s.register(self._pool.prefix, self._layout_key)
        if reason is not None or g.request.prefill_only:
            self._end(s, reason or FinishReason.LENGTH)
        self._tell(s, index, tuple(told), reason)
        if limit and g.num_total >= limit:
            for sibling in g.alive:
                self._end(sibling, FinishReason.LENGTH)
                self._tell(sibling, sibling.num_generated, (), FinishReason.LENGTH)
        return True

    def _append_scores(self, s: Seq, infos: Sequence[TokenInfo | None]) -> None:
        """Tells given tokens and ends a sequence with the last of them."""
        told = [info for info in infos if info is not None]
        if len(told) < len(infos):
            self._fail(s.group, InternalError("the model gave no finite logits for this request"))
            return
        index = s.num_scored
        s.num_scored += len(told)
        self._num_scored += len(told)
        reason = FinishReason.LENGTH if s.num_scored == len(s.to_score) else None
        if reason is not None:
            self._end(s, reason)
        self._tell(s, index, tuple(told), reason)

    def _after_compute(self, plan: Iterable[Planned]) -> None:
        """Makes new full blocks findable and announces those of prefill_only prompts."""
        for p in plan:
            s = p.seq
            if s.state is State.RUNNING and s.group.cache:
                s.register(self._pool.prefix, self._layout_key)
            if s.state is State.RUNNING and s.group.request.prefill_only:
                self._announce(s)

    def _announce(self, s: Seq) -> None:
        g, prompt = s.group, s.group.request.token_ids
        computed = min(s.num_computed, g.num_prompt)
        last = -(-g.num_prompt // BLOCK_TOKENS) if computed == g.num_prompt else computed // BLOCK_TOKENS
        if g.num_blocks_announced == last:
            return
        if not self._pool.memory.all_finite(s.blocks[g.num_blocks_announced : last]):
            self._fail(g, InternalError("the model gave no finite keys and values for this request"))  # they must not reach other engines
            return
        names = s.names_upto(computed, self._layout_key)
        if last > len(names):
            parent = names[-1] if names else self._layout_key
            names = [*names, block_id(parent, prompt[len(names) * BLOCK_TOKENS :])]
        for i in range(g.num_blocks_announced, last):
            parent = names[i - 1] if i else self._layout_key
            num_tokens = min(BLOCK_TOKENS, g.num_prompt - i * BLOCK_TOKENS)
            self._out.blocks_ready.append(BlockReady(s.request_id, i, names[i], parent, num_tokens))
        g.num_blocks_announced = last

    def _emit(self) -> StepOutput:
        """Hands over what the step produced."""
        out, self._out = self._out, StepOutput(step=self._num_steps + 1)
        out.step, out.weight_version = self._num_steps, self.model.version
        return out

    # -- ends ------------------------------------------------------------------------------------------------------

    def _end(self, s: Seq, reason: FinishReason) -> None:
        """Takes a sequence out. Its blocks are freed, retained for a prefill_only prompt, or passed to a sibling when the prompt was being computed for both."""
        old_state, g = s.state, s.group
        s.state, s.finish_reason = State.FINISHED, reason
        if old_state is State.RUNNING:
            self._running.remove(s)
        elif old_state is State.WAITING:
            self._waiting.remove(s)
        alive = g.alive
        if not g.forked and old_state is not State.UNBORN and alive:
            heir = alive[0]
            heir.blocks, s.blocks = s.blocks, []
            heir.num_computed, heir.num_registered = s.num_computed, s.num_registered
            heir.block_ids = s.block_ids[: heir.num_computed // BLOCK_TOKENS]
            heir.state = old_state
            bisect.insort(self._running if old_state is State.RUNNING else self._waiting, heir, key=lambda r: r.order)
        if not g.forked and len(alive) == 1:
            g.forked = True
        kept = g.request.prefill_only and reason in (FinishReason.STOP, FinishReason.LENGTH)
        if kept and g.request.request_id not in self._retained:
            self._retained[g.request.request_id], s.blocks = s.blocks, []
        if g.request.hold and reason in (FinishReason.STOP, FinishReason.LENGTH):
            if g.spans_versions:  # whoever goes on from it shall not do so over the KV of old weights
                self._drop_blocks(s)
            self._holds.keep(g.request.request_id, s.index, Origin(s.tokens, s.num_computed, s.blocks))
            s.blocks = []
        self._drop_blocks(s)

    def _close(self, g: Group) -> None:
        self._drop_imports(g)
        self._drop_inherited(g)
        if self._filtering is not None:
            self._filtering.drop(g)
        del self._groups[g.request.request_id]

    def _tell(self, s: Seq, index: int, tokens: tuple[TokenInfo, ...], reason: FinishReason | None, error: PlugmeshError | None = None) -> None:
        done = s.state is State.FINISHED and not s.group.alive
        usage = self._usage(s.group) if done else None
        self._out.tokens.append(TokenEvent(s.request_id, s.index, index, tokens, reason, done, usage, error))
        if done:
            self._close(s.group)

    def _fail(self, g: Group, error: PlugmeshError) -> None:
        """Ends a whole request with one error event. What it computed is not trusted to be found by others."""
        alive = g.alive
        self._out.blocks_ready = [b for b in self._out.blocks_ready if b.request_id != g.request.request_id]
        for s in alive:
            self._pool.forget(s.blocks)
            self._end(s, FinishReason.ERROR)
        if blocks := self._retained.get(g.request.request_id):
            self._pool.forget(blocks)
            self.release(g.request.request_id)
        self._holds.release(g.request.request_id)
        self._tell(alive[0], alive[0].num_generated, (), FinishReason.ERROR, error)

    def _finish_complete_resumes(self, g: Group) -> None:
        """Ends sequences that came complete: marked so, or whose tokens end them anyway."""
        for s in list(g.alive):
            known = bool(g.request.resume_finished and g.request.resume_finished[s.index])
            is_complete = known or (s.grammar is not None and s.grammar.is_over)
            reason = FinishReason.STOP if is_complete else self._finish_reason(s, s.tokens[-1]) if s.num_resumed else None
            if reason is not None:
                self._end(s, reason)
                if not known or not g.alive:  # an end that was told before is told again only to end the request
                    self._tell(s, s.num_generated, (), reason)

    def _finish_reason(self, s: Seq, token: int) -> FinishReason | None:
        if token in s.group.end_ids(self._eos):
            return FinishReason.STOP
        if s.num_generated >= s.sampling.max_tokens or len(s.tokens) >= self.max_model_len:
            return FinishReason.LENGTH
        return None

    def _usage(self, g: Group) -> Usage:
        if g.request.score:
            return Usage(g.num_prompt + sum(map(len, g.request.score)), 0, max(0, g.num_cached_tokens))
        return Usage(g.num_given, sum(s.num_generated for s in g.sequences), max(0, g.num_cached_tokens))
