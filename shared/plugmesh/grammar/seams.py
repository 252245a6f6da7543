"""What a grammar engine provides: compilation in one process, matchers in any other that has the same tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """The tokens that a grammar is compiled against.

    Attributes:
        token_bytes: The exact bytes of token i; None for an id that no token has.
        vocab_size: Width of the logits; at least `len(token_bytes)`. What is beyond is never allowed.
        special_ids: Control tokens: never allowed, but for end tokens where the grammar is complete.
        eos_token_ids: Tokens that end the output.
        tokenizer_hash: Names the tokenizer; compiled forms of another one are refused.
        encode: Text to ids as the model's own tokenizer writes it, without control tokens. None where nobody needs it.
    """

    token_bytes: Sequence[bytes | None]
    vocab_size: int
    special_ids: frozenset[int]
    eos_token_ids: tuple[int, ...]
    tokenizer_hash: str
    encode: Callable[[str], list[int]] | None = None

    @property
    def num_words(self) -> int:
        """32-bit words of a mask."""
        return -(-self.vocab_size // 32)


class Matcher(Protocol):
    """Where one sequence stands in its grammar. Not thread-safe; different matchers may be used in different threads at once."""

    @property
    def is_completed(self) -> bool:
        """The output may end here."""

    @property
    def is_terminated(self) -> bool:
        """An end token was accepted; nothing more is."""

    def fill(self, mask: np.ndarray) -> bool:
        """Writes the tokens that may come next: bit j % 32 of word j // 32 for token j.

        Args:
            mask: (num_words,) uint32, written whole.

        Returns:
            False when every token of the vocabulary is allowed; the mask is then of no use.
        """

    def accept(self, token_id: int) -> bool:
        """Goes on by a token. False, and nothing changes, when it is not allowed."""

    def rollback(self, num_tokens: int) -> None:
        """Takes the last tokens back; at least 128 can be. Raises ValueError when fewer were accepted."""

    def forced(self) -> bytes:
        """The bytes that must come next whatever is chosen; empty where there is a choice, or where the output may end. May stop inside a UTF-8 character."""

    def fork(self) -> Matcher:
        """An independent copy."""


class NativeMatcher(Protocol):
    """What a matcher may offer besides: the same matcher for a caller without Python, which saves tens of microseconds of a step."""

    def native(self) -> object | None:
        """A capsule "plugmesh.matcher.v1" (`plugmesh_kernels/csrc/matching.h`), valid as long as the matcher; None when there is none, here or today.

        Its calls and those of the methods above may alternate.
        """


class CompiledGrammar(Protocol):
    """A grammar that is ready to match."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, roughly."""

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an output."""


class GrammarEngine(Protocol):
    """One engine for one vocabulary. Thread-safe."""

    def compile(self, language: str, source: str) -> bytes:
        """The compiled form, for `load` here or in another process with the same tokenizer and engine version; equal for equal input.

        Runs in a process that is killed when it takes too long; need not defend itself against time or memory.

        Args:
            language: One of the record's.

        Raises:
            UnsupportedGrammar: It cannot be enforced exactly, or is not a grammar of that language.
        """

    def load(self, compiled: bytes) -> CompiledGrammar:
        """Must be safe whatever the bytes are, and take a small part of the time of compiling: requests wait for it.

        Milliseconds for small forms; a form of megabytes may take hundreds of them. Therefore called in a thread that is neither the event loop's nor an
        engine's, several at once where they are small; should not hold the interpreter's lock for long meanwhile, which would stop both.

        Raises:
            DataLoss: Not a compiled form of this engine, version and tokenizer.
        """
