"""A run's base model: weights in float32 and the tokenizer's files of any model that the weightstore can import."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from plugmesh import models
from plugmesh.errors import ConfigError
from plugmesh.types import ModelConfig
from plugmesh_rollout.loop.text import ChatText, chat_text

_TOKENIZER, _CONFIG = "tokenizer", "base.json"  # below a run's folder


@dataclass(frozen=True, slots=True)
class Base:
    """`tensors` float32 under their Hugging Face names; `assets` the tokenizer's files by name."""

    config: ModelConfig
    tensors: Mapping[str, np.ndarray]
    assets: Mapping[str, bytes]


def read_base(name: str, *, max_position: int = 0) -> Base:
    """A model of this machine, dequantised. Blocks for some seconds.

    The weightstore's own code reads it, in a process of its own (services do not import one another), with a store that is gone afterwards.

    Args:
        name: As for `plugmesh.models.find`.
        max_position: Shorter than the model's own context, which costs KV memory; 0 leaves that.

    Raises:
        ConfigError: No such model here, or one that cannot be imported.
    """
    path = models.find(name)
    if path is None:
        raise ConfigError(f"the base model {name!r} is not on this machine: plugmesh pull {name}")
    with tempfile.TemporaryDirectory(prefix="plugmesh-rl-") as store:
        command = [sys.executable, "-m", "plugmesh_weightstore.offline", "--model", str(path), "--format", "float32", "--store", store]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise ConfigError(f"the base model {name!r} cannot be read: {done.stderr.strip()[-300:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        config = ModelConfig.from_json(found["config_json"])
        if max_position:
            config = dataclasses.replace(config, max_position=min(config.max_position, max_position))
        tensors = {
            t["name"]: np.fromfile(t["path"], np.float32, t["num_bytes"] // 4, offset=t["offset"]).reshape(t["shape"]) for t in found["tensors"]
        }
        assets = {a["name"]: pathlib.Path(a["path"]).read_bytes()[: a["num_bytes"]] for a in found["assets"]}
    return Base(config, tensors, assets)


def keep_tokenizer(base: Base, folder: pathlib.Path) -> None:
    """Into a run's folder, for its workers."""
    (folder / _TOKENIZER).mkdir(parents=True, exist_ok=True)
    for name, data in base.assets.items():
        (folder / _TOKENIZER / name).write_bytes(data)
    (folder / _CONFIG).write_text(base.config.to_json())


def kept_text(folder: pathlib.Path, system: str) -> ChatText:
    """Of a folder that `keep_tokenizer` wrote to. Raises ConfigError or CorruptModelFile for a model that has no tokenizer or chat template known here."""
    if not (folder / _CONFIG).exists():
        raise ConfigError(f"{folder} holds no tokenizer; the run's first weights bring it")
    return chat_text(folder / _TOKENIZER, ModelConfig.from_json((folder / _CONFIG).read_text()), system)
