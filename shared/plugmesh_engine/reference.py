"""The slow, obvious Llama: float32, whole sequence every time, no cache, loops over heads, complex-number rotation.

Written on its own, against the papers and not against `model.llama`, for checking everything else. Shares no code with the engine but `ModelConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from plugmesh.types import ModelConfig

Array = np.ndarray


class ReferenceLlama:
    """Logits by the textbook.

    Args:
        weights: Hugging Face names to float32 arrays.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array]) -> None:
        self.config = config
        self.w = {k: np.asarray(v, dtype=np.float32) for k, v in weights.items()}

    def hidden(self, token_ids: Sequence[int]) -> Array:
        """(T, hidden) after the final norm."""
        return self._norm(self.stream(token_ids, self.config.num_layers), "model.norm.weight")

    def stream(self, token_ids: Sequence[int], layer: int) -> Array:
        """(T, hidden) as it enters a layer; the number of layers for what leaves the last one."""
        x = self.w["model.embed_tokens.weight"][list(token_ids)]
        for i in range(layer):
            p = f"model.layers.{i}."
            x = x + self._attention(self._norm(x, p + "input_layernorm.weight"), p + "self_attn.")
            h = self._norm(x, p + "post_attention_layernorm.weight")
            gate, up = h @ self.w[p + "mlp.gate_proj.weight"].T, h @ self.w[p + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[p + "mlp.down_proj.weight"].T
        return x

    def queries_and_keys(self, token_ids: Sequence[int], layer: int) -> tuple[Array, Array]:
        """(T, heads, head_dim) and (T, kv_heads, head_dim) of a layer after the rotation."""
        c, p = self.config, f"model.layers.{layer}."
        x = self._norm(self.stream(token_ids, layer), p + "input_layernorm.weight")
        q = self._project(x, p + "self_attn.q_proj").reshape(len(x), c.num_heads, c.head_dim)
        k = self._project(x, p + "self_attn.k_proj").reshape(len(x), c.num_kv_heads, c.head_dim)
        return np.stack([self._rotate(q[:, i]) for i in range(c.num_heads)], 1), np.stack([self._rotate(k[:, i]) for i in range(c.num_kv_heads)], 1)

    def logits(self, token_ids: Sequence[int]) -> Array:
        """(T, vocab)."""
        return self.hidden(token_ids) @ self._head().T

    def next_logits(self, token_ids: Sequence[int]) -> Array:
        """(vocab,) after the last token."""
        return self._head() @ self.hidden(token_ids)[-1]

    def greedy(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The most likely continuation, token by token, each from the whole sequence."""
        tokens = list(token_ids)
        for _ in range(num_tokens):
            tokens.append(int(self.next_logits(tokens).argmax()))
        return tokens[len(token_ids) :]

    def perplexity(self, token_ids: Sequence[int]) -> float:
        """exp of the mean negative log-likelihood of every token but the first."""
        logits = self.logits(token_ids).astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        logp = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return math.exp(-np.mean([logp[i, t] for i, t in enumerate(token_ids[1:])]))

    def _head(self) -> Array:
        return self.w["model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"]

    def _norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(self.config.rms_norm_eps)) * self.w[name]

    def _project(self, x: Array, name: str) -> Array:
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def _attention(self, x: Array, p: str) -> Array:
        c, n = self.config, len(x)
        q = self._project(x, p + "q_proj").reshape(n, c.num_heads, c.head_dim)
        k = self._project(x, p + "k_proj").reshape(n, c.num_kv_heads, c.head_dim)
        v = self._project(x, p + "v_proj").reshape(n, c.num_kv_heads, c.head_dim)
        out = np.zeros_like(q)
        for head in range(c.num_heads):
            kv_head = head * c.num_kv_heads // c.num_heads
            qh, kh = self._rotate(q[:, head]), self._rotate(k[:, kv_head])
            scores = qh @ kh.T / np.float32(math.sqrt(c.head_dim))
            scores[np.triu_indices(n, 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, kv_head]
        return self._project(out.reshape(n, -1), p + "o_proj")

    def _rotate(self, x: Array) -> Array:
        """Each pair is a complex number that is turned by position * theta ** (-2 i / head_dim)."""
        half = self.config.head_dim // 2
        pairs = x[:, 0::2] + 1j * x[:, 1::2] if self.config.rope_style == "interleaved" else x[:, :half] + 1j * x[:, half:]
        angles = np.outer(np.arange(len(x)), self.config.rope_theta ** (-2.0 * np.arange(half) / self.config.head_dim))
        turned = pairs * np.exp(1j * angles)
        out = np.empty_like(x)
        if self.config.rope_style == "interleaved":
            out[:, 0::2], out[:, 1::2] = turned.real, turned.imag
        else:
            out[:, :half], out[:, half:] = turned.real, turned.imag
        return out
