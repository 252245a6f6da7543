"""Finite automata over code points: sets of strings with union, intersection, complement and equality."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any
from weakref import WeakValueDictionary

from plugmesh.errors import LimitExceeded

Arc = tuple[int, int, int]  # first and last code point, target state
MAX_STATES = 4000
# Everything that a JSON string can hold and UTF-8 can carry: code points without the surrogates.
UNIVERSE: tuple[tuple[int, int], ...] = ((0, 0xD7FF), (0xE000, 0x10FFFF))
_MINIMISE_BELOW = 1500  # states; refinement is quadratic, and an automaton that is not minimal is only larger


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Dfa:
    """A deterministic automaton without dead states; state 0 is the start. Missing arcs refuse.

    Small ones are minimal, numbered breadth first and interned (`_make`), so that equal sets are the same object.

    Attributes:
        arcs: Per state, sorted and disjoint.
        accepting: States in which a string may end.
    """

    arcs: tuple[tuple[Arc, ...], ...]
    accepting: frozenset[int]

    @property
    def is_empty(self) -> bool:
        return not self.accepting

    def accepts(self, text: str) -> bool:
        state = 0
        for char in text:
            code = ord(char)
            for lo, hi, target in self.arcs[state]:
                if lo <= code <= hi:
                    state = target
                    break
            else:
                return False
        return state in self.accepting

    def __and__(self, other: Dfa) -> Dfa:
        if self is other or other is ANY:
            return self
        if self is ANY:
            return other
        return _product(self, other, "and")

    def __or__(self, other: Dfa) -> Dfa:
        if self is ANY or other is ANY:
            return ANY
        return _product(self, other, "or")

    def __sub__(self, other: Dfa) -> Dfa:
        if other is ANY:
            return EMPTY
        return _product(self, other, "sub")

    def finite(self, limit: int) -> list[str] | None:
        """The set's strings in order, or None when there are more than `limit`."""
        found: list[str] = []
        if self._has_cycle():
            return None
        todo: list[tuple[int, str]] = [(0, "")]
        while todo:
            state, text = todo.pop()
            if state in self.accepting:
                found.append(text)
            for lo, hi, target in self.arcs[state]:
                if hi - lo >= limit:
                    return None
                todo.extend((target, text + chr(code)) for code in range(lo, hi + 1))
            if len(found) > limit or len(todo) > 4 * limit + 64:
                return None
        return sorted(found)

    def lengths(self) -> tuple[int, int | None]:
        """Shortest and longest string; None for no longest. Of a set that is not empty."""
        shortest = {0: 0}
        queue = deque([0])
        while queue:
            state = queue.popleft()
            for _, _, target in self.arcs[state]:
                if target not in shortest:
                    shortest[target] = shortest[state] + 1
                    queue.append(target)
        least = min(shortest[state] for state in self.accepting)
        if self._has_cycle():
            return least, None
        order = self._topological()
        longest = dict.fromkeys(range(len(self.arcs)), 0)
        for state in order:
            for _, _, target in self.arcs[state]:
                longest[target] = max(longest[target], longest[state] + 1)
        return least, max(longest[state] for state in self.accepting)

    def _topological(self) -> list[int]:
        degree = [0] * len(self.arcs)
        for arcs in self.arcs:
            for _, _, target in arcs:
                degree[target] += 1
        ready = [state for state, d in enumerate(degree) if d == 0]
        order = []
        while ready:
            state = ready.pop()
            order.append(state)
            for _, _, target in self.arcs[state]:
                degree[target] -= 1
                if degree[target] == 0:
                    ready.append(target)
        return order

    def _has_cycle(self) -> bool:
        return len(self._topological()) < len(self.arcs)


def explore(start: Hashable, step: Callable[[Any], Iterable[tuple[int, int, Any]]], accepts: Callable[[Any], bool], *, max_states: int = MAX_STATES) -> Dfa:
    """The automaton whose states are the values that `step` reaches from `start`.

    Args:
        step: Arcs of a state: first and last code point, next state; disjoint.
        accepts: Whether a string may end in a state.
    """
    number: dict[Any, int] = {start: 0}
    todo = deque([start])
    arcs: list[list[Arc]] = []
    accepting = set()
    while todo:
        state = todo.popleft()
        here: list[Arc] = []
        for lo, hi, target in step(state):
            if target not in number:
                if len(number) >= max_states:
                    raise LimitExceeded(f"the automaton of a pattern or range needs more than {max_states} states")
                number[target] = len(number)
                todo.append(target)
            here.append((lo, hi, number[target]))
        arcs.append(_merged(here))
        if accepts(state):
            accepting.add(number[state])
    return _canonical(arcs, accepting)


def _merged(arcs: list[Arc]) -> list[Arc]:
    out: list[Arc] = []
    for lo, hi, target in sorted(arcs):
        if out and out[-1][2] == target and out[-1][1] + 1 == lo:
            out[-1] = (out[-1][0], hi, target)
        else:
            out.append((lo, hi, target))
    return out


