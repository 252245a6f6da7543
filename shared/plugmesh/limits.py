"""What a request may ask for: pure checks with typed errors, the same for HTTP and for gRPC.

Ranges of sampling parameters are fixed; counts and sizes stand in `Limits` so that a deployment can change them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plugmesh.errors import ContextLengthExceeded, InvalidRequest, LimitExceeded
from plugmesh.types import SamplingParams

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MAX_TOP_LOGPROBS = 20
MAX_CONFIDENCE_TOP_K = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Counts and sizes above which a request is refused with LimitExceeded."""

    max_messages: int = 1024
    max_prompts: int = 64
    max_sequences: int = 16         # `n`
    max_stop: int = 16              # stop strings
    max_stop_chars: int = 256       # of one stop string
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024      # entries
    max_tokens: int = 131072        # per sequence


DEFAULT = Limits()


def check_sampling(params: SamplingParams, limits: Limits = DEFAULT, *, vocab_size: int = 0) -> None:
    """Refuses parameters out of range.

    Args:
        vocab_size: 0 when it is not known yet: token ids are then checked for sign only.

    Raises:
        InvalidRequest: A value out of its range; `param` is the field's OpenAI name.
        LimitExceeded: More than `limits` allows.
    """
    _between("temperature", params.temperature, 0.0, 2.0)
    _between("top_p", params.top_p, 0.0, 1.0, open_low=True)
    _between("min_p", params.min_p, 0.0, 1.0)
    _between("repetition_penalty", params.repetition_penalty, 0.0, 10.0, open_low=True)
    _between("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _between("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _between("top_k", params.top_k, 0, INT32_MAX)
    if params.seed is not None:
        _between("seed", params.seed, -INT64_MAX - 1, INT64_MAX)
    if params.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, not {params.max_tokens}", param="max_tokens")
    _at_most("max_tokens", params.max_tokens, limits.max_tokens, "tokens")
    _between("min_tokens", params.min_tokens, 0, params.max_tokens)
    if params.num_sequences < 1:
        raise InvalidRequest(f"n must be at least 1, not {params.num_sequences}", param="n")
    _at_most("n", params.num_sequences, limits.max_sequences, "sequences")
    _between("top_logprobs", params.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if params.top_logprobs and not params.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    _between("confidence_top_k", params.confidence_top_k, 0, MAX_CONFIDENCE_TOP_K)
    _at_most("logit_bias", len(params.logit_bias), limits.max_logit_bias, "entries")
    for token_id, bias in params.logit_bias.items():
        check_token_id("logit_bias", token_id, vocab_size)
        _between("logit_bias", bias, -100.0, 100.0)
    _at_most("stop_token_ids", len(params.stop_token_ids), limits.max_stop_token_ids, "ids")
    for token_id in params.stop_token_ids:
        check_token_id("stop_token_ids", token_id, vocab_size)


def check_stop(stop: Sequence[str], limits: Limits = DEFAULT) -> None:
    """Refuses too many, too long or empty stop strings. Raises InvalidRequest, LimitExceeded."""
    _at_most("stop", len(stop), limits.max_stop, "strings")
    for text in stop:
        if not text:
            raise InvalidRequest("a stop string must not be empty", param="stop")
        if len(text) > limits.max_stop_chars:
            raise LimitExceeded(f"a stop string has {len(text)} characters, at most {limits.max_stop_chars} are allowed", param="stop")


def check_counts(*, num_messages: int = 0, num_prompts: int = 0, limits: Limits = DEFAULT) -> None:
    """Refuses too many messages or prompts. Raises LimitExceeded."""
    _at_most("messages", num_messages, limits.max_messages, "messages")
    _at_most("prompt", num_prompts, limits.max_prompts, "prompts")


def check_token_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Refuses an empty prompt and ids outside the vocabulary. Raises InvalidRequest."""
    if not token_ids:
        raise InvalidRequest("the prompt is empty", param=param)
    if min(token_ids) < 0 or (vocab_size and max(token_ids) >= vocab_size):
        bad = next(t for t in token_ids if t < 0 or (vocab_size and t >= vocab_size))
        check_token_id(param, bad, vocab_size)


def check_token_id(param: str, token_id: int, vocab_size: int) -> None:
    """Refuses one id outside the vocabulary. Raises InvalidRequest."""
    top = vocab_size - 1 if vocab_size else INT32_MAX
    if not 0 <= token_id <= top:
        raise InvalidRequest(f"{param}: token id {token_id} is not between 0 and {top}", param=param)


def fit_context(num_prompt_tokens: int, max_tokens: int | None, context_length: int, *, param: str = "messages") -> int:
    """Tokens that may be generated per sequence.

    Args:
        max_tokens: None takes what the context leaves.
        context_length: 0 when it is not known; then `max_tokens` (or 16) is taken as it is.

    Raises:
        ContextLengthExceeded: The prompt, or the prompt plus `max_tokens`, does not fit.
    """
    if context_length <= 0:
        return max_tokens or SamplingParams().max_tokens
    room = context_length - num_prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"this model's context is {context_length} tokens, and the prompt alone has {num_prompt_tokens}", param=param)
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise ContextLengthExceeded(
            f"this model's context is {context_length} tokens, but {num_prompt_tokens + max_tokens} are asked for: "
            f"{num_prompt_tokens} in the prompt and {max_tokens} to generate", param=param)
    return max_tokens


def _between(param: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    # Written so that NaN is refused, too.
    if not (low < value <= high if open_low else low <= value <= high) or math.isnan(value):
        bracket = "above" if open_low else "at least"
        raise InvalidRequest(f"{param} must be {bracket} {low:g} and at most {high:g}, not {value:g}", param=param)


def _at_most(param: str, value: int, limit: int, what: str) -> None:
    if value > limit:
        raise LimitExceeded(f"{param}: {value} {what}, at most {limit} are allowed", param=param)
