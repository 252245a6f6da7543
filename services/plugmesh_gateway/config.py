"""`[services.gateway]`."""

from __future__ import annotations

import pathlib
from typing import Literal

import pydantic

from plugmesh.config import ServiceSettings
from plugmesh.limits import Limits


class Settings(ServiceSettings):
    """The gateway's own keys.

    HTTP is served on `[mesh] host`, which is loopback unless told otherwise.
    """

    port: int = pydantic.Field(8000, ge=0, le=65535)              # 0: a free one
    keys_file: pathlib.Path | None = None                         # API keys; None: no authentication (loopback only is then wise)
    request_timeout_s: float = pydantic.Field(300.0, gt=0, le=86400)
    body_timeout_s: float = pydantic.Field(30.0, gt=0)            # for a body to arrive completely
    max_connections: int = pydantic.Field(2048, ge=1)

    # Admission.
    max_in_flight: int = pydantic.Field(256, ge=1)                # sequences being worked on
    max_queued: int = pydantic.Field(512, ge=0)                   # requests waiting for a place; above it 429
    max_pending_tokens: int = pydantic.Field(1_048_576, ge=1)     # prompt plus wanted tokens of all work in flight

    # Faults.
    stall_s: float = pydantic.Field(10.0, gt=0)                   # without frames and without an answer to probes: suspect
    hang_s: float = pydantic.Field(60.0, gt=0)                    # answers probes, has running sequences, but makes no step
    recovery_wait_s: float = pydantic.Field(30.0, ge=0)           # a running request waits this long for another instance
    max_attempts: int = pydantic.Field(8, ge=1)                   # failures in a row, without a token, that end a request

    # Token ids to text: within this process, with the model's table of tokens, or always at a tokenizer instance.
    detokenize: Literal["local", "tokenizer"] = "local"

    # Strategies: one request into many.
    default_strategy: str = ""                                    # of a plugin, for requests that name none; "": the model alone
    strategy_budget_tokens: int = pydantic.Field(65536, ge=1)     # generated tokens of all children of one request
    strategy_budget_calls: int = pydantic.Field(256, ge=1)        # and their number

    # Grammars and tools.
    grammar_timeout_s: float = pydantic.Field(15.0, gt=0)         # for the grammar service to compile one
    tool_format: Literal["auto", "hermes", "smollm2", "llama3"] = "auto"  # how the model writes calls; auto: as its chat template or its name says

    # Slow readers.
    max_buffered_events: int = pydantic.Field(4096, ge=1)         # per request, not yet taken by its client

    # Limits on one request.
    max_body_bytes: int = pydantic.Field(2 * 1024 * 1024, ge=1024)
    max_messages: int = pydantic.Field(1024, ge=1)
    max_prompts: int = pydantic.Field(64, ge=1)
    max_sequences: int = pydantic.Field(16, ge=1)
    max_stop: int = pydantic.Field(16, ge=0)
    max_stop_chars: int = pydantic.Field(256, ge=1)
    max_logit_bias: int = pydantic.Field(1024, ge=0)
    max_tokens: int = pydantic.Field(131072, ge=1)

    def limits(self) -> Limits:
        """The limits on one request, as `plugmesh.limits` checks them."""
        return Limits(
            max_messages=self.max_messages, max_prompts=self.max_prompts, max_sequences=self.max_sequences,
            max_stop=self.max_stop, max_stop_chars=self.max_stop_chars, max_logit_bias=self.max_logit_bias,
            max_tokens=self.max_tokens,
        )
