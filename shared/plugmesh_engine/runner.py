"""Runs a batch on the device: the only place that touches the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from plugmesh_engine.attention import TorchAttention
from plugmesh_engine.batch import Batch, Rows
from plugmesh_engine.kv.pool import BlockPool
from plugmesh_engine.seams import AttentionBackend
from plugmesh_engine.weights import LoadedModel


class Runner:
    """Lays out the rows of a step, runs the layers, and gives the logits of the rows that are sampled."""

    def __init__(self, model: LoadedModel, pool: BlockPool, attention: AttentionBackend | None = None) -> None:
        self._graph = model.graph
        self._device = torch.device(model.device)
        self._attention = attention or TorchAttention(pool.storage, model.config.num_heads)

    def run(self, rows: Sequence[Rows]) -> torch.Tensor:
        """(R, vocab) float32 logits, one row per entry of `rows` with `logits` set, in order. Writes the KV of all rows."""
        with torch.inference_mode():
            batch = Batch.build(rows, self._device)
            hidden = self._graph.hidden(batch, self._attention)
            if not len(batch.logit_rows):
                return torch.empty(0, self._graph.config.vocab_size, device=self._device)
            return self._graph.logits(hidden.index_select(0, batch.logit_rows))
