"""What sequences find in the KV memory and what they will take of it; asking changes nothing."""

from __future__ import annotations

from plugmesh.types import BLOCK_TOKENS, KvLayout
from plugmesh_engine.kv.pool import BlockPool
from plugmesh_engine.seams import SequenceView
from plugmesh_engine.sequence import Sequence, State


class PoolView:
    """Implements `plugmesh_engine.seams.KvView`, and the same questions for the engine itself."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._layout_key = pool.layout.key()

    def rename(self, layout: KvLayout) -> bytes:
        """From now on blocks are named for another layout of the same form; its key."""
        self._pool.layout = layout
        self._layout_key = layout.key()
        return self._layout_key

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_total(self) -> int:
        return self._pool.num_total

    @property
    def watermark(self) -> int:
        """One block in a hundred."""
        return max(1, self._pool.num_total // 100)

    def pending(self, sequence: SequenceView) -> int:
        assert isinstance(sequence, Sequence)
        if sequence.state is State.RUNNING:
            return sequence.num_pending
        found = self.found(sequence)
        # A prompt that is found complete is forked at once, so that what came after it is pending.
        target = len(sequence.tokens) if found >= sequence.group.num_shared else sequence.target
        return target - found

    def blocks_for(self, sequence: SequenceView, num_tokens: int) -> int:
        assert isinstance(sequence, Sequence)
        if sequence.state is State.RUNNING:
            new = -(-(sequence.num_computed + num_tokens) // BLOCK_TOKENS) - len(sequence.blocks)
            new = max(0, new)  # one taken for drafted tokens may be there already
            return new + int(self.writes_shared_block(sequence))
        cached = self.matched(sequence)
        inherited, num_inherited = self.inherited(sequence)
        if num_inherited > len(cached) * BLOCK_TOKENS:
            copied = num_inherited % BLOCK_TOKENS != 0 and self._pool.refs[inherited[-1]] > 1
            return -(-(num_inherited + num_tokens) // BLOCK_TOKENS) - len(inherited) + int(copied)
        revived = sum(self._pool.prefix.is_idle(b) for b in cached)  # they count as free until they are held
        return -(-(self.found(sequence) + num_tokens) // BLOCK_TOKENS) - len(cached) + revived

    def limit(self, s: Sequence) -> int:
        """Tokens of a waiting sequence that may be found rather than computed: one is left to sample from, if anything is."""
        g = s.group
        if s.to_score:
            limit = s.first_scored_row
        elif g.forked:
            limit = len(s.tokens) - 1
        else:
            limit = g.num_prompt - (1 if g.waits_for_prompt_logits else 0)
        return min(limit, s.num_tapped) if g.request.taps else limit

    def matched(self, s: Sequence) -> list[int]:
        """Blocks that the prefix cache holds for a waiting sequence."""
        if not s.group.cache:
            return []
        return self._pool.prefix.match(s.names_upto(self.limit(s), self._layout_key))

    def inherited(self, s: Sequence) -> tuple[list[int], int]:
        """Blocks that a waiting sequence shares with the one it was forked from, and the tokens in them that are of use."""
        if not s.group.inherited:
            return [], 0
        num_tokens = min(s.group.num_inherited, self.limit(s))
        return s.group.inherited[: -(-num_tokens // BLOCK_TOKENS)], num_tokens

    def found(self, s: Sequence) -> int:
        """Tokens that a waiting sequence finds in the prefix cache, shares with its origin or brings along."""
        brought = sum(k.num_tokens for k in s.group.kv)
        return max(len(self.matched(s)) * BLOCK_TOKENS, self.inherited(s)[1], min(brought, self.limit(s)))

    def writes_shared_block(self, s: Sequence) -> bool:
        """Whether the next token of a running sequence goes into a block that others hold too."""
        i = s.num_computed // BLOCK_TOKENS
        return i < len(s.blocks) and self._pool.refs[s.blocks[i]] > 1
