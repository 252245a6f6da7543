"""`[services.prefill]`."""

from __future__ import annotations

from typing import Literal

import pydantic

from plugmesh.config import ServiceSettings


class Settings(ServiceSettings):
    """Settings of one prefill instance. `executor`, `dtype`, `kv_dtype` and `weight_format` must equal decode's, or no block can be shared."""

    executor: Literal["auto", "native", "torch", "cuda"] = "auto"  # auto: native kernels where this machine has them, else torch
    dtype: Literal["bfloat16", "float32"] = "float32"         # of the torch executor
    kv_dtype: Literal["bfloat16", "int8"] = "bfloat16"        # of the native executor's KV
    weight_format: str = pydantic.Field("", max_length=24)    # a plugin's, to be loaded here and in the weightstore; empty: the executor's own
    device: str = "cpu"
    num_kv_blocks: int = pydantic.Field(520, ge=8, le=1 << 20)
    commit_kv: bool = False                                   # take the memory of the native executor's pool at start, not as blocks are first used
    max_tokens_per_step: int = pydantic.Field(256, ge=1, le=65536)  # one chunk
    max_model_len: int = pydantic.Field(0, ge=0)
    max_jobs: int = pydantic.Field(8, ge=1, le=256)                 # taken from the queue and not yet done
    num_threads: int = pydantic.Field(0, ge=0, le=256)              # 0: one per core that the process may use
    prefix_cache: bool = True
    job_ack_wait_s: float = pydantic.Field(10.0, gt=1, le=600)      # a job of a dead instance goes to another one after this
    max_deliveries: int = pydantic.Field(3, ge=1, le=100)
