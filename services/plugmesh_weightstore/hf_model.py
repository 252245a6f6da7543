"""From a folder with safetensors and a Hugging Face configuration to a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from plugmesh.errors import CorruptModelFile
from plugmesh.types import ModelConfig
from plugmesh_weightstore.gguf_model import END_TOKENS
from plugmesh_weightstore.llama_shapes import check_config, check_shapes
from plugmesh_weightstore.safetensors_file import parse_json, read_safetensors
from plugmesh_weightstore.source import FileStamp, SourceModel, SourceTensor, read_whole

MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 64 << 20
MAX_SHARDS = 1024
ARCHITECTURES = ("llama", "mistral", "qwen2")
_INDEX = "model.safetensors.index.json"


def load_hf_model(folder: Path, open_path: Callable[[Path], Path] = lambda p: p) -> SourceModel:
    """Checks a folder as a whole: config.json, headers of all shards, tokenizer files.

    Args:
        open_path: Resolves a path inside the folder to the real one, refusing what must not be read.

    Raises:
        CorruptModelFile: Names the file and the field at fault; also for architectures that are not supported.
    """

    def read(name: str, max_bytes: int) -> bytes | None:
        path = folder / name
        return read_whole(open_path(path), max_bytes) if path.exists() else None

    text = read("config.json", MAX_CONFIG_BYTES)
    if text is None:
        raise CorruptModelFile(f"{folder.name}: config.json is missing", file="config.json", field="file")
    raw = _Config(parse_json(text, "config.json", "config"))
    # 1. Small files: kept byte by byte, read here only for the end tokens.
    assets: dict[str, bytes] = {}
    for name, limit in (
        ("tokenizer.json", MAX_TOKENIZER_BYTES), ("tokenizer_config.json", 4 * MAX_CONFIG_BYTES), ("generation_config.json", MAX_CONFIG_BYTES),
        ("special_tokens_map.json", MAX_CONFIG_BYTES), ("chat_template.jinja", MAX_CONFIG_BYTES),
    ):  # fmt: skip
        content = read(name, limit)
        if content is not None:
            assets[name] = content
    parsed = {name: parse_json(data, name, "file") for name, data in assets.items() if name.endswith(".json")}
    template = parsed.get("tokenizer_config.json", {}).get("chat_template")
    if "chat_template.jinja" not in assets and isinstance(template, str):
        assets["chat_template.jinja"] = template.encode(errors="replace")
    # 2. Tensors.
    tensors, stamps = _tensors(folder, open_path, read(_INDEX, 4 * MAX_CONFIG_BYTES))
    # Some files carry buffers that follow from the configuration.
    tensors = [t for t in tensors if not t.name.endswith(".rotary_emb.inv_freq")]
    if raw.flag("tie_word_embeddings", False):
        tensors = [t for t in tensors if t.name != "lm_head.weight"]  # a second copy of the embedding
    shapes = {t.name: t.shape for t in tensors}
    # 3. The two must agree.
    config = _model_config(raw, folder.name, shapes, _end_tokens(raw, parsed))
    check_shapes(config, shapes, folder.name)
    if "generation_config.json" not in assets:
        assets["generation_config.json"] = json.dumps({"eos_token_id": list(config.eos_token_ids)}).encode()
    return SourceModel("safetensors", folder.name, "", config, tuple(tensors), assets, stamps)


def _tensors(folder: Path, open_path: Callable[[Path], Path], index: bytes | None) -> tuple[list[SourceTensor], dict[Path, FileStamp]]:
    if index is None:
        if not (folder / "model.safetensors").exists():
            raise CorruptModelFile(f"{folder.name}: model.safetensors is missing", file="model.safetensors", field="file")
        path = open_path(folder / "model.safetensors")
        tensors, stamp = read_safetensors(path)
        return tensors, {path: stamp}
    weight_map = parse_json(index, _INDEX, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptModelFile(f"{_INDEX}: weight_map is not a table of file names", file=_INDEX, field="weight_map")
    files = sorted(set(weight_map.values()))
    if not 1 <= len(files) <= MAX_SHARDS:
        raise CorruptModelFile(f"{_INDEX}: {len(files)} shards, expected 1 to {MAX_SHARDS}", file=_INDEX, field="weight_map")
    out: list[SourceTensor] = []
    stamps: dict[Path, FileStamp] = {}
    for name in files:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise CorruptModelFile(f"{_INDEX}: {name[:120]!r} is not the name of a shard", file=_INDEX, field="weight_map")
        if not (folder / name).exists():
            raise CorruptModelFile(f"{_INDEX}: the shard {name} is missing", file=_INDEX, field="weight_map")
        path = open_path(folder / name)
        tensors, stamps[path] = read_safetensors(path)
        for t in tensors:
            if weight_map.get(t.name) != name:
                raise CorruptModelFile(f"{_INDEX}: {t.name} lies in {name}, the index says otherwise", file=_INDEX, field=f"weight_map.{t.name}")
        out += tensors
    missing = sorted(set(weight_map) - {t.name for t in out})
    if missing:
        raise CorruptModelFile(f"{_INDEX}: {missing[0]} is in no shard", file=_INDEX, field=f"weight_map.{missing[0]}")
    return out, stamps


class _Config:
    """Typed access to config.json."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def fail(self, key: str, problem: str) -> NoReturn:
        raise CorruptModelFile(f"config.json: {key}: {problem}", file="config.json", field=key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.data.get(key)
        value = default if value is None else value
        if type(value) is not int:
            self.fail(key, "is missing" if value is None else "is not an integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.data.get(key)
        value = default if value is None else value
        if type(value) not in (int, float):
            self.fail(key, "is missing" if value is None else "is not a number")
        try:
            return float(value)  # type: ignore[arg-type] # a number, checked above
        except OverflowError:
            self.fail(key, "is too large")

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "is not true or false")
        return value


def _end_tokens(raw: _Config, parsed: dict[str, dict[str, Any]]) -> tuple[int, ...]:
    ids: set[int] = set()
    for file, value in (
        ("config.json", raw.data.get("eos_token_id")), ("generation_config.json", parsed.get("generation_config.json", {}).get("eos_token_id"))
    ):  # fmt: skip
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int for v in values):
            raise CorruptModelFile(f"{file}: eos_token_id: not an integer or a list of them", file=file, field="eos_token_id")
        ids.update(values)
    added = parsed.get("tokenizer.json", {}).get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get("special") is True and token.get("content") in END_TOKENS and type(token.get("id")) is int:
            ids.add(token["id"])
    return tuple(sorted(ids))


