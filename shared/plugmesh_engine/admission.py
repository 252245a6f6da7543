"""Checks a request before the engine takes it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from plugmesh.errors import ContextLengthExceeded, InvalidRequest, LimitExceeded
from plugmesh.types import BLOCK_TOKENS, KvLayout, ModelConfig, SamplingParams, block_chain
from plugmesh_engine.config import EngineConfig
from plugmesh_engine.requests import EngineRequest

MAX_TOP_LOGPROBS = 100


def check_request(request: EngineRequest, model: ModelConfig, config: EngineConfig, max_model_len: int, layout: KvLayout) -> None:
    """Raises ContextLengthExceeded, LimitExceeded or another InvalidRequest whose `param` names the field."""
    _check_ids(request.token_ids, model.vocab_size, "token_ids")
    if not request.token_ids:
        raise InvalidRequest("the prompt is empty", param="token_ids")
    check_sampling(request.sampling, model.vocab_size)
    p = request.sampling
    if request.num_sequences > config.max_num_sequences:
        param = "score" if request.score else "num_sequences"
        raise LimitExceeded(f"{request.num_sequences} sequences wanted, at most {config.max_num_sequences} run together", param=param)
    _check_resume(request, model.vocab_size)
    _check_primitives(request, model)
    if request.grammar is not None:
        _check_grammar(request)
    num_prompt = len(request.token_ids)
    if request.score:
        longest = max(map(len, request.score))
        if num_prompt + longest > max_model_len:
            raise ContextLengthExceeded(f"{num_prompt} prompt tokens plus a continuation of {longest} exceed the context of {max_model_len}", param="score")
    elif num_prompt + p.max_tokens > max_model_len:
        raise ContextLengthExceeded(
            f"{num_prompt} prompt tokens plus max_tokens {p.max_tokens} exceed the context of {max_model_len}", param="max_tokens"
        )
    longest = num_prompt + max((len(r) for r in (*request.resume, *request.score)), default=0) + 1
    if -(-longest // BLOCK_TOKENS) > config.num_blocks:
        raise ContextLengthExceeded(f"{longest} tokens do not fit the KV pool of {config.num_blocks * BLOCK_TOKENS}", param="token_ids")
    _check_kv(request, layout)


def check_sampling(p: SamplingParams, vocab_size: int) -> None:
    """Ranges that the sampler relies on."""

    def need(ok: bool, param: str, wanted: str) -> None:
        if not ok:
            raise InvalidRequest(f"{param} must be {wanted}, not {getattr(p, param)!r}", param=param)

    need(math.isfinite(p.temperature) and p.temperature >= 0, "temperature", "a number from 0")
    need(p.top_k >= -1, "top_k", "a count, or 0 or -1 for off")
    need(0 <= p.top_p <= 1, "top_p", "between 0 and 1")
    need(0 <= p.min_p <= 1, "min_p", "between 0 and 1")
    need(math.isfinite(p.repetition_penalty) and p.repetition_penalty > 0, "repetition_penalty", "above 0")
    need(math.isfinite(p.presence_penalty), "presence_penalty", "a finite number")
    need(math.isfinite(p.frequency_penalty), "frequency_penalty", "a finite number")
    need(p.max_tokens >= 1, "max_tokens", "1 or more")
    need(0 <= p.min_tokens <= p.max_tokens, "min_tokens", "between 0 and max_tokens")
    need(0 <= p.top_logprobs <= min(MAX_TOP_LOGPROBS, vocab_size), "top_logprobs", f"between 0 and {min(MAX_TOP_LOGPROBS, vocab_size)}")
    need(p.num_sequences >= 1, "num_sequences", "1 or more")
    need(p.seed is None or isinstance(p.seed, int), "seed", "an integer")
    _check_ids(p.stop_token_ids, vocab_size, "stop_token_ids")
    _check_ids(p.logit_bias, vocab_size, "logit_bias")
    need(all(math.isfinite(b) for b in p.logit_bias.values()), "logit_bias", "finite")


def _check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    for t in ids:
        if not 0 <= t < vocab_size:
            raise InvalidRequest(f"token id {t} is not below the vocabulary's {vocab_size}", param=param)


def _check_resume(request: EngineRequest, vocab_size: int) -> None:
    n = request.sampling.num_sequences
    if request.resume and request.prefill_only:
        raise InvalidRequest("a prefill_only request has nothing to resume", param="resume")
    if request.resume and len(request.resume) != n:
        raise InvalidRequest(f"resume holds {len(request.resume)} sequences, the request {n}", param="resume")
    if request.resume_finished and (len(request.resume_finished) != n or not request.resume):
        raise InvalidRequest("resume_finished needs one entry per sequence, and resume", param="resume_finished")
    for tokens in request.resume:
        _check_ids(tokens, vocab_size, "resume")
        if len(tokens) > request.sampling.max_tokens:
            raise InvalidRequest(f"{len(tokens)} resumed tokens exceed max_tokens {request.sampling.max_tokens}", param="resume")


def _check_primitives(request: EngineRequest, model: ModelConfig) -> None:
    """score, taps, hold and max_total_tokens: ranges, and what does not go together."""
    for tokens in request.score:
        if not tokens:
            raise InvalidRequest("a continuation to score is empty", param="score")
        _check_ids(tokens, model.vocab_size, "score")
    if request.score and (request.prefill_only or request.resume or request.hold or request.taps):
        raise InvalidRequest("a request that scores generates nothing: no prefill_only, resume, hold or taps", param="score")
    if request.hold and request.prefill_only:
        raise InvalidRequest("a prefill_only request keeps its blocks anyway", param="hold")
    if request.taps:
        if request.num_sequences != 1 or request.prefill_only:
            raise InvalidRequest("hidden states are told of a request with one sequence that is not prefill_only", param="taps")
        if len(set(request.taps)) != len(request.taps) or not all(0 <= layer <= model.num_layers for layer in request.taps):
            raise InvalidRequest(f"taps must be different layers from 0 to {model.num_layers}", param="taps")
    if request.tap_from < 0:
        raise InvalidRequest("tap_from must be 0 or more", param="tap_from")
    if request.max_total_tokens < 0:
        raise InvalidRequest("max_total_tokens must be 0 or more", param="max_total_tokens")


def _check_grammar(request: EngineRequest) -> None:
    if request.score or request.taps or request.prefill_only:
        raise InvalidRequest("a request with a grammar generates: no score, taps or prefill_only", param="grammar")
    if request.sampling.ignore_eos:
        raise InvalidRequest("with a grammar the output ends where it must; ignore_eos cannot be kept", param="ignore_eos")


def _check_kv(request: EngineRequest, layout: KvLayout) -> None:
    """The sources are this prompt's blocks, by name, in order, of this layout."""
    if not request.kv:
        return
    if any(s.num_tokens != BLOCK_TOKENS for s in request.kv[:-1]) or not 1 <= request.kv[-1].num_tokens <= BLOCK_TOKENS:
        raise InvalidRequest("imported blocks are full, but for the last", param="kv")
    covered = sum(s.num_tokens for s in request.kv)
    if covered > len(request.token_ids):
        raise InvalidRequest(f"imported KV covers {covered} tokens of a prompt of {len(request.token_ids)}", param="kv")
    names = block_chain(layout.key(), request.token_ids[:covered], tail=True)
    for i, (source, name) in enumerate(zip(request.kv, names, strict=True)):
        if source.block_id != name:
            raise InvalidRequest(f"imported block {i} is not of this prompt, model and layout", param="kv")
        if memoryview(source.data).nbytes != layout.block_bytes:
            raise InvalidRequest(f"imported block {i} holds {memoryview(source.data).nbytes} bytes, not {layout.block_bytes}", param="kv")
