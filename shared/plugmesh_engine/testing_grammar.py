"""A small grammar engine for tests: byte-level automata over a vocabulary of some hundred tokens. Slow, obvious, and a real matcher in every method."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plugmesh.grammar.seams import GrammarVocabulary

# -- languages: nodes of a nondeterministic automaton, made by these few functions ------------------------------------------------


@dataclass(slots=True, eq=False)
class Node:
    """A state: bytes lead on, and `free` steps cost none."""

    on: list[tuple[frozenset[int], Node]] = field(default_factory=list)
    free: list[Node] = field(default_factory=list)


Part = Callable[[Node], Node]
"""Builds on from a node; returns where it ends."""


def lit(text: str) -> Part:
    def build(node: Node) -> Node:
        for byte in text.encode():
            after = Node()
            node.on.append((frozenset([byte]), after))
            node = after
        return node

    return build


def one_of(chars: str) -> Part:
    def build(node: Node) -> Node:
        after = Node()
        node.on.append((frozenset(chars.encode()), after))
        return after

    return build


def seq(*parts: Part) -> Part:
    def build(node: Node) -> Node:
        for part in parts:
            node = part(node)
        return node

    return build


def alt(*parts: Part) -> Part:
    def build(node: Node) -> Node:
        end = Node()
        for part in parts:
            begin = Node()
            node.free.append(begin)
            part(begin).free.append(end)
        return end

    return build


def star(part: Part) -> Part:
    def build(node: Node) -> Node:
        hub = Node()
        node.free.append(hub)
        part(hub).free.append(hub)
        end = Node()
        hub.free.append(end)
        return end

    return build


LETTERS = "abcdefghijklmnopqrstuvwxyz"
STRING = seq(lit('"'), star(one_of(LETTERS + " ")), lit('"'))
WORD = seq(lit('"'), *[alt(one_of(LETTERS), lit(""))] * 4, one_of(LETTERS), lit('"'))
INTEGER = alt(lit("0"), seq(one_of("123456789"), star(one_of("0123456789"))))


def record(**fields: Part) -> Part:
    """A JSON object with exactly these keys, in order, without spaces but behind a colon."""
    parts: list[Part] = []
    for i, (name, part) in enumerate(fields.items()):
        parts += [lit("{" if i == 0 else ","), lit(f'"{name}": '), part]
    return seq(*parts, lit("}"))


PERSON = record(name=WORD, age=alt(one_of("123456789"), lit("42"), lit("105")), city=WORD)


# -- the vocabulary of the small test models ---------------------------------------------------------------------------------------

END = 2


@functools.cache
def small_vocabulary(size: int = 211) -> GrammarVocabulary:
    """Three control tokens (the third ends), all ASCII that prints, and words; written greedily, the longest token first."""
    words = [
        '{"', '"}', '": ', '", "', '": "', ',"', 'name', 'age', 'city', 'na', 'me', 'ag', 'ci', 'ty', '  ', '"name', '"name"', ' "', 'the', 'th', 'ab', 'abc', 'é', '日',
        'true', 'false', '10', '42', '{}', '[]',
    ]  # fmt: skip
    pairs = (a + b for a, b in itertools.product(LETTERS, "aeiou"))
    texts = [chr(c) for c in range(32, 127)] + words + [p for p in pairs if p not in words]
    token_bytes: list[bytes | None] = [b"<unk>", b"<s>", b"</s>", *(t.encode() for t in texts[: size - 5]), "本".encode()[:2], "本".encode()[2:]]
    assert len(token_bytes) == size and len(set(token_bytes)) == size
    ids = {b: i for i, b in enumerate(token_bytes) if b is not None and i > END}
    longest = max(map(len, ids))

    def encode(text: str) -> list[int]:
        data, found, at = text.encode(), list[int](), 0
        while at < len(data):
            end = next((end for end in range(at + longest, at, -1) if data[at:end] in ids), at + 1)
            found.append(ids.get(data[at:end], 0))  # what cannot be written is <unk>
            at = min(end, len(data))
        return found

    return GrammarVocabulary(token_bytes, size, frozenset([0, 1, 2]), (END,), f"small-{size}", encode)


def text_of(vocabulary: GrammarVocabulary, tokens: Sequence[int]) -> bytes:
    """The output's bytes, without control tokens."""
    return b"".join(vocabulary.token_bytes[t] or b"" for t in tokens if t not in vocabulary.special_ids)


