"""Chooses the next token of every row, repeatably: what a row gets depends on its own logits, parameters, seed and position only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from plugmesh.types import SamplingParams, TokenInfo

_CANDIDATES = 1024  # sorted before a full sort is tried; nearly every top-p lies within


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the sampler must know of one row.

    Attributes:
        seed, sequence, position: Name the random number; position counts generated tokens.
        prompt_ids: Distinct tokens of the prompt, int64; read for the repetition penalty only.
        counts: Generated tokens and how often each occurred; read for the penalties only.
        end_ids: Tokens that end the sequence, forbidden before `min_tokens`.
    """

    params: SamplingParams
    seed: int
    sequence: int
    position: int
    prompt_ids: np.ndarray
    counts: Mapping[int, int]
    end_ids: Sequence[int]


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[TokenInfo | None]:
    """One token per row, in the order that `plugmesh.types.SamplingParams` documents.

    Tokens whose logits tie with the last one that top-k or top-p lets in are let in too, so that a result never depends on the order of a sort.

    Args:
        logits: (R, vocab) float32; changed in place.

    Returns:
        None for a row without a finite maximum (NaN or infinity in the model's output).
    """
    finite = torch.isfinite(logits.amax(dim=1))
    ok = finite.tolist()
    if not all(ok):
        logits[~finite] = 0.0
    _bias(logits, rows)
    _penalise(logits, rows)
    _forbid_early_end(logits, rows)
    chosen = _choose(logits, rows)
    infos = _infos(logits, rows, chosen)
    return [info if good else None for info, good in zip(infos, ok, strict=True)]


def uniforms(seeds: Sequence[int], sequences: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) per (seed, sequence, position), without state.

    The three are absorbed one after another with the finaliser of SplitMix64 (Steele et al., OOPSLA 2014); the upper 53 bits give the number.
    """
    with np.errstate(over="ignore"):
        h = np.zeros(len(seeds), dtype=np.uint64)
        for part in (seeds, sequences, positions):
            words = np.array([int(v) & 0xFFFFFFFFFFFFFFFF for v in part], dtype=np.uint64)
            h = (h ^ words) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return (h >> np.uint64(11)).astype(np.float64) * 2.0**-53


def needs_counts(params: SamplingParams) -> bool:
    """Whether a request uses a penalty."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _flat(logits: torch.Tensor, row_of: list[np.ndarray], ids: list[np.ndarray], *values: list[np.ndarray]) -> tuple[torch.Tensor, ...]:
    arrays = [np.concatenate(row_of), np.concatenate(ids), *(np.concatenate(v).astype(np.float32) for v in values)]
    return tuple(torch.from_numpy(a).to(logits.device) for a in arrays)


