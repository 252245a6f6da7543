"""Plain records that cross functions and processes; no protobuf, no torch.

`plugmesh.wire` translates them to and from protobuf.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BLOCK_TOKENS = 16  # tokens in one KV block, everywhere


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Defaults are OpenAI's; 0 or None is off where that makes sense.

    Order in the sampler: logit bias, repetition, presence and frequency penalties, min_tokens,
    then temperature, top-k, top-p, min-p. Log-probabilities are those of the distribution after
    bias and penalties and before temperature and filters. The confidence of a token is
    -(1/k) times the sum of the log-probabilities of the k = `confidence_top_k` most likely tokens
    of the model's own distribution, before any of that; 0 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    num_sequences: int = 1
    confidence_top_k: int = 0


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One generated token; `top` holds (token id, log-probability), best first; `confidence` is 0 unless asked for."""

    token_id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    confidence: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens a request used; `cached_tokens` is the part of the prompt whose KV was found."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the engine must know of a model; written by the weightstore, read by the engine.

    `rope_style`: "half" rotates (i, i + head_dim/2) as Hugging Face weights expect, "interleaved"
    rotates adjacent pairs (2i, 2i + 1) as llama.cpp's GGUF order of Q and K expects.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_style: str
    tie_word_embeddings: bool
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    rope_scaling: Mapping[str, object] | None = None
    attention_bias: bool = False
    name: str = ""

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Inverse of `to_json`. Raises TypeError on unknown or missing keys."""
        data = json.loads(text)
        data["eos_token_ids"] = tuple(data.get("eos_token_ids", ()))
        return cls(**data)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """How the bytes of one KV block are laid out: (layers, 2, block_tokens, kv_heads, head_dim), C order.

    Index 0 of the second axis is K (after RoPE), 1 is V. Two layouts with different `key()` never share blocks.
    """

    model: str
    codec: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    block_bytes: int

    def key(self) -> bytes:
        """32 bytes that seed the hash chain of every prefix in this layout."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).digest()


def block_id(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a block: sha256 over its parent's name (or `KvLayout.key()`) and its token ids.

    Args:
        parent: 32 bytes.
        token_ids: 1 to 16 ids; a tail block with fewer than 16 tokens has a name of its own.
    """
    h = hashlib.sha256(parent)
    h.update(len(token_ids).to_bytes(4, "little"))
    for t in token_ids:
        h.update(int(t).to_bytes(4, "little", signed=True))
    return h.digest()


def block_chain(layout_key: bytes, token_ids: Sequence[int], *, tail: bool = False) -> list[bytes]:
    """Names of the full blocks of a prompt in order, with `tail` also that of its last partial block."""
    ids: list[bytes] = []
    parent = layout_key
    end = len(token_ids) if tail else len(token_ids) - len(token_ids) % BLOCK_TOKENS
    for i in range(0, end, BLOCK_TOKENS):
        parent = block_id(parent, token_ids[i : min(i + BLOCK_TOKENS, end)])
        ids.append(parent)
    return ids


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """One row of the discovery table.

    `state` is "ready", "draining" or "suspect". `load` holds the role's own numbers
    (decode: num_running, num_waiting, num_pending_tokens, kv_blocks_used, kv_blocks_total).
    """

    role: str
    instance_id: str
    incarnation: str
    grpc_address: str
    host: str
    pid: int
    state: str = "ready"
    version: str = ""
    model: str = ""
    weight_version: str = ""
    roles: tuple[str, ...] = ()
    plugins: Mapping[str, str] = field(default_factory=dict)  # slug to version
    load: Mapping[str, float] = field(default_factory=dict)
    started_unix_s: float = 0.0
    metrics_address: str = ""
