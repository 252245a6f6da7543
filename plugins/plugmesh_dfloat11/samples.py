"""A bfloat16 model to measure on: a small Llama in a Hugging Face folder, its weights random numbers of the kind that training leaves.

No trained bfloat16 model is at hand: values are normal, with a standard deviation of their own for every matrix and row, about 0.02, as published models of this
family have them. What counts here is the distribution of exponents, and that is set by the spread of magnitudes.
"""

from __future__ import annotations

import json
import pathlib
import struct

import numpy as np

from plugmesh_dfloat11.layout import to_bfloat16


def write_llama(folder: pathlib.Path, *, hidden: int = 512, intermediate: int = 1408, num_layers: int = 4, vocab: int = 8192, seed: int = 0, tie: bool = False) -> pathlib.Path:
    """Writes config.json, model.safetensors (bfloat16) and the smallest tokenizer that an import takes; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    heads = hidden // 64
    kv = max(1, heads // 4)
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": num_layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": tie, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(num_layers):
        p = f"model.layers.{i}."
        shapes |= {
            f"{p}input_layernorm.weight": (hidden,), f"{p}post_attention_layernorm.weight": (hidden,), f"{p}self_attn.q_proj.weight": (heads * 64, hidden),
            f"{p}self_attn.k_proj.weight": (kv * 64, hidden), f"{p}self_attn.v_proj.weight": (kv * 64, hidden), f"{p}self_attn.o_proj.weight": (hidden, heads * 64),
            f"{p}mlp.gate_proj.weight": (intermediate, hidden), f"{p}mlp.up_proj.weight": (intermediate, hidden), f"{p}mlp.down_proj.weight": (hidden, intermediate),
        }  # fmt: skip
    if not tie:
        shapes["lm_head.weight"] = (vocab, hidden)
    rng = np.random.default_rng(seed)
    header: dict[str, object] = {}
    blobs: list[bytes] = []
    at = 0
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        values = values * (0.02 * rng.lognormal(0, 0.3) * rng.lognormal(0, 0.2, (shape[0], 1))).astype(np.float32) if len(shape) == 2 else 1 + np.float32(0.1) * values
        blobs.append(to_bfloat16(values.astype(np.float32)).tobytes())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + len(blobs[-1])]}
        at += len(blobs[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    return folder
