"""Sequences that obey a grammar: masks while the model computes, tokens accepted behind the sampler, forced text without forward passes.

What is asked of matchers, which are foreign code, runs on a thread of its own: a step computes its masks while the forward pass runs, a matcher that raises
costs its request, and one that hangs is given up on with its thread. Idea of masks beside the forward pass and of jump-forward: XGrammar, Dong et al.,
arXiv:2411.15100; SGLang, Zheng et al., arXiv:2312.07104.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import structlog

from plugmesh.errors import FailedPrecondition, GrammarTimeout, InternalError, InvalidRequest, PlugmeshError
from plugmesh.grammar.seams import CompiledGrammar, GrammarVocabulary, Matcher

log = structlog.get_logger()
T = TypeVar("T")

WINDOW_TOKENS = (4, 2, 1)
"""Of how many of the last tokens the text is tokenised together with what is forced; the first that comes back unchanged counts."""
LOOK_AHEAD_BYTES = 96
"""Of forced text, to find its next token: several times the longest token that matters."""
_PROBES = ("a", "0", " ", '"', ",", "\n")
"""What might follow forced text. A token whose border any of them moves is left to the model."""
_WAITS = 4  # a process that was suspended must see its thread run before a matcher is called hung


@dataclass(frozen=True, slots=True)
class Constraint:
    """What `EngineRequest.grammar` holds; every sequence of the request obeys it on its own, from its first generated token on."""

    compiled: CompiledGrammar
    vocabulary: GrammarVocabulary


@dataclass(slots=True)
class GrammarCounters:
    """Since the engine's start.

    Attributes:
        num_masks_filled, num_masks_skipped: Rows with a mask, and rows where every token was allowed.
        num_checked, num_redrawn: Tokens that were drawn without a mask and allowed, and those that were drawn anew because they were not.
        num_masks_late: Steps whose forward pass was done before their masks; `late_ms` is how long they waited for them.
        num_forced_calls, num_forced: Times that a matcher was asked what is forced, and how often anything was.
        num_jumped_tokens: Tokens that were appended without a forward pass of their own.
        num_draft_tokens_cut: Drafted tokens that a grammar refused before they were computed.
        num_errors: Requests that ended because their matcher raised, hung or contradicted itself.
    """

    num_masks_filled: int = 0
    num_masks_skipped: int = 0
    num_checked: int = 0
    num_redrawn: int = 0
    num_masks_late: int = 0
    late_ms: float = 0.0
    num_forced_calls: int = 0
    num_forced: int = 0
    num_jumped_tokens: int = 0
    num_draft_tokens_cut: int = 0
    num_errors: int = 0


class Jumper:
    """Finds the tokens of forced text as the model's own tokenizer would have written them.

    One token at a time, from the last tokens and the forced bytes alone: whoever goes on from the same tokens, in another process perhaps, finds the same.
    """

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        assert vocabulary.encode is not None
        self._encode = vocabulary.encode
        self._bytes = vocabulary.token_bytes
        self._special = vocabulary.special_ids
        self.find = functools.lru_cache(maxsize=8192)(self._find)

    def bytes_of(self, token: int) -> bytes | None:
        """None for a control token, and where there is none."""
        return self._bytes[token] if token < len(self._bytes) and token not in self._special else None

    def tokens(self, last: Sequence[int], forced: bytes) -> tuple[tuple[int, ...], int]:
        """What `forced` is written as behind the `last` tokens.

        Returns:
            The tokens, and how many of them stay as they are whatever follows. None at all when the tokenizer would have written the last tokens otherwise.
        """
        return self.find(tuple(last[-WINDOW_TOKENS[0] :]), forced[:LOOK_AHEAD_BYTES])

    def _find(self, last: tuple[int, ...], forced: bytes) -> tuple[tuple[int, ...], int]:
        ahead = forced.decode("utf-8", "ignore").encode()  # a character that is cut at the end is left out
        if not ahead or not forced.startswith(ahead):
            return (), 0
        for size in sorted({min(size, len(last)) for size in WINDOW_TOKENS}, reverse=True):
            tail = last[len(last) - size :]
            parts = [self.bytes_of(t) for t in tail]
            if not all(parts):
                continue
            try:
                text = (b"".join(p for p in parts if p) + ahead).decode()
            except UnicodeDecodeError:  # the window begins inside of a character
                continue
            found = tuple(self._encode(text))
            if found[: len(tail)] != tail or not self._is_exact(found[len(tail) :], ahead):
                continue
            stable = len(found) - 1  # nobody knows how the last one would go on
            for probe in _PROBES:
                other = self._encode(text + probe)
                stable = min(stable, next((i for i, (a, b) in enumerate(zip(found, other, strict=False)) if a != b), len(other)))
            return found[len(tail) :], max(0, stable - len(tail))
        return (), 0

    def _is_exact(self, tokens: Sequence[int], text: bytes) -> bool:
        """A tokenizer may normalise what it reads; tokens that say something else are of no use."""
        parts = [self.bytes_of(t) for t in tokens]
        return None not in parts and b"".join(p for p in parts if p is not None) == text


Redraw = Callable[[int, np.ndarray], int]
"""From a row of the step and a mask (words,) uint32 to a token that the mask allows; -1 when there is none."""


@dataclass(slots=True, eq=False)
class Cursor:
    """Where one sequence stands in its grammar. Used by the engine's thread and its matching thread, one after another.

    Attributes:
        end_ids: Tokens that end the output, the model's and the grammar's.
        masks: (rows, words) uint32; of the first `num_ready` rows of the step to come, or of one that is over.
        is_free: Per row, whether every token is allowed.
        is_over: Nothing but an end may follow.
        native: Of `native_checks.NativeChecks.row`; None before it was asked for, False when there is none.
        jumps: Forced text is to be appended.
        checked_as: Its entry among the tokens that the step checks natively, -1 when it is none of them.
        error: The sequence's request is to end with it.
    """

    matcher: Matcher
    end_ids: frozenset[int]
    num_words: int
    masks: np.ndarray
    is_free: list[bool] = field(default_factory=list)
    num_ready: int = 0
    is_over: bool = False
    native: Any = None
    jumps: bool = False
    checked_as: int = -1
    error: PlugmeshError | None = None

    def mask(self, row: int) -> np.ndarray | None:
        """Of a row of the step, None where every token is allowed. Valid until the sequence goes on."""
        assert row < self.num_ready
        return None if self.is_free[row] else self.masks[row]


def without(mask: np.ndarray, tokens: Collection[int]) -> np.ndarray:
    """A copy that allows none of the tokens, or the mask itself when it would allow nothing then."""
    less = _less(mask, tokens)
    return less if less.any() else mask


def _less(mask: np.ndarray, tokens: Collection[int]) -> np.ndarray:
    less = mask.copy()
    for t in tokens:
        less[t >> 5] &= np.uint32(~(1 << (t & 31)) & 0xFFFFFFFF)
    return less


@dataclass(frozen=True, slots=True)
class Told:
    """What a constrained sequence gets out of a step: `tokens`, and whether the grammar ends it behind them."""

    tokens: tuple[int, ...]
    rows: tuple[int, ...]  # the row of the step that each was sampled from, -1 for one that was forced
    is_over: bool


class Grammars:
    """The constrained sequences of one engine. Everything but `close` is called by the engine's thread.

    Args:
        vocab_size: Width of the model's logits.
        jump: Append forced text.
        timeout_s: A matcher that takes longer for one sequence's part of a step is given up on.
        fill_ahead: Compute the next token's mask as soon as a token is accepted, not beside the next forward pass: one exchange between threads a step less.
    """

    def __init__(self, vocab_size: int, end_ids: Collection[int], *, jump: bool, timeout_s: float, fill_ahead: bool = False) -> None:
        self.counters = GrammarCounters()
        self._vocab_size = vocab_size
        self._eos = frozenset(end_ids)
        self._jump = jump
        self._fill_ahead = fill_ahead
        self._jumpers: dict[str, Jumper] = {}
        self._matching = Matching(timeout_s)
        self._filling: tuple[Batch, list[Cursor]] | None = None

    def close(self) -> None:
        """Ends the thread."""
        self._matching.close()

    def open(self, constraint: Constraint, resume: Sequence[Sequence[int]]) -> list[Cursor]:
        """A cursor per sequence, behind its resumed tokens.

        Raises:
            InvalidRequest: The grammar does not allow the resumed tokens.
            FailedPrecondition: It was compiled for fewer tokens than the model has.
            GrammarTimeout, InternalError: The matcher hung or raised.
        """
        v = constraint.vocabulary
        if v.vocab_size < self._vocab_size:
            raise FailedPrecondition(f"the grammar is of a vocabulary of {v.vocab_size} tokens, the model's has {self._vocab_size}")
        opened: list[Cursor] = []

        def begin(tokens: Sequence[int]) -> None:
            matcher = constraint.compiled.matcher()
            cursor = Cursor(matcher, self._eos.union(v.eos_token_ids), v.num_words, np.zeros((1, v.num_words), np.uint32), [False])
            for i, token in enumerate(tokens):
                if not matcher.accept(token):
                    raise InvalidRequest(f"the grammar does not allow token {i} of those that are resumed", param="resume")
            if tokens:
                cursor.is_over = self._is_over(cursor)
            opened.append(cursor)

        batch = self._matching.submit(begin, resume)
        self._matching.wait(batch)
        for error in batch.errors.values():
            self.counters.num_errors += not isinstance(error, InvalidRequest)
            raise error
        return opened

    # -- before and beside the forward pass ------------------------------------------------------------------------

    def cut(self, drafts: Sequence[tuple[Cursor, Sequence[int]]]) -> list[list[int]]:
        """The head of each draft that the grammar allows, without an end token, behind which there is nothing to compute."""
        kept: list[list[int]] = [[] for _ in drafts]

        def walk(one: tuple[tuple[Cursor, Sequence[int]], list[int]]) -> None:
            ((cursor, draft), good), num = one, 0
            for token in draft:
                if token in cursor.end_ids or not cursor.matcher.accept(token):
                    break
                num += 1
            if num:
                cursor.matcher.rollback(num)
            good.extend(draft[:num])

        self._finish(walk, list(zip(drafts, kept, strict=True)), [c for c, _ in drafts])
        self.counters.num_draft_tokens_cut += sum(len(d) - len(k) for (_, d), k in zip(drafts, kept, strict=True))
        return kept

    def fill(self, rows: Sequence[tuple[Cursor, Sequence[int]]]) -> None:
        """Begins to compute the masks of a step: of each cursor's next token, and of those behind the tokens of its draft. `collect` waits for them."""
        self.collect()  # there is nothing, unless the last step raised
        for cursor, _ in rows:
            cursor.num_ready = min(cursor.num_ready, 1)  # those behind it were of another draft
        rows = [(c, d) for c, d in rows if c.num_ready <= len(d)]
        self._filling = (self._matching.submit(self._fill, rows), [c for c, _ in rows]) if rows else None

    def _fill(self, one: tuple[Cursor, Sequence[int]]) -> None:
        cursor, draft = one
        num_rows, matcher = 1 + len(draft), cursor.matcher
        if len(cursor.masks) < num_rows:
            cursor.masks = np.concatenate([cursor.masks, np.zeros((num_rows - len(cursor.masks), cursor.num_words), np.uint32)])
        cursor.is_free = (cursor.is_free[: cursor.num_ready] + [False] * num_rows)[:num_rows]
        num_accepted = 0
        for row in range(num_rows):
            if row >= cursor.num_ready:
                self._fill_row(cursor, row)
            if row < len(draft):
                if not matcher.accept(draft[row]):
                    raise InternalError("the grammar refuses a token that it allowed before")
                num_accepted += 1
        if num_accepted:
            matcher.rollback(num_accepted)
        cursor.num_ready = num_rows

    def _fill_row(self, cursor: Cursor, row: int) -> None:
        cursor.is_free[row] = not cursor.matcher.fill(cursor.masks[row])
        self.counters.num_masks_skipped += cursor.is_free[row]
        self.counters.num_masks_filled += not cursor.is_free[row]
        if not cursor.is_free[row] and not cursor.masks[row].any():
            raise InternalError("the grammar allows no token at all")

    def collect(self, *, is_awaited: bool = False) -> None:
        """Waits for what `fill` began; `Cursor.error` tells whose masks there are none of. `is_awaited`: nothing else is done meanwhile, so they are not late."""
        if self._filling is None:
            return
        (batch, cursors), self._filling = self._filling, None
        if not batch.is_done:
            began = time.perf_counter()
            self._matching.wait(batch)
            if not is_awaited:
                self.counters.num_masks_late += 1
                self.counters.late_ms += (time.perf_counter() - began) * 1e3
        self._charge(batch, cursors)

    # -- behind the sampler ----------------------------------------------------------------------------------------

    def advance(self, parts: Sequence[Advance]) -> None:
        """Accepts what was sampled, and what is forced behind it; fills in `Advance.told`. `Cursor.error` tells of whom there is none."""
        self._finish(self._advance, parts, [a.cursor for a in parts])

    def _advance(self, a: Advance) -> None:
        cursor, tokens, rows, row, num_jumped = a.cursor, list[int](), list[int](), 0, 0
        while row < len(a.sampled) and len(tokens) < a.budget:
            token = a.sampled[row]
            if token < 0:
                break
            if a.is_accepted:
                pass
            elif a.redraw is None:
                self._accept(cursor, token)
            elif cursor.matcher.accept(token):
                cursor.num_ready = 0
                self.counters.num_checked += 1
            else:
                token = self._redrawn(cursor, row, a.redraw)
            tokens.append(token)
            rows.append(row if token == a.sampled[row] else -1)
            # The rows behind count as long as the output is what the draft said.
            in_step = row < len(a.draft) and a.draft[row] == token
            row += 1
            cursor.is_over = token not in a.end_ids and self._is_over(cursor)
            if cursor.is_over or token in a.end_ids:
                break
            for forced in self._forced(a, (*a.last, *tokens), a.budget - len(tokens)) if a.jumper is not None else ():
                num_jumped += 1
                tokens.append(forced)
                rows.append(-1)
                in_step = in_step and row < len(a.draft) and a.draft[row] == forced
                row += in_step
            if cursor.is_over or not in_step or tokens[-1] in a.end_ids:
                break
        a.told = Told(tuple(tokens), tuple(rows), cursor.is_over)
        self.counters.num_jumped_tokens += num_jumped
        if self._fill_ahead and a.redraw is None and not a.is_accepted and not cursor.is_over and not cursor.num_ready and 0 < len(tokens) < a.budget and tokens[-1] not in a.end_ids:
            self._fill_row(cursor, 0)
            cursor.num_ready = 1

    def resume(self, parts: Sequence[Advance]) -> None:
        """As `advance`, of sequences that came with tokens: what an undisturbed run would have appended behind them."""

        def go_on(a: Advance) -> None:
            tokens = [] if a.cursor.is_over else self._forced(a, a.last, a.budget)
            a.told = Told(tuple(tokens), (-1,) * len(tokens), a.cursor.is_over)
            self.counters.num_jumped_tokens += len(tokens)

        self._finish(go_on, parts, [a.cursor for a in parts])

    def _accept(self, cursor: Cursor, token: int) -> None:
        if not cursor.matcher.accept(token):
            raise InternalError("the grammar refuses a token that it allowed")
        cursor.num_ready = 0

    def _redrawn(self, cursor: Cursor, row: int, redraw: Redraw) -> int:
        """The second draw, for which there must be a mask now, accepted."""
        if not cursor.num_ready:
            self._fill_row(cursor, 0)
        self.counters.num_redrawn += 1
        if cursor.is_free[0] or (token := redraw(row, cursor.masks[0])) < 0:
            raise InternalError("the grammar refuses every token, or the model's logits of those that it allows are not finite")
        self._accept(cursor, token)
        return token

    def _is_over(self, cursor: Cursor) -> bool:
        """Whether an end token came, or no other may. The mask that it takes to know is that of the next row."""
        if cursor.matcher.is_terminated:
            return True
        if not cursor.matcher.is_completed:
            return False
        self._fill_row(cursor, 0)
        cursor.num_ready = 1
        if cursor.is_free[0]:
            return False
        return not _less(cursor.masks[0], cursor.end_ids).any()

    def _forced(self, a: Advance, last: Sequence[int], budget: int) -> list[int]:
        """Tokens that are certain, accepted; sets `Cursor.is_over` when the grammar ends with them."""
        cursor, found, jumper = a.cursor, list[int](), a.jumper
        if jumper is None or not self._jump:
            return found
        last = list(last[-WINDOW_TOKENS[0] :])
        while len(found) < budget:
            self.counters.num_forced_calls += 1
            forced = cursor.matcher.forced()
            if not forced:
                break
            self.counters.num_forced += 1
            tokens, num_stable = jumper.tokens(last, forced)
            if not tokens or tokens[0] in a.end_ids or tokens[0] >= self._vocab_size:
                break
            is_last = False
            if not num_stable:
                if len(forced) > LOOK_AHEAD_BYTES or not self._ends_with(cursor, tokens):
                    break
                is_last = len(tokens) == 1
            self._accept(cursor, tokens[0])
            found.append(tokens[0])
            last = [*last[1:], tokens[0]] if len(last) == WINDOW_TOKENS[0] else [*last, tokens[0]]
            if is_last:
                cursor.is_over = True
                break
        return found

    def _ends_with(self, cursor: Cursor, tokens: Sequence[int]) -> bool:
        """Whether the grammar is over behind these tokens, so that nothing can move their borders. Leaves the matcher where it is."""
        matcher, num = cursor.matcher, 0
        for token in tokens:
            if not matcher.accept(token):
                break
            num += 1
        over = num == len(tokens) and self._is_over(cursor)
        cursor.num_ready = 0
        if num:
            matcher.rollback(num)
        return over

    def jumper(self, constraint: Constraint) -> Jumper | None:
        """Of the grammar's vocabulary; None where nothing is to be appended."""
        v = constraint.vocabulary
        if not self._jump or v.encode is None:
            return None
        if v.tokenizer_hash not in self._jumpers:
            self._jumpers[v.tokenizer_hash] = Jumper(v)
        return self._jumpers[v.tokenizer_hash]

    def _finish(self, work: Callable[[T], None], parts: Sequence[T], cursors: Sequence[Cursor]) -> None:
        batch = self._matching.submit(work, parts)
        self._matching.wait(batch)
        self._charge(batch, cursors)

    def _charge(self, batch: Batch, cursors: Sequence[Cursor]) -> None:
        for i, error in batch.errors.items():
            if cursors[i].error is None:
                cursors[i].error = error
                self.counters.num_errors += 1