def _canonical(arcs: Sequence[Sequence[Arc]], accepting: set[int]) -> Dfa:
    # 1. Keep what can still accept.
    back: list[list[int]] = [[] for _ in arcs]
    for state, here in enumerate(arcs):
        for _, _, target in here:
            back[target].append(state)
    live = set(accepting)
    todo = list(accepting)
    while todo:
        for state in back[todo.pop()]:
            if state not in live:
                live.add(state)
                todo.append(state)
    if 0 not in live:
        return EMPTY
    trimmed = {state: [arc for arc in arcs[state] if arc[2] in live] for state in live}
    # 2. Merge states that behave alike (Moore).
    block = {state: int(state in accepting) for state in live}
    if len(live) <= _MINIMISE_BELOW:
        count = len(set(block.values()))
        while True:
            names: dict[Any, int] = {}
            refined = {}
            for state in live:
                signature = (block[state], tuple(_merged([(lo, hi, block[target]) for lo, hi, target in trimmed[state]])))
                refined[state] = names.setdefault(signature, len(names))
            block = refined
            if len(names) == count:
                break
            count = len(names)
    else:
        block = {state: state for state in live}
    # 3. Number breadth first.
    representative: dict[int, int] = {}
    for state in live:
        representative.setdefault(block[state], state)
    number = {block[0]: 0}
    order = [block[0]]
    out = []
    for name in order:
        here = []
        for lo, hi, target in _merged([(lo, hi, block[target]) for lo, hi, target in trimmed[representative[name]]]):
            if target not in number:
                number[target] = len(number)
                order.append(target)
            here.append((lo, hi, number[target]))
        out.append(tuple(here))
    return _make(tuple(out), frozenset(number[name] for name in order if representative[name] in accepting))


def _overlay(a: Sequence[Arc], b: Sequence[Arc]) -> list[tuple[int, int, int | None, int | None]]:
    points = sorted({p for lo, hi, _ in (*a, *b) for p in (lo, hi + 1)})
    out = []
    i = j = 0
    for lo, after in pairwise(points):
        while i < len(a) and a[i][1] < lo:
            i += 1
        while j < len(b) and b[j][1] < lo:
            j += 1
        left = a[i][2] if i < len(a) and a[i][0] <= lo else None
        right = b[j][2] if j < len(b) and b[j][0] <= lo else None
        if left is not None or right is not None:
            out.append((lo, after - 1, left, right))
    return out


@lru_cache(maxsize=4096)
def _product(a: Dfa, b: Dfa, how: str) -> Dfa:
    def step(state: tuple[int | None, int | None]) -> Iterable[tuple[int, int, Any]]:
        left, right = state
        for lo, hi, x, y in _overlay(a.arcs[left] if left is not None else (), b.arcs[right] if right is not None else ()):
            if (how == "and" and (x is None or y is None)) or (how == "sub" and x is None):
                continue
            yield lo, hi, (x, y)

    def accepts(state: tuple[int | None, int | None]) -> bool:
        x, y = state[0] in a.accepting, state[1] in b.accepting
        return (x and y) if how == "and" else (x or y) if how == "or" else (x and not y)

    return explore((0, 0), step, accepts)


_interned: WeakValueDictionary[Any, Dfa] = WeakValueDictionary()


def _make(arcs: tuple[tuple[Arc, ...], ...], accepting: frozenset[int]) -> Dfa:
    return _interned.setdefault((arcs, accepting), Dfa(arcs, accepting))


EMPTY = _make(((),), frozenset())
ANY = _make((tuple((lo, hi, 0) for lo, hi in UNIVERSE),), frozenset({0}))


def words(texts: Iterable[str]) -> Dfa:
    """The set of exactly these strings. Raises ValueError on a lone surrogate, which UTF-8 cannot carry."""
    root: dict[str, Any] = {}
    for text in texts:
        if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
            raise ValueError("a lone surrogate")
        node = root
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    if not root:
        return EMPTY
    # Equal subtrees are shared from the leaves up, which makes the automaton minimal in linear time.
    shared: dict[Any, int] = {}
    rows: list[tuple[tuple[Arc, ...], bool]] = []

    def fold(node: dict[str, Any]) -> int:
        stack: list[tuple[dict[str, Any], bool]] = [(node, False)]
        done: dict[int, int] = {}
        while stack:
            current, seen = stack.pop()
            if not seen:
                stack.append((current, True))
                stack.extend((child, False) for char, child in current.items() if char)
                continue
            arcs = tuple(_merged([(ord(char), ord(char), done[id(child)]) for char, child in current.items() if char]))
            key = (arcs, "" in current)
            if key not in shared:
                shared[key] = len(rows)
                rows.append(key)
            done[id(current)] = shared[key]
        return done[id(node)]

    top = fold(root)
    number = {top: 0}
    order = [top]
    out = []
    for state in order:
        here = []
        for lo, hi, target in rows[state][0]:
            if target not in number:
                number[target] = len(number)
                order.append(target)
            here.append((lo, hi, number[target]))
        out.append(tuple(here))
    return _make(tuple(out), frozenset(number[state] for state in order if rows[state][1]))


@lru_cache(maxsize=256)
def of_length(least: int, most: int | None) -> Dfa:
    """Strings of so many code points."""
    last = least if most is None else most
    rows: list[tuple[Arc, ...]] = []
    for n in range(last + 1):
        target = n + 1 if n < last else n if most is None else None
        rows.append(tuple((lo, hi, target) for lo, hi in UNIVERSE) if target is not None else ())
    return ANY if (least, most) == (0, None) else _make(tuple(rows), frozenset(range(least, last + 1)))
