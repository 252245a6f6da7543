"""From the rows of a step to its tokens: which outputs a sequence wants, what the sampler makes of them, and which drafts were worth nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from plugmesh.types import BLOCK_TOKENS, TokenInfo
from plugmesh_engine.batch import Rows, StepResult, Tap
from plugmesh_engine.kv.pool import BlockPool
from plugmesh_engine.requests import HiddenRows
from plugmesh_engine.sampler import Choose, SampleRow, describe, sample
from plugmesh_engine.sequence import Sequence as Seq
from plugmesh_engine.sequence import State
from plugmesh_engine.speculate import Planned

Sampled = tuple[Seq, Planned, Sequence[TokenInfo | None]]
"""A sequence, its part of the step, and a token for each wanted row; None for a row without finite logits."""

MAX_SCORED_ROWS = 128
"""Rows of one step whose whole logits are taken to score given tokens: 25 MB of a vocabulary of 49,152."""


def rows_of(p: Planned, *, keeps: bool = False) -> Rows:
    """What the executor is told of one sequence's part of the step; kept in `p.rows`.

    Args:
        keeps: The executor can keep logits for matchers.
    """
    s, draft, g = p.seq, p.draft, p.seq.group
    start = s.num_computed
    end, num_wanted, full, kept = start + p.num_tokens, 0, False, False
    if s.to_score:
        num_wanted, full = max(0, end - s.first_scored_row) if g.forked else 0, True
    elif end == s.target:
        num_wanted = 1 + len(draft)
        min_tokens = g.request.sampling.min_tokens
        full = g.needs_logits or (min_tokens > 0 and (not g.forked or s.num_generated < min_tokens))
        # A greedy token is the best one; only where the matcher refuses it is another looked for, and a native one can ask the executor for that.
        if keeps and full and g.rarely_reads_logits and g.forked and not draft and s.grammar is not None and s.grammar.native and is_checked_later(s):
            full, kept = False, True
    ids = s.tokens[start:end]
    if draft:
        ids += draft
    p.rows = Rows(ids, start, s.blocks, num_wanted, full, kept)
    return p.rows


def taps_of(plan: Sequence[Planned]) -> list[Tap]:
    """The hidden states that the requests of a step want, in the order of the plan."""
    return [Tap(i, layer) for i, p in enumerate(plan) for layer in p.seq.group.request.taps]


def hidden_rows(plan: Sequence[Planned], hidden: Iterable[np.ndarray]) -> list[HiddenRows]:
    """What is to be told of the taps of `taps_of(plan)`: nothing twice, and nothing before the position that was asked for. Call once per step."""
    told: list[HiddenRows] = []
    found = iter(hidden)
    for p in plan:
        if not (layers := p.seq.group.request.taps):
            continue
        assert p.rows is not None
        start, end = p.rows.num_computed, p.rows.num_computed + len(p.rows.token_ids)
        first = max(start, p.seq.num_tapped)
        for layer in layers:
            values = next(found)
            if first < end:
                told.append(HiddenRows(p.seq.request_id, layer, first, values[first - start :]))
        p.seq.num_tapped = max(p.seq.num_tapped, end)
    return told


def cut_scored(p: Planned, num_left: int) -> int:
    """Shortens a part so that it wants at most `num_left` rows to score; returns how many it wants."""
    s = p.seq
    if not s.to_score or not s.group.forked:
        return 0
    first = max(s.num_computed, s.first_scored_row)
    p.num_tokens = min(p.num_tokens, first + num_left - s.num_computed)
    return max(0, s.num_computed + p.num_tokens - first)


def is_checked_later(s: Seq) -> bool:
    """Whether the next token of a constrained sequence may be drawn before its mask is known; its matcher is then asked for that token alone."""
    g = s.group
    return g.is_checked_later and s.num_generated >= g.request.sampling.min_tokens


def choose_tokens(
    plan: Sequence[Planned], result: StepResult, best: Sequence[int], siblings: Callable[[Seq], Sequence[Seq]], choose: Choose | None, eos: tuple[int, ...],
    *, checks_later: bool = False,
) -> list[Sampled]:  # fmt: skip
    """A token for every wanted row of every sequence that still runs.

    Args:
        best: `result.best` as integers.
        siblings: The sequences that sample from the rows of one whose prompt was computed for all of them.
        checks_later: There are no masks for those of whom `is_checked_later`: their tokens are those of a free sequence, and the logits are kept for a second draw.
    """
    sampled: list[Sampled] = []
    pairs: list[tuple[Seq, Planned, int, list[TokenInfo | None]]] = []  # sequence, its part, first row of the logits, where its tokens go
    full_best: list[int] = []  # of the rows of `pairs`
    row = full_row = 0
    for p in plan:
        assert p.rows is not None
        if not (n := p.rows.num_wanted):
            continue
        s, first, full_first = p.seq, row, full_row
        row += n
        full_row += n if p.rows.full else 0
        if s.state is not State.RUNNING or p.is_void:  # its KV turned out bad
            continue
        if s.to_score:
            sampled.append((s, p, _scores(s, result.logits[full_first:full_row], best[first:row])))
            continue
        for sibling in [s] if s.group.forked else siblings(s):
            is_best = not p.rows.full
            if checks_later and is_checked_later(sibling):
                p.logits, p.first_logits = result.logits, -1 - first if p.rows.kept else full_first
                is_best = sibling.sampling.temperature <= 0
            infos: list[TokenInfo | None] = [TokenInfo(t) if t >= 0 else None for t in best[first:row]] if is_best else []
            sampled.append((sibling, p, infos))
            if not is_best:
                pairs.append((sibling, p, full_first, infos))
                full_best += best[first : first + 1 + len(p.draft)]
    if pairs:
        at = [full_first + i for _, p, full_first, _ in pairs for i in range(1 + len(p.draft))]
        logits = result.logits if at == list(range(len(result.logits))) else result.logits[at]
        rows = [_sample_row(s, p.draft, i, eos, has_mask=not (checks_later and is_checked_later(s))) for s, p, _, _ in pairs for i in range(1 + len(p.draft))]
        found = iter(sample(logits, rows, choose, full_best))
        for _, p, _, infos in pairs:
            infos.extend(itertools.islice(found, 1 + len(p.draft)))
    return sampled


def _scores(s: Seq, logits: np.ndarray, best: Sequence[int]) -> list[TokenInfo | None]:
    """The given tokens with the log-probabilities of the model's own distribution."""
    tokens = s.to_score[s.num_scored : s.num_scored + len(best)]
    infos = describe(logits, tokens, s.sampling.top_logprobs)
    return [info if b >= 0 else None for info, b in zip(infos, best, strict=True)]


