"""A side of a quality comparison that is small enough to read, for tests of metrics."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

VOCABULARY = 256


class FakeSubject:
    """Bytes are its tokens, and it has learnt that text goes on as it did before. Implements `records.QualitySubject`.

    Args:
        damage: 0 is sound; the more, the more noise is in its logits. Above 0 it gives no answers.
        salt: Sides with different ones have different noise.
    """

    def __init__(self, *, seed: int = 0, damage: float = 0.0, is_quick: bool = True, kinds: frozenset[str] = frozenset({"logits", "tokens", "answers"}), salt: int = 0) -> None:
        self.kinds, self.seed, self.is_quick, self.context_tokens = kinds, seed, is_quick, 8192
        self._damage, self._salt = damage, salt

    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii", "replace"))

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode("ascii", "replace")

    def english(self) -> str:
        sentence = "The quick brown fox jumps over the lazy dog while number {} sleeps. "
        return "".join(sentence.format(i) for i in range(1500))

    def logits(self, token_ids: Sequence[int], *, chunk_tokens: int = 32) -> Iterator[np.ndarray]:
        for start in range(0, len(token_ids), chunk_tokens):
            yield np.stack([self._row(token_ids[: i + 1]) for i in range(start, min(start + chunk_tokens, len(token_ids)))])

    def _row(self, prefix: Sequence[int]) -> np.ndarray:
        """What followed the last two bytes earlier is likely; the rest is as a checksum says."""
        rng = np.random.default_rng(zlib.crc32(bytes(prefix[-8:])))
        row = rng.standard_normal(VOCABULARY).astype(np.float32)
        for i in range(1, len(prefix) - 1):
            if tuple(prefix[i - 1 : i + 1]) == tuple(prefix[-2:]):
                row[prefix[i + 1]] += 4
        if self._damage:
            noise = np.random.default_rng((zlib.crc32(bytes(prefix[-8:])), self._salt, 1)).standard_normal(VOCABULARY)
            row += (self._damage * noise).astype(np.float32)
        return row

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> list[list[int]]:
        found = []
        for i, prompt in enumerate(prompts):
            tokens = list(prompt)
            rng = np.random.default_rng((seed + i, 2))
            for _ in range(max_tokens):
                noise = temperature * rng.gumbel(size=VOCABULARY) if temperature else 0.0
                tokens.append(int((self._row(tokens) + noise).argmax()))
            found.append(tokens[len(prompt) :])
        return found

    def answer(self, questions: Sequence[str], max_tokens: int) -> list[str]:
        """Repeats everything that it was told."""
        return ["" if self._damage else q for q in questions]

    def complete(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """Repeats what stands behind the last colon but one."""
        return ["" if self._damage else (":" + t).split(":")[-2].split("\n")[0] for t in texts]
