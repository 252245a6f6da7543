"""Small models to test with: real GGUF files and Hugging Face folders with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 512, 4, 2, 64, 48
TOKENS = [f"t{i}" for i in range(VOCAB - 3)] + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def random_blocks(rng: np.random.Generator, dtype: str, rows: int, columns: int) -> np.ndarray:
    """Bytes of a (rows, columns) tensor in a GGUF type; half-precision scales are small finite numbers."""
    kind = gguf.GGMLQuantizationType[dtype]
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if dtype == "F32":
        return rng.standard_normal((rows, columns), np.float32)
    if dtype == "F16":
        return rng.standard_normal((rows, columns), np.float32).astype(np.float16)
    blocks = rng.integers(0, 256, (rows * columns // block_elements, block_bytes), np.uint8)
    if dtype == "BF16":
        return (rng.standard_normal((rows, columns), np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    scales = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
              "IQ4_NL": [0], "IQ4_XS": [0]}  # fmt: skip
    for at in scales[dtype]:
        blocks[:, at : at + 2] = rng.uniform(-0.1, 0.1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(path: Path, dtype: str = "Q4_1", *, name: str = "Tiny Model", seed: int = 0, layers: int = 1, extra: Callable[[Any], object] | None = None) -> Path:
    """Writes a small llama whose matrices have the GGUF type `dtype`; `extra(writer)` runs before the tensors are added."""
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, "llama")
    w.add_name(name)
    w.add_license("apache-2.0")
    w.add_block_count(layers)
    w.add_context_length(2048)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(INTERMEDIATE)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_tokenizer_model("gpt2")
    w.add_token_list(TOKENS)
    w.add_token_types([1] * (VOCAB - 3) + [3] * 3)
    w.add_token_merges(["a b", "b c"])
    w.add_eos_token_id(VOCAB - 1)
    w.add_chat_template("{{ messages }}")
    if extra:
        extra(w)
    kind = gguf.GGMLQuantizationType[dtype]

    def add(tensor: str, rows: int, columns: int) -> None:
        w.add_tensor(tensor, random_blocks(rng, dtype, rows, columns), raw_dtype=None if dtype in ("F32", "F16") else kind)

    add("token_embd.weight", VOCAB, HIDDEN)
    w.add_tensor("output_norm.weight", rng.standard_normal(HIDDEN, np.float32))
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{norm}.weight", rng.standard_normal(HIDDEN, np.float32))
        add(f"blk.{i}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{i}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{i}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{i}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        add(f"blk.{i}.ffn_gate.weight", INTERMEDIATE, HIDDEN)
        add(f"blk.{i}.ffn_up.weight", INTERMEDIATE, HIDDEN)
        add(f"blk.{i}.ffn_down.weight", HIDDEN, INTERMEDIATE)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def hf_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a one-layer llama by their Hugging Face names, float32, embedding tied."""
    rng = np.random.default_rng(seed)
    q, kv, p = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,), p + "input_layernorm.weight": (HIDDEN,),
        p + "post_attention_layernorm.weight": (HIDDEN,), p + "self_attn.q_proj.weight": (q, HIDDEN), p + "self_attn.k_proj.weight": (kv, HIDDEN),
        p + "self_attn.v_proj.weight": (kv, HIDDEN), p + "self_attn.o_proj.weight": (HIDDEN, q), p + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        p + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN), p + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }  # fmt: skip
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


HF_CONFIG = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
    "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def write_hf(folder: Path, *, shards: int = 1, config: dict[str, Any] | None = None, weights: dict[str, np.ndarray] | None = None) -> Path:
    """Writes a Hugging Face folder of a small llama; `config` overrides keys of config.json."""
    folder.mkdir(parents=True)
    weights = hf_weights() if weights is None else weights
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | (config or {})))
    tokenizer = {"version": "1.0", "added_tokens": [{"id": 45, "content": "<|im_end|>", "special": True}], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    if shards == 1:
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[i::shards])
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
