"""Configuration, names and tokenizer files that come out of a GGUF file; and what makes it no model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from plugmesh import models
from plugmesh.errors import CorruptModelFile
from plugmesh_weightstore.gguf_model import load_gguf_model


def test_a_llama_becomes_a_model_with_hugging_face_names(make_gguf: Callable[..., Path]) -> None:
    model = load_gguf_model(make_gguf("Q4_1", layers=2))

    c = model.config
    assert (c.architecture, c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size) == ("llama", 2, 256, 4, 2, 64, 48)
    assert (c.rope_style, c.tie_word_embeddings, c.max_position, c.attention_bias) == ("interleaved", True, 2048, False)
    assert c.eos_token_ids == (45, 47)  # <|endoftext|> by its text, <|im_end|> by both
    by_name = {t.name: t for t in model.tensors}
    assert by_name["model.layers.1.self_attn.k_proj.weight"].shape == (128, 256)
    assert by_name["model.layers.0.mlp.down_proj.weight"].dtype == "Q4_1"
    assert by_name["model.layers.0.input_layernorm.weight"].dtype == "float32"
    assert (model.name, model.license) == ("Tiny Model", "apache-2.0")


def test_tokenizer_metadata_is_kept_whole(make_gguf: Callable[..., Path]) -> None:
    assets = load_gguf_model(make_gguf()).assets

    tokenizer = json.loads(assets["tokenizer.gguf.json"])
    assert tokenizer["tokenizer.ggml.model"] == "gpt2"
    assert len(tokenizer["tokenizer.ggml.tokens"]) == 48
    assert tokenizer["tokenizer.ggml.merges"] == ["a b", "b c"]
    assert tokenizer["tokenizer.ggml.eos_token_id"] == 47
    assert assets["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(assets["generation_config.json"]) == {"eos_token_id": [45, 47]}


WRONG: dict[str, tuple[Callable[[gguf.GGUFWriter], Any], str]] = {
    "more layers than tensors": (lambda w: w.add_uint32("llama.block_count", 2), "model.layers.1.input_layernorm.weight"),
    "countless layers": (lambda w: w.add_uint32("llama.block_count", 0xFFFFFFFF), "llama.block_count"),
    "no heads": (lambda w: w.add_uint32("llama.attention.head_count", 0), "llama.attention.head_count"),
    "uneven heads": (lambda w: w.add_uint32("llama.attention.head_count", 7), "llama.attention.head_count"),
    "uneven key-value heads": (lambda w: w.add_uint32("llama.attention.head_count_kv", 3), "llama.attention.head_count_kv"),
    "heads per layer": (lambda w: w.add_array("llama.attention.head_count", [4]), "llama.attention.head_count"),
    "other width": (lambda w: w.add_uint32("llama.embedding_length", 512), "model.embed_tokens.weight"),
    "other feed-forward width": (lambda w: w.add_uint32("llama.feed_forward_length", 300), "model.layers.0.mlp.gate_proj.weight"),
    "vocabulary size": (lambda w: w.add_uint32("llama.vocab_size", 49), "llama.vocab_size"),
    "more tokens than rows": (lambda w: w.add_array("tokenizer.ggml.tokens", ["x"] * 49), "tokenizer.ggml.tokens"),
    "token types": (lambda w: w.add_array("tokenizer.ggml.token_type", [1]), "tokenizer.ggml.token_type"),
    "end token outside": (lambda w: w.add_uint32("tokenizer.ggml.eos_token_id", 48), "tokenizer.ggml.eos_token_id"),
    "epsilon not a number": (lambda w: w.add_float32("llama.attention.layer_norm_rms_epsilon", math.nan), "llama.attention.layer_norm_rms_epsilon"),
    "rope base negative": (lambda w: w.add_float32("llama.rope.freq_base", -1.0), "llama.rope.freq_base"),
    "scores not finite": (lambda w: w.add_array("tokenizer.ggml.scores", [math.inf] * 48), "tokenizer.ggml.scores"),
    "experts": (lambda w: w.add_uint32("llama.expert_count", 8), "llama.expert_count"),
    "partial rotation": (lambda w: w.add_uint32("llama.rope.dimension_count", 32), "llama.rope.dimension_count"),
    "unknown scaling": (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "llama.rope.scaling.type"),
    "architecture": (lambda w: w.add_string("general.architecture", "mamba"), "general.architecture"),
    "context is text": (lambda w: w.add_string("llama.context_length", "long"), "llama.context_length"),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_metadata_that_contradicts_the_tensors_is_named(case: str, make_gguf: Callable[..., Path]) -> None:
    change, field = WRONG[case]

    def replace(w: gguf.GGUFWriter) -> None:
        before = dict(w.kv_data[0])
        w.kv_data[0].clear()
        change(w)
        w.kv_data[0] = before | w.kv_data[0]

    with pytest.raises(CorruptModelFile) as e:
        load_gguf_model(make_gguf(extra=replace))

    assert e.value.field == field


def test_a_missing_key_and_a_foreign_tensor_are_named(make_gguf: Callable[..., Path]) -> None:
    import numpy as np

    with pytest.raises(CorruptModelFile) as e:
        load_gguf_model(make_gguf(extra=lambda w: w.kv_data[0].pop("llama.context_length")))
    assert e.value.field == "llama.context_length"
    for name in ("blk.0.ssm_in.weight", "rope_freqs.weight", "blk.7.attn_q.weight"):
        with pytest.raises(CorruptModelFile):
            load_gguf_model(make_gguf(extra=lambda w, name=name: w.add_tensor(name, np.zeros(32, np.float32))))


@pytest.mark.model
def test_the_default_model() -> None:
    path = models.find("smollm2")
    if path is None:
        pytest.skip("the default model is not in the cache; plugmesh pull smollm2")
    model = load_gguf_model(path)

    c = model.config
    assert (c.num_layers, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim) == (30, 576, 1536, 9, 3, 64)
    assert (c.vocab_size, c.max_position, c.rope_theta, c.rope_style, c.tie_word_embeddings) == (49152, 8192, 100000.0, "interleaved", True)
    assert c.bos_token_id == 1 and 2 in c.eos_token_ids
    assert len(model.tensors) == 272
    assert sum(math.prod(t.shape) for t in model.tensors) == 134_515_008
