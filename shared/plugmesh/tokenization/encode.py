"""Text to ids, with control tokens only where they are trusted.

The text is cut at the control tokens that count, and what lies between goes to a BPE that cannot yield one. Cutting
happens on the whole text rather than message by message, because BPE may join characters across the border between
template and content: ids equal those of the reference tokenizer on the whole string.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from plugmesh.tokenization.load import Vocabulary


def clean_text(text: str) -> str:
    """`text` with lone surrogates, which have no UTF-8, replaced by U+FFFD. Paired ones become their character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class Encoder:
    """Encodes with one vocabulary. Immutable; safe in threads, and the BPE runs without the interpreter lock."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        specials = [t for t in vocabulary.added_tokens if t.is_special]
        self._ids = {t.content: t.token_id for t in specials}
        self._strips = {t.content: (t.strip_left, t.strip_right) for t in specials if t.strip_left or t.strip_right}
        # Longest first: of two tokens that begin at one place the longer one counts, as in the reference.
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def encode(self, text: str, *, allow_special: bool, add_special_tokens: bool = False, restore: Callable[[str], str] | None = None) -> list[int]:
        """Token ids of a text.

        Args:
            allow_special: Control tokens written in the text become control tokens.
            add_special_tokens: Put the model's begin and end tokens around, where it wants them.
            restore: Applied to each stretch between control tokens before BPE; takes out the marks that
                `provenance` put into untrusted text.
        """
        text = clean_text(text)
        restore = restore or _unchanged
        ids: list[int] = []
        if allow_special and self._pattern is not None:
            start = 0
            for match in self._pattern.finditer(text):
                stretch = text[start : match.start()]
                start = match.end()
                strip_left, strip_right = self._strips.get(match[0], (False, False))
                if strip_left:
                    stretch = stretch.rstrip()
                if strip_right:
                    start += len(text[start:]) - len(text[start:].lstrip())
                self._extend(ids, restore(stretch))
                ids.append(self._ids[match[0]])
            text = text[start:]
        self._extend(ids, restore(text))
        if add_special_tokens:
            return [*self._vocabulary.prefix_ids, *ids, *self._vocabulary.suffix_ids]
        return ids

    def _extend(self, ids: list[int], text: str) -> None:
        if text:
            # The batch call gives up the interpreter lock, the single one does not.
            ids.extend(self._vocabulary.bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _unchanged(text: str) -> str:
    return text