@dataclass(slots=True, eq=False)
class Advance:
    """One sequence's tokens of a step, on their way into its grammar.

    Attributes:
        sampled: A token per row of the step, -1 for a row without finite logits.
        last: The generated tokens before them, or the last few of these.
        draft: What the rows behind the first were computed for.
        budget: Tokens that may come at most.
        end_ids: Tokens that end the sequence.
        jumper: None when forced text is not to be appended.
        redraw: Set when the tokens were drawn without a mask; called for one that the grammar refuses.
        is_accepted: The one sampled token is in the matcher already.
        told: The result.
    """

    cursor: Cursor
    sampled: Sequence[int]
    last: Sequence[int]
    draft: Sequence[int]
    budget: int
    end_ids: Collection[int]
    jumper: Jumper | None
    redraw: Redraw | None = None
    is_accepted: bool = False
    told: Told | None = None


@dataclass(slots=True, eq=False)
class Batch:
    """The same work on parts in order, each with a matcher of its own. `at` is the one being done; a thread that is given up on stops before the next one.

    Attributes:
        errors: Why parts failed, by their number.
    """

    work: Callable[[Any], None]
    parts: Sequence[Any]
    errors: dict[int, PlugmeshError] = field(default_factory=dict)
    at: int = -1
    is_done: bool = False
    is_abandoned: bool = False
    done: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)


