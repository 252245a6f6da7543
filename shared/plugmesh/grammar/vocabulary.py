"""The vocabulary that grammars of a model are compiled against: the same in the grammar service, its workers and in decode."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

from plugmesh.grammar.seams import GrammarVocabulary

if TYPE_CHECKING:
    from plugmesh.mesh.api import Mesh
    from plugmesh.tokenization.fetch import ModelFiles
    from plugmesh.tokenization.load import Vocabulary


def vocabulary_of(vocabulary: Vocabulary, vocab_size: int) -> GrammarVocabulary:
    """A loaded tokenizer as grammars see it.

    Its `tokenizer_hash` says everything that a compiled form depends on: besides the tokenizer the width of the logits and the end
    tokens, which a model's configuration may set.

    Args:
        vocab_size: Width of the logits (the model's configuration); taken as the tokenizer's own where that is larger.
    """
    from plugmesh.tokenization.encode import Encoder

    encoder = Encoder(vocabulary)
    width = max(vocab_size, vocabulary.vocab_size)
    identity = f"{vocabulary.hash}:{width}:{','.join(map(str, vocabulary.eos_token_ids))}:{','.join(map(str, sorted(vocabulary.special_ids)))}"
    return GrammarVocabulary(
        token_bytes=vocabulary.token_bytes,
        vocab_size=width,
        special_ids=vocabulary.special_ids,
        eos_token_ids=vocabulary.eos_token_ids,
        tokenizer_hash=hashlib.sha256(identity.encode()).hexdigest(),
        encode=lambda text: encoder.encode(text, allow_special=False),
    )


async def load(mesh: Mesh, files: ModelFiles, *, max_bytes: int = 128 << 20, timeout_s: float = 10.0) -> GrammarVocabulary:
    """The vocabulary of a model that `plugmesh.tokenization.fetch.resolve` found. Reads files and builds the tokenizer in a thread.

    Raises:
        CorruptModelFile, DataLoss, LimitExceeded, Unavailable: As `fetch.read_assets` and `load_vocabulary`.
    """
    from plugmesh.tokenization import fetch
    from plugmesh.tokenization.load import load_vocabulary

    assets = await fetch.read_assets(mesh, files, max_bytes=max_bytes, timeout_s=timeout_s)
    loaded = await asyncio.to_thread(load_vocabulary, assets, config=files.config)
    width = files.config.get("vocab_size")
    return vocabulary_of(loaded, width if isinstance(width, int) else 0)