def _bias(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    row_of, ids, bias = [], [], []
    for i, r in enumerate(rows):
        if r.params.logit_bias:
            n = len(r.params.logit_bias)
            row_of.append(np.full(n, i, dtype=np.int64))
            ids.append(np.fromiter(r.params.logit_bias.keys(), dtype=np.int64, count=n))
            bias.append(np.fromiter(r.params.logit_bias.values(), dtype=np.float64, count=n))
    if row_of:
        at, token, value = _flat(logits, row_of, ids, bias)
        logits[at, token] += value


def _penalise(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Repetition over prompt and output (divides positive logits, multiplies negative ones; CTRL, arXiv:1909.05858), then presence and frequency over the output."""
    row_of, ids, factor = [], [], []
    for i, r in enumerate(rows):
        if r.params.repetition_penalty != 1.0:
            seen = np.union1d(r.prompt_ids, np.fromiter(r.counts.keys(), dtype=np.int64, count=len(r.counts)))
            row_of.append(np.full(len(seen), i, dtype=np.int64))
            ids.append(seen)
            factor.append(np.full(len(seen), r.params.repetition_penalty))
    if row_of:
        at, token, f = _flat(logits, row_of, ids, factor)
        old = logits[at, token]
        logits[at, token] = torch.where(old > 0, old / f, old * f)
    row_of, ids, less = [], [], []
    for i, r in enumerate(rows):
        p = r.params
        if r.counts and (p.presence_penalty or p.frequency_penalty):
            n = len(r.counts)
            row_of.append(np.full(n, i, dtype=np.int64))
            ids.append(np.fromiter(r.counts.keys(), dtype=np.int64, count=n))
            less.append(p.presence_penalty + p.frequency_penalty * np.fromiter(r.counts.values(), dtype=np.float64, count=n))
    if row_of:
        at, token, minus = _flat(logits, row_of, ids, less)
        logits[at, token] -= minus


def _forbid_early_end(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    for i, r in enumerate(rows):
        if r.position < r.params.min_tokens and r.end_ids:
            logits[i, list(r.end_ids)] = float("-inf")


def _choose(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    random = [i for i, r in enumerate(rows) if r.params.temperature > 0]
    if not random:
        return logits.argmax(dim=1).tolist()
    tokens = logits.argmax(dim=1).tolist() if len(random) < len(rows) else [0] * len(rows)
    drawn = _draw(logits if len(random) == len(rows) else logits[random], [rows[i] for i in random])
    for i, token in zip(random, drawn, strict=True):
        tokens[i] = token
    return tokens


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Inverse CDF over the tokens in the order of their ids, in float64."""

    def column(values: Sequence[float] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float64)).to(logits.device)[:, None]

    scaled = logits.double() / column([r.params.temperature for r in rows])
    scaled -= scaled.amax(dim=1, keepdim=True)
    floor = thresholds(scaled, [r.params for r in rows])
    mass = scaled.exp()
    if floor is not None:
        mass.masked_fill_(scaled < floor, 0.0)
    cdf = mass.cumsum(dim=1)
    total = cdf[:, -1:]
    u = uniforms([r.seed for r in rows], [r.sequence for r in rows], [r.position for r in rows])
    # Strictly below the total, so that rounding cannot lead past the last token with mass.
    target = torch.minimum(column(u) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[:, 0].tolist()


def thresholds(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor | None:
    """The lowest value that top-k, then top-p of what remains, then min-p let in; (R, 1), None when no row filters.

    Args:
        scaled: (R, vocab) float64, logits after temperature minus their row's maximum.
    """
    vocab = scaled.shape[1]
    floor: torch.Tensor | None = None
    min_p = [np.log(p.min_p) if p.min_p > 0 else -np.inf for p in params]
    if any(m > -np.inf for m in min_p):
        floor = torch.as_tensor(np.asarray(min_p)).to(scaled.device)[:, None]
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    cut = [i for i, p in enumerate(params) if top_k[i] < vocab or p.top_p < 1.0]
    if not cut:
        return floor
    if floor is None:
        floor = torch.full((len(params), 1), -torch.inf, dtype=scaled.dtype, device=scaled.device)
    num = min(vocab, max([_CANDIDATES, *(top_k[i] for i in cut if top_k[i] < vocab)]))
    best = torch.topk(scaled[cut], num, dim=1).values
    for j, i in enumerate(cut):
        value = _nucleus(scaled[i], best[j], top_k[i], params[i].top_p)
        if value is None:  # flatter than the candidates reach
            value = _nucleus(scaled[i], torch.sort(scaled[i], descending=True).values, top_k[i], params[i].top_p)
        assert value is not None
        floor[i] = torch.maximum(floor[i], value)
    return floor


def _nucleus(row: torch.Tensor, best: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor | None:
    """Lowest value within top-k and top-p; None when `best` (descending) ends before top-p is reached."""
    kth = best[top_k - 1] if top_k < len(row) else None
    if top_p >= 1.0:
        return kth
    mass = row.exp()
    total = mass.sum() if kth is None else mass[row >= kth].sum()
    cumulated = best.exp().cumsum(0)
    reached = int((cumulated < top_p * total).sum())
    if reached < len(best):
        return best[reached] if kth is None else torch.maximum(best[reached], kth)
    return best[-1] if len(best) == len(row) else None


def _infos(logits: torch.Tensor, rows: Sequence[SampleRow], chosen: list[int]) -> list[TokenInfo]:
    wanted = [i for i, r in enumerate(rows) if r.params.logprobs]
    infos = [TokenInfo(t) for t in chosen]
    if not wanted:
        return infos
    logprobs = torch.log_softmax(logits[wanted], dim=1)
    num_top = max(rows[i].params.top_logprobs for i in wanted)
    best = torch.topk(logprobs, num_top, dim=1)
    values, ids = best.values.tolist(), best.indices.tolist()
    for j, i in enumerate(wanted):
        n = rows[i].params.top_logprobs
        top = tuple(zip(ids[j][:n], values[j][:n], strict=True))
        infos[i] = TokenInfo(chosen[i], float(logprobs[j, chosen[i]]), top)
    return infos
