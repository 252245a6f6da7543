"""A Llama that can be trained: the tensors and names that `plugmesh_engine` reads, with gradients.

Architecture: Touvron et al., arXiv:2302.13971; grouped queries: Ainslie et al., arXiv:2305.13245; rotary positions: Su et al., arXiv:2104.09864.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from torch import nn

from plugmesh.errors import DataLoss
from plugmesh.types import ModelConfig
from plugmesh_engine.model.rope import rope_tables
from plugmesh_engine.weights import check_shapes, llama_shapes

TokenIds = Sequence[int] | np.ndarray


class LlamaForTraining(nn.Module):
    """float32 parameters under their Hugging Face names.

    Args:
        tensors: All tensors that `llama_shapes` names; copied.

    Raises:
        DataLoss: A tensor is missing or has another shape.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        check_shapes(config, {name: tuple(t.shape) for name, t in tensors.items()})
        self.config = config
        self._names = list(llama_shapes(config))
        for name in self._names:  # a module's names have no dots
            self.register_parameter(_attribute(name), nn.Parameter(torch.tensor(np.asarray(tensors[name], np.float32))))
        cos, sin = rope_tables(config)
        self.register_buffer("cos", torch.from_numpy(cos), persistent=False)
        self.register_buffer("sin", torch.from_numpy(sin), persistent=False)

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of all tensors by Hugging Face name."""
        return {name: self._weight(name).detach().numpy().copy() for name in self._names}

    def load_arrays(self, tensors: Mapping[str, np.ndarray]) -> None:
        """In place, so that an optimizer keeps its parameters."""
        with torch.no_grad():
            for name in self._names:
                self._weight(name).copy_(torch.from_numpy(np.asarray(tensors[name], np.float32)))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits (R, T, vocab) of token ids (R, T); each row attends to its own earlier tokens, so what fills a row up on the right does no harm."""
        return self.logits(self.hidden(token_ids))

    def hidden(self, token_ids: torch.Tensor, positions: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What `logits` reads, (R, T, hidden).

        Args:
            positions: (R, T) of the tokens; without them 0 to T - 1.
            mask: (R, 1, T, T), which tokens (last axis) a token attends to; without it, itself and all before it.
        """
        c = self.config
        turn = (self.cos[: token_ids.shape[1], None], self.sin[: token_ids.shape[1], None])
        if positions is not None:
            turn = (self.cos[positions][:, :, None], self.sin[positions][:, :, None])
        x = F.embedding(token_ids, self._weight("model.embed_tokens.weight"))
        for i in range(c.num_layers):
            p = f"model.layers.{i}."
            x = x + self._attention(F.rms_norm(x, (c.hidden_size,), self._weight(p + "input_layernorm.weight"), c.rms_norm_eps), p + "self_attn.", turn, mask)
            h = F.rms_norm(x, (c.hidden_size,), self._weight(p + "post_attention_layernorm.weight"), c.rms_norm_eps)
            gated = F.silu(self._linear(h, p + "mlp.gate_proj")) * self._linear(h, p + "mlp.up_proj")
            x = x + self._linear(gated, p + "mlp.down_proj")
        return F.rms_norm(x, (c.hidden_size,), self._weight("model.norm.weight"), c.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., vocab) of (..., hidden): apart, so that a head over a large vocabulary can be spared where nobody reads it."""
        return self._linear(hidden, "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head")

    def _attention(self, x: torch.Tensor, p: str, turn: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        c, (rows, length, _) = self.config, x.shape
        q = self._rotate(self._linear(x, p + "q_proj").view(rows, length, c.num_heads, c.head_dim), turn)
        k = self._rotate(self._linear(x, p + "k_proj").view(rows, length, c.num_kv_heads, c.head_dim), turn)
        v = self._linear(x, p + "v_proj").view(rows, length, c.num_kv_heads, c.head_dim)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None, enable_gqa=c.num_heads != c.num_kv_heads
        )
        return self._linear(out.transpose(1, 2).reshape(rows, length, -1), p + "o_proj")

    def _rotate(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x (R, T, heads, head_dim)."""
        (cos, sin), half = turn, self.config.head_dim // 2
        if self.config.rope_style == "interleaved":
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = name + ".bias"
        return F.linear(x, self._weight(name + ".weight"), self._weight(bias) if self.config.attention_bias and bias in self._names else None)

    def _weight(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = getattr(self, _attribute(name))
        return tensor


def _attribute(name: str) -> str:
    return name.replace(".", "__")


def token_logprobs(
    model: LlamaForTraining, rows: Sequence[tuple[TokenIds, TokenIds]], *, share_prompts: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (R, longest response) of responses under the model, zero where a shorter one is filled up, and the mask (same shape) of what is not filling.

    Args:
        rows: Prompt and response of each; prompts are not empty.
        share_prompts: Rows of one prompt make one sequence, in which every response attends to the prompt and to itself: the prompt is computed once.
    """
    packs = _packs(rows, share_prompts)
    width = max(len(prompt) + sum(max(0, len(rows[i][1]) - 1) for i in members) for prompt, members in packs)
    longest = max(1, max(len(r) for _, r in rows))
    ids, positions = (np.zeros((len(packs), width), np.int64) for _ in range(2))
    part = np.full((len(packs), width), -1, np.int64)  # 0 the prompt, i + 1 the i-th response
    mask = np.zeros((len(rows), longest), bool)
    wanted: list[tuple[int, int, int, int]] = []  # row and token, where it is told (within all packs), which it is
    for k, (prompt, members) in enumerate(packs):
        end = len(prompt)
        ids[k, :end], positions[k, :end], part[k, :end] = prompt, np.arange(end), 0
        for n, i in enumerate(members):
            response = rows[i][1]
            mask[i, : len(response)] = True
            # A token's probability is told by the one before it; the last one tells of nothing that is wanted.
            wanted += [(i, j, k * width + (end + j - 1 if j else len(prompt) - 1), int(t)) for j, t in enumerate(response)]
            if (more := len(response) - 1) > 0:
                at = slice(end, end + more)
                ids[k, at], positions[k, at], part[k, at] = response[:-1], len(prompt) + np.arange(more), n + 1
                end += more
    found = torch.zeros(mask.shape)
    if not wanted:
        return found.requires_grad_(torch.is_grad_enabled()), torch.from_numpy(mask)
    row, token, told, target = (torch.tensor(column) for column in zip(*wanted, strict=True))
    if any(len(members) > 1 for _, members in packs):
        hidden = model.hidden(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(_attends(part)))
    else:
        hidden = model.hidden(torch.from_numpy(ids))
    logits = model.logits(hidden.flatten(0, 1).index_select(0, told))
    logprobs = -F.cross_entropy(logits, target, reduction="none")
    return found.index_put((row, token), logprobs), torch.from_numpy(mask)


def _packs(rows: Sequence[tuple[TokenIds, TokenIds]], share_prompts: bool) -> list[tuple[TokenIds, list[int]]]:
    """Prompts, each with the rows that have it."""
    if not share_prompts:
        return [(prompt, [i]) for i, (prompt, _) in enumerate(rows)]
    packs: dict[bytes, tuple[TokenIds, list[int]]] = {}
    for i, (prompt, _) in enumerate(rows):
        packs.setdefault(np.asarray(prompt, np.int64).tobytes(), (prompt, []))[1].append(i)
    return list(packs.values())


def _attends(part: np.ndarray) -> np.ndarray:
    """(R, 1, T, T) out of parts (R, T): to the prompt and the own part, as far as they come before. What fills up attends to something, too, or it would be NaN."""
    ask, told = part[:, :, None], part[:, None, :]
    mask: np.ndarray = np.tril(np.ones((part.shape[1],) * 2, bool)) & ((told == 0) | (ask == told))
    return mask[:, None]


def fresh_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """To train from scratch: normal with deviation 0.02, smaller where layers add to the stream (Radford et al., 2019); norms are one."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for name, shape in llama_shapes(config).items():
        if name.endswith("norm.weight"):
            weights[name] = np.ones(shape, np.float32)
        elif name.endswith(".bias"):
            weights[name] = np.zeros(shape, np.float32)
        else:
            scale = 0.02 / math.sqrt(2 * config.num_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            weights[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
    return weights


def save_weights(path: pathlib.Path, config: ModelConfig, tensors: Mapping[str, np.ndarray], **facts: str) -> None:
    """One safetensors file with the configuration in its header; there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    safetensors.numpy.save_file(dict(tensors), part, {"config": config.to_json(), **facts})
    part.replace(path)


def load_weights(path: pathlib.Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Inverse of `save_weights`. Raises DataLoss for a file that is damaged or not one of these."""
    try:
        with path.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        return ModelConfig.from_json(header["__metadata__"]["config"]), safetensors.numpy.load_file(path)
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as e:
        raise DataLoss(f"{path.name} holds no weights of a run: {type(e).__name__}") from e
