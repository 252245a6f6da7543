"""The splitters that run before byte-level BPE, by the name a GGUF carries in `tokenizer.ggml.pre`.

Each entry is the `pre_tokenizer` and `normalizer` part of a Hugging Face tokenizer.json. The names and the patterns
behind them were checked against llama.cpp's tokenizer (see tests/reference_ids.json). A name that is not here is an
error: a wrong splitter gives plausible ids on which the model is quietly worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel has built in
_DIGITS = {"type": "Digits", "individual_digits": True}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _tiktoken(digits: str) -> dict[str, Any]:
    """The family of cl100k: case-blind contractions, punctuation takes its line breaks along."""
    pattern = (
        _CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return _sequence(_split(pattern), _BYTES_ONLY)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before BPE, and what else follows from the family.

    `ignore_merges`: a piece that is a whole vocabulary entry is taken as it is. `add_bos`: whether a begin token is
    added when the file does not say.
    """

    pre_tokenizer: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2_FAMILY = PreTokenizer(_sequence(_GPT2))
_DIGITS_FAMILY = PreTokenizer(_sequence(_DIGITS, _GPT2))
_LLAMA3 = PreTokenizer(_tiktoken(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer(_tiktoken(r"\p{N}"), normalizer={"type": "NFC"})

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _GPT2_FAMILY,
    "gpt2": _GPT2_FAMILY,
    # What llama.cpp does with files that say "default": punctuation, then GPT-2, then digits by threes.
    "default": PreTokenizer(
        _sequence(_split(r"[\p{P}\$\+<=>\^~\|]+"), _split(_GPT2_PATTERN), _split(r"\p{N}+"), _split("[0-9][0-9][0-9]"), _BYTES_ONLY)
    ),
    "smollm": _DIGITS_FAMILY,
    "starcoder": _DIGITS_FAMILY,
    "refact": _DIGITS_FAMILY,
    "codeshell": _DIGITS_FAMILY,
    "command-r": _DIGITS_FAMILY,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
}
