"""Chooses the next token of every row, repeatably: what a row gets depends on its own logits, parameters, seed and position only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from plugmesh.types import SamplingParams, TokenInfo
from plugmesh_engine.constrained import without

_CANDIDATES = 1024  # sorted before a full sort is tried; nearly every top-p lies within
_MASK = 0xFFFFFFFFFFFFFFFF
SECOND = 0x5EC0D0D2A3B1C4F7
"""Makes the seed of `redraw` of a seed."""
_PYTHON_UNIFORMS = 16  # up to so many rows plain integers are faster than numpy's calls


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the sampler must know of one row.

    Attributes:
        seed, sequence, position: Name the random number; position counts generated tokens.
        prompt_ids: Gives the distinct tokens of the prompt, int64; called for the repetition penalty only.
        counts: Generated tokens and how often each occurred; read for the penalties only.
        end_ids: Tokens that end the sequence, forbidden before `min_tokens`.
        mask: (words,) uint32, a bit for every token that a grammar allows; None for all. What `min_tokens` would forbid stays where nothing else is allowed.
            Where `draws_freely`, a mask that comes after the draw does as well: see `redraw`.
    """

    params: SamplingParams
    seed: int
    sequence: int
    position: int
    prompt_ids: Callable[[], np.ndarray]
    counts: Mapping[int, int]
    end_ids: Sequence[int]
    mask: np.ndarray | None = None


