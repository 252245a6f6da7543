"""The folder that peers read has the GGUF's weights in Hugging Face's order."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh import models
from plugmesh.bench.hf_folder import _half_order, to_bfloat16, tokenizer_of, write_hf_folder
from plugmesh.errors import FailedPrecondition

HEADS, DIM, HIDDEN, FF, VOCAB = 2, 8, 16, 24, 12


def rotate(x: np.ndarray, position: int, *, neighbours: bool) -> np.ndarray:
    """RoPE of (heads, dim), written out pair by pair."""
    out = x.copy()
    for i in range(DIM // 2):
        a, b = (2 * i, 2 * i + 1) if neighbours else (i, i + DIM // 2)
        angle = position * 10000 ** (-2 * i / DIM)
        out[:, a] = x[:, a] * np.cos(angle) - x[:, b] * np.sin(angle)
        out[:, b] = x[:, a] * np.sin(angle) + x[:, b] * np.cos(angle)
    return out


def test_scores_are_the_same_under_either_rotary_order():
    rng = np.random.default_rng(0)
    wq, wk = rng.standard_normal((2, HEADS * DIM, HIDDEN))
    x, y = rng.standard_normal((2, HIDDEN))

    def scores(q, k, neighbours):
        q, k = ((w @ v).reshape(HEADS, DIM) for w, v in ((q, x), (k, y)))
        return (rotate(q, 7, neighbours=neighbours) * rotate(k, 3, neighbours=neighbours)).sum(1)

    np.testing.assert_allclose(scores(_half_order(wq, HEADS), _half_order(wk, HEADS), False), scores(wq, wk, True))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
def test_rounding_goes_to_the_nearest_bfloat16(values):
    x = np.array(values, np.float32)
    bits = to_bfloat16(x)
    got = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    below = (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    above = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32).astype(np.float64)

    exact = x.astype(np.float64)
    assert np.array_equal(np.abs(got - exact), np.minimum(np.abs(below - exact), np.abs(above - exact)))


def write(path, architecture: str = "llama"):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(1)
    w = gguf.GGUFWriter(path, architecture)
    w.add_block_count(1)
    w.add_context_length(64)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv(HEADS)
    w.add_rope_dimension_count(DIM)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("gpt2")
    w.add_token_list([f"t{i}" for i in range(VOCAB - 1)] + ["<|end|>"])
    w.add_token_types([1] * (VOCAB - 1) + [3])
    w.add_token_merges(["t 1", "t 2"])
    w.add_bos_token_id(VOCAB - 1)
    w.add_eos_token_id(VOCAB - 1)
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)}
    shapes |= {f"blk.0.attn_{n}": (HIDDEN, HIDDEN) for n in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (FF, HIDDEN), "blk.0.ffn_up": (FF, HIDDEN), "blk.0.ffn_down": (HIDDEN, FF)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in tensors.items():
        w.add_tensor(f"{name}.weight", value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return tensors


def test_the_folder_holds_every_weight_a_config_and_a_tokenizer(tmp_path):
    tensors = write(tmp_path / "a.gguf")
    folder = write_hf_folder(tmp_path / "a.gguf", tmp_path / "out" / "a")
    raw = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])

    assert len(header) == len(tensors) + 1
    q = header["model.layers.0.self_attn.q_proj.weight"]
    at = slice(8 + size + q["data_offsets"][0], 8 + size + q["data_offsets"][1])
    assert ("BF16", [HIDDEN, HIDDEN]) == (q["dtype"], q["shape"])
    assert raw[at] == to_bfloat16(_half_order(tensors["blk.0.attn_q"], HEADS)).tobytes()
    assert len(raw) == 8 + size + max(t["data_offsets"][1] for n, t in header.items() if n != "__metadata__")
    config = json.loads((folder / "config.json").read_text())
    assert (VOCAB, True, HEADS, DIM) == (config["vocab_size"], config["tie_word_embeddings"], config["num_key_value_heads"], config["head_dim"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert ["<|end|>"] == [t["content"] for t in tokenizer["added_tokens"]]
    assert folder == write_hf_folder(tmp_path / "missing.gguf", folder)  # what is there is kept


def test_other_architectures_are_refused(tmp_path):
    write(tmp_path / "a.gguf", "phi3")
    with pytest.raises(FailedPrecondition, match="not a Llama"):
        write_hf_folder(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.model
def test_the_default_models_tokenizer_gives_its_own_ids():
    pytest.importorskip("tokenizers")
    pytest.importorskip("gguf")
    made = tokenizer_of(models.find("smollm2"))

    assert [504, 3575, 282, 4649, 314] == made.encode("The capital of France is").ids
    assert [1, 9690, 198] == made.encode("<|im_start|>system\n").ids
    assert "x 12 é\n" == made.decode(made.encode("x 12 é\n").ids)
