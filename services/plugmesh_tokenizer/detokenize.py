"""Token ids to text all at once; `plugmesh.detokenize` does it as they come."""

from __future__ import annotations

from collections.abc import Sequence

from plugmesh.errors import InvalidRequest
from plugmesh.tokenization.load import Vocabulary


def decode(vocabulary: Vocabulary, token_ids: Sequence[int], *, skip_special_tokens: bool) -> tuple[str, list[bytes]]:
    """All at once: the text, and the exact bytes of each token.

    Bytes that are not UTF-8 become U+FFFD as in `bytes.decode("utf-8", "replace")`. A skipped token keeps its bytes
    in the second result.

    Raises:
        InvalidRequest: An id that no token has.
    """
    pieces = [bytes_of_token(vocabulary, token_id) for token_id in token_ids]
    if not skip_special_tokens:
        return b"".join(pieces).decode("utf-8", "replace"), pieces
    special = vocabulary.special_ids
    kept = b"".join(piece for token_id, piece in zip(token_ids, pieces, strict=True) if token_id not in special)
    return kept.decode("utf-8", "replace"), pieces


def bytes_of_token(vocabulary: Vocabulary, token_id: int) -> bytes:
    """The exact bytes of one token. Raises InvalidRequest for an id that no token has."""
    piece = vocabulary.token_bytes[token_id] if 0 <= token_id < vocabulary.vocab_size else None
    if piece is None:
        raise InvalidRequest(f"token id {token_id} is not in the vocabulary of {vocabulary.vocab_size}", param="token_ids")
    return piece
