"""The idea: guess that a run of tokens goes on as it did before, and check the guess only when that is expected to pay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from plugmesh.records import DraftContext
from plugmesh_engine import DraftOutcome, DraftView
from plugmesh_ngram_draft.cost import StepCost
from plugmesh_ngram_draft.lookup import SuffixIndex, follow

if TYPE_CHECKING:
    from plugmesh_ngram_draft.plugin import Settings

log = structlog.get_logger()

MATCH_CLASSES = (4, 8)  # matches of up to 3, 7 and more tokens are trusted differently
FORGET = 0.93  # weight of a trial after the next one
PRIOR_TRIALS = 4.0  # a sequence's own record counts for more than the engine's after so many
FIRST_HITS, FIRST_TRIALS = 0.8, 4.0  # the engine's record before it has one: doubtful, since a wrong guess costs and evidence is free
HOPE_TOKENS, FORGET_HOPE = 8.0, 0.97  # how soon, and for how long, drafts that bring less than was expected of them count


class Record:
    """Hits among recent guesses, by how long the match behind them was."""

    def __init__(self, hits: float = 0.0, trials: float = 0.0) -> None:
        self.hits = [hits] * (len(MATCH_CLASSES) + 1)
        self.trials = [trials] * (len(MATCH_CLASSES) + 1)

    def add(self, kind: int, hit: bool, forget: float = FORGET) -> None:
        self.hits[kind] = self.hits[kind] * forget + hit
        self.trials[kind] = self.trials[kind] * forget + 1


class Memory:
    """What is remembered of one sequence.

    Attributes:
        guess: Tokens expected from `at` on; compared with what came, whether they were drafted or not.
    """

    __slots__ = ("at", "guess", "index", "kind", "record")

    def __init__(self, index: SuffixIndex) -> None:
        self.index = index
        self.record = Record()
        self.guess: list[int] = []
        self.at = 0
        self.kind = 0


class NgramDraft:
    """Prompt lookup with a length that follows from measured gain and cost. Implements `plugmesh_engine.DraftMethod`.

    Guesses are made in every step and compared with what the model said, which costs no row of the model; so how often they are right is known before
    the first is drafted. A guess whose tokens are right with probability p brings p, p * p, ... tokens; the most likely ones of all sequences are drafted, as
    many as make expected tokens per millisecond largest, or none when that gains less than `min_gain`. The same weighing ends drafts in large batches,
    where rows are not free. Source of the weighing: Liu et al., SmartSpec, arXiv:2406.14066; of the guess: Saxena, Prompt Lookup Decoding, 2023.
    """

    def __init__(self, cost: StepCost, *, min_match: int, max_match: int, max_tokens: int, min_gain: float) -> None:
        self.cost = cost
        self._min_match = min_match
        self._max_match = max_match
        self._max_tokens = max_tokens
        self._min_gain = min_gain
        self._all = Record(FIRST_HITS, FIRST_TRIALS)
        self._hoped, self._got = HOPE_TOKENS, HOPE_TOKENS  # tokens expected of what was drafted, and accepted, lately
        self._hope = 0.0  # of the step in progress

    def propose(self, views: Sequence[DraftView], num_prompt_rows: int) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in views]
        self._hope = 0.0
        if not self._can_pay(len(views)):
            return drafts
        gains: list[tuple[float, int]] = []  # expected tokens of one more drafted row, and whose it is
        for i, v in enumerate(views):
            p = self._guess(v)
            gain = min(1.0, self._got / self._hoped)
            for _ in range(min(len(v.memo.guess), v.max_draft_tokens)):
                gain *= p
                if gain < 0.02:
                    break
                gains.append((gain, i))
        if not gains or num_prompt_rows:  # beside a prompt, a stream waits for the prompt anyway, and the prompt would wait for the drafts
            return drafts
        gains.sort(key=lambda item: -item[0])
        chosen = gains[: self._best_number(len(views), gains)]
        for _, i in chosen:
            drafts[i].append(0)
        self._hope = sum(gain for gain, _ in chosen) / min(1.0, self._got / self._hoped)
        return [v.memo.guess[: len(d)] if d else d for v, d in zip(views, drafts, strict=True)]

    def observe(self, outcome: DraftOutcome) -> None:
        if any(outcome.num_drafted):
            # What looks best among many guesses is on average a little worse than it looks.
            self._hoped = self._hoped * FORGET_HOPE + self._hope
            self._got = self._got * FORGET_HOPE + sum(outcome.num_accepted)
        if not outcome.num_prompt_rows:
            self.cost.learn(outcome.num_rows, drafted=any(outcome.num_drafted), ms=outcome.step_ms)

    def _can_pay(self, num_views: int) -> bool:
        """False when even drafts that are always right would not: then nothing is looked up either."""
        return self._rate(num_views, self._max_tokens * num_views, float(self._max_tokens * num_views)) > self._rate(num_views, 0, 0.0)

    def _rate(self, num_views: int, num_drafted: int, gain: float) -> float:
        """Expected tokens per millisecond."""
        return (num_views + gain) / self.cost.ms(num_views + num_drafted, drafted=num_drafted > 0)

    def _best_number(self, num_views: int, gains: Sequence[tuple[float, int]]) -> int:
        """Of the sorted gains, how many to draft."""
        best, wanted = 0, self._rate(num_views, 0, 0.0) * (1 + self._min_gain)
        total = 0.0
        for i, (gain, _) in enumerate(gains, 1):
            total += gain
            rate = self._rate(num_views, i, total)
            if rate > wanted:
                best, wanted = i, rate
        return best

    def _guess(self, v: DraftView) -> float:
        """Looks up what may come next; returns how likely each token of it is, the ones before it being right."""
        m = v.memo
        if m is None:
            m = v.memo = Memory(SuffixIndex(self._min_match, self._max_match))
        tokens = v.tokens
        for guessed, came in zip(m.guess, tokens[m.at :], strict=False):
            m.record.add(m.kind, guessed == came)
            self._all.add(m.kind, guessed == came, forget=0.99)
            if guessed != came:
                break
        m.at = len(tokens)
        m.index.extend(tokens)
        place, length = m.index.find(tokens)
        if place < 0:
            m.guess = []
            return 0.0
        m.guess = follow(tokens, place, self._max_tokens)
        m.kind = sum(length >= c for c in MATCH_CLASSES)
        prior = self._all.hits[m.kind] / self._all.trials[m.kind]
        return float((m.record.hits[m.kind] + PRIOR_TRIALS * prior) / (m.record.trials[m.kind] + PRIOR_TRIALS))


def build_method(settings: Settings, engine: DraftContext) -> NgramDraft:
    """The method of one engine; times some steps of the model first, which takes from a fraction of a second (native) to some seconds (torch)."""
    max_tokens = min(settings.max_tokens, engine.max_draft_tokens)
    cost = StepCost.measure(engine.measure_step_ms, engine.max_num_sequences + max_tokens)
    log.info("ngram_draft.profiled", step_ms={r: round(cost.ms(r, drafted=False), 2) for r in (1, 2, 4, 8, 16, 32)})
    return NgramDraft(cost, min_match=settings.min_match, max_match=settings.max_match, max_tokens=max_tokens, min_gain=settings.min_gain)