def _model_config(raw: _Config, name: str, shapes: dict[str, tuple[int, ...]], eos: tuple[int, ...]) -> ModelConfig:
    architecture = raw.data.get("model_type")
    if architecture not in ARCHITECTURES:
        raw.fail("model_type", f"{str(architecture)[:80]!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    for key, plain in (("mlp_bias", False), ("quantization_config", None), ("partial_rotary_factor", 1.0), ("hidden_act", "silu")):
        if raw.data.get(key, plain) not in (plain, None):
            raw.fail(key, f"{str(raw.data[key])[:80]!r} is not supported")
    max_position = raw.integer("max_position_embeddings")
    window = raw.data.get("sliding_window")
    if window is not None and raw.data.get("use_sliding_window", architecture == "mistral") and raw.integer("sliding_window") < max_position:
        raw.fail("sliding_window", f"a window of {window} below the context of {max_position} is not supported")
    hidden, num_heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
    if num_heads < 1 or ("head_dim" not in raw.data and hidden % num_heads):
        raw.fail("num_attention_heads", f"{num_heads} heads cannot share a hidden size of {hidden} evenly")
    # Newer files keep rotary settings together under rope_parameters.
    rope = raw.data.get("rope_parameters") or {}
    scaling = raw.data.get("rope_scaling") or rope or None
    if not isinstance(rope, dict) or not isinstance(scaling, dict | None):
        raw.fail("rope_scaling", "is not a table")
    theta = _Config(rope).real("rope_theta") if "rope_theta" in rope else raw.real("rope_theta", 10000.0)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    bias = raw.flag("attention_bias", architecture == "qwen2")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=raw.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.integer("intermediate_size"),
        num_layers=raw.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=raw.integer("num_key_value_heads", num_heads),
        head_dim=raw.integer("head_dim", hidden // num_heads),
        max_position=max_position,
        rms_norm_eps=raw.real("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_style="half",
        tie_word_embeddings="lm_head.weight" not in shapes,
        bos_token_id=raw.integer("bos_token_id") if raw.data.get("bos_token_id") is not None else None,
        eos_token_ids=eos,
        rope_scaling=None if kind == "default" else scaling,
        attention_bias=bias,
        name=name,
    )
    names = {
        "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
        "max_position": "max_position_embeddings", "eos_token_ids": "eos_token_id",
    }  # fmt: skip
    check_config(config, "config.json", names)
    if not raw.flag("tie_word_embeddings", False) and "lm_head.weight" not in shapes and raw.data.get("tie_word_embeddings") is False:
        raw.fail("tie_word_embeddings", "is false, but lm_head.weight is missing")
    return config