# -- matching ----------------------------------------------------------------------------------------------------------------------

States = frozenset[Node]


@dataclass(frozen=True, slots=True)
class SmallGrammar:
    """Implements `plugmesh.grammar.seams.CompiledGrammar`."""

    vocabulary: GrammarVocabulary
    start: States
    end: Node
    masks: dict[States, np.ndarray] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(m.nbytes for m in self.masks.values())

    def matcher(self) -> SmallMatcher:
        return SmallMatcher(self, [self.start])

    def matches(self, text: bytes) -> bool:
        """Whether the whole text is in the language."""
        return self.end in walk(self.start, text)


def compile_small(part: Part, vocabulary: GrammarVocabulary | None = None) -> SmallGrammar:
    begin = Node()
    end = part(begin)
    return SmallGrammar(vocabulary or small_vocabulary(), close_over([begin]), end)


def close_over(nodes: Sequence[Node]) -> States:
    found, todo = set(nodes), list(nodes)
    while todo:
        for node in todo.pop().free:
            if node not in found:
                found.add(node)
                todo.append(node)
    return frozenset(found)


def walk(states: States, text: bytes) -> States:
    for byte in text:
        states = close_over([after for node in states for chars, after in node.on if byte in chars])
    return states


@dataclass(slots=True, eq=False)
class SmallMatcher:
    """Implements `plugmesh.grammar.seams.Matcher`. `history` holds the states before each token and now; an empty set behind an end token."""

    grammar: SmallGrammar
    history: list[States]
    kept: Any = field(default=None, kw_only=True)  # what a test that gives it a native side must keep

    @property
    def is_completed(self) -> bool:
        return self.grammar.end in self.history[-1]

    @property
    def is_terminated(self) -> bool:
        return not self.history[-1]

    def fill(self, mask: np.ndarray) -> bool:
        states, v = self.history[-1], self.grammar.vocabulary
        if states not in self.grammar.masks:
            allowed = np.zeros(v.num_words * 32, bool)
            for token, data in enumerate(v.token_bytes):
                if data is not None and token not in v.special_ids:
                    allowed[token] = bool(walk(states, data))
            allowed[list(v.eos_token_ids)] = self.is_completed
            self.grammar.masks[states] = np.packbits(allowed, bitorder="little").view(np.uint32)
        mask[:] = self.grammar.masks[states]
        return True

    def accept(self, token_id: int) -> bool:
        v, states = self.grammar.vocabulary, self.history[-1]
        if token_id in v.eos_token_ids:
            if not self.is_completed:
                return False
            self.history.append(frozenset())
            return True
        data = v.token_bytes[token_id] if token_id not in v.special_ids else None
        after = walk(states, data) if data else frozenset()
        if not after:
            return False
        self.history.append(after)
        return True

    def rollback(self, num_tokens: int) -> None:
        if num_tokens >= len(self.history):
            raise ValueError("fewer tokens were accepted")
        del self.history[len(self.history) - num_tokens :]

    def forced(self) -> bytes:
        return bytes(self._forced())

    def _forced(self) -> Iterator[int]:
        states = self.history[-1]
        while self.grammar.end not in states:
            chars = {c for node in states for some, _ in node.on for c in some}
            if len(chars) != 1:
                return
            yield from chars
            states = walk(states, bytes(chars))

    def fork(self) -> SmallMatcher:
        return SmallMatcher(self.grammar, list(self.history))
