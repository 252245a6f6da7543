"""`[services.decode]`."""

from __future__ import annotations

from typing import Literal

import pydantic

from plugmesh.config import ServiceSettings


class Settings(ServiceSettings):
    """Settings of one decode instance; memory of the KV pool is at most num_kv_blocks times `KvLayout.block_bytes`, committed as blocks are used."""

    executor: Literal["auto", "native", "torch", "cuda"] = "auto"  # auto: native kernels where this machine has them, else torch
    dtype: Literal["bfloat16", "float32"] = "float32"         # of the torch executor
    kv_dtype: Literal["bfloat16", "int8"] = "bfloat16"        # of the native executor's KV
    weight_format: str = pydantic.Field("", max_length=24)    # a plugin's, to be loaded here and in the weightstore; empty: the executor's own
    device: str = "cpu"
    num_kv_blocks: int = pydantic.Field(1024, ge=8, le=1 << 20)
    commit_kv: bool = False                                   # take the memory of the native executor's pool at start, not as blocks are first used
    max_num_sequences: int = pydantic.Field(64, ge=1, le=1024)
    max_tokens_per_step: int = pydantic.Field(512, ge=1, le=65536)
    max_model_len: int = pydantic.Field(0, ge=0)              # 0: the model's context length
    max_waiting: int = pydantic.Field(256, ge=1, le=65536)
    num_threads: int = pydantic.Field(0, ge=0, le=256)        # 0: one per core that the process may use
    max_draft_tokens: int = pydantic.Field(16, ge=0, le=256)  # of one sequence and step, when a plugin drafts
    prefix_cache: bool = True
    use_kvstore: bool = True                                  # look for prefixes of prompts in the kvstore
    remote_prefill_min_tokens: int = pydantic.Field(256, ge=1)  # "auto" sends shorter prompts to nobody
    remote_prefill_timeout_s: float = pydantic.Field(5.0, gt=0, le=600)  # without progress for this long: compute locally
    max_held_sequences: int = pydantic.Field(64, ge=0, le=4096)  # finished ones whose KV stays to fork from, while nobody needs the memory
    hold_ttl_s: float = pydantic.Field(60.0, gt=0, le=3600)   # since their end or last use
    max_tap_bytes: int = pydantic.Field(64 << 20, ge=1 << 16)  # hidden states that one call may ask for
    jump_forward: bool = True                                 # append text that a grammar forces without a forward pass for each token
    grammar_timeout_s: float = pydantic.Field(1.0, gt=0, le=60)  # a matcher that takes longer for one step costs its request
    max_grammar_bytes: int = pydantic.Field(64 << 20, ge=1 << 20)  # compiled grammars that are kept in memory
    follow_model: str = pydantic.Field("", max_length=128)    # go over to what is published under this name in the weightstore; empty: do not
    follow_mode: Literal["finish", "continue", "abort"] = "finish"  # what becomes of requests that run then; see SwapWeights
    follow_poll_s: float = pydantic.Field(30.0, gt=0, le=3600)  # ask this often, should a notification be lost
    swap_timeout_s: float = pydantic.Field(60.0, gt=0, le=3600)  # what runs may take to end before a swap that waits for it is given up
    max_session_rows: int = pydantic.Field(65536, ge=16)      # rows a slow consumer may leave unread