Choose = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""The signature of `sample_rows`."""


def sample(
    logits: np.ndarray, rows: Sequence[SampleRow], choose: Choose | None = None, best: Sequence[int] | None = None
) -> list[TokenInfo | None]:
    """One token per row, in the order that `plugmesh.types.SamplingParams` documents.

    Tokens whose logits tie with the last one that top-k or top-p lets in are let in too, so that a result never depends on the order of a sort.
    Runs in `plugmesh_kernels` when that is compiled, else in numpy, with the same results but for the last bits of sums.

    Args:
        logits: (R, vocab) float32; changed in place.
        choose: In place of `sample_rows`; an executor may have it run on its own threads.
        best: `StepResult.best` of the rows, where it is known: below 0 for one without a finite maximum.

    Returns:
        None for a row without a finite maximum (NaN or infinity in the model's output).
    """
    if best is not None and (settled := _settled(rows, best)):
        rest = [i for i in range(len(rows)) if i not in settled]
        others = iter(sample(logits[rest], [rows[i] for i in rest], choose, [best[i] for i in rest]) if rest else ())
        return [TokenInfo(settled[i]) if i in settled else next(others) for i in range(len(rows))]
    masks = {i: m for i, r in enumerate(rows) if (m := r.mask) is not None and draws_freely(r.params, r.position)}
    if masks:
        rows = [replace(r, mask=None) if i in masks else r for i, r in enumerate(rows)]
    # Before an edit hides it.
    spoiled = [i for i, r in enumerate(rows) if _edits(r) and (not np.isfinite(logits[i].max()) if best is None else best[i] < 0)]
    confidences = _confidences(logits, rows)  # of the model's own distribution: a bias or a mask would make any token look certain
    for i, r in enumerate(rows):
        if _edits(r):
            _edit(logits[i], r)
    _mask(logits, rows)
    if spoiled:
        logits[spoiled] = np.nan
    chosen = _choose(logits, rows, choose)
    for i, mask in masks.items():
        if (token := int(chosen[i])) >= 0 and not allows(mask, token):
            r = rows[i]
            chosen[i] = redraw(logits[i], mask, r.params, r.seed, r.sequence, r.position)
    infos = _infos(logits, rows, chosen)
    for i, confidence in confidences.items():
        info = infos[i]
        if info is not None:
            infos[i] = TokenInfo(info.token_id, info.logprob, info.top, confidence)
    return infos


def _settled(rows: Sequence[SampleRow], best: Sequence[int]) -> dict[int, int]:
    """Row to token of greedy rows whose best token their grammar allows: nothing that is masked out can have been better. Mostly the model means to obey."""
    found = {}
    for i, (r, token) in enumerate(zip(rows, best, strict=True)):
        if r.mask is not None and token >= 0 and r.params.temperature <= 0 and draws_freely(r.params, r.position) and allows(r.mask, token):
            found[i] = token
    return found


def allows(mask: np.ndarray, token: int) -> bool:
    """Whether the token's bit is set in (words,) uint32."""
    return bool(int(mask[token >> 5]) >> (token & 31) & 1)


def draws_freely(params: SamplingParams, position: int) -> bool:
    """Whether a row's token is drawn as if there were no grammar, and drawn anew by `redraw` from what the grammar allows where that refuses the first.

    Both together have the distribution of one draw from what is allowed: with A for that, and p for the model's, a token of A comes with
    p(x) + (1 - p(A)) p(x) / p(A) = p(x) / p(A). Most first draws are allowed, and for those no mask is needed, only the matcher's word for one token. Not where a
    filter, an edit or what is told of the token looks at more than the one that is drawn.
    """
    p = params
    if p.logprobs or p.confidence_top_k or p.logit_bias or position < p.min_tokens or needs_counts(p):
        return False
    return p.temperature <= 0 or (p.top_k <= 0 and p.top_p >= 1.0 and p.min_p <= 0.0)


def redraw(logits: np.ndarray, mask: np.ndarray, params: SamplingParams, seed: int, sequence: int, position: int) -> int:
    """The second draw of `draws_freely`, with a random number of its own; -1 when no allowed token has a finite logit.

    Args:
        logits: (vocab,) float32, not changed.
        mask: (words,) uint32.
    """
    kernels = _kernels()
    draw = draw_allowed if kernels is None else kernels.draw_allowed
    return int(draw(logits, mask, params.temperature, _uniform(seed ^ SECOND, sequence, position) if params.temperature > 0 else 0.0))


def draw_allowed(logits: np.ndarray, mask: np.ndarray, temperature: float, u: float) -> int:
    """`plugmesh_kernels.native().draw_allowed` in numpy: what `sample_rows` draws of the tokens of (vocab,) whose bit is set; -1 when none has a finite logit."""
    ids = np.flatnonzero(_bits(mask, len(logits)))
    if not len(ids):
        return -1
    one, none = np.ones(1, np.float32), np.zeros(1, np.float32)
    at = int(sample_rows(logits[None, ids], temperature * one, np.zeros(1, np.int32), one, none, np.array([u]))[0])
    return int(ids[at]) if at >= 0 else -1


def _bits(mask: np.ndarray, n: int) -> np.ndarray:
    """(n,) uint8 of packed (words,) uint32."""
    return np.unpackbits(mask.astype("<u4", copy=False).view(np.uint8), bitorder="little")[:n]


def _confidences(logits: np.ndarray, rows: Sequence[SampleRow]) -> dict[int, float]:
    """Row to -(1/k) times the sum of its k best log-probabilities (DeepConf, arXiv:2508.15260), where k is asked for. A row on its own gives the same."""
    wanted = [i for i, r in enumerate(rows) if r.params.confidence_top_k > 0]
    if not wanted:
        return {}
    kernels = _kernels()
    tell = kernels.logprobs_rows if kernels is not None else logprobs_rows
    num_top = [min(rows[i].params.confidence_top_k, logits.shape[1]) for i in wanted]
    tokens = np.zeros(len(wanted), np.int32)
    _, _, values = tell(logits if len(wanted) == len(rows) else logits[wanted], tokens, max(num_top))
    return {i: -float(values[at, :k].mean(dtype=np.float64)) for at, (i, k) in enumerate(zip(wanted, num_top, strict=True))}


def needs_counts(params: SamplingParams) -> bool:
    """Whether a request uses a penalty."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def needs_logits(params: SamplingParams) -> bool:
    """Whether more than the best token of a row is wanted, `min_tokens` aside."""
    return params.temperature > 0 or params.logprobs or params.confidence_top_k > 0 or bool(params.logit_bias) or needs_counts(params)


def uniforms(seeds: Sequence[int], sequences: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) per (seed, sequence, position), without state.

    The three are absorbed one after another with the finaliser of SplitMix64 (Steele et al., OOPSLA 2014); the upper 53 bits give the number.
    """
    if len(seeds) <= _PYTHON_UNIFORMS:
        return np.array([_uniform(*key) for key in zip(seeds, sequences, positions, strict=True)])
    with np.errstate(over="ignore"):
        h = np.zeros(len(seeds), dtype=np.uint64)
        for part in (seeds, sequences, positions):
            words = np.array([int(v) & _MASK for v in part], dtype=np.uint64)
            h = (h ^ words) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return (h >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _uniform(seed: int, sequence: int, position: int) -> float:
    h = 0
    for word in (seed, sequence, position):
        h = ((h ^ (word & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
        h ^= h >> 31
    return (h >> 11) * 2.0**-53


def _mask(logits: np.ndarray, rows: Sequence[SampleRow]) -> None:
    """Forbids what grammars do not allow; rows without one are not touched."""
    wanted = [i for i, r in enumerate(rows) if r.mask is not None]
    if not wanted:
        return
    masks = [without(m, r.end_ids) if r.position < r.params.min_tokens else m for r in rows if (m := r.mask) is not None]
    kernels = _kernels()
    forbid = mask_rows if kernels is None else kernels.mask_rows
    forbid(logits, np.stack(masks) if len(masks) > 1 else masks[0][None], np.array(wanted, np.int32))


def mask_rows(logits: np.ndarray, masks: np.ndarray, rows: np.ndarray) -> None:
    """`plugmesh_kernels.native().mask_rows` in numpy: row `rows[i]` of (R, vocab) becomes -inf, in place, where `masks[i]` (words,) uint32 has no bit."""
    for row, mask in zip(rows, masks, strict=True):
        logits[row, _bits(mask, logits.shape[1]) == 0] = -np.inf


# -- what changes the logits ---------------------------------------------------------------------------------------------------


def _edits(r: SampleRow) -> bool:
    p = r.params
    return bool(p.logit_bias) or needs_counts(p) or r.position < p.min_tokens or r.mask is not None


def _edit(x: np.ndarray, r: SampleRow) -> None:
    """Bias, then repetition over prompt and output (divides positive logits, multiplies negative ones; CTRL, arXiv:1909.05858), then
    presence and frequency over the output, then no early end; x (vocab,) in place."""
    p = r.params
    if p.logit_bias:
        n = len(p.logit_bias)
        x[np.fromiter(p.logit_bias.keys(), np.int64, n)] += np.fromiter(p.logit_bias.values(), np.float32, n)
    if p.repetition_penalty != 1.0:
        seen = np.union1d(r.prompt_ids(), np.fromiter(r.counts.keys(), np.int64, len(r.counts)))
        old, factor = x[seen], np.float32(p.repetition_penalty)
        x[seen] = np.where(old > 0, old / factor, old * factor)
    if r.counts and (p.presence_penalty or p.frequency_penalty):
        n = len(r.counts)
        less = p.presence_penalty + p.frequency_penalty * np.fromiter(r.counts.values(), np.float64, n)
        x[np.fromiter(r.counts.keys(), np.int64, n)] -= less.astype(np.float32)
    if r.position < p.min_tokens and r.end_ids and r.mask is None:
        x[list(r.end_ids)] = -np.inf


# -- the choice ----------------------------------------------------------------------------------------------------------------


def _kernels() -> Any:
    """The compiled module, or None."""
    try:
        import plugmesh_kernels
    except ImportError:
        return None
    return plugmesh_kernels.native() if plugmesh_kernels.available() else None


def _choose(logits: np.ndarray, rows: Sequence[SampleRow], choose: Choose | None) -> np.ndarray:
    """(R,) int32, -1 for a row without a finite maximum."""
    ps = [r.params for r in rows]
    random = [i for i, p in enumerate(ps) if p.temperature > 0]
    u = np.zeros(len(rows))
    if random:
        u[random] = uniforms([rows[i].seed for i in random], [rows[i].sequence for i in random], [rows[i].position for i in random])
    temperature = np.array([p.temperature for p in ps], np.float32)
    top_k = np.array([max(0, p.top_k) for p in ps], np.int32)
    top_p, min_p = np.array([p.top_p for p in ps], np.float32), np.array([p.min_p for p in ps], np.float32)
    if choose is None:
        kernels = _kernels()
        choose = sample_rows if kernels is None else kernels.sample_rows
    return choose(logits, temperature, top_k, top_p, min_p, u)


def sample_rows(logits: np.ndarray, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """`plugmesh_kernels.native().sample_rows` in numpy: inverse CDF over the tokens in the order of their ids, in float64; argmax at temperature 0.

    Args:
        logits: (R, vocab) float32, not changed; the others (R,).
        top_k: 0 for off.

    Returns:
        (R,) int32, -1 for a row without a finite maximum.
    """
    chosen = np.full(len(logits), -1, np.int32)
    for i, x in enumerate(logits):
        best = x.max()
        if not np.isfinite(best):
            continue
        if temperature[i] <= 0:
            chosen[i] = x.argmax()
            continue
        scaled = x.astype(np.float64) / temperature[i]
        scaled -= scaled.max()
        mass = np.exp(scaled)
        floor = _floor(scaled, mass, int(top_k[i]), float(top_p[i]), float(min_p[i]))
        if floor > -np.inf:
            mass[scaled < floor] = 0.0
        cdf = mass.cumsum()
        # Strictly below the total, so that rounding cannot lead past the last token with mass.
        chosen[i] = np.searchsorted(cdf, min(u[i] * cdf[-1], np.nextafter(cdf[-1], 0.0)), side="right")
    return chosen


def _floor(scaled: np.ndarray, mass: np.ndarray, top_k: int, top_p: float, min_p: float) -> float:
    """The lowest of the scaled logits that top-k, then top-p of what remains, then min-p let in; mass = exp(scaled)."""
    vocab = len(scaled)
    floor = float(np.log(min_p)) if min_p > 0 else -np.inf
    if not 0 < top_k < vocab:
        top_k = vocab
    if top_k < vocab or top_p < 1.0:
        num = min(vocab, max(_CANDIDATES, top_k if top_k < vocab else 0))
        value = _nucleus(scaled, mass, -np.sort(-np.partition(scaled, vocab - num)[vocab - num :]), top_k, top_p)
        if value is None:  # flatter than the candidates reach
            value = _nucleus(scaled, mass, -np.sort(-scaled), top_k, top_p)
        assert value is not None
        floor = max(floor, value)
    return floor


def _nucleus(row: np.ndarray, mass: np.ndarray, best: np.ndarray, top_k: int, top_p: float) -> float | None:
    """Lowest value within top-k and top-p; None when `best` (descending) ends before top-p is reached."""
    kth = float(best[top_k - 1]) if top_k < len(row) else None
    if top_p >= 1.0:
        return kth
    total = mass.sum() if kth is None else mass[row >= kth].sum()
    reached = int((np.exp(best).cumsum() < top_p * total).sum())
    if reached < len(best):
        return float(best[reached]) if kth is None else max(float(best[reached]), kth)
    return float(best[-1]) if len(best) == len(row) else None


# -- what is told of it --------------------------------------------------------------------------------------------------------


def _infos(logits: np.ndarray, rows: Sequence[SampleRow], chosen: np.ndarray) -> list[TokenInfo | None]:
    infos = [TokenInfo(t) if t >= 0 else None for t in chosen.tolist()]
    wanted = [i for i, r in enumerate(rows) if r.params.logprobs and infos[i] is not None]
    if not wanted:
        return infos
    kernels = _kernels()
    tell = kernels.logprobs_rows if kernels is not None else logprobs_rows
    num_top = max(rows[i].params.top_logprobs for i in wanted)
    tokens = np.ascontiguousarray(chosen[wanted])
    logprob, ids, values = tell(logits if len(wanted) == len(rows) else logits[wanted], tokens, num_top)
    for i, token, lp, row_ids, row_values in zip(wanted, tokens.tolist(), logprob.tolist(), ids.tolist(), values.tolist(), strict=True):
        n = rows[i].params.top_logprobs
        top = zip(row_ids[:n], row_values[:n], strict=True)
        infos[i] = TokenInfo(token, lp, tuple(top) if rows[i].mask is None else tuple((t, v) for t, v in top if v > -np.inf))
    return infos


def describe(logits: np.ndarray, tokens: Sequence[int], num_top: int) -> list[TokenInfo]:
    """Given tokens with their log-probabilities under (R, vocab) logits, and the `num_top` best of each row; a row on its own gives the same."""
    kernels = _kernels()
    tell = kernels.logprobs_rows if kernels is not None else logprobs_rows
    logprob, ids, values = tell(np.ascontiguousarray(logits), np.asarray(tokens, np.int32), num_top)
    return [TokenInfo(t, lp, tuple(zip(i, v, strict=True))) for t, lp, i, v in zip(tokens, logprob.tolist(), ids.tolist(), values.tolist(), strict=True)]


def logprobs_rows(logits: np.ndarray, tokens: np.ndarray, num_top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`plugmesh_kernels.native().logprobs_rows` in numpy: log-softmax of (R, vocab) at `tokens` (R,), and its `num_top` best, ties by lower id.

    Returns:
        (R,) float32, (R, num_top) int32, (R, num_top) float32.
    """
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :num_top]
    at = np.arange(len(x))
    return x[at, tokens].astype(np.float32), ids.astype(np.int32), np.take_along_axis(x, ids, axis=1).astype(np.float32)
