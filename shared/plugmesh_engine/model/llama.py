"""The Llama family: RMS norm, rotary positions, grouped-query attention, SwiGLU.

Architecture: Touvron et al., arXiv:2302.13971; rotary positions: Su et al., arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from plugmesh.types import ModelConfig
from plugmesh_engine.executors.ragged import Batch
from plugmesh_engine.model import rope
from plugmesh_engine.model.linear import FloatFormat
from plugmesh_engine.seams import AttentionBackend, WeightFormat


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer; matrices are (out, in)."""

    input_norm: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor | None
    v_bias: torch.Tensor | None
    o_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class Llama:
    """The graph, without state of its own: KV lives behind the attention backend.

    Args:
        tensors: Hugging Face names to tensors, all of one dtype and device. Not copied. Where `format` is replaced, matrices may be whatever it multiplies by.
        device: Of the embedding where `embed` is replaced.

    Attributes:
        format: Multiplies by the matrices.
        embed: (T, hidden) of token ids (T,).
        before_layer: Called with the number of each layer before it is computed, and with the number of layers before the head.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Any], device: torch.device | None = None) -> None:
        self.config = config
        self.format: WeightFormat = FloatFormat()
        self.before_layer: Callable[[int], None] | None = None
        self.embedding = tensors.get("model.embed_tokens.weight")  # None where `embed` is replaced
        self.embed: Callable[[torch.Tensor], torch.Tensor] = self._embed
        self.norm = tensors["model.norm.weight"]
        self.head = self.embedding if config.tie_word_embeddings and "lm_head.weight" not in tensors else tensors["lm_head.weight"]
        self.layers = [self._layer(tensors, f"model.layers.{i}.") for i in range(config.num_layers)]
        self._cos, self._sin = rope_tables(config, device or self.norm.device)

    @staticmethod
    def _layer(tensors: Mapping[str, torch.Tensor], prefix: str) -> Layer:
        def linear(name: str) -> torch.Tensor:
            return tensors[f"{prefix}{name}.weight"]

        def bias(name: str) -> torch.Tensor | None:
            return tensors.get(f"{prefix}{name}.bias")

        return Layer(
            input_norm=linear("input_layernorm"),
            q=linear("self_attn.q_proj"), k=linear("self_attn.k_proj"), v=linear("self_attn.v_proj"), o=linear("self_attn.o_proj"),
            q_bias=bias("self_attn.q_proj"), k_bias=bias("self_attn.k_proj"), v_bias=bias("self_attn.v_proj"), o_bias=bias("self_attn.o_proj"),
            mlp_norm=linear("post_attention_layernorm"),
            gate=linear("mlp.gate_proj"), up=linear("mlp.up_proj"), down=linear("mlp.down_proj"),
        )  # fmt: skip

    def hidden(
        self, batch: Batch, attention: AttentionBackend, tapped: Container[int] = (), seen: dict[int, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """(T, hidden) after the last layer, before the final norm. Writes KV through `attention`.

        Args:
            tapped: Layers whose input is to be kept in `seen`; the number of layers for the result itself.
        """
        attention.plan(batch)
        x = self.embed(batch.token_ids)
        for i in range(len(self.layers)):
            if seen is not None and i in tapped:
                seen[i] = x
            x = self._run_layer(x, batch, attention, i)
        if seen is not None and len(self.layers) in tapped:
            seen[len(self.layers)] = x
        return x

    def queries_and_keys(self, batch: Batch, attention: AttentionBackend, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """q (T, heads, head_dim) and k (T, kv_heads, head_dim) of one layer after RoPE; runs those before it, which writes their KV."""
        attention.plan(batch)
        x = self.embed(batch.token_ids)
        for i in range(layer):
            x = self._run_layer(x, batch, attention, i)
        q, k, _ = self._qkv(x, batch, layer)
        return q, k

    def _qkv(self, x: torch.Tensor, batch: Batch, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.before_layer is not None:
            self.before_layer(layer)
        c, linear, w, num_rows = self.config, self.format.linear, self.layers[layer], x.shape[0]
        cos, sin = self._cos[batch.positions][:, None], self._sin[batch.positions][:, None]
        h = self.format.prepare_input(F.rms_norm(x, (c.hidden_size,), w.input_norm, c.rms_norm_eps))
        q = linear(h, w.q, w.q_bias).view(num_rows, c.num_heads, c.head_dim)
        k = linear(h, w.k, w.k_bias).view(num_rows, c.num_kv_heads, c.head_dim)
        v = linear(h, w.v, w.v_bias).view(num_rows, c.num_kv_heads, c.head_dim)
        qk = rotate(torch.cat((q, k), dim=1), cos, sin, c.rope_style)
        return qk[:, : c.num_heads], qk[:, c.num_heads :], v

    def _run_layer(self, x: torch.Tensor, batch: Batch, attention: AttentionBackend, layer: int) -> torch.Tensor:
        c, linear, prepare, w = self.config, self.format.linear, self.format.prepare_input, self.layers[layer]
        a = attention.run(*self._qkv(x, batch, layer), layer)
        x = x + linear(prepare(a.reshape(x.shape[0], -1)), w.o, w.o_bias)
        h = prepare(F.rms_norm(x, (c.hidden_size,), w.mlp_norm, c.rms_norm_eps))
        return x + linear(prepare(F.silu(linear(h, w.gate)) * linear(h, w.up)), w.down)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        assert self.embedding is not None
        return F.embedding(token_ids, self.embedding)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(R, vocab) float32 for rows of `hidden`."""
        if self.before_layer is not None:
            self.before_layer(self.config.num_layers)
        h = F.rms_norm(x, (self.config.hidden_size,), self.norm, self.config.rms_norm_eps)
        return self.format.linear(self.format.prepare_input(h), self.head).float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
    """Turns each pair of x (T, heads, head_dim) by its position's angle; cos and sin are (T, 1, head_dim / 2) float32."""
    if style == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def rope_tables(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`plugmesh_engine.model.rope.rope_tables` as tensors on the device."""
    cos, sin = rope.rope_tables(config)
    return torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device)