def _sample_row(s: Seq, draft: Sequence[int], num_before: int, eos: tuple[int, ...], *, has_mask: bool) -> SampleRow:
    """The row behind the first `num_before` drafted tokens, which is only looked at when all of them were accepted."""
    g = s.group
    counts = s.counts or {}
    if num_before and s.counts is not None:
        counts = dict(counts)
        for token in draft[:num_before]:
            counts[token] = counts.get(token, 0) + 1
    return SampleRow(
        params=g.request.sampling, seed=g.seed, sequence=s.index, position=s.num_generated + num_before, prompt_ids=g.distinct_prompt_ids,
        counts=counts, end_ids=g.end_ids(eos), mask=s.grammar.mask(num_before) if s.grammar is not None and has_mask else None,
    )  # fmt: skip


def drop_bad_drafts(plan: Iterable[Planned], best: Sequence[int], pool: BlockPool) -> None:
    """Cuts drafts before their first row without finite logits, and removes the KV from there on.

    Usually the next step writes over what a rejected token left, but a backend that masks by adding -inf meets its NaN before (0 * NaN is NaN), and
    may have met it in the same step. When not even the first row is finite, nothing of the step counts, and the sequence goes on without a draft.
    """
    row = 0
    for p in plan:
        assert p.rows is not None
        first, row = row, row + p.rows.num_wanted
        if not p.draft or -1 not in best[first:row]:
            continue
        s, num_good = p.seq, best[first:row].index(-1)
        p.draft = p.draft[: max(0, num_good - 1)]
        if num_good == 0:
            p.is_void = s.skips_draft = True
            s.num_computed -= p.num_tokens
        good = s.num_computed + len(p.draft)
        keep = -(-good // BLOCK_TOKENS)
        pool.drop(reversed(s.blocks[keep:]))
        del s.blocks[keep:]
        if good % BLOCK_TOKENS:
            pool.truncate(s.blocks[-1], good % BLOCK_TOKENS)