class Matching:
    """A thread that does one batch after another, and is replaced when it hangs.

    A matcher that neither comes back nor gives up the interpreter's lock cannot be helped.

    Args:
        timeout_s: Given to one part of a batch, counted from when somebody waits for it.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._waiting: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[T], None], parts: Sequence[T]) -> Batch:
        """Begins."""
        return self._begin(Batch(work, parts))

    def _begin(self, batch: Batch) -> Batch:
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._waiting,), name="grammar", daemon=True)
            self._thread.start()
        self._waiting.put(batch)
        return batch

    def wait(self, batch: Batch) -> None:
        """Returns when every part is done or failed; one that hangs fails with GrammarTimeout, and those behind it are done by a new thread."""
        while True:
            at, num_waits = batch.at, 0
            while num_waits < _WAITS:
                try:
                    batch.done.get(timeout=self._timeout_s / _WAITS)
                    return
                except queue.Empty:
                    at, num_waits = batch.at, num_waits + 1 if batch.at == at else 0
            batch.is_abandoned = True
            hung = max(0, at)
            batch.errors[hung] = GrammarTimeout(f"the grammar engine did not come back within {self._timeout_s:g} s")
            log.error("engine.matcher_hangs", timeout_s=self._timeout_s)
            self._waiting.put(None)  # should it come back after all
            self._waiting, self._thread = queue.SimpleQueue(), None
            batch = self._begin(Batch(batch.work, batch.parts, batch.errors, at=hung))

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(self._timeout_s)
            self._thread = None


def _work(waiting: queue.SimpleQueue[Batch | None]) -> None:
    while (batch := waiting.get()) is not None:
        work, parts = batch.work, batch.parts
        for i in range(batch.at + 1, len(parts)):
            if batch.is_abandoned:
                return
            batch.at = i
            try:
                work(parts[i])
            except PlugmeshError as e:
                batch.errors.setdefault(i, e)
            except Exception as e:
                log.error("engine.matcher_failed", error=type(e).__name__)  # not the traceback: it may hold output
                batch.errors.setdefault(i, InternalError("the grammar engine failed on this request"))
        batch.is_done = True
        batch.done.put(None)
        del batch, work, parts
