"""The best token of each row of logits, on the device, so that (R, vocab) floats need not travel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PIECE = 4096  # logits per program: 12 programs per row of SmolLM2's vocabulary


@triton.jit
def _piece_max(logits, values, indices, n, PIECE: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits + row * n + i, mask=i < n, other=float("-inf")).to(tl.float32)
    best = tl.max(x, 0)
    # The first of equals; a NaN is unequal to itself, and its mark is kept apart because `max` may step over it.
    first = tl.min(tl.where((x == best) & (i < n), i, n), 0)
    broken = tl.max((x != x).to(tl.int32), 0)
    at = row * tl.num_programs(1) + piece
    tl.store(values + at, tl.where(broken > 0, float("nan"), best))
    tl.store(indices + at, first)


@triton.jit
def _merge_pieces(values, indices, out, pieces, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(values + row * pieces + i, mask=i < pieces, other=float("-inf"))
    at = tl.load(indices + row * pieces + i, mask=i < pieces, other=n)
    best = tl.max(x, 0)
    broken = tl.max((x != x).to(tl.int32), 0)
    first = tl.min(tl.where(x == best, at, n), 0)
    finite = (broken == 0) & (best < float("inf")) & (best > float("-inf"))
    tl.store(out + row, tl.where(finite, first, -1))


def argmax(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """(R,) int32: index of the largest of each row of (R, N), the first of equals; -1 where the maximum is not finite or a NaN is among them."""
    num_rows, n = logits.shape
    assert logits.is_contiguous()
    best = torch.empty(num_rows, dtype=torch.int32, device=logits.device) if out is None else out
    if num_rows:
        pieces = triton.cdiv(n, PIECE)
        values = torch.empty(num_rows, pieces, dtype=torch.float32, device=logits.device)
        indices = torch.empty(num_rows, pieces, dtype=torch.int32, device=logits.device)
        _piece_max[(num_rows, pieces)](logits, values, indices, n, PIECE=PIECE, num_warps=8)
        _merge_pieces[(num_rows,)](values, indices, best, pieces, n, BLOCK=triton.next_power_of_2(pieces), num_warps=1)
    return best


def argmax_reference(logits: torch.Tensor) -> torch.Tensor:
    found = []
    for row in logits.float():
        best = row.max()
        found.append(int((row == best).nonzero()[0]) if bool(torch.isfinite(best)) and not bool(row.isnan().any()) else -1)
    return torch.tensor(found, dtype=torch.int32, device=logits.device)
