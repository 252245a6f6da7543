"""What the engine does about grammars in a step: masks beside the forward pass, or tokens checked behind their draw; both end in tokens that are allowed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from plugmesh.errors import PlugmeshError
from plugmesh.types import TokenInfo
from plugmesh_engine.batch import StepResult
from plugmesh_engine.constrained import WINDOW_TOKENS, Advance, Cursor, Grammars, Redraw
from plugmesh_engine.native_checks import Checking, NativeChecks
from plugmesh_engine.outcome import Sampled, is_checked_later
from plugmesh_engine.sampler import redraw
from plugmesh_engine.sequence import Group, State
from plugmesh_engine.sequence import Sequence as Seq
from plugmesh_engine.speculate import Planned

Obeyed = tuple[Seq, Planned, Sequence[TokenInfo | None], Advance | None]
"""A sequence, its part of the step, its tokens, and what its grammar said where more than these tokens is to be known."""


class Obeying:
    """The part of `Engine` that deals with grammars. Not of use alone."""

    max_model_len: int
    _eos: tuple[int, ...]
    _grammars: Grammars
    _overlaps_masks: bool
    _native_checks: NativeChecks | None
    _filling: list[Seq]  # whose masks are computed beside the forward pass
    _checking: Checking | None  # what this step checks natively

    if TYPE_CHECKING:

        def _fail(self, g: Group, error: PlugmeshError) -> None: ...
        def _extend(self, s: Seq, p: Planned | None, infos: Sequence[TokenInfo | None], obeyed: Advance | None) -> bool: ...

    def _fill_masks(self, plan: Iterable[Planned]) -> None:
        """Begins to compute what the grammars of a step allow, for every row that a token will be sampled from."""
        rows: list[tuple[Cursor, Sequence[int]]] = []
        for p in plan:
            s, g = p.seq, p.seq.group
            if s.grammar is None or s.num_computed + p.num_tokens < s.target:
                continue
            if not self._overlaps_masks and g.is_checked_later and not g.request.sampling.min_tokens:
                continue
            samplers = [s] if g.forked else [a for a in g.alive if len(a.tokens) == g.num_prompt]
            if not self._overlaps_masks:
                samplers = [a for a in samplers if not is_checked_later(a)]
            self._filling.extend(samplers)
            rows.extend((a.grammar, p.draft) for a in samplers if a.grammar is not None)
        if rows:
            self._grammars.fill(rows)
            if not self._overlaps_masks:
                self._grammars.collect(is_awaited=True)

    def _collect_masks(self) -> None:
        """Waits for the masks. A request whose matcher failed ends here."""
        if self._filling:
            self._grammars.collect()
            self._fail_unmatched(self._filling)
            self._filling = []

    def _fail_unmatched(self, sequences: Iterable[Seq]) -> None:
        for s in sequences:
            if s.grammar is not None and s.grammar.error is not None and s.state is not State.FINISHED:
                self._fail(s.group, s.grammar.error)

    def _check_best(self, plan: Iterable[Planned], result: StepResult | None, best: Sequence[int]) -> None:
        """Begins to ask the matchers for tokens that no sampler decides about, so that they work while the rest of the step is done."""
        self._checking = None
        if result is None or self._native_checks is None:
            return
        c, row = Checking(), 0
        for p in plan:
            rows = p.rows
            assert rows is not None
            if rows.kept and (token := best[row]) >= 0:  # it has a matcher with a native side then, and one wanted row
                s = p.seq
                cursor = s.grammar
                assert cursor is not None
                cursor.checked_as = c.add(cursor, token, s.num_generated, -1 - row)
            row += rows.num_wanted
        if c.cursors:
            self._checking = c
            self._native_checks.begin(c, result.logits)

    def _check(self, s: Seq, token: int, logit_row: int) -> bool:
        """Adds a token to those to be checked. False when its matcher has no native side."""
        cursor = s.grammar
        assert cursor is not None
        if not (cursor.native or self._native_row(s, cursor)):
            return False
        if self._checking is None:
            self._checking = Checking()
        cursor.checked_as = self._checking.add(cursor, token, s.num_generated, logit_row)
        return True

    def _obey(self, sampled: Sequence[Sampled]) -> Iterator[Obeyed]:
        """Takes the constrained sequences on in their grammars, and what is forced behind their tokens. Those that fail end here.

        Every sequence is told as soon as it is known what it gets: free ones go on as they are, constrained ones perhaps with another token than the sampler's.
        """
        logits: np.ndarray | None = None
        for s, p, infos in sampled:
            cursor = s.grammar
            if cursor is None or p.logits is None:
                continue
            logits = p.logits
            if cursor.checked_as < 0 and not p.draft and s.state is State.RUNNING and (info := infos[0]) is not None:
                self._check(s, info.token_id, p.first_logits)
        checks, checking = self._native_checks, self._checking
        if checks is None or checking is None or logits is None:
            checking = None
        else:
            checks.begin(checking, logits)
        later: list[Obeyed] = []
        for s, p, infos in sampled:
            cursor = s.grammar
            if cursor is None:
                yield s, p, infos, None
                continue
            advance: Advance | None = None
            if cursor.checked_as < 0:
                if s.state is State.RUNNING:
                    advance = self._advance_of(s, [-1 if i is None else i.token_id for i in infos], p)
            else:
                assert checks is not None and checking is not None and logits is not None
                token, needs_look = checks.result(checking, cursor.checked_as, logits)
                cursor.checked_as = -1
                if cursor.error is None and (info := infos[0]) is not None and info.token_id != token:
                    infos = [TokenInfo(token)]
                if needs_look and cursor.error is None and token not in s.group.end_ids(self._eos):
                    advance = self._advance_of(s, [token], p, is_accepted=True)
            if advance is None and cursor.error is None and not s.group.request.max_total_tokens:  # tokens that siblings share are given out in order
                yield s, p, infos, None
            else:
                later.append((s, p, infos, advance))
        if parts := [advance for _, _, _, advance in later if advance is not None]:
            self._grammars.advance(parts)
        self._fail_unmatched(s for s, _, _, _ in later)
        for s, p, infos, advance in later:
            yield s, p, infos if advance is None or advance.told is None else told_tokens(advance, infos), advance

    def _native_row(self, s: Seq, cursor: Cursor) -> Any:
        """False where there is none."""
        g = s.group
        if self._native_checks is None or g.request.grammar is None:
            cursor.native = False
        elif cursor.native is None:
            cursor.jumps = self._grammars.jumper(g.request.grammar) is not None
            cursor.native = self._native_checks.row(cursor, g.seed, s.index, s.sampling.temperature, cursor.jumps) or False
        return cursor.native

    def _advance_of(self, s: Seq, sampled: Sequence[int], p: Planned | None, *, is_accepted: bool = False) -> Advance:
        g = s.group
        assert s.grammar is not None and g.request.grammar is not None
        budget = min(s.sampling.max_tokens - s.num_generated, self.max_model_len - len(s.tokens))
        if g.request.max_total_tokens:
            budget = min(budget, g.request.max_total_tokens - g.num_total)
        explains = s.sampling.logprobs or s.sampling.confidence_top_k > 0  # every token's row is wanted
        jumper = None if explains else self._grammars.jumper(g.request.grammar)
        last = s.tokens[max(g.num_prompt, len(s.tokens) - WINDOW_TOKENS[0]) :]
        again: Redraw | None = None
        if p is not None and p.logits is not None and p.first_logits >= 0 and not self._overlaps_masks and is_checked_later(s):
            logits, first, seed, index, position = p.logits, p.first_logits, g.seed, s.index, s.num_generated

            def again(row: int, mask: np.ndarray) -> int:
                return redraw(logits[first + row], mask, s.sampling, seed, index, position + row)

        draft = p.draft if p is not None else ()
        return Advance(s.grammar, sampled, last, draft, budget, g.end_ids(self._eos), jumper, again, is_accepted)

    def _go_on_from_resumed(self, g: Group) -> None:
        """Appends what an undisturbed run would have had forced behind the resumed tokens, perhaps in the middle of it."""
        found = {id(s): self._advance_of(s, (), None) for s in g.alive if s.num_resumed}
        if not found:
            return
        self._grammars.resume(list(found.values()))
        self._fail_unmatched(list(g.alive))
        for s in list(g.alive):
            step = found.get(id(s))
            if s.state is not State.FINISHED and step is not None and step.told is not None and step.told.tokens:
                self._extend(s, None, told_tokens(step, ()), step)


def told_tokens(step: Advance, infos: Sequence[TokenInfo | None]) -> list[TokenInfo | None]:
    """A grammar's tokens with what is known of those that were sampled."""
    assert step.told is not None
    return [infos[row] if row >= 0 else TokenInfo(token) for token, row in zip(step.told.tokens, step.told.rows, strict=True)]
