"""From a weightstore manifest to a model, by whichever executor the engine is set to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plugmesh.errors import ConfigError, DataLoss
from plugmesh.records import WeightFormatRecord
from plugmesh.types import ModelConfig
from plugmesh_engine.config import EngineConfig, resolve_executor
from plugmesh_engine.engine import Engine
from plugmesh_engine.foreign import check_format
from plugmesh_engine.plugins import EnginePlugins
from plugmesh_engine.seams import ManifestLike, Model


def load_model(manifest: ManifestLike, config: EngineConfig, weight_format: WeightFormatRecord | None = None) -> Model:
    """Maps the weights for the executor that `config` names.

    With "auto" a manifest of plain floats is left to torch.

    Args:
        weight_format: The plugin's format that the manifest is in; None for one of the core's.

    Raises:
        FailedPrecondition: The manifest's format is not the given one, or none that the executor reads; the weightstore packs the model when asked for
            `config.weight_format` or the record's name.
        PluginError: The format could not be loaded.
        DataLoss: A file is shorter than the manifest says, or a tensor is missing or has the wrong shape.
        ConfigError: Unknown executor, dtype, architecture or rope scaling.
    """
    check_format(manifest, weight_format)
    name = resolve_executor(config, ModelConfig.from_json(manifest.config_json).architecture)
    if config.executor == "auto" and manifest.format != "native" and weight_format is None:
        name = "torch"
    if name == "native":
        from plugmesh_engine.executors import native

        return native.load(manifest, weight_format=weight_format)
    if name == "cuda":
        from plugmesh_engine.executors import cuda

        if weight_format is not None:
            raise ConfigError(f"the cuda executor reads the core's formats; {weight_format.name!r} works under native and torch")
        return cuda.load(manifest, config)
    from plugmesh_engine.executors import torch as torch_executor

    return torch_executor.load(manifest, config.dtype, config.device, weight_format=weight_format)


def build_engine(
    manifest: ManifestLike, config: EngineConfig, plugins: EnginePlugins | None = None, *, scheduler: Any = None, drafts: Any = None
) -> Engine:
    """The model of a manifest and an engine on it; for how they fail see `load_model` and `Engine`. Blocks for as long as the weights take to map.

    Args:
        scheduler, drafts: In place of those in `plugins`.
    """
    plugins = plugins or EnginePlugins()

    def first(own: Any, of_plugins: Any) -> Any:
        return of_plugins if own is None else own

    model = load_model(manifest, config, plugins.weight_format)
    return Engine(
        model, config, scheduler=first(scheduler, plugins.scheduler), drafts=first(drafts, plugins.drafts), kv_codec=plugins.kv_codec,
        prompt_filter=plugins.prompt_filter,
    )  # fmt: skip


def check_shapes(c: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor that a Llama reads is among `found` in the right shape. Raises DataLoss naming the first that is not."""
    for name, shape in llama_shapes(c).items():
        if name not in found:
            raise DataLoss(f"the manifest lacks tensor {name}")
        if found[name] != shape:
            raise DataLoss(f"tensor {name} has shape {found[name]}, expected {shape}")


def llama_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and (out, in) shapes of a Llama's tensors."""
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
    return wanted
