"""The tensors that a Llama-like model must and may have, and their shapes: where configuration and tensors must agree."""

from __future__ import annotations

import math
from collections.abc import Mapping

from plugmesh.errors import CorruptModelFile
from plugmesh.types import ModelConfig

MAX_LAYERS = 1024
LAYER_TENSORS = {
    "input_layernorm.weight": "norm",
    "post_attention_layernorm.weight": "norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "kv",
    "self_attn.v_proj.weight": "kv",
    "self_attn.o_proj.weight": "o",
    "mlp.gate_proj.weight": "up",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
LAYER_BIASES = {"self_attn.q_proj.bias": "q_bias", "self_attn.k_proj.bias": "kv_bias", "self_attn.v_proj.bias": "kv_bias"}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model with this configuration, by Hugging Face name, with its row-major shape."""
    hidden, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "norm": (hidden,), "q": (q, hidden), "kv": (kv, hidden), "o": (hidden, q), "up": (config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size), "q_bias": (q,), "kv_bias": (kv,),
    }  # fmt: skip
    kinds = LAYER_TENSORS | (LAYER_BIASES if config.attention_bias else {})
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        out |= {f"model.layers.{layer}.{name}": shapes[kind] for name, kind in kinds.items()}
    return out


def check_config(config: ModelConfig, file: str, fields: Mapping[str, str]) -> None:
    """Refuses configurations whose numbers contradict each other or are out of any sensible range.

    Args:
        fields: ModelConfig field to the name that the file uses for it.
    """

    def fail(name: str, problem: str) -> None:
        field = fields.get(name, name)
        raise CorruptModelFile(f"{file}: {field}: {problem}", file=file, field=field)

    limits = {
        "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_layers": MAX_LAYERS, "num_heads": 1 << 12,
        "num_kv_heads": 1 << 12, "head_dim": 1 << 12, "max_position": 1 << 30,
    }  # fmt: skip
    for name, limit in limits.items():
        if not 1 <= getattr(config, name) <= limit:
            fail(name, f"{getattr(config, name)} is not between 1 and {limit}")
    if config.num_heads % config.num_kv_heads:
        fail("num_kv_heads", f"{config.num_heads} heads cannot share {config.num_kv_heads} key-value heads evenly")
    if config.head_dim % 2:
        fail("head_dim", f"{config.head_dim} is odd; rotary positions need pairs")
    for name in ("rms_norm_eps", "rope_theta"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            fail(name, f"{value} is not a positive number")
    for name, ids in (("bos_token_id", (config.bos_token_id,)), ("eos_token_ids", config.eos_token_ids)):
        for token_id in ids:
            if token_id is not None and not 0 <= token_id < config.vocab_size:
                fail(name, f"token {token_id} is outside the vocabulary of {config.vocab_size}")


def check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]], file: str) -> None:
    """Refuses missing, unknown and misshapen tensors; names the first of them."""
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise CorruptModelFile(f"{file}: the tensor {name} is missing", file=file, field=name)
        if found[name] != shape:
            raise CorruptModelFile(f"{file}: {name}: shape {list(found[name])}, the configuration needs {list(shape)}", file=file, field=name)
    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise CorruptModelFile(f"{file}: {unknown[0]}: no tensor of a {config.architecture} model", file=file, field=unknown[0])
