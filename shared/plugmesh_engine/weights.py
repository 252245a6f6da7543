"""Turns a weightstore manifest into a model whose weights are the pages of the stored files."""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from plugmesh.errors import ConfigError, DataLoss, FailedPrecondition
from plugmesh.types import ModelConfig
from plugmesh_engine.model.llama import Llama

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ARCHITECTURES = {"llama": Llama}


class TensorLike(Protocol):
    """One entry of a manifest: `num_bytes` of `dtype` at `offset` of the file `path`, C order."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def path(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class ManifestLike(Protocol):
    """The fields of `plugmesh_proto.v1.weightstore_pb2.ModelManifest` that the engine reads."""

    @property
    def version(self) -> str: ...
    @property
    def config_json(self) -> str: ...
    @property
    def tensors(self) -> Sequence[TensorLike]: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        version: Names the weights; KV of different versions never mixes.
        num_mapped_bytes, num_copied_bytes: Weights that share the file's pages, and those that had to be converted or moved.
    """

    graph: Llama
    config: ModelConfig
    version: str
    dtype: str
    device: str
    num_mapped_bytes: int
    num_copied_bytes: int


def load_model(manifest: ManifestLike, dtype: str, device: str = "cpu") -> LoadedModel:
    """Maps the tensors read only and builds the graph over them.

    A tensor stored as `dtype` is mapped, so that processes on one host share its pages; a float tensor of another dtype is converted, which copies it.

    Raises:
        FailedPrecondition: A tensor is not stored as floats; the weightstore packs it when asked for a float format.
        DataLoss: A file is shorter than the manifest says, or a tensor is missing or has the wrong shape.
        ConfigError: Unknown dtype, architecture or rope scaling.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"the engine computes in float32 or bfloat16, not {dtype!r}")
    config = ModelConfig.from_json(manifest.config_json)
    if config.architecture not in ARCHITECTURES:
        raise ConfigError(f"no model family for architecture {config.architecture!r}; known: {', '.join(sorted(ARCHITECTURES))}")
    files: dict[str, mmap.mmap] = {}
    tensors: dict[str, torch.Tensor] = {}
    mapped = copied = 0
    for entry in manifest.tensors:
        raw = _map(entry, files)
        tensor = raw.to(device=device, dtype=DTYPES[dtype])
        if tensor.data_ptr() == raw.data_ptr():
            mapped += entry.num_bytes
        else:
            copied += tensor.numel() * tensor.element_size()
        tensors[entry.name] = tensor
    _check_shapes(config, tensors)
    graph = ARCHITECTURES[config.architecture](config, tensors)
    return LoadedModel(graph, config, manifest.version, dtype, device, mapped, copied)


def _map(entry: TensorLike, files: dict[str, mmap.mmap]) -> torch.Tensor:
    """The tensor over the file's pages. The mapping lives as long as a tensor uses it."""
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise FailedPrecondition(f"tensor {entry.name} is stored as {entry.dtype}; resolve the model as float32 or bfloat16", param="format")
    shape = tuple(int(n) for n in entry.shape)
    if math.prod(shape) * dtype.itemsize != entry.num_bytes:
        raise DataLoss(f"tensor {entry.name}: {entry.num_bytes} bytes do not hold {shape} of {entry.dtype}")
    if entry.path not in files:
        with open(entry.path, "rb") as f:
            files[entry.path] = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
    data = files[entry.path]
    if entry.offset < 0 or entry.offset + entry.num_bytes > len(data):
        raise DataLoss(f"tensor {entry.name} ends at byte {entry.offset + entry.num_bytes} of a file of {len(data)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nor is it meant to be
        return torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=entry.offset).view(shape)


def _check_shapes(c: ModelConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Every tensor that the graph reads is there in the right shape."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    wanted: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
    }
    if not c.tie_word_embeddings:
        wanted["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    for i in range(c.num_layers):
        p = f"model.layers.{i}."
        wanted |= {
            f"{p}input_layernorm.weight": (c.hidden_size,),
            f"{p}post_attention_layernorm.weight": (c.hidden_size,),
            f"{p}self_attn.q_proj.weight": (q, c.hidden_size),
            f"{p}self_attn.k_proj.weight": (kv, c.hidden_size),
            f"{p}self_attn.v_proj.weight": (kv, c.hidden_size),
            f"{p}self_attn.o_proj.weight": (c.hidden_size, q),
            f"{p}mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
            f"{p}mlp.up_proj.weight": (c.intermediate_size, c.hidden_size),
            f"{p}mlp.down_proj.weight": (c.hidden_size, c.intermediate_size),
        }
        if c.attention_bias:
            wanted |= {f"{p}self_attn.{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
    for name, shape in wanted.items():
        if name not in tensors:
            raise DataLoss(f"the manifest lacks tensor {name}")
        if tuple(tensors[name].shape) != shape:
            raise DataLoss(f"tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
