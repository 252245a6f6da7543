"""From the header of a GGUF file to a model: configuration, Hugging Face tensor names, tokenizer assets."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from plugmesh.errors import CorruptModelFile
from plugmesh.types import ModelConfig
from plugmesh_weightstore.gguf_file import GgufFile, read_gguf
from plugmesh_weightstore.llama_shapes import check_config, check_shapes
from plugmesh_weightstore.source import SourceModel, SourceTensor

# llama.cpp permutes Q and K of "llama" files for the rotation of adjacent pairs, those of "qwen2" files it leaves alone.
ROPE_STYLES = {"llama": "interleaved", "qwen2": "half"}

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,3})\.(\w+)\.(weight|bias)")

# Texts of control tokens that end a turn or a document; files often name only one of them as their end token.
END_TOKENS = frozenset({"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "</s>"})
_CONTROL = 3  # tokenizer.ggml.token_type


def load_gguf_model(path: Path) -> SourceModel:
    """Checks a GGUF file as a whole; reads its header only.

    Raises:
        CorruptModelFile: Names the file and the metadata key or tensor at fault; also for architectures that are not supported.
    """
    file = read_gguf(path)
    metadata = _Metadata(file)
    architecture = metadata.text("general.architecture")
    if architecture not in ROPE_STYLES:
        metadata.fail("general.architecture", f"{architecture[:80]!r} is not supported; supported are {', '.join(sorted(ROPE_STYLES))}")
    tensors = tuple(SourceTensor(_hf_name(t.name, metadata), t.dtype, t.shape, path, t.offset, t.num_bytes) for t in file.tensors)
    shapes = {t.name: t.shape for t in tensors}
    config = _config(architecture, metadata, shapes)
    check_shapes(config, shapes, path.name)
    name = metadata.text("general.name", path.stem)
    return SourceModel("gguf", name, metadata.text("general.license", ""), config, tensors, _assets(metadata, config), {path: file.stamp})


class _Metadata:
    """Typed access to the key-value pairs of one file."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.pairs = file.path.name, file.metadata

    def fail(self, key: str, problem: str) -> NoReturn:
        raise CorruptModelFile(f"{self.file}: {key}: {problem}", file=self.file, field=key)

    def _get(self, key: str, default: Any, kinds: type | tuple[type, ...], what: str) -> Any:
        value = self.pairs.get(key, default)
        if value is None:
            self.fail(key, "is missing")
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            self.fail(key, f"is not {what}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, default, str, "a string")

    def integer(self, key: str, default: int | None = None) -> int:
        return self._get(key, default, int, "one integer")

    def real(self, key: str, default: float | None = None) -> float:
        return float(self._get(key, default, (int, float), "one number"))

    def items(self, key: str) -> list[Any]:
        return self._get(key, [], list, "an array")


def _hf_name(name: str, metadata: _Metadata) -> str:
    if name in _NAMES:
        return _NAMES[name]
    match = _LAYER.fullmatch(name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    if name == "rope_freqs.weight":
        metadata.fail(name, "per-frequency rope factors are not supported; import the model's safetensors form")
    metadata.fail(name[:80], "no tensor of a supported architecture")


def _config(architecture: str, metadata: _Metadata, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    def key(name: str) -> str:
        return f"{architecture}.{name}"

    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is None or len(embedding) != 2:
        metadata.fail("token_embd.weight", "is missing or not a matrix")
    hidden, num_heads = metadata.integer(key("embedding_length")), metadata.integer(key("attention.head_count"))
    if num_heads < 1:
        metadata.fail(key("attention.head_count"), f"{num_heads} is not positive")
    if key("attention.key_length") not in metadata.pairs and hidden % num_heads:
        metadata.fail(key("attention.head_count"), f"{hidden} is not a multiple of {num_heads} heads")
    head_dim = metadata.integer(key("attention.key_length"), hidden // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(key(name), head_dim) != head_dim:
            metadata.fail(key(name), f"other than the head size {head_dim} is not supported")
    vocab_size = embedding[0]
    if metadata.integer(key("vocab_size"), vocab_size) != vocab_size:
        metadata.fail(key("vocab_size"), f"{metadata.pairs[key('vocab_size')]}, but the embedding has {vocab_size} rows")
    if metadata.integer(key("expert_count"), 0):
        metadata.fail(key("expert_count"), "mixtures of experts are not supported")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=metadata.integer(key("feed_forward_length")),
        num_layers=metadata.integer(key("block_count")),
        num_heads=num_heads,
        num_kv_heads=metadata.integer(key("attention.head_count_kv"), num_heads),
        head_dim=head_dim,
        max_position=metadata.integer(key("context_length")),
        rms_norm_eps=metadata.real(key("attention.layer_norm_rms_epsilon")),
        rope_theta=metadata.real(key("rope.freq_base"), 10000.0),
        rope_style=ROPE_STYLES[architecture],
        tie_word_embeddings="lm_head.weight" not in shapes,
        bos_token_id=metadata.integer("tokenizer.ggml.bos_token_id") if "tokenizer.ggml.bos_token_id" in metadata.pairs else None,
        eos_token_ids=_end_tokens(metadata, vocab_size),
        rope_scaling=_rope_scaling(metadata, key),
        attention_bias="model.layers.0.self_attn.q_proj.bias" in shapes,
        name=metadata.text("general.name", ""),
    )
    names = {
        "hidden_size": key("embedding_length"), "intermediate_size": key("feed_forward_length"), "num_layers": key("block_count"),
        "num_heads": key("attention.head_count"), "num_kv_heads": key("attention.head_count_kv"), "head_dim": key("attention.key_length"),
        "max_position": key("context_length"), "rms_norm_eps": key("attention.layer_norm_rms_epsilon"), "rope_theta": key("rope.freq_base"),
        "bos_token_id": "tokenizer.ggml.bos_token_id", "eos_token_ids": "tokenizer.ggml.eos_token_id", "vocab_size": "token_embd.weight",
    }  # fmt: skip
    check_config(config, metadata.file, names)
    return config


def _rope_scaling(metadata: _Metadata, key: Any) -> dict[str, object] | None:
    kind = metadata.text(key("rope.scaling.type"), "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        metadata.fail(key("rope.scaling.type"), f"{kind[:40]!r} is not supported")
    factor = metadata.real(key("rope.scaling.factor"))
    if not (math.isfinite(factor) and factor > 0):
        metadata.fail(key("rope.scaling.factor"), f"{factor} is not a positive number")
    out: dict[str, object] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        out["original_max_position_embeddings"] = metadata.integer(key("rope.scaling.original_context_length"))
    return out


def _end_tokens(metadata: _Metadata, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a sequence: those the file names, and control tokens whose text says so. Checks the vocabulary too."""
    tokens, kinds = metadata.items("tokenizer.ggml.tokens"), metadata.items("tokenizer.ggml.token_type")
    if len(tokens) > vocab_size:
        metadata.fail("tokenizer.ggml.tokens", f"{len(tokens)} tokens, but the embedding has {vocab_size} rows")
    for name, per_token in (("token_type", kinds), ("scores", metadata.items("tokenizer.ggml.scores"))):
        if per_token and len(per_token) != len(tokens):
            metadata.fail(f"tokenizer.ggml.{name}", f"{len(per_token)} entries for {len(tokens)} tokens")
    ids = {metadata.integer(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot", "eom") if f"tokenizer.ggml.{n}_token_id" in metadata.pairs}
    ids |= {i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == _CONTROL and text in END_TOKENS}
    return tuple(sorted(ids))


def _assets(metadata: _Metadata, config: ModelConfig) -> dict[str, bytes]:
    tokenizer = {k: v for k, v in metadata.pairs.items() if k.startswith("tokenizer.")}
    generation: dict[str, object] = {"eos_token_id": list(config.eos_token_ids)}
    if config.bos_token_id is not None:
        generation["bos_token_id"] = config.bos_token_id
    try:
        text = json.dumps(tokenizer, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:
        metadata.fail("tokenizer.ggml.scores", "holds numbers that are not finite")
    assets = {
        "tokenizer.gguf.json": text.encode(),
        "generation_config.json": json.dumps(generation, sort_keys=True).encode(),
    }
    template = tokenizer.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        assets["chat_template.jinja"] = template.encode()
    return assets
