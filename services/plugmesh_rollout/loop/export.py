"""A run's model as a Hugging Face folder: for a mesh to begin with (`plugmesh up --model FOLDER`), and for other programs."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from plugmesh.errors import AlreadyExists, InvalidRequest, NotFound
from plugmesh.types import ModelConfig
from plugmesh_rollout.loop import tasks
from plugmesh_rollout.loop.folder import RunFolder
from plugmesh_rollout.loop.settings import Settings
from plugmesh_rollout.loop.synchronous import first_weights

_ARCHITECTURES = {"llama": "LlamaForCausalLM"}


def export_run(settings: Settings, folder: pathlib.Path, version: int | None = None) -> int:
    """Writes the weights of a version, by default the newest of the run; of a run that has not begun, those that it would begin with.

    Returns:
        The version.

    Raises:
        NotFound: The run keeps no such version.
        AlreadyExists, InvalidRequest: See `write_folder`.
    """
    run = RunFolder(settings.run.folder)
    kept = run.versions()
    if version is None:
        version = max(kept, default=0)
    if not kept and version == 0:
        run.save_weights(0, *first_weights(settings))
    elif version not in kept:
        raise NotFound(f"{run.root} has no weights of version {version}; it has {', '.join(map(str, kept)) or 'none'}")
    write_folder(folder, *run.load_weights(version))
    return version


def write_folder(folder: pathlib.Path, config: ModelConfig, tensors: dict[str, np.ndarray]) -> None:
    """Configuration, tensors in float32, and the tokenizer of the loop's own tasks, which puts a begin token before every text.

    Raises:
        AlreadyExists: The folder is not empty.
        InvalidRequest: A model with a tokenizer of its own, or whose rows of Q and K are in GGUF's order: it has a source elsewhere.
    """
    if config.vocab_size != tasks.VOCAB_SIZE or config.rope_style != "half" or config.architecture not in _ARCHITECTURES:
        raise InvalidRequest("only models that are trained from scratch on the loop's own tasks can be exported", param="model")
    if folder.exists() and any(folder.iterdir()):
        raise AlreadyExists(f"{folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            "architectures": [_ARCHITECTURES[config.architecture]], "model_type": config.architecture, "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
            "max_position_embeddings": config.max_position, "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta,
            "tie_word_embeddings": config.tie_word_embeddings, "attention_bias": config.attention_bias, "hidden_act": "silu", "torch_dtype": "float32",
            "bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids),
        },
        "generation_config.json": {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {
            "bos_token": _SPECIAL[tasks.BOS], "eos_token": _SPECIAL[tasks.EOS], "pad_token": _SPECIAL[tasks.PAD], "add_bos_token": True,
            "chat_template": "{{ messages[-1]['content'] }}",
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False))
    safetensors.numpy.save_file({n: np.ascontiguousarray(a, np.float32) for n, a in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


_SPECIAL = {tasks.PAD: "<pad>", tasks.BOS: "<bos>", tasks.EOS: "<eos>"}


def tokenizer() -> dict[str, Any]:
    """`tasks.encode` as a tokenizer.json: byte-level BPE that merges nothing. Characters that the vocabulary lacks disappear."""
    letters = {chr(b): chr(b) for b in range(0x21, 0x7F)} | {" ": "\u0120", "\n": "\u010a"}  # GPT-2's alphabet of bytes, where ours are
    vocab = _SPECIAL | {i: letters[tasks.decode([i])] for i in range(3, tasks.VOCAB_SIZE)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i, text in _SPECIAL.items()
        ],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "vocab": {text: i for i, text in vocab.items()}, "merges": []},
    }  # fmt: skip
