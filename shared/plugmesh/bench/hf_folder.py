"""A Hugging Face folder in bfloat16 out of a GGUF, for peers that read nothing else.

The weights are the GGUF's own, dequantised and rounded to bfloat16, so that every system answers from the same model.
Llama-family files with a byte-level BPE vocabulary only.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

from plugmesh.errors import FailedPrecondition

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NORMAL_TOKEN = 1  # tokenizer.ggml.token_type
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})  # tokenizer.ggml.pre of vocabularies that split digits


def write_hf_folder(gguf_path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Writes the folder in one go (a half-written one never appears) and returns it; an existing one is kept.

    Raises:
        FailedPrecondition: The file is not a Llama with a BPE vocabulary, or a package that reads it is missing.
    """
    if (folder / "config.json").exists():
        return folder
    try:
        import gguf
        import numpy as np
    except ImportError as e:
        raise FailedPrecondition(f"converting a GGUF needs the package {e.name}: pip install 'plugmesh[weightstore]'") from e
    reader = gguf.GGUFReader(str(gguf_path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.model") != "gpt2":
        raise FailedPrecondition(f"{gguf_path.name} is not a Llama with a byte-level BPE vocabulary")
    config = _config(fields)
    tensors: dict[str, Any] = {}
    for t in reader.tensors:
        values = gguf.dequantize(t.data, t.tensor_type).reshape([int(n) for n in reversed(t.shape)]).astype(np.float32)
        for part, heads in (("attn_q.", config["num_attention_heads"]), ("attn_k.", config["num_key_value_heads"])):
            if part in t.name:
                values = _half_order(values, heads)
        tensors[_hf_name(t.name)] = to_bfloat16(values)
    config["vocab_size"] = tensors["model.embed_tokens.weight"].shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _write_safetensors(tensors, work / "model.safetensors")
        files = {"config.json": config, "tokenizer.json": _tokenizer(fields), "tokenizer_config.json": _tokenizer_config(fields)}
        files["generation_config.json"] = {k: config[k] for k in ("bos_token_id", "eos_token_id")}
        for name, content in files.items():
            (work / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def tokenizer_of(gguf_path: pathlib.Path) -> Any:
    """A `tokenizers.Tokenizer` of the file's vocabulary; None where a package is missing or the vocabulary is of another kind."""
    try:
        import gguf
        import tokenizers
    except ImportError:
        return None
    try:
        fields = {name: field.contents() for name, field in gguf.GGUFReader(str(gguf_path)).fields.items() if name.startswith("tokenizer.")}
    except (OSError, ValueError):
        return None
    return tokenizers.Tokenizer.from_str(json.dumps(_tokenizer(fields))) if fields.get("tokenizer.ggml.model") == "gpt2" else None


def _write_safetensors(tensors: dict[str, Any], path: pathlib.Path) -> None:
    # By hand: numpy has no bfloat16, so the package's own numpy writer has none either.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, bits in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [at, at + bits.nbytes]}
        at += bits.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for bits in tensors.values():
            f.write(bits.tobytes())


def to_bfloat16(values: Any) -> Any:
    """Float32 to the bits of the nearest bfloat16, ties to even; finite input only."""
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _half_order(values: Any, num_heads: int) -> Any:
    # llama.cpp stores the rows of Q and K so that rotary pairs are neighbours (2i, 2i+1); Hugging Face's are (i, i + dim/2).
    rows = values.shape[0] // num_heads
    return values.reshape(num_heads, rows // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _hf_name(name: str) -> str:
    match = _LAYER.fullmatch(name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    stem, _, kind = name.partition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    raise FailedPrecondition(f"{name[:80]}: no tensor of a plain Llama")


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    def number(key: str) -> Any:
        return fields[f"llama.{key}"]

    heads = int(number("attention.head_count"))
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False,
        "hidden_size": int(number("embedding_length")), "intermediate_size": int(number("feed_forward_length")), "num_hidden_layers": int(number("block_count")),
        "num_attention_heads": heads, "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
        "head_dim": int(fields.get("llama.rope.dimension_count", number("embedding_length") // heads)),
        "max_position_embeddings": int(number("context_length")), "rms_norm_eps": float(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)), "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0))},  # what transformers 5 reads
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]), "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
    }  # fmt: skip


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = [{"type": "Digits", "individual_digits": True}] if fields.get("tokenizer.ggml.pre") in _DIGITS_APART else []
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*digits, byte_level]},
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _NORMAL_TOKEN
        ],
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": False, "vocab": {text: i for i, text in enumerate(tokens)}, "merges": fields["tokenizer.ggml.merges"],
        },
    }  # fmt: skip


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": int(fields["llama.context_length"]), "clean_up_tokenization_spaces": False,
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]], "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "chat_template": fields.get("tokenizer.chat_template", ""),
    }  # fmt: skip
