"""The rows of one step as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from plugmesh.types import BLOCK_TOKENS
from plugmesh_engine.batch import Rows


@dataclass(frozen=True, slots=True)
class Batch:
    """A ragged batch: all rows of all sequences after one another.

    Attributes:
        rows: Per sequence.
        starts: First row of each sequence, and the total at the end.
        token_ids, positions: (T,) int64 on the device.
        blocks, offsets: (T,) int64 on the device: where each row's K and V go.
        wanted_rows: (R,) int64 on the device: rows that give an output.
    """

    rows: tuple[Rows, ...]
    starts: tuple[int, ...]
    token_ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    wanted_rows: torch.Tensor

    @classmethod
    def build(cls, rows: Sequence[Rows], device: torch.device) -> Batch:
        """Lays the sequences out in the given order."""
        starts = [0]
        ids: list[int] = []
        positions: list[np.ndarray] = []
        blocks: list[np.ndarray] = []
        wanted: list[int] = []
        for r in rows:
            n = len(r.token_ids)
            p = np.arange(r.num_computed, r.num_computed + n, dtype=np.int64)
            ids.extend(r.token_ids)
            positions.append(p)
            blocks.append(np.asarray(r.blocks, dtype=np.int64)[p // BLOCK_TOKENS])
            starts.append(starts[-1] + n)
            wanted.extend(range(starts[-1] - r.num_wanted, starts[-1]))
        where = np.concatenate(positions)

        def put(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(device)

        return cls(
            rows=tuple(rows), starts=tuple(starts), token_ids=put(np.asarray(ids, dtype=np.int64)), positions=put(where),
            blocks=put(np.concatenate(blocks)), offsets=put(where % BLOCK_TOKENS), wanted_rows=put(np.asarray(wanted, dtype=np.int64)),
        )  # fmt: skip
