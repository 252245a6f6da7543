"""Which instance has which beginning of a prompt: what instances tell, and what they were just sent.

Names of blocks are hash chains (`plugmesh.types.block_id`), so a name stands for the whole prompt up to its block and two
prompts that share a block's text but not what comes before it never meet.

Source: AIBrix, arXiv:2504.03648, prefix-cache routing. Its table is the router's own guess, filled as requests are routed;
here the instances' events are the truth and a guess holds only until they tell.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from plugmesh.records import KvEvent

_MAX_ENDS = 1 << 16
CONFIRM_S = 0.5  # after the first token: by then the event of a followed instance has come, or its blocks were not kept


@dataclass(slots=True)
class _Expected:
    instance_id: str
    block_ids: tuple[bytes, ...]
    has_started: bool = False


class PrefixIndex:
    """At most `max_blocks` entries of known blocks and as many of expected ones.

    Whatever is told, in whatever order, an answer is only a hint: at worst a prompt is computed that was cached elsewhere.
    """

    def __init__(self, max_blocks: int, expect_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_known = 0
        self.num_expected = 0
        self._max_blocks = max_blocks
        self._expect_s = expect_s
        self._clock = clock
        self._known: dict[str, OrderedDict[bytes, None]] = {}  # instance to blocks, least recently useful first
        self._life: dict[str, str] = {}                        # instance to the incarnation that its blocks belong to
        self._expected: dict[str, _Expected] = {}              # request to what it will leave behind
        self._counts: dict[str, Counter[bytes]] = {}           # instance to blocks of `_expected`
        # Until when, each in order of time: from being sent, and from the first token.
        self._ends: tuple[deque[tuple[float, str, _Expected]], deque[tuple[float, str, _Expected]]] = (deque(), deque())

    # What instances tell.

    def on_event(self, event: KvEvent) -> None:
        """See `plugmesh.records.KvEvent`."""
        name = event.instance_id
        if event.kind == "cleared":
            self._clear(name)
            return
        if self._life.get(name) != event.incarnation:
            if event.kind == "removed":
                return  # of a life of which nothing is known
            self._clear(name)
            self._drop_expected(name)  # what was sent to the earlier life
            self._life[name] = event.incarnation
            self._known[name] = OrderedDict()
        known = self._known[name]
        if event.kind == "removed":
            for block_id in event.block_ids:
                if block_id in known:
                    del known[block_id]
                    self.num_known -= 1
            return
        # The head of a chain last, as the most useful one: without it the rest cannot be matched.
        for block_id in reversed(event.block_ids):
            if block_id not in known:
                self.num_known += 1
                known[block_id] = None
            else:
                known.move_to_end(block_id)
        while self.num_known > self._max_blocks:
            largest = max(self._known.values(), key=len)
            largest.popitem(last=False)
            self.num_known -= 1

    def is_followed(self, instance_id: str) -> bool:
        """Whether the instance has told what it holds."""
        return instance_id in self._life

    def num_blocks(self, instance_id: str) -> int:
        return len(self._known.get(instance_id, ()))

    # What instances were sent.

    def expect(self, request_id: str, instance_id: str, block_ids: tuple[bytes, ...]) -> None:
        """The instance computes this prompt now: the next one like it is to go there too, before any event tells."""
        known = self._known.get(instance_id)
        if known:
            for block_id in reversed(block_ids):
                if block_id in known:
                    known.move_to_end(block_id)
        before = self._expected.get(request_id)
        if before is not None:
            self._drop(request_id, before)
        if not block_ids or not self._expect_s or self.num_expected + len(block_ids) > self._max_blocks:
            return
        entry = _Expected(instance_id, block_ids)
        self._expected[request_id] = entry
        self._counts.setdefault(instance_id, Counter()).update(block_ids)
        self.num_expected += len(block_ids)
        self._ends[0].append((self._clock() + self._expect_s, request_id, entry))

    def started(self, request_id: str) -> None:
        """Its first token came, so its prompt's blocks are there; a followed instance tells of them any moment."""
        entry = self._expected.get(request_id)
        if entry is not None and not entry.has_started:
            entry.has_started = True
            if self.is_followed(entry.instance_id):
                self._ends[1].append((self._clock() + CONFIRM_S, request_id, entry))

    def ended(self, request_id: str) -> None:
        """A request that ended before its first token leaves nothing behind."""
        entry = self._expected.get(request_id)
        if entry is not None and not entry.has_started:
            self._drop(request_id, entry)

    # What routers ask.

    def num_matched(self, block_ids: Sequence[bytes], instance_ids: Iterable[str]) -> dict[str, int]:
        """How many leading blocks each instance has or will have."""
        self._expire()
        found = {}
        for name in instance_ids:
            known, counts = self._known.get(name, ()), self._counts.get(name, ())
            num = 0
            for block_id in block_ids:
                if block_id not in known and block_id not in counts:
                    break
                num += 1
            found[name] = num
        return found

    def _clear(self, instance_id: str) -> None:
        self._life.pop(instance_id, None)
        self.num_known -= len(self._known.pop(instance_id, ()))

    def _drop_expected(self, instance_id: str) -> None:
        for request_id, entry in list(self._expected.items()):
            if entry.instance_id == instance_id:
                self._drop(request_id, entry)

    def _drop(self, request_id: str, entry: _Expected) -> None:
        del self._expected[request_id]
        block_ids, entry.block_ids = entry.block_ids, ()  # `_ends` may keep the entry for a while
        self.num_expected -= len(block_ids)
        counts = self._counts[entry.instance_id]
        for block_id in block_ids:
            counts[block_id] -= 1
            if not counts[block_id]:
                del counts[block_id]
        if not counts:
            del self._counts[entry.instance_id]

    def _expire(self) -> None:
        now = self._clock()
        for ends in self._ends:
            while ends and (ends[0][0] <= now or len(ends) > _MAX_ENDS or self._expected.get(ends[0][1]) is not ends[0][2]):
                _, request_id, entry = ends.popleft()
                if self._expected.get(request_id) is entry:
                    self._drop(request_id, entry)
