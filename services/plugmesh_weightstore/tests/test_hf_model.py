"""safetensors headers and Hugging Face folders: what they give, and every way in which they can be wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.errors import CorruptModelFile, PermissionDenied
from plugmesh_weightstore.hf_model import _Config, _model_config, load_hf_model
from plugmesh_weightstore.importing import AllowedRoots, load_source
from plugmesh_weightstore.safetensors_file import read_safetensors
from plugmesh_weightstore.testing import HF_CONFIG, hf_weights


def written(header: Any, data: int = 16, *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(data)


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": (b"", "header_size"),
    "header longer than the file": (written({"a": entry()}, size=1 << 40), "header_size"),
    "header of exabytes": (b"\xff" * 8 + bytes(64), "header_size"),
    "no JSON": (written(b"{"), "header"),
    "not an object": (written([]), "header"),
    "deep JSON": (written(b"[" * 100_000), "header"),
    "not UTF-8": (written(b'{"\xff": 1}'), "header"),
    "huge number": (written(b'{"a": ' + b"9" * 10_000 + b"}"), "header"),
    "no tensors": (written({"__metadata__": {}}, 0), "header"),
    "name twice": (written(b'{"a": 1, "a": 2}'), "header"),
    "entry is a number": (written({"a": 1}), "a"),
    "missing key": (written({"a": {"dtype": "F32"}}), "a"),
    "unknown dtype": (written({"a": entry("F8_E4M3", (16,))}), "a.dtype"),
    "dtype is a list": (written({"a": entry([])}), "a.dtype"),
    "negative shape": (written({"a": entry(shape=(-4,))}), "a.shape"),
    "shape of booleans": (written({"a": entry(shape=(True, 4))}), "a.shape"),
    "huge shape": (written({"a": entry(shape=(1 << 62,))}), "a.shape"),
    "empty tensor": (written({"a": entry(shape=(0,), offsets=(0, 0))}, 0), "a.data_offsets"),
    "shape and bytes differ": (written({"a": entry(shape=(5,))}), "a.data_offsets"),
    "backwards": (written({"a": entry(offsets=(16, 0))}), "a.data_offsets"),
    "one offset": (written({"a": entry(offsets=(0,))}), "a.data_offsets"),
    "beyond the end": (written({"a": entry(offsets=(16, 32))}), "a.data_offsets"),
    "truncated": (written({"a": entry()}, 15), "a.data_offsets"),
    "bytes that nobody owns": (written({"a": entry()}, 17), "data_offsets"),
    "overlap": (written({"a": entry(), "b": entry(offsets=(8, 24))}, 24), "b.data_offsets"),
}


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_a_lie_in_a_safetensors_header_is_named(case: str, tmp_path: Path) -> None:
    content, field = HOSTILE[case]
    (tmp_path / "evil.safetensors").write_bytes(content)

    with pytest.raises(CorruptModelFile) as e:
        read_safetensors(tmp_path / "evil.safetensors")

    assert (e.value.file, e.value.field) == ("evil.safetensors", field)


def test_tensors_lie_where_the_library_finds_them(tmp_path: Path) -> None:
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.float16)}
    safetensors.numpy.save_file(weights, tmp_path / "m.safetensors", metadata={"format": "np"})

    tensors, _ = read_safetensors(tmp_path / "m.safetensors")

    data = (tmp_path / "m.safetensors").read_bytes()
    found = {t.name: np.frombuffer(data, t.dtype, count=t.num_bytes // np.dtype(t.dtype).itemsize, offset=t.offset).reshape(t.shape) for t in tensors}
    assert found.keys() == weights.keys()
    for name, expected in weights.items():
        assert np.array_equal(found[name], expected)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_becomes_a_model(shards: int, make_hf: Callable[..., Path]) -> None:
    model = load_hf_model(make_hf(shards=shards))

    c = model.config
    assert (c.architecture, c.rope_style, c.rope_theta, c.num_layers, c.head_dim, c.tie_word_embeddings) == ("llama", "half", 50000.0, 1, 64, True)
    assert c.eos_token_ids == (2, 3, 45)  # both files, and <|im_end|> among the added tokens
    assert {t.name: t.shape for t in model.tensors} == {n: w.shape for n, w in hf_weights().items()}
    assert set(model.assets) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert model.assets["chat_template.jinja"] == b"{{ x }}"


def test_an_untied_head_and_biases_are_kept(make_hf: Callable[..., Path]) -> None:
    weights = hf_weights() | {"lm_head.weight": np.zeros((48, 256), np.float32)}
    for name, size in (("q", 256), ("k", 128), ("v", 128)):
        weights[f"model.layers.0.self_attn.{name}_proj.bias"] = np.zeros(size, np.float32)

    c = load_hf_model(make_hf(weights=weights, config={"model_type": "qwen2", "tie_word_embeddings": False})).config

    assert (c.architecture, c.tie_word_embeddings, c.attention_bias) == ("qwen2", False, True)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"model_type": "mamba"}, "model_type"),
    "architecture is a list": ({"model_type": []}, "model_type"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "text for a number": ({"hidden_size": "256"}, "hidden_size"),
    "boolean for a number": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "countless layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "a layer too many": ({"num_hidden_layers": 2}, "model.layers.1.input_layernorm.weight"),
    "a layer too few": ({"num_hidden_layers": 1, "intermediate_size": 511}, "model.layers.0.mlp.gate_proj.weight"),
    "vocabulary": ({"vocab_size": 49}, "model.embed_tokens.weight"),
    "end token outside": ({"eos_token_id": 48}, "eos_token_id"),
    "end token is text": ({"eos_token_id": "2"}, "eos_token_id"),
    "head is missing": ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "infinite epsilon": ({"rms_norm_eps": 1e400}, "rms_norm_eps"),
    "number too large": ({"rope_theta": 10**400}, "rope_theta"),
    "sliding window": ({"model_type": "mistral", "sliding_window": 128}, "sliding_window"),
    "rope scaling is a list": ({"rope_scaling": [1]}, "rope_scaling"),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_configuration_that_contradicts_the_tensors_is_named(case: str, make_hf: Callable[..., Path]) -> None:
    change, field = WRONG[case]

    with pytest.raises(CorruptModelFile) as e:
        load_hf_model(make_hf(config=change))

    assert e.value.field == field


INDEXES: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "no table": (lambda m: [], "weight_map"),
    "empty": (lambda m: {}, "weight_map"),
    "leaves the folder": (lambda m: m | {"model.norm.weight": "../other.safetensors"}, "weight_map"),
    "shard is missing": (lambda m: m | {"model.norm.weight": "a-none.safetensors"}, "weight_map"),
    "tensor in no shard": (lambda m: m | {"ghost": next(iter(m.values()))}, "weight_map.ghost"),
    "tensor in another shard": (lambda m: dict(zip(m, reversed(m.values()), strict=True)), "weight_map.model.embed_tokens.weight"),
}


@pytest.mark.parametrize("case", INDEXES, ids=str)
def test_an_index_that_contradicts_its_shards_is_named(case: str, make_hf: Callable[..., Path]) -> None:
    change, field = INDEXES[case]
    folder = make_hf(shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))

    with pytest.raises(CorruptModelFile) as e:
        load_hf_model(folder)

    assert e.value.field == field


def test_a_folder_without_weights_or_configuration_is_named(make_hf: Callable[..., Path]) -> None:
    folder = make_hf()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptModelFile, match=r"model\.safetensors is missing"):
        load_hf_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CorruptModelFile, match=r"config\.json is missing"):
        load_hf_model(folder)


def test_links_may_not_lead_out_of_the_allowed_folders(make_hf: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_hf("roots/model")
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)

    with pytest.raises(PermissionDenied):
        load_source(folder, AllowedRoots([tmp_path / "roots"]))
    assert load_source(folder, AllowedRoots([tmp_path])).config.num_layers == 1  # a link within is fine


def test_any_damage_to_a_folder_is_a_typed_error(make_hf: Callable[..., Path]) -> None:
    folder = make_hf(shards=2)
    files = {p: p.read_bytes() for p in sorted(folder.iterdir())}
    edits = st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=6)), max_size=4)

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(files)), edits, st.one_of(st.none(), st.integers(0, 5000)))
    def damage(path: Path, changes: list[tuple[int, bytes]], cut: int | None) -> None:
        data = bytearray(files[path])
        for at, new in changes:
            data[at : at + len(new)] = new
        path.write_bytes(bytes(data[:cut]))
        fault = None
        try:
            load_hf_model(folder)
        except CorruptModelFile as e:
            fault = e
        finally:
            path.write_bytes(files[path])
        assert fault is None or (fault.file and fault.field)

    damage()


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)), lambda c: st.lists(c, max_size=3), max_leaves=3),
       st.sampled_from(["vocab_size", "hidden_size", "num_attention_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
                        "eos_token_id", "bos_token_id", "tie_word_embeddings", "model_type", "mlp_bias", "attention_bias", "quantization_config"]))  # fmt: skip
def test_any_value_of_any_key_is_a_typed_error_or_a_model(value: Any, key: str) -> None:
    shapes = {n: w.shape for n, w in hf_weights().items()}
    fault = None
    try:
        _model_config(_Config(json.loads(json.dumps(HF_CONFIG | {key: value}))), "m", shapes, (2,))
    except CorruptModelFile as e:
        fault = e
    assert fault is None or fault.field
